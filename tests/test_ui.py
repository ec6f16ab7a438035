"""`dmat ui` answers only on 127.0.0.1 and ends every process that it started."""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from dmat.errors import DmatError
from tests import servers


def test_it_listens_on_this_machine_alone(capsys):
    from cli.main import app

    with pytest.raises(DmatError, match=r"--host is .0\.0\.0\.0.; expected 127\.0\.0\.1, because whoever reaches"):
        app(["ui", "--host", "0.0.0.0"], standalone_mode=False)


def test_a_signal_to_its_process_alone_ends_the_servers_too(root, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    port = servers.free_port()
    started = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "ui", "--port", str(port)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while not servers.healthy(port):
            assert started.poll() is None, started.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(started.pid).children(recursive=True)
        assert children
        commands = [line for line in map(servers.command_line, children) if line]
        assert commands
        # the address may hold a password
        assert not any("mlflow.db" in argument for line in commands for argument in line)
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
    finally:
        for process in [*psutil.Process(started.pid).children(recursive=True)] if started.poll() is None else []:
            process.kill()
        started.kill()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
