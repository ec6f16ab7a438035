"""Who computes which shard: processes share a folder, and nothing else.

Each shard is one file beside a note that says what it is (its identity, its checksum). A process claims a shard by a
file lock, which ends with the process, so a shard of a killed worker is free at once. On one machine this always works;
on several it needs a shared folder whose locks hold (NFS 4 or later).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from tqdm import tqdm

from dmat import files
from dmat.errors import DmatError

_LOOK_EVERY = 0.5  # seconds between two looks at what others compute
_NOTE: dict[str, Any] = {
    "identity": dict,
    "images": int,
    "seconds": (int, float),
    "sha256": str,
}

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class ShardTask:
    """One shard: the path of its files without suffix, what it is, and how to compute it.

    by: who computes it, kept in its note: shards of one evaluation may be of several machines and versions.
    """

    path: Path
    images: int
    identity: Mapping[str, Any]
    make: Callable[[], Columns]
    by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the shard is there as it was computed; a damaged one is not, and is computed again.

        Refuses, as `note` does, a shard of another evaluation: nobody computes for hours beside those.
        """
        return self.note() is not None

    def compute(self) -> None:
        """The note comes last: without it nothing was computed."""
        started = time.monotonic()
        columns = self.make()
        with files.writing(self.path.with_suffix(".npz")) as file:
            np.savez(file, **columns)  # type: ignore[arg-type]  # its stub takes the first for allow_pickle
        note = {
            "identity": dict(self.identity),
            "images": self.images,
            "seconds": round(time.monotonic() - started, 3),
            "sha256": files.sha256(self.path.with_suffix(".npz")),
            "by": dict(self.by),
        }
        files.write_json(self.path.with_suffix(".json"), note)

    def note(self) -> dict[str, Any] | None:
        """What is known of the shard; None where it is not there, or not as it was computed.

        Raises DmatError for a shard of another model, other images or other settings.
        """
        path, shard = self.path.with_suffix(".json"), self.path.with_suffix(".npz")
        if not path.is_file() or not shard.is_file():
            return None
        try:
            note = files.read_record(path, **_NOTE)
        except DmatError:
            return None
        if files.sha256(shard) != note["sha256"]:
            return None
        if note["identity"] != dict(self.identity) or note["images"] != self.images:
            other = [key for key, value in self.identity.items() if note["identity"].get(key) != value]
            raise DmatError(
                f"{shard} belongs to another evaluation ({', '.join(other) or 'its images'} differ); expected the same "
                f"model, images and settings; give another folder, or start over with --fresh"
            )
        return note

    def read(self) -> Columns:
        """Raises DmatError where the shard is not there: it was damaged after all were computed."""
        path = self.path.with_suffix(".npz")
        if not self.done:
            raise DmatError(
                f"{path} is missing or was altered since it was computed; expected the file that "
                f"{self.path.with_suffix('.json').name} describes; run the same command again: one shard is lost"
            )
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}


def compute_all(tasks: Sequence[ShardTask], *, wait: bool, quiet: bool) -> None:
    """Computes what nobody else does, with a progress bar that also counts what others do.

    wait: returns when all is there, and takes over what others leave behind.
    """
    for unit in tasks:
        unit.path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(unit.images for unit in tasks)
    with tqdm(total=total, unit=" images", desc="evaluate", disable=quiet, dynamic_ncols=True) as bar:
        while True:
            pending = [unit for unit in tasks if not unit.done]
            bar.update(total - sum(unit.images for unit in pending) - bar.n)
            if not pending:
                return
            if not any(_computed(unit) for unit in pending):  # the first that is free, then a new look
                if not wait:
                    return
                time.sleep(_LOOK_EVERY)


def _computed(unit: ShardTask) -> bool:
    """Whether this process computed the shard: nobody else was at it."""
    try:
        with filelock.FileLock(unit.path.with_suffix(".lock"), timeout=0):
            if unit.done:
                return False
            unit.compute()
    except filelock.Timeout:
        return False
    return True


def estimate(tasks: Sequence[ShardTask]) -> dict[str, Any]:
    """Shards done, and seconds that one process needs for the others, by the median second per image so far.

    Shards of one folder count together; None where none of a folder is done.
    """
    left = 0.0
    known = True
    for folder in dict.fromkeys(unit.path.parent for unit in tasks):
        own = [unit for unit in tasks if unit.path.parent == folder]
        missing = sum(unit.images for unit in own if not unit.done)
        speeds = [note["seconds"] / note["images"] for unit in own if (note := unit.note()) is not None]
        if missing and not speeds:
            known = False
        elif missing:
            left += missing * statistics.median(speeds)
    return {
        "shards": len(tasks),
        "shards_done": sum(unit.done for unit in tasks),
        "seconds_left": round(left, 1) if known else None,
    }
