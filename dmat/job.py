"""The contract of a job: what the `run(settings, job)` of a stage gets, and what it gives back."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmat import files, tracking
from dmat.data.shard_pool import ShardPool
from dmat.devices import Compute
from dmat.training.long_run import LongRun, Watcher
from dmat.workspace import PICTURES, RESULT

POOLS = "pools"  # folder in runs/ of shards that several sets share


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job gets besides its settings: where to read, where to write, and how to compute."""

    inputs: Mapping[str, Path]
    instance: Mapping[str, Any]  # the options that name this instance
    root: Path  # the project's folder
    work: Path  # for state that a restart needs
    compute: Compute
    save_seconds: float  # between two checkpoints
    quiet: bool
    code: str = ""  # identity of the code
    fresh: bool = False  # compute what earlier work left anew
    watcher: Watcher | None = None  # of the metrics of a long run

    @property
    def result(self) -> Path:
        """For what is published, one file or folder per output."""
        return self.work / RESULT

    @property
    def pictures(self) -> Path:
        """For PNG files that people look at and no stage computes with."""
        return self.work / PICTURES

    def pool(self, identity: Mapping[str, Any], arrays: Sequence[str]) -> ShardPool:
        """The pool of shards that everything in `identity` and the code decide (docs/architecture.md)."""
        whole = {"stage": self.work.parent.name, "code": self.code, **identity}
        folder = self.work.parent.parent / POOLS / f"{self.work.parent.name}-{files.fingerprint(whole)}"
        return ShardPool(folder, whole, arrays, self.fresh)

    def long_run(self, total: int) -> LongRun:
        """Checkpoints, metrics and progress bar of this instance."""
        return LongRun(
            self.work,
            self.compute,
            total,
            label=self.work.parent.name,
            quiet=self.quiet,
            save_seconds=self.save_seconds,
            watcher=self.watcher,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job found, beside the files that it wrote."""

    metrics: Mapping[str, Any]  # the same whenever it is computed again
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)  # differs from run to run, such as speed
    notes: Sequence[str] = ()  # sentences that a reader of this result must know
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the MLflow run
    description: str = ""  # of the MLflow run, Markdown
    attachments: Sequence[Path] = ()  # files that people will want to open where they look at the run
    models: Sequence[tracking.RegistryCandidate] = ()  # for the registry
    pools: Sequence[str] = ()  # names of those whose shards the result holds
