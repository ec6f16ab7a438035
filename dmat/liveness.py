"""Which process a number means, and whether it still runs: the kernel gives the numbers of ended processes again.

A process is known by the boot of its machine and the clock ticks from that boot to its start. The time of day decides
nothing: NTP and resumed virtual machines step it.
"""

from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STATE, _TICKS = 0, 19  # fields 3 and 22 of /proc/PID/stat (man 5 proc_pid_stat), counted after the command's name
_ENDED = (b"Z", b"X", b"x")  # killed, and its parent did not ask yet


def boot_id() -> str:
    """Names the time since this machine was started; empty where the system has no such name."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def started(pid: int) -> float | None:
    """When a process started: clock ticks since the boot; seconds since 1970 where the system does not count them.
    None if it is gone or ended."""
    return _ticks(pid) if psutil.LINUX else _seconds(pid)


def identity(pid: int) -> str:
    """Names a process of this machine for ever; empty if it is gone."""
    since = started(pid)
    return "" if since is None else f"{boot_id()}/{since:.2f}"


def lives(pid: int, known: str) -> bool:
    """Whether the process that had this number and this identity still runs."""
    return known != "" and identity(pid) == known


def _ticks(pid: int) -> float | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(b")")[2].split()  # the name before it may hold spaces and parentheses
    return None if fields[_STATE] in _ENDED else float(fields[_TICKS])


def _seconds(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
