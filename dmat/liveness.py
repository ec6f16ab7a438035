"""Identifies processes and tells whether they still run. A pid alone does not: the kernel reuses pids.

The identity of a process is the boot of its machine and the clock ticks from that boot to its start. The time of day is
not used: NTP and resumed virtual machines step it.
"""

import contextlib
import fcntl
import os
import select
import struct
import time
from pathlib import Path

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STATE, _START_TICKS = 0, 19  # fields 3 and 22 of /proc/PID/stat (man 5 proc_pid_stat), counted after the command name
_ENDED_STATES = (b"Z", b"X", b"x")  # zombie or dead: the process ended and its parent has not reaped it yet
# linux/pidfd.h, Linux 6.15: struct pidfd_info is a mask, a cgroup, eleven numbers of the process, its exit status
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3
_REAP_TIMEOUT = 10.0  # seconds from the end of a process until its parent asks for the exit status
_POLL_SECONDS = 1.0  # where the system does not announce the end of a process


def boot_id() -> str:
    """Identifier of the current boot of this machine; "" where the system has none."""
    try:
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def start_time(pid: int) -> float | None:
    """Start time of a process: clock ticks since the boot on Linux, seconds since 1970 on other systems.

    None if the process has ended or does not exist.
    """
    return _start_ticks(pid) if psutil.LINUX else _start_seconds(pid)


def identity(pid: int) -> str:
    """Unique name of a process of this machine, also across reboots; "" if the process has ended or does not exist."""
    start = start_time(pid)
    return "" if start is None else f"{boot_id()}/{start:.2f}"


def is_running(pid: int, process_identity: str) -> bool:
    """Whether the process with this pid still is the one with this identity (see `identity`) and runs."""
    return process_identity != "" and identity(pid) == process_identity


def wait_for_end(pid: int, process_identity: str) -> int | None:
    """Waits for the end of a process that is not a child of this one.

    For a child it would first wait `_REAP_TIMEOUT` in vain, because only this process can reap it.
    Returns its status as `os.wait` gives it; None where the system does not tell it (before Linux 6.15).
    """
    status = None
    with contextlib.suppress(OSError, AttributeError):  # it has ended, or the system has no pidfd
        pidfd = os.pidfd_open(pid)
        try:
            if is_running(pid, process_identity):  # the pid was not reused before the pidfd was open
                status = _exit_status(pidfd)
        finally:
            os.close(pidfd)
    while is_running(pid, process_identity):
        time.sleep(_POLL_SECONDS)
    return status


def _exit_status(pidfd: int) -> int | None:
    """Waits for the end of the process, then until its parent has reaped it; None if the kernel gives no status."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
    poll.modify(pidfd, 0)  # now wait only for POLLHUP: the parent has reaped the process, and its status is public
    poll.poll(1000 * _REAP_TIMEOUT)
    info = _PIDFD_INFO.unpack(fcntl.ioctl(pidfd, _PIDFD_GET_INFO, _PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13)))
    return info[-1] if info[0] & _PIDFD_INFO_EXIT else None


def _start_ticks(pid: int) -> float | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(b")")[2].split()  # the command name before it may hold spaces and parentheses
    return None if fields[_STATE] in _ENDED_STATES else float(fields[_START_TICKS])


def _start_seconds(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
