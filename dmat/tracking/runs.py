"""The tracked run of one stage instance: what the job sees of tracking."""

import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from dmat.errors import Interrupted
from dmat.redaction import redacted
from dmat.tracking import open_runs, origin, overview, parents, sender, stores
from dmat.tracking.registry import RegistryCandidate
from dmat.tracking.run_record import WORK, RunRecord, remembered
from dmat.tracking.system import SystemMonitor

_SAMPLE_EVERY = 10.0  # seconds between two looks at processor and memory
_MAX_SENDERS = 3  # that a run calls before it ends, should they die
_PATIENCE = 120.0  # seconds that the end of a stage waits for the sending process to answer: sent, failed or gone
_silent = set[str]()  # stores that did not answer last time: their runs are told once, and wait for nothing


class Run:
    """As a context it ends with the status that fits how the block ended."""

    def __init__(self, home: Path, folder: Path, about: dict[str, Any], enabled: bool = True):
        self.home, self.folder = home, folder
        self._record = RunRecord(folder, stores.identity(home))
        self._store = stores.shown(home)
        self._about, self._enabled = about, enabled
        self._closing, self._reached, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._final: tuple[dict[str, float], list[str]] = ({}, [])
        self._tags: dict[str, str] = {}
        self._models: list[dict[str, Any]] = []
        self._status: tuple[str, str] | None = None
        self._started = time.time()
        self._calls = 0

    def __enter__(self) -> Self:
        if self._enabled:
            self._record.update(about=self._about, ending=None, tags=self._tags)
            open_runs.write(self.home, self.folder, os.getpid())
            self._start_sender()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        status = (
            "FINISHED"
            if kind is None
            else "KILLED"
            if issubclass(kind, (Interrupted, KeyboardInterrupt, SystemExit))
            else "FAILED"
        )
        status, reason = self._status or (status, str(error) if error else "")
        metrics, pictures = self._final
        ending = {
            "status": status,
            "error": redacted(reason),
            "metrics": metrics,
            "pictures": pictures,
            "models": self._models,
            "ended": time.time(),
        }
        try:
            self._record.update(
                seconds=self._record["seconds"] + time.time() - self._started, ending=ending, tags=self._tags
            )
        finally:
            self._closing.set()
            if self._enabled:
                if self._sender.gone:
                    self._start_sender()
                self._sender.close(self.folder)
                if self._store not in _silent:
                    self._ended.wait(_PATIENCE)

    def finish_with(self, metrics: Mapping[str, Any], pictures: list[Path]) -> None:
        """Final numbers and pictures (inside the work folder), sent when the block ends."""
        self._final = (dict(flatten(metrics)), [str(path.relative_to(self.folder)) for path in pictures])

    def end_as(self, status: str, reason: str) -> None:
        """Another status than the end of the block tells."""
        self._status = (status, reason)

    def tag(self, name: str, value: str) -> None:
        """A tag that becomes known while the run goes on."""
        self._tags[name] = value
        if self._enabled:
            self._record.update(tags=self._tags)

    def describe(self, text: str) -> None:
        """Markdown that MLflow shows on top of the run's page."""
        self.tag(overview.NOTE, text)

    def register(self, candidate: RegistryCandidate) -> None:
        """A model for the registry, sent when the block ends."""
        weights = candidate.weights.resolve()
        if weights.is_relative_to(self.home):  # so that a project may be moved
            weights = weights.relative_to(self.home)
        self._models.append(dataclasses.replace(candidate, weights=weights).plain())

    def provenance(self) -> dict[str, Any]:
        """Where this result can be looked up: not part of any hash. The runs are None where the store is away; what the
        folder `work` remembers tells them later (`dmat.report.lineage.runs_of`)."""
        if self._enabled:
            self._reached.wait(_PATIENCE)
            self._record.refresh()
        return {
            "mlflow_run": self._record["run"],
            "mlflow_parent": self._record["parent"],
            "work": open_runs.relative(self.home, self.folder),
            **self._about["git"],
            **self._about["code"],
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host_cores": os.cpu_count(),
        }

    def _start_sender(self) -> None:
        self._ended.clear()
        self._calls += 1
        self._sender = sender.of_this_process()
        self._sender.open(self.home, self.folder, stores.identity(self.home), self._hear)

    def _watch(self) -> None:
        """The thread: samples what the machine is busy with until the block ends."""
        sampler = SystemMonitor()
        while not self._closing.wait(_SAMPLE_EVERY):
            if self._sender.gone and self._calls < _MAX_SENDERS:
                self._start_sender()
            self._sender.system(self.folder, sampler.sample(), time.time() - self._started)

    def _hear(self, what: str, text: str) -> None:
        """What the sender says of this run."""
        if what == "warned":
            warnings.warn(text, stacklevel=1)
            return
        if what == "reached":
            _silent.discard(self._store)
        elif what == "gone":
            warnings.warn(f"{text}; the run goes on, another takes over", stacklevel=1)
        elif what == "failed" and self._store not in _silent:
            _silent.add(self._store)
            warnings.warn(
                f"MLflow at {self._store} cannot be reached ({text}); the run goes on, its metrics are in "
                f"{self.folder / 'metrics.jsonl'} and are sent later",
                stacklevel=1,
            )
        self._reached.set()
        if what in ("ended", "gone"):
            self._ended.set()


def open_run(
    home: Path,
    work: Path,
    *,
    stage: str,
    instance_name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    compute: Mapping[str, Any],
    root: Path | None = None,
    ancestors: Mapping[str, Mapping[str, str | None]] | None = None,
    parent: Path | None = None,
    fingerprint: str | None = None,
    tags: Mapping[str, str] | None = None,
    enabled: bool = True,
) -> Run:
    """The run of a stage instance; resumed where `work` remembers one. DMAT_TRACKING=off makes all of them silent.

    root: the tree whose code and parameters are used; `home` if not given. behind: the stage instances that the inputs
    come from -> their `run` and its `parent`. parent: the folder that remembers the parent's run; without it that of
    the `dvc` process above, if there is one. fingerprint: of settings and inputs, where the work has one of its own.
    """
    git = origin.git(root or home)
    software = origin.software()
    about = {
        "name": f"{stage} {instance_name}",
        "settings": dict(settings),
        "inputs": {name: dict(entry) for name, entry in inputs.items()},
        "behind": {title: dict(one) for title, one in (ancestors or {}).items()},
        "started": time.time(),
        "git": git,
        "code": {} if origin.holds_code(root or home) else {"dmat": software["dmat"]},
        "tags": {
            "dmat.stage": stage,
            "dmat.instance": instance_name,
            **({"dmat.fingerprint": fingerprint} if fingerprint else {}),
            WORK: open_runs.relative(home, work),
            **{f"compute.{name}": str(value) for name, value in compute.items()},
            **{f"software.{name}": number for name, number in software.items()},
            **{f"input.{name}": entry["sha256"] for name, entry in inputs.items()},
            **{f"git.{name.removeprefix('git_')}": str(value) for name, value in git.items()},
            **{
                tag: os.environ[name]
                for name, tag in (("DVC_STAGE", "dvc.stage"), ("DVC_EXP_NAME", "dvc.exp"))
                if name in os.environ
            },
            **(tags or {}),
        },
    }
    enabled = enabled and os.environ.get("DMAT_TRACKING", "on") != "off"
    above = (parent or parents.folder_above(home, root or home)) if enabled else None
    if enabled:
        origin.write_patch(root or home, work)
    return Run(home, work, about | {"parent": open_runs.relative(home, above) if above else None}, enabled)


def adopt(home: Path, folder: Path, run: str, name: str) -> None:
    """Makes `folder` remember a run that another machine keeps, so that runs below it find their parent. Does nothing
    where it remembers one."""
    record = RunRecord(folder, stores.identity(home))
    with record.lock:
        record.refresh()
        if record["about"] is None:
            about = {"name": name, "tags": {}, "settings": {}, "started": time.time(), "parent": None}
            record.update(run=run, about=about)


def seconds_before(work: Path) -> float:
    """Time that earlier attempts at this work spent."""
    return float(remembered(work).get("seconds", 0.0))


def remembered_runs(work: Path) -> tuple[str | None, str | None]:
    """Ids of the run of this work and of its parent, as far as a store has them by now."""
    known = remembered(work)
    return known.get("run"), known.get("parent")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings as dotted names; text and lists are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
