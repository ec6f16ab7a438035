"""Checksums that a machine remembers: what is read again, and that nothing wrong is ever believed."""

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
AGES_AGO = (10**18, 10**18)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksum_cache, "_own", {})
    monkeypatch.setattr(checksum_cache, "_SETTLED", -(10**12))  # a file counts as settled at once
    return checksum_cache.database_path()


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(SIZE))
    return path


def _another_process(monkeypatch):
    monkeypatch.setattr(checksum_cache, "_own", {})


def _rows(memory) -> list[tuple]:
    with sqlite3.connect(memory) as found:
        return found.execute("select size, sha256 from files").fetchall()


def _poison(memory):
    """What is remembered is taken from there, if the test sees this again."""
    with sqlite3.connect(memory) as found:
        found.execute("update files set sha256 = 'remembered'")


def test_a_large_file_is_read_once_on_a_machine(memory, large, monkeypatch):
    digest = files.sha256(large)
    assert _rows(memory) == [(SIZE, digest)]
    _poison(memory)
    assert files.sha256(large) == digest, "of this process"
    _another_process(monkeypatch)
    assert files.sha256(large) == "remembered"
    (copy := large.with_name("copy")).write_bytes(large.read_bytes())
    assert files.sha256(copy) == digest, "another inode"
    with checksum_cache.reading_anew():
        assert files.sha256(large) == digest, "who asks for the bytes gets them"
    assert files.checksums(large.parent)["large"] == digest, "and what was found then counts from now on"


@pytest.mark.parametrize("change", ["one byte", "one byte and both times set back", "length", "replaced"])
def test_a_changed_file_is_read_again(memory, large, monkeypatch, change):
    os.utime(large, ns=AGES_AGO)
    before = files.sha256(large)
    _poison(memory)
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
        os.utime(large, ns=AGES_AGO)
    assert files.sha256(large) not in (before, "remembered")


def test_small_files_and_files_that_just_changed_are_not_remembered(memory, large, monkeypatch):
    small = large.with_name("small")
    small.write_bytes(b"x")
    files.sha256(small)
    monkeypatch.setattr(checksum_cache, "_SETTLED", 10**12)
    files.sha256(large)
    assert _rows(memory) == []


@pytest.mark.parametrize("damage", ["no folder can be made", "not a database", "another table", "locked"])
def test_without_a_memory_everything_is_read(memory, large, monkeypatch, damage):
    digest = files.sha256(large)
    _another_process(monkeypatch)
    holder = None
    if damage == "no folder can be made":
        monkeypatch.setenv("XDG_CACHE_HOME", str(large))
    elif damage == "not a database":
        memory.write_bytes(b"nothing that SQLite knows" * 100)
    elif damage == "another table":
        memory.unlink()
        with sqlite3.connect(memory) as other:
            other.execute("create table files (name text)")
    else:
        monkeypatch.setattr(checksum_cache, "_WAIT", 0.01)
        holder = sqlite3.connect(memory)
        holder.execute("begin exclusive")
    assert files.sha256(large) == digest
    if holder:
        holder.close()


def test_a_row_for_each_file_however_often_it_changes(memory, large, monkeypatch):
    for k in range(3):
        with open(large, "r+b") as file:
            file.write(bytes([k]) * 10)
        _another_process(monkeypatch)
        files.sha256(large)
    assert len(_rows(memory)) == 1


def test_inodes_beyond_what_sqlite_counts(memory, large):
    state = types.SimpleNamespace(st_dev=2**64 - 2, st_ino=2**64 - 1, st_size=SIZE, st_mtime_ns=1, st_ctime_ns=1)
    checksum_cache.remember(state, "digest")
    checksum_cache._own.clear()
    assert checksum_cache.recall(state) == "digest"


def test_processes_that_write_at_once_lose_nothing(memory, tmp_path):
    paths = [tmp_path / f"file-{k}" for k in range(24)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * SIZE)
    script = (
        "import sys; from pathlib import Path; from dmat import checksum_cache, files\n"
        "checksum_cache._SETTLED = -10**12\n"
        "for name in sys.argv[1:]: files.sha256(Path(name))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(memory.parent.parent)}
    running = [
        subprocess.Popen([sys.executable, "-c", script, *map(str, paths[k::4])], env=environment) for k in range(4)
    ]
    assert [one.wait(300) for one in running] == [0] * 4
    assert len(_rows(memory)) == len(paths)


def test_a_missing_file_is_a_sentence(memory, tmp_path):
    with pytest.raises(DmatError, match="does not exist"):
        files.sha256(tmp_path / "nothing")
