"""Servers and other processes that tests start on this machine: they end with their test, however it ends."""

import contextlib
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process; at the end it and its descendants are killed. options: of Popen."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kills a process and its descendants, also those in sessions of their own."""
    if process.poll() is None:
        kill_tree(process.pid)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def kill_tree(pid: int) -> None:
    """Kills the process `pid` and its descendants. Nothing happens if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for descendant in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(port: int) -> bool:
    """Whether an MLflow server answers at this port."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response,
    ):
        return response.status == 200
    return False


def command_line(process: psutil.Process) -> list[str]:
    """Its words; none where it ended meanwhile, as helpers of a server do after a moment."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def environment(process: psutil.Process) -> dict[str, str]:
    """Its environment; empty where it ended meanwhile."""
    try:
        return process.environ()
    except psutil.NoSuchProcess:
        return {}
