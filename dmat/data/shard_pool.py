"""A pool of shards that sets of any size share: a set is hard links to some of them, so growing one makes only what is
new and no byte lies on disk twice.

The folder of a pool is named by everything that decides a byte of its shards. A shard is made by one process at a time;
others wait for it. Its files are read-only and replaced by rename, since DVC's cache holds the same inodes.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from dmat import files
from dmat.errors import DmatError

_WAIT = 0.2  # s between two looks at a shard that another process makes


class ShardPool:
    """arrays: names of the arrays of a shard, such as images and labels. fresh: make what is there anew.

    counts: how many shards were made, taken from the pool, and taken from a copy elsewhere.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], arrays: Sequence[str], fresh: bool = False):
        self.folder, self.arrays, self.fresh = folder, tuple(arrays), fresh
        self.counts = {"made": 0, "pooled": 0, "copied": 0}
        self._copies: dict[str, dict[str, tuple[Path, str]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "identity.json").exists():
            files.write_json(folder / "identity.json", dict(identity))  # for people

    @property
    def name(self) -> str:
        return self.folder.name

    def offer(self, shard: str, copies: Mapping[str, tuple[Path, str]]) -> None:
        """Says where copies of a shard's files lie, such as in DVC's cache: array -> path and SHA-256."""
        self._copies[shard] = dict(copies)

    def obtain(
        self, shard: str, count: int, make: Callable[[], Mapping[str, np.ndarray]], pause: Callable[[], None]
    ) -> dict[str, Any]:
        """The record of a shard of `count` rows: {count, array: file, array_sha256: SHA-256, ...}.

        pause: called between two looks while another process makes the shard; may raise to stop waiting.
        """
        with self._lock(shard, pause):
            record = None if self.fresh else self._intact(shard, count)
            if record is not None:
                self.counts["pooled"] += 1
                return record
            if not self.fresh and (record := self._from_copy(shard, count)) is not None:
                self.counts["copied"] += 1
                return record
            self.counts["made"] += 1
            return self._write(shard, count, make())

    def link(self, record: Mapping[str, Any], targets: Mapping[str, Path]) -> None:
        """Makes files of a set hard links to those of a shard; copies across file systems."""
        for array, target in targets.items():
            source = self.folder / record[array]
            target.parent.mkdir(parents=True, exist_ok=True)
            files.link(source, target)

    @contextlib.contextmanager
    def _lock(self, shard: str, pause: Callable[[], None]) -> Any:
        lock = filelock.FileLock(self.folder / f"{shard}.lock")  # ends with its process
        while True:
            pause()
            try:
                lock.acquire(timeout=_WAIT)
                break
            except filelock.Timeout:
                continue
        try:
            yield
        finally:
            lock.release()

    def _intact(self, shard: str, count: int) -> dict[str, Any] | None:
        """The record of a shard whose files are those that were written; else None, and what is there is made anew."""
        path = self.folder / f"{shard}.json"
        if not path.exists():
            return None
        kinds: dict[str, type] = {"count": int, **dict.fromkeys([*self.arrays, *map(_digest, self.arrays)], str)}
        with contextlib.suppress(DmatError):
            record = files.read_record(path, **kinds)
            if record["count"] == count and all(self._holds(record, array, shard) for array in self.arrays):
                return record
        tqdm.write(f"note: {path} or its shard was damaged after it was made; it is made again", file=sys.stderr)
        return None

    def _holds(self, record: Mapping[str, Any], array: str, shard: str) -> bool:
        path = self.folder / _file(array, shard)
        return record[array] == path.name and path.is_file() and files.sha256(path) == record[_digest(array)]

    def _from_copy(self, shard: str, count: int) -> dict[str, Any] | None:
        copies = self._copies.get(shard, {})
        if any(array not in copies for array in self.arrays):
            return None
        record: dict[str, Any] = {"count": count}
        for array in self.arrays:
            path, digest = copies[array]
            if not path.is_file() or files.sha256(path) != digest:
                return None
            name = _file(array, shard)
            files.link(path, self.folder / name)
            record |= {array: name, _digest(array): digest}
        files.write_json(self.folder / f"{shard}.json", record)
        return record

    def _write(self, shard: str, count: int, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The record comes last: a shard without one is made again."""
        (self.folder / f"{shard}.json").unlink(missing_ok=True)
        record: dict[str, Any] = {"count": count}
        for array in self.arrays:
            path = self.folder / _file(array, shard)
            with files.writing(path) as file:
                np.save(file, np.ascontiguousarray(arrays[array]), allow_pickle=False)
            path.chmod(0o444)
            record |= {array: path.name, _digest(array): files.sha256(path)}
        files.write_json(self.folder / f"{shard}.json", record)
        return record


def _file(array: str, shard: str) -> str:
    return f"{array}-{shard}.npy"


def _digest(array: str) -> str:
    return f"{array}_sha256"
