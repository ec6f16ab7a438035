"""Checksums of files that this process has read, and of large ones that this machine has: a set of millions of images
is not read at every start.

A file is known by device, inode, size and both its times: whatever writes to it changes one of them. What cannot be
remembered is computed again; nothing depends on this memory.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

LARGE = 1 << 20  # bytes; smaller files are read faster than looked up
_SETTLED = 2_000_000_000  # ns; file systems mark times coarsely, so a file that just changed may change again unseen
_WAIT = 5.0  # s for another process that writes at this moment
_TABLE = """create table if not exists files (
    device integer, inode integer, size integer, modified integer, changed integer, sha256 text,
    primary key (device, inode)
)"""
_own: dict[tuple[int, ...], str] = {}  # of this process: device, inode, size, times -> SHA-256
_asked_to_read = 0


@contextlib.contextmanager
def reading_anew() -> Iterator[None]:
    """Inside, nothing is taken from memory: for who asks whether the bytes on the disk are what they were."""
    global _asked_to_read
    _asked_to_read += 1
    try:
        yield
    finally:
        _asked_to_read -= 1


def recall(state: os.stat_result) -> str | None:
    """SHA-256 of a file in this very state, if it was read before."""
    if _asked_to_read:
        return None
    key = _key(state)
    if key in _own or state.st_size < LARGE:
        return _own.get(key)
    with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(_open()) as memory:
        query = "select sha256 from files where (device, inode, size, modified, changed) = (?, ?, ?, ?, ?)"
        if found := memory.execute(query, key).fetchone():
            _own[key] = found[0]
    return _own.get(key)


def remember(state: os.stat_result, sha256: str) -> None:
    """Notes what a file holds. state: of the open file, before it was read to its end."""
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) <= _SETTLED:
        return
    _own[_key(state)] = sha256
    if state.st_size >= LARGE:
        with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(_open()) as memory, memory:
            memory.execute("replace into files values (?, ?, ?, ?, ?, ?)", (*_key(state), sha256))


def database_path() -> Path:
    """Of this user on this machine: inodes mean nothing elsewhere."""
    return Path(platformdirs.user_cache_dir("dmat")) / "checksums.db"


def _key(state: os.stat_result) -> tuple[int, ...]:
    """SQLite's numbers have a sign, and those of file systems need not."""
    numbers = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return tuple(number - (1 << 64) if number >= 1 << 63 else number for number in numbers)


def _open() -> sqlite3.Connection:
    path = database_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = sqlite3.connect(path, timeout=_WAIT)
    memory.execute(_TABLE)
    return memory
