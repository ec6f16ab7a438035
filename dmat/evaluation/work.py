"""Distribution of shards over processes, which share a folder and nothing else; their progress.

Each shard is one .npz file and one .json record with its identity and checksum. A process claims a shard by a file
lock. The lock ends with the process, so the shard of a killed worker is free at once. This always works on one machine;
several machines need a shared folder with working file locks (NFS 4 or later).
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired

import filelock
import numpy as np
from tqdm import tqdm
from typing_extensions import TypedDict

from dmat import files
from dmat.data import npz_arrays
from dmat.errors import DmatError
from dmat.evaluation import progress
from dmat.evaluation.progress import AttackProgress, ProgressFile, Report
from dmat.metrics.anytime import without_replacement

_POLL_SECONDS = 0.5  # between two looks at which shards other processes have computed
_SHOW_SECONDS = 2.0  # between two versions of the progress bar
_LINE_SECONDS = 10.0  # between two lines for programs

Columns = dict[str, np.ndarray]


class AttackedShardRecord(TypedDict):
    """The record of a finished shard of an evaluation."""

    identity: dict[str, object]  # everything that decides its content
    images: int
    seconds: float  # of computing it
    sha256: str  # of its .npz file
    by: NotRequired[dict[str, object]]  # device and versions
    passes: NotRequired[int]  # that it took, as `progress.Meter` counts them; earlier versions counted none


class Bounds(TypedDict):
    """What is certain, and what is likely, about the accuracy under the suite while it runs. Never a headline.

    images: attacked in the end. broken, robust: what is certain by now; all others count both ways in low and high.
    likely_low, likely_high: the accuracy of all `images` lies between them at every time until the end, with a
    probability of 95 %, if the images are in random order; None if their labels show that they are not, and before the
    first shard has ended. Accuracies are in [0, 1].
    """

    images: int
    broken: int
    robust: int
    low: float
    high: float
    likely_low: float | None
    likely_high: float | None


class WorkEstimate(TypedDict):
    """How much of an evaluation is done, and how long one process needs for the rest."""

    shards: int
    shards_done: int
    passes_done: int  # forward passes of single images
    passes_left: int  # if no image is broken that is robust so far
    seconds_left: float | None  # None where it is not known yet
    bounds: Bounds | None  # None without a suite


@dataclass(frozen=True)
class ShardTask:
    """One shard: the path of its files without suffix, its identity, and how to compute it.

    images: their number. passes: that it takes if no image is broken. make: computes the columns, and reports its
    progress. computed_by: device and versions, kept in the shard's record, because shards of one evaluation may come
    from several machines and versions. suite: whether its images are attacked by a suite. mixed: whether the images of
    the evaluation are in random order, as far as their labels show.
    """

    path: Path
    images: int
    passes: int
    identity: Mapping[str, object]
    make: Callable[[Report], Columns]
    computed_by: Mapping[str, object] = field(default_factory=dict)
    suite: bool = False
    mixed: bool = False

    @property
    def done(self) -> bool:
        """Whether the shard exists and is unchanged. A damaged shard is not done, and is computed again.

        Raises DmatError, as `record` does, for a shard of another evaluation: hours of computing would be lost.
        """
        return self.record() is not None

    def compute(self, show: Callable[[], None] = lambda: None) -> None:
        """Computes the shard and writes its files. The record comes last: without it the shard is not done.

        show: called when the file of its progress has changed.
        """
        started = time.monotonic()
        progress_file = ProgressFile(self.path)

        def report(state: AttackProgress) -> None:
            if progress_file.write(state):
                show()

        try:
            columns = self.make(report)
            with files.writing(self.path.with_suffix(".npz")) as file:
                np.savez(file, **columns)  # type: ignore[arg-type]  # its stub takes the first for allow_pickle
            shard_record: AttackedShardRecord = {
                "identity": dict(self.identity),
                "images": self.images,
                "seconds": round(time.monotonic() - started, 3),
                "sha256": files.sha256(self.path.with_suffix(".npz")),
                "by": dict(self.computed_by),
                "passes": progress_file.passes,
            }
            files.write_json(self.path.with_suffix(".json"), shard_record)
        finally:
            progress_file.remove()

    def record(self) -> AttackedShardRecord | None:
        """The record of the shard; None where the shard is missing or damaged.

        Raises DmatError for a shard of another model, other images or other settings.
        """
        record_path, array_path = self.path.with_suffix(".json"), self.path.with_suffix(".npz")
        if not record_path.is_file() or not array_path.is_file():
            return None
        try:
            shard_record = files.read_record(record_path, AttackedShardRecord)
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
        return npz_arrays.read_arrays(path)

    def read_column(self, name: str) -> np.ndarray:
        """One column [B] of the shard, which is done."""
        return npz_arrays.read_arrays(self.path.with_suffix(".npz"), [name])[name]


class Monitor:
    """Reads how far the shards of an evaluation are, whoever computes them. It holds neither models nor images."""

    def __init__(self, tasks: Sequence[ShardTask]):
        self._tasks = [dataclasses.replace(task, make=_computed_elsewhere) for task in tasks]
        self._finished: dict[Path, _FinishedShard] = {}

    def estimate(self) -> WorkEstimate:
        """Passes done and left, the time that one process needs for these, and the bounds of the accuracy.

        A shard that nobody has begun is expected to take as many passes per image as the finished ones of its folder;
        without any, as if no image of it were broken. The time comes from the seconds per pass so far.
        """
        running: dict[Path, progress.ShardProgress] = {}
        for task in self._tasks:
            if task.path not in self._finished and (record := task.record()) is not None:
                robust = int(task.read_column("auto_attack").sum()) if task.suite else 0
                self._finished[task.path] = _FinishedShard(
                    task.images, record.get("passes", task.passes), record["seconds"], robust
                )
            if task.path not in self._finished and (state := progress.read(task.path)) is not None:
                running[task.path] = state
        begun = [(shard.passes, shard.seconds) for shard in self._finished.values()]
        begun += [(state["passes_done"], state["seconds"]) for state in running.values()]
        passes_done, seconds = sum(passes for passes, _ in begun), sum(seconds for _, seconds in begun)
        passes_left = sum(state["passes_left"] for state in running.values())
        passes_left += sum(
            self._expected_passes(task)
            for task in self._tasks
            if task.path not in self._finished and task.path not in running
        )
        measurable = passes_done > 0 or not passes_left
        return {
            "shards": len(self._tasks),
            "shards_done": len(self._finished),
            "passes_done": passes_done,
            "passes_left": passes_left,
            "seconds_left": round(passes_left * seconds / max(passes_done, 1), 1) if measurable else None,
            "bounds": self._bounds(running),
        }

    def _expected_passes(self, task: ShardTask) -> int:
        """Passes of a shard that nobody has begun."""
        peers = [shard for path, shard in self._finished.items() if path.parent == task.path.parent]
        images = sum(shard.images for shard in peers)
        return round(task.images * sum(shard.passes for shard in peers) / images) if images else task.passes

    def _bounds(self, running: Mapping[Path, progress.ShardProgress]) -> Bounds | None:
        """Bounds of the accuracy of the images that a suite attacks; None if there are none."""
        attacked = [task for task in self._tasks if task.suite]
        if not attacked:
            return None
        images = sum(task.images for task in attacked)
        finished = [self._finished[task.path] for task in attacked if task.path in self._finished]
        robust = sum(shard.robust for shard in finished)
        broken = sum(shard.images - shard.robust for shard in finished) + sum(
            task.images - running[task.path]["unbroken"] for task in attacked if task.path in running
        )
        bounds: Bounds = {
            "images": images,
            "broken": broken,
            "robust": robust,
            "low": robust / images,
            "high": 1 - broken / images,
            "likely_low": None,
            "likely_high": None,
        }
        # Shards of robust images take longer, so that those which happen to be finished are no random ones. Those
        # before the first that is not finished are: their number is all that depends on times.
        first = list(itertools.takewhile(lambda task: task.path in self._finished, attacked))
        if first and attacked[0].mixed:
            right = sum(self._finished[task.path].robust for task in first)
            low, high = without_replacement(right, sum(task.images for task in first), images)
            bounds["likely_low"], bounds["likely_high"] = (
                min(max(count / images, bounds["low"]), bounds["high"]) for count in (low, high)
            )
        return bounds


@dataclass(frozen=True)
class _FinishedShard:
    """What remains of interest of a finished shard. robust: images that survived the suite."""

    images: int
    passes: int
    seconds: float
    robust: int


def _computed_elsewhere(report: Report) -> Columns:
    raise AssertionError("a monitor computes nothing")


@contextlib.contextmanager
def progress_bar(monitor: Monitor, label: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """A progress bar that counts passes and shows bounds of the accuracy; none if `quiet`.

    Gives the function that brings it up to date, which does so at most every two seconds.
    """
    if quiet:
        yield lambda: None
        return
    state, shown = monitor.estimate(), time.monotonic()
    total = state["passes_done"] + state["passes_left"]
    with tqdm(
        total=total, initial=state["passes_done"], unit=" passes", unit_scale=True, desc=label, dynamic_ncols=True
    ) as bar:

        def show(at_once: bool = False) -> None:
            nonlocal shown
            if at_once or time.monotonic() - shown > _SHOW_SECONDS:
                state, shown = monitor.estimate(), time.monotonic()
                bar.n, bar.total = state["passes_done"], state["passes_done"] + state["passes_left"]
                bar.set_postfix_str(describe(state["bounds"]))

        show(at_once=True)
        yield show
        show(at_once=True)


@contextlib.contextmanager
def progress_lines(monitor: Monitor | None) -> Iterator[None]:
    """Writes the estimate to stderr as a line of JSON, {"progress": `WorkEstimate`}, at first and every ten seconds.

    For programs: the result on stdout stays a JSON object of its own. The estimate comes from the files beside the
    shards, so it covers what other processes compute. monitor: None for no lines.
    """
    if monitor is None:
        yield
        return
    ended = threading.Event()

    def write() -> None:
        while True:
            with contextlib.suppress(DmatError):  # shards of an earlier request, which the evaluation itself reports
                print(json.dumps({"progress": monitor.estimate()}), file=sys.stderr, flush=True)
            if ended.wait(_LINE_SECONDS):
                return

    thread = threading.Thread(target=write, name="progress lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def describe(bounds: Bounds | None) -> str:
    """The bounds for people, such as "robust 31.0 to 82.4 %, likely 70.1 to 75.3 %"; "" for None."""
    if bounds is None:
        return ""
    text = f"robust {100 * bounds['low']:.1f} to {100 * bounds['high']:.1f} %"
    if bounds["likely_low"] is not None and bounds["likely_high"] is not None:
        text += f", likely {100 * bounds['likely_low']:.1f} to {100 * bounds['likely_high']:.1f} %"
    return text


def compute_all(tasks: Sequence[ShardTask], *, quiet: bool) -> None:
    """Computes the shards that no other process computes, and waits for the others.

    Takes over what other processes leave behind. The progress bar also counts their passes.
    """
    for task in tasks:
        task.path.parent.mkdir(parents=True, exist_ok=True)
    pending = list(tasks)
    with progress_bar(Monitor(tasks), "evaluate", quiet) as show:
        while pending := [task for task in pending if not task.done]:
            if not any(_compute_if_free(task, show) for task in pending):  # the first free one, then `pending` anew
                time.sleep(_POLL_SECONDS)
            show()


def _compute_if_free(task: ShardTask, show: Callable[[], None]) -> bool:
    """Computes the shard unless another process holds or has computed it. Returns whether this process computed it."""
    try:
        with filelock.FileLock(task.path.with_suffix(".lock"), timeout=0):
            if task.done:
                return False
            task.compute(show)
    except filelock.Timeout:
        return False
    return True
