"""Caches checksums of files: of all files in this process, and of large files on this machine. So a set of millions of
images is not read at every start.

A file is identified by device, inode, size and both its times: whatever writes to the file changes one of them. A
checksum that cannot be cached is computed again; nothing depends on this cache.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

LARGE = 1 << 20  # bytes; reading smaller files is faster than a look-up
_MIN_AGE_NS = 2_000_000_000  # ns; file times are coarse: a file that just changed may change again without a new time
_LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes at the same time
_TABLE = """create table if not exists files (
    device integer, inode integer, size integer, modified integer, changed integer, sha256 text,
    primary key (device, inode)
)"""
_process_cache: dict[tuple[int, ...], str] = {}  # of this process: device, inode, size, times -> SHA-256
_bypass_depth = 0


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """Ignores the cache inside the block: for checks of whether the bytes on disk are still the same."""
    global _bypass_depth
    _bypass_depth += 1
    try:
        yield
    finally:
        _bypass_depth -= 1


def recall(state: os.stat_result) -> str | None:
    """SHA-256 of a file in exactly this state, or None if the cache does not have it."""
    if _bypass_depth:
        return None
    key = _key(state)
    if key in _process_cache or state.st_size < LARGE:
        return _process_cache.get(key)
    with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(_open()) as database:
        query = "select sha256 from files where (device, inode, size, modified, changed) = (?, ?, ?, ?, ?)"
        if row := database.execute(query, key).fetchone():
            _process_cache[key] = row[0]
    return _process_cache.get(key)


def remember(state: os.stat_result, sha256: str) -> None:
    """Adds the checksum of a file to the cache. state: of the open file, taken before the file was read."""
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) <= _MIN_AGE_NS:
        return
    _process_cache[_key(state)] = sha256
    if state.st_size >= LARGE:
        with contextlib.suppress(OSError, sqlite3.Error), contextlib.closing(_open()) as database, database:
            database.execute("replace into files values (?, ?, ?, ?, ?, ?)", (*_key(state), sha256))


def database_path() -> Path:
    """Path of the database, one per user and machine: inodes mean nothing on another machine."""
    return Path(platformdirs.user_cache_dir("dmat")) / "checksums.db"


def _key(state: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size and times as signed 64-bit integers: SQLite has no unsigned ones, file systems have."""
    numbers = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return tuple(number - (1 << 64) if number >= 1 << 63 else number for number in numbers)


def _open() -> sqlite3.Connection:
    path = database_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=_LOCK_TIMEOUT)
    database.execute(_TABLE)
    return database
