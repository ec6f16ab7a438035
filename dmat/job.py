"""The contract of a job: what the `run(settings, job)` of a stage receives and returns."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from dmat import files, tracking
from dmat.data.shard_pool import ShardPool
from dmat.data.shards import ArrayName
from dmat.devices import Compute
from dmat.training.long_run import LongRun, Watcher
from dmat.workspace import PICTURES, POOLS, RESULT, Instance

Metrics = Mapping[str, float | Mapping[str, float]]  # name -> value; of the report: group -> measure -> value


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job receives besides its settings: where to read, where to write, and how to compute."""

    inputs: Mapping[str, Path]
    instance: Instance
    root: Path  # the project's folder
    work: Path  # folder for state that a restart needs
    compute: Compute
    save_seconds: float  # between two checkpoints
    quiet: bool  # no progress bars
    code: str = ""  # identity of the code
    fresh: bool = False  # recompute what earlier work left
    watcher: Watcher | None = None  # of the metrics of a long run

    @property
    def result(self) -> Path:
        """Folder for what is published, one file or folder per output."""
        return self.work / RESULT

    @property
    def pictures(self) -> Path:
        """Folder for PNG files that people look at and no stage reads."""
        return self.work / PICTURES

    def pool(self, identity: Mapping[str, object], arrays: Sequence[ArrayName]) -> ShardPool:
        """The pool of shards with this `identity` and code, which decide their content (docs/architecture.md).

        arrays: names of the arrays of a shard.
        """
        pool_identity = {"stage": self.work.parent.name, "code": self.code, **identity}
        folder = self.work.parent.parent / POOLS / f"{self.work.parent.name}-{files.fingerprint(pool_identity)}"
        return ShardPool(folder, pool_identity, arrays, self.fresh)

    def long_run(self, total: int) -> LongRun:
        """The checkpoints, metrics and progress bar of this instance. total: images that the run will see."""
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
    """What a job returns besides the files that it wrote."""

    metrics: Metrics  # the same in every repetition
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)  # differs from run to run, such as speed
    headlines: Mapping[str, float] = dataclasses.field(default_factory=dict)  # further metrics of the MLflow run alone
    notes: Sequence[str] = ()  # sentences that a reader of this result must know
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the MLflow run
    description: str = ""  # of the MLflow run, Markdown
    attachments: Sequence[Path] = ()  # files to open in the MLflow run
    models: Sequence[tracking.RegistryCandidate] = ()  # for the registry
    compiled: bool = False  # whether the steps of a training were compiled
    pools: Sequence[str] = ()  # names of the pools whose shards the result holds
