"""How far a running evaluation is, in forward passes of single images, and what the passes so far have shown.

Images are no measure of work: an image that the first attack breaks takes some two hundred passes, a robust one some
ten thousand. A shard that is being computed has a small file beside it, which its process rewrites while attacks end;
so whoever shares the folder sees the progress of every process. Nothing here decides a result.
Shapes: B images, C channels, H height, W width, K classes.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from dmat import files, liveness
from dmat.errors import DmatError
from dmat.robust.attacks import Logits
from dmat.robust.passes import GRADIENT

SUFFIX = ".progress"
_WRITE_SECONDS = 2.0  # between two versions of a file


class AttackProgress(NamedTuple):
    """How far the attacks on some images are."""

    attack: str  # what runs, such as "apgd-t 3/9": three of nine targets are finished
    passes_done: int
    passes_left: int  # if no other image is broken
    unbroken: int  # images that no attack of the suite has broken so far


Report = Callable[[AttackProgress], None]


class ShardProgress(TypedDict):
    """What the file of a shard that is being computed holds: an `AttackProgress`, its seconds and its process."""

    attack: str
    passes_done: int
    passes_left: int
    unbroken: int
    seconds: float
    pid: int
    process: str  # as `liveness.identity`
    boot: str  # of the machine of the process


class Meter(nn.Module):
    """Calls a model, images [B, C, H, W] -> logits [B, K], and counts its passes.

    left: passes that are expected. images: how many are attacked. report: called after every pass; cheap.
    """

    def __init__(self, logits_of: Logits, left: int, images: int, report: Report):
        super().__init__()
        self._logits_of, self._report = logits_of, report
        self._progress = AttackProgress("", 0, left, images)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        logits = self._logits_of(images)
        passes = len(images) * (GRADIENT if images.requires_grad and torch.is_grad_enabled() else 1)
        before = self._progress
        self._progress = before._replace(
            passes_done=before.passes_done + passes, passes_left=max(0, before.passes_left - passes)
        )
        self._report(self._progress)
        return logits

    def expect(self, attack: str, left: int, unbroken: int) -> None:
        """Takes note of what runs from now on, how many passes are left, and how many images are not broken."""
        self._progress = AttackProgress(attack, self._progress.passes_done, left, unbroken)
        self._report(self._progress)


class ProgressFile:
    """The file in which a process says how far its shard is. path: of the shard, without suffix."""

    def __init__(self, path: Path):
        self._path = path.with_suffix(SUFFIX)
        self._started, self._written = time.monotonic(), 0.0
        self._process = {"pid": os.getpid(), "process": liveness.identity(os.getpid()), "boot": liveness.boot_id()}
        self.passes = 0  # of the newest report

    def write(self, progress: AttackProgress) -> bool:
        """Writes the file if the last version is old enough. Returns whether it did."""
        self.passes = progress.passes_done
        if time.monotonic() - self._written < _WRITE_SECONDS:
            return False
        seconds = round(time.monotonic() - self._started, 3)
        with contextlib.suppress(DmatError):  # a disk that is full for a moment must not end an evaluation
            files.write_json(self._path, {**progress._asdict(), "seconds": seconds, **self._process})
        self._written = time.monotonic()
        return True

    def remove(self) -> None:
        """Removes the file: the shard is finished, or was given up."""
        self._path.unlink(missing_ok=True)


def read(path: Path) -> ShardProgress | None:
    """The progress of the shard that a process computes; None if none does.

    path: of the shard, without suffix. The file of a process of this machine that was killed does not count; whether
    a process of another machine still runs cannot be seen.
    """
    try:
        progress = files.read_record(path.with_suffix(SUFFIX), ShardProgress)
    except DmatError:  # there is none
        return None
    here = progress["boot"] == liveness.boot_id()
    return None if here and not liveness.is_running(progress["pid"], progress["process"]) else progress
