"""Which process a number means, and whether it still runs: the kernel gives the numbers of ended processes again.

A process is known by the boot of its machine and the clock ticks from that boot to its start. The time of day decides
nothing: NTP and resumed virtual machines step it.
"""

import contextlib
import fcntl
import os
import select
import struct
import time
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STATE, _TICKS = 0, 19  # fields 3 and 22 of /proc/PID/stat (man 5 proc_pid_stat), counted after the command's name
_ENDED = (b"Z", b"X", b"x")  # killed, and its parent did not ask yet
# linux/pidfd.h, Linux 6.15: struct pidfd_info is a mask, a cgroup, eleven numbers of the process, its exit status
_INFO = struct.Struct("=QQ11Ii")
_GET_INFO, _WITH_EXIT = 0xC040FF0B, 1 << 3
_REAPED_WITHIN = 10.0  # seconds from a process's end until its parent asks for the exit status
_LOOK_EVERY = 1.0  # seconds, where the system does not tell of a process's end


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


def wait(pid: int, known: str) -> int | None:
    """Waits for the end of a process that is no child of this one. Returns its status as `os.wait` has it, or None
    where the system does not tell it (before Linux 6.15)."""
    status = None
    with contextlib.suppress(OSError, AttributeError):  # gone by now, or a system without such handles
        handle = os.pidfd_open(pid)
        try:
            if lives(pid, known):  # its number was not given away before the handle was there
                status = _status_at_end(handle)
        finally:
            os.close(handle)
    while lives(pid, known):
        time.sleep(_LOOK_EVERY)
    return status


def _status_at_end(handle: int) -> int | None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll()
    poll.modify(handle, 0)  # from now on only that its parent asked, which makes the status public
    poll.poll(1000 * _REAPED_WITHIN)
    info = _INFO.unpack(fcntl.ioctl(handle, _GET_INFO, _INFO.pack(_WITH_EXIT, *[0] * 13)))
    return info[-1] if info[0] & _WITH_EXIT else None


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
