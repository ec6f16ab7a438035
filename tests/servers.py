"""Servers that tests start on this machine: a free port, a health check, and what their processes were started with."""

import contextlib
import socket
import urllib.request

import psutil


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(port: int) -> bool:
    """Whether an MLflow server answers at this port."""
    with (
        contextlib.suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response,
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
