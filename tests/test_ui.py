"""`dmat ui`: answers on 127.0.0.1 and takes everything with it that it started."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from dmat.errors import DmatError


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_it_listens_on_this_machine_alone(capsys):
    from cli.main import app

    with pytest.raises(DmatError, match=r"--host is .0\.0\.0\.0.; expected 127\.0\.0\.1, because whoever reaches"):
        app(["ui", "--host", "0.0.0.0"], standalone_mode=False)


def test_a_signal_to_its_process_alone_ends_the_servers_too(root, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    port = _free_port()
    started = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "ui", "--port", str(port)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert started.poll() is None, started.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        servers = psutil.Process(started.pid).children(recursive=True)
        assert servers
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        _, left = psutil.wait_procs(servers, timeout=30)
        assert left == []
    finally:
        for process in [*psutil.Process(started.pid).children(recursive=True)] if started.poll() is None else []:
            process.kill()
        started.kill()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
