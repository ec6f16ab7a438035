"""Distribution of shards over processes, which share a folder and nothing else.

Each shard is one .npz file and one .json record with its identity and checksum. A process claims a shard by a file
lock. The lock ends with the process, so the shard of a killed worker is free at once. This always works on one machine;
several machines need a shared folder with working file locks (NFS 4 or later).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import filelock
import numpy as np
from tqdm import tqdm

from dmat import files
from dmat.errors import DmatError

_POLL_SECONDS = 0.5  # between two looks at which shards other processes have computed
_RECORD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "images": int,
    "seconds": (int, float),
    "sha256": str,
}

Columns = dict[str, np.ndarray]


class AttackedShardRecord(TypedDict):
    """The record of a finished shard of an evaluation."""

    identity: dict[str, object]  # everything that decides its content
    images: int
    seconds: float  # of computing it
    sha256: str  # of its .npz file
    by: NotRequired[dict[str, object]]  # device and versions


class WorkEstimate(TypedDict):
    """How much of an evaluation is done, and how long one process needs for the rest."""

    shards: int
    shards_done: int
    seconds_left: float | None  # None where it is not known yet


@dataclass(frozen=True)
class ShardTask:
    """One shard: the path of its files without suffix, its identity, and how to compute it.

    images: their number. make: computes the columns. computed_by: device and versions, kept in the shard's record,
    because shards of one evaluation may come from several machines and versions.
    """

    path: Path
    images: int
    identity: Mapping[str, object]
    make: Callable[[], Columns]
    computed_by: Mapping[str, object] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the shard exists and is unchanged. A damaged shard is not done, and is computed again.

        Raises DmatError, as `record` does, for a shard of another evaluation: hours of computing would be lost.
        """
        return self.record() is not None

    def compute(self) -> None:
        """Computes the shard and writes its files. The record comes last: without it the shard is not done."""
        started = time.monotonic()
        columns = self.make()
        with files.writing(self.path.with_suffix(".npz")) as file:
            np.savez(file, **columns)  # type: ignore[arg-type]  # its stub takes the first for allow_pickle
        shard_record: AttackedShardRecord = {
            "identity": dict(self.identity),
            "images": self.images,
            "seconds": round(time.monotonic() - started, 3),
            "sha256": files.sha256(self.path.with_suffix(".npz")),
            "by": dict(self.computed_by),
        }
        files.write_json(self.path.with_suffix(".json"), shard_record)

    def record(self) -> AttackedShardRecord | None:
        """The record of the shard; None where the shard is missing or damaged.

        Raises DmatError for a shard of another model, other images or other settings.
        """
        record_path, array_path = self.path.with_suffix(".json"), self.path.with_suffix(".npz")
        if not record_path.is_file() or not array_path.is_file():
            return None
        try:
            shard_record = cast(AttackedShardRecord, files.read_record(record_path, **_RECORD_FIELDS))
        except DmatError:
            return None
        if files.sha256(array_path) != shard_record["sha256"]:
            return None
        if shard_record["identity"] != dict(self.identity) or shard_record["images"] != self.images:
            differing = [key for key, value in self.identity.items() if shard_record["identity"].get(key) != value]
            raise DmatError(
                f"{array_path} belongs to another evaluation ({', '.join(differing) or 'its images'} differ); expected "
                f"the same model, images and settings; give another folder, or start over with --fresh"
            )
        return shard_record

    def read(self) -> Columns:
        """The columns of the shard. Raises DmatError where it is missing: it was damaged after all were computed."""
        path = self.path.with_suffix(".npz")
        if not self.done:
            raise DmatError(
                f"{path} is missing or was altered since it was computed; expected the file that "
                f"{self.path.with_suffix('.json').name} describes; run the same command again: it computes only this "
                f"shard again"
            )
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}


def compute_all(tasks: Sequence[ShardTask], *, quiet: bool) -> None:
    """Computes the shards that no other process computes, and waits for the others.

    Takes over what other processes leave behind. The progress bar also counts their shards.
    """
    for task in tasks:
        task.path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(task.images for task in tasks)
    with tqdm(total=total, unit=" images", desc="evaluate", disable=quiet, dynamic_ncols=True) as bar:
        while True:
            pending = [task for task in tasks if not task.done]
            bar.update(total - sum(task.images for task in pending) - bar.n)
            if not pending:
                return
            if not any(_compute_if_free(task) for task in pending):  # the first free one, then `pending` anew
                time.sleep(_POLL_SECONDS)


def _compute_if_free(task: ShardTask) -> bool:
    """Computes the shard unless another process holds or has computed it. Returns whether this process computed it."""
    try:
        with filelock.FileLock(task.path.with_suffix(".lock"), timeout=0):
            if task.done:
                return False
            task.compute()
    except filelock.Timeout:
        return False
    return True


def estimate(tasks: Sequence[ShardTask]) -> WorkEstimate:
    """Number of shards, number done, and seconds that one process needs for the rest.

    The seconds come from the median seconds per image so far, taken over the shards of one folder. They are None where
    a folder has no finished shard yet.
    """
    seconds_left = 0.0
    measurable = True
    for folder in dict.fromkeys(task.path.parent for task in tasks):
        folder_tasks = [task for task in tasks if task.path.parent == folder]
        missing_images = sum(task.images for task in folder_tasks if not task.done)
        seconds_per_image = [
            record["seconds"] / record["images"] for task in folder_tasks if (record := task.record()) is not None
        ]
        if missing_images and not seconds_per_image:
            measurable = False
        elif missing_images:
            seconds_left += missing_images * statistics.median(seconds_per_image)
    return {
        "shards": len(tasks),
        "shards_done": sum(task.done for task in tasks),
        "seconds_left": round(seconds_left, 1) if measurable else None,
    }
