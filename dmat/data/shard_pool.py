"""A pool of shards that sets of any size share.

A set consists of hard links to shards of the pool: growing a set computes only the new shards, and no byte is stored
twice. The name of a pool's folder depends on everything that determines the bytes of its shards. One process at a time
computes a shard; others wait for it. The files are read-only and replaced by rename, because DVC's cache holds the same
inodes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from dmat import files
from dmat.data.shards import CHECKSUM_KEYS, ArrayName, ShardRecord
from dmat.errors import DmatError

_LOCK_TIMEOUT = 0.2  # seconds between two attempts to lock a shard that another process computes


def expect_numbers(numbers: range, count: int, owner: str) -> None:
    """Raises DmatError unless these are numbers of shards of what has `count`. owner: its name, for the message."""
    if not 0 <= numbers.start < numbers.stop <= count:
        raise DmatError(
            f"--shards is {numbers.start}:{numbers.stop}; {owner} has the shards 0 to {count - 1}; "
            f"expected two numbers from 0 to {count}, the lower first"
        )


class ShardPool:
    """Gives out shards of one pool and computes the missing ones.

    identity: everything that determines the bytes of the shards; written to identity.json for people. arrays: names of
    the arrays of a shard, such as images and labels. fresh: compute shards again even if the pool has them.

    counts: number of shards computed ("made"), taken from the pool ("pooled") and taken from a copy elsewhere
    ("copied").
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], arrays: Sequence[ArrayName], fresh: bool = False):
        self.folder, self.arrays, self.fresh = folder, tuple(arrays), fresh
        self.counts = {"made": 0, "pooled": 0, "copied": 0}
        self._copies: dict[str, dict[ArrayName, tuple[Path, str]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "identity.json").exists():
            files.write_json(folder / "identity.json", dict(identity))  # for people

    @property
    def name(self) -> str:
        """Name of the pool's folder."""
        return self.folder.name

    def offer(self, shard: str, copies: Mapping[ArrayName, tuple[Path, str]]) -> None:
        """Registers copies of a shard's files, such as those in DVC's cache: array -> (path, SHA-256)."""
        self._copies[shard] = dict(copies)

    def obtain(
        self, shard: str, count: int, make: Callable[[], Mapping[ArrayName, np.ndarray]], pause: Callable[[], None]
    ) -> ShardRecord:
        """Returns the record of a shard of `count` rows.

        make: computes the arrays of the shard, each [N, ...] with N = `count`; called only if the pool and the copies
        lack the shard, or if `fresh`. pause: called before each attempt to lock the shard; may raise to stop waiting.
        """
        with self._lock(shard, pause):
            record = None if self.fresh else self._intact_record(shard, count)
            if record is not None:
                self.counts["pooled"] += 1
                return record
            if not self.fresh and (record := self._restore_from_copy(shard, count)) is not None:
                self.counts["copied"] += 1
                return record
            self.counts["made"] += 1
            return self._write(shard, count, make())

    def link(self, record: ShardRecord, targets: Mapping[ArrayName, Path]) -> None:
        """Makes the files of a set hard links to those of a shard; copies them across file systems."""
        for array, target in targets.items():
            source = self.folder / record[array]
            target.parent.mkdir(parents=True, exist_ok=True)
            files.link(source, target)

    @contextlib.contextmanager
    def _lock(self, shard: str, pause: Callable[[], None]) -> Iterator[None]:
        lock = filelock.FileLock(self.folder / f"{shard}.lock")  # released when its process ends
        while True:
            pause()
            try:
                lock.acquire(timeout=_LOCK_TIMEOUT)
                break
            except filelock.Timeout:
                continue
        try:
            yield
        finally:
            lock.release()

    def _intact_record(self, shard: str, count: int) -> ShardRecord | None:
        """The record of a shard whose files are intact; None if the shard must be computed."""
        path = self.folder / f"{shard}.json"
        if not path.exists():
            return None
        with contextlib.suppress(DmatError):
            record = files.read_record(path, ShardRecord)
            if record["count"] == count and all(self._is_intact(record, array, shard) for array in self.arrays):
                return record
        tqdm.write(f"note: {path} or its shard is damaged; the shard is computed again", file=sys.stderr)
        return None

    def _is_intact(self, record: ShardRecord, array: ArrayName, shard: str) -> bool:
        """Whether the file of an array is the one in the record."""
        path, checksum = self.folder / _file_name(array, shard), record.get(CHECKSUM_KEYS[array])
        return record.get(array) == path.name and path.is_file() and files.sha256(path) == checksum

    def _restore_from_copy(self, shard: str, count: int) -> ShardRecord | None:
        """Links the registered copies into the pool and returns their record; None if a copy is missing or damaged."""
        copies = self._copies.get(shard, {})
        if any(array not in copies for array in self.arrays):
            return None
        record: ShardRecord = {"count": count}
        for array in self.arrays:
            path, checksum = copies[array]
            if not path.is_file() or files.sha256(path) != checksum:
                return None
            name = _file_name(array, shard)
            files.link(path, self.folder / name)
            record[array], record[CHECKSUM_KEYS[array]] = name, checksum
        files.write_json(self.folder / f"{shard}.json", record)
        return record

    def _write(self, shard: str, count: int, arrays: Mapping[ArrayName, np.ndarray]) -> ShardRecord:
        """Writes the arrays, each [N, ...] with N = `count`, then the record: a shard without record is incomplete."""
        (self.folder / f"{shard}.json").unlink(missing_ok=True)
        record: ShardRecord = {"count": count}
        for array in self.arrays:
            path = self.folder / _file_name(array, shard)
            with files.writing(path) as file:
                np.save(file, np.ascontiguousarray(arrays[array]), allow_pickle=False)
            path.chmod(0o444)
            record[array], record[CHECKSUM_KEYS[array]] = path.name, files.sha256(path)
        files.write_json(self.folder / f"{shard}.json", record)
        return record


def _file_name(array: str, shard: str) -> str:
    return f"{array}-{shard}.npy"
