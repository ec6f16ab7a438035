"""The checksum cache of a machine: which files are read again, and that no stale checksum is ever used."""

import os
import sqlite3
import subprocess
import sys
import time
import types

import pytest

from dmat import checksum_cache, files
from dmat.errors import DmatError

SIZE = checksum_cache.LARGE + 5
OLD_TIMES = (10**18, 10**18)


@pytest.fixture
def database(tmp_path, monkeypatch):
    """Database of a cache that this test alone uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksum_cache, "_process_cache", {})
    monkeypatch.setattr(checksum_cache, "_MIN_AGE_NS", -(10**12))  # every file is old enough
    return checksum_cache.database_path()


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SIZE))
    return path


def _another_process(monkeypatch):
    monkeypatch.setattr(checksum_cache, "_process_cache", {})


def _rows(database) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute("select size, sha256 from files").fetchall()


def _poison(database):
    """Writes a marker into every row: a test that sees it knows that the checksum came from the cache."""
    with sqlite3.connect(database) as connection:
        connection.execute("update files set sha256 = 'remembered'")


def test_a_large_file_is_read_once_per_machine(database, large, monkeypatch):
    digest = files.sha256(large)
    assert _rows(database) == [(SIZE, digest)]
    _poison(database)
    assert files.sha256(large) == digest, "cached by this process"
    _another_process(monkeypatch)
    assert files.sha256(large) == "remembered"
    (copy := large.with_name("copy")).write_bytes(large.read_bytes())
    assert files.sha256(copy) == digest, "another inode"
    with checksum_cache.bypassed():
        assert files.sha256(large) == digest, "bypassing the cache reads the file"
    assert files.checksums(large.parent)["large"] == digest, "and updates the cache"


@pytest.mark.parametrize("change", ["one byte", "one byte and both times set back", "length", "replaced"])
def test_a_changed_file_is_read_again(database, large, monkeypatch, change):
    os.utime(large, ns=OLD_TIMES)
    before = files.sha256(large)
    _poison(database)
    _another_process(monkeypatch)
    time.sleep(0.05)  # the times of a file system may be coarse
    content = bytearray(large.read_bytes())
    content[SIZE // 2] ^= 1
    if change == "length":
        content += b"."
    if change == "replaced":
        large.with_name("new").write_bytes(content)
        os.replace(large.with_name("new"), large)
    else:
        large.write_bytes(content)
    if "set back" in change:
        os.utime(large, ns=OLD_TIMES)
    assert files.sha256(large) not in (before, "remembered")


def test_small_and_recently_changed_files_are_not_cached(database, large, monkeypatch):
    small = large.with_name("small")
    small.write_bytes(b"x")
    files.sha256(small)
    monkeypatch.setattr(checksum_cache, "_MIN_AGE_NS", 10**12)
    files.sha256(large)
    assert _rows(database) == []


@pytest.mark.parametrize("damage", ["no folder can be made", "not a database", "another table", "locked"])
def test_without_a_cache_every_file_is_read(database, large, monkeypatch, damage):
    digest = files.sha256(large)
    _another_process(monkeypatch)
    holder = None
    if damage == "no folder can be made":
        monkeypatch.setenv("XDG_CACHE_HOME", str(large))
    elif damage == "not a database":
        database.write_bytes(b"nothing that SQLite knows" * 100)
    elif damage == "another table":
        database.unlink()
        with sqlite3.connect(database) as other:
            other.execute("create table files (name text)")
    else:
        monkeypatch.setattr(checksum_cache, "_LOCK_TIMEOUT", 0.01)
        holder = sqlite3.connect(database)
        holder.execute("begin exclusive")
    assert files.sha256(large) == digest
    if holder:
        holder.close()


def test_each_file_has_one_row_however_often_it_changes(database, large, monkeypatch):
    for k in range(3):
        with open(large, "r+b") as file:
            file.write(bytes([k]) * 10)
        _another_process(monkeypatch)
        files.sha256(large)
    assert len(_rows(database)) == 1


def test_inodes_beyond_the_integers_of_sqlite(database, large):
    state = types.SimpleNamespace(st_dev=2**64 - 2, st_ino=2**64 - 1, st_size=SIZE, st_mtime_ns=1, st_ctime_ns=1)
    checksum_cache.remember(state, "digest")
    checksum_cache._process_cache.clear()
    assert checksum_cache.recall(state) == "digest"


def test_concurrent_writers_lose_nothing(database, tmp_path):
    paths = [tmp_path / f"file-{k}" for k in range(24)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * SIZE)
    script = (
        "import sys; from pathlib import Path; from dmat import checksum_cache, files\n"
        "checksum_cache._MIN_AGE_NS = -10**12\n"
        "for name in sys.argv[1:]: files.sha256(Path(name))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(database.parent.parent)}
    running = [
        subprocess.Popen([sys.executable, "-c", script, *map(str, paths[k::4])], env=environment) for k in range(4)
    ]
    assert [process.wait(300) for process in running] == [0] * 4
    assert len(_rows(database)) == len(paths)


def test_a_missing_file_is_a_clear_error(database, tmp_path):
    with pytest.raises(DmatError, match="does not exist"):
        files.sha256(tmp_path / "nothing")
