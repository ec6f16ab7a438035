"""`dmat ui` answers only on 127.0.0.1 and ends every process that it started."""

import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest

from cli import runs
from dmat.errors import DmatError
from tests import forked, servers


def test_it_listens_on_this_machine_alone(capsys):
    from cli.main import app

    with pytest.raises(DmatError, match=r"--host is .0\.0\.0\.0.; expected 127\.0\.0\.1, because whoever reaches"):
        app(["ui", "--host", "0.0.0.0"], standalone_mode=False)


def test_a_signal_to_its_process_alone_ends_the_servers_too(root, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text())
    port = servers.free_port()
    command = [sys.executable, "-m", "cli.main", "ui", "--port", str(port)]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(root), "PATH": ""}, "text": True}
    with servers.running(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options) as started:
        lines = iter(started.stdout.readline, "")  # the server prints lines of its own before
        assert any(line.startswith(f"MLflow UI: http://127.0.0.1:{port}/#/experiments/") for line in lines)
        assert servers.healthy(port), "the address is printed when it answers"
        children = psutil.Process(started.pid).children(recursive=True)
        commands = [line for line in map(servers.command_line, children) if line]
        assert commands
        # the address may hold a password
        assert not any("mlflow.db" in argument for line in commands for argument in line)
        assert not any("job" in argument or "huey" in argument for line in commands for argument in line)
        started.send_signal(signal.SIGTERM)
        started.wait(forked.LIMIT)
        _, alive = psutil.wait_procs(children, timeout=forked.LIMIT)
        assert alive == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_nothing_is_printed_for_a_server_that_never_answers(capsys):
    with servers.running([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        announcing = threading.Thread(target=runs._announce, args=(started, ("127.0.0.1", servers.free_port()), "here"))
        announcing.start()
        started.communicate(b"\n")
        announcing.join()
    assert capsys.readouterr().out == ""


def test_a_killed_process_takes_its_descendants_with_it():
    """Also one in a session of its own, as the server of `dmat ui` is."""
    script = "import subprocess as s; p = s.Popen(['sleep', '600'], start_new_session=True); print(p.pid, flush=True)"
    command = [sys.executable, "-c", f"{script}; p.wait()"]
    with servers.running(command, stdout=subprocess.PIPE, text=True) as started:
        descendant = psutil.Process(int(started.stdout.readline()))
    assert started.returncode == -signal.SIGKILL
    psutil.wait_procs([descendant], timeout=forked.LIMIT)
    assert not descendant.is_running() or descendant.status() == psutil.STATUS_ZOMBIE
