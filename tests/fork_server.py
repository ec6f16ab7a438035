"""`dmat` for tests that run it many times, such as through DVC, without importing torch and MLflow each time.

A server imports what other projects provide, once, and forks for each command. dmat itself is imported after the fork
from the project of the command, so that a project runs its own code. On PATH stands a small program that passes its
arguments, environment, folder and streams on, and signals too; if it is killed, its command is killed. To dmat, the
parents of a command are those of that program: tracking looks for `dvc` among them.
"""

import atexit
import functools
import importlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

MODULES = (
    *("torch", "torch._dynamo", "mlflow", "mlflow.tracking", "sklearn.datasets", "matplotlib.pyplot", "plotly.express"),
    *("pyarrow.parquet", "pyautoattack", "optuna", "pydantic", "ruamel.yaml", "safetensors.torch", "pandas"),
)

# It imports three modules only, as it starts for every command.
CLIENT = """
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = dict(folder=os.getcwd(), arguments=sys.argv[1:], environment=dict(os.environ), pid=os.getpid())
socket.send_fds(connection, [b"%"], [0, 1, 2])
connection.sendall(json.dumps(request).encode() + b"\\n")
answers = connection.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda received, frame: os.kill(process, received))
code = answers.read()  # to the end of the process
os._exit(int(code) if code else 137)
"""


@functools.cache
def folder() -> Path:
    """A folder with the program `dmat`, to put first on PATH. The server ends with this process."""
    home = Path(tempfile.mkdtemp(prefix="dmat-server-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    address = str(home / "socket")
    script = home / "client.py"
    script.write_text(CLIENT.format(address=address))
    program = home / "bin" / "dmat"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", "-S", str(script)])} "$@"\n')
    program.chmod(0o755)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}  # a project is compiled once, not each time
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **environment}, cwd="/",
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    _kept.append(server)  # its standard input closes when this process ends
    return program.parent


_kept: list[subprocess.Popen] = []


def _serve(address: str) -> None:
    for name in MODULES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not {"dmat", "cli"} & sys.modules.keys(), "each project has its own"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the commands
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:  # the tests have ended
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _run(connection)
            connection.close()


def _run(connection: socket.socket) -> None:
    """Runs a command in this process, which was forked for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    parents = psutil.Process(request["pid"]).parents
    psutil.Process.parents = lambda _: parents()  # type: ignore[method-assign]
    sys.path[:0] = filter(None, request["environment"].get("PYTHONPATH", "").split(":"))
    sys.argv = ["dmat", *request["arguments"]]
    connection.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=_die_with_the_client, args=(connection,), daemon=True).start()
    code: object = 1
    try:
        from cli.main import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
        raise
    finally:
        connection.sendall(str(code).encode())  # the client waits for the end of this process too


def _die_with_the_client(connection: socket.socket) -> None:
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
