"""The tracked run of one stage instance: the interface of tracking for jobs."""

import contextlib
import dataclasses
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dmat.errors import DmatError, Interrupted
from dmat.redaction import redacted
from dmat.tracking import open_runs, origin, overview, parents, sender, stores
from dmat.tracking.registry import RegistryCandidate
from dmat.tracking.run_record import METRICS_LOG, SYSTEM_LOG, WORK, RunRecord, read_tracking
from dmat.tracking.system import SystemMonitor

if TYPE_CHECKING:
    from dmat.workspace import CodeOrigin, InputRecord, RunOrigin

_SAMPLE_EVERY = 10.0  # seconds between two samples of system metrics
_LOOK_EVERY = 2.0  # seconds between two looks at the sending process, which tries again after five seconds
_MAX_SENDERS = 3  # sending processes that a run starts if they die
_SENDER_TIMEOUT = 120.0  # seconds that the end of a stage waits until its run was sent or the store failed
_POLL_SECONDS = 0.05  # while it waits
_unreachable_stores = set[str]()  # did not answer last time: warned about once, and runs do not wait for them


class Run:
    """A tracked run. As a context manager it ends with the status that fits the end of the block.

    FINISHED, KILLED after Interrupted, KeyboardInterrupt or SystemExit, FAILED after any other exception.
    """

    def __init__(self, home: Path, folder: Path, about: dict[str, Any], enabled: bool = True):
        self.home, self.folder = home, folder
        self._record = RunRecord(folder, stores.identity(home))
        self._store = stores.masked_uri(home)
        self._about, self._enabled = about, enabled
        self._is_closing, self._looking = threading.Event(), threading.Lock()
        self._final_values: tuple[dict[str, float], list[str]] = ({}, [])
        self._tags: dict[str, str] = {}
        self._models: list[dict[str, Any]] = []
        self._status: tuple[str, str] | None = None
        self._started = time.time()
        self._lost_senders = self._shown_warnings = 0

    def __enter__(self) -> Self:
        if self._enabled:
            open_runs.write(self.home, self.folder, os.getpid(), attempt=self._about["started"])
            self._record.update(about=self._about, ending=None, tags=self._tags, problem="", warnings=[])
            sender.ensure(self.home, self.folder)
            threading.Thread(target=self._monitor, daemon=True).start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        status = (
            "FINISHED"
            if error_type is None
            else "KILLED"
            if issubclass(error_type, (Interrupted, KeyboardInterrupt, SystemExit))
            else "FAILED"
        )
        status, reason = self._status or (status, str(error) if error else "")
        metrics, pictures = self._final_values
        ending = {
            "status": status,
            "error": redacted(reason),
            "metrics": metrics,
            "pictures": pictures,
            "models": self._models,
            "ended": time.time(),
        }
        try:
            seconds = self._record["seconds"] + time.time() - self._started
            self._record.update(seconds=seconds, ending=ending, tags=self._tags, problem="")
        finally:
            self._is_closing.set()
            if self._enabled:
                open_runs.mark_ended(self.home, self.folder)
                if self._store not in _unreachable_stores:
                    self._wait_until(lambda: not open_runs.exists(self.home, self.folder))

    def finish_with(self, metrics: Mapping[str, Any], pictures: list[Path]) -> None:
        """Sets final metrics and pictures (paths in the work folder), which are sent when the block ends.

        Whole numbers of a run with curves, such as its number of parameters, become tags: MLflow sorts charts by name,
        and its page would begin with bars of constants.
        """
        values = dict(flatten(metrics))
        if (self.folder / METRICS_LOG).exists():
            for name in [name for name, value in values.items() if isinstance(value, int)]:
                self.tag(f"constant.{name}", str(values.pop(name)))
        self._final_values = (values, [str(path.relative_to(self.folder)) for path in pictures])

    def end_as(self, status: str, reason: str) -> None:
        """Sets the final status and its reason, whatever the end of the block."""
        self._status = (status, reason)

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the active run."""
        self._tags[name] = value
        if self._enabled:
            self._record.update(tags=self._tags)

    def describe(self, text: str) -> None:
        """Sets the description (Markdown) that MLflow shows on the page of the run."""
        self.tag(overview.DESCRIPTION_TAG, text)

    def register(self, candidate: RegistryCandidate) -> None:
        """Adds a model for the registry, which is sent when the block ends."""
        weights = candidate.weights.resolve()
        if weights.is_relative_to(self.home):  # so that a project may be moved
            weights = weights.relative_to(self.home)
        self._models.append(dataclasses.replace(candidate, weights=weights).plain())

    def provenance(self) -> "RunOrigin":
        """Where to look this result up: run ids, work folder, commit, end time (UTC), cores. Not part of any hash.

        The run ids are None if the store is unreachable; the record in the work folder has them later
        (`dmat.report.lineage.mlflow_runs`).
        """
        if self._enabled:
            self._wait_until(self._is_announced)
        code: CodeOrigin = self._about["git"] | self._about["code"]
        return {
            "mlflow_run": self._record["run"],
            "mlflow_parent": self._record["parent"],
            "work": open_runs.relative(self.home, self.folder),
            **code,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host_cores": os.cpu_count(),
        }

    def _is_announced(self) -> bool:
        return bool(self._record["announced"] == self._about["started"])

    def _monitor(self) -> None:
        """The thread that looks at the sending process and samples system metrics until the block ends."""
        monitor, next_sample = SystemMonitor(), time.monotonic() + _SAMPLE_EVERY
        while not self._is_closing.wait(_LOOK_EVERY):
            self._look()
            if time.monotonic() < next_sample:
                continue
            next_sample += _SAMPLE_EVERY
            sample = {"seconds": int(time.time() - self._started), **monitor.sample()}
            path = self.folder / SYSTEM_LOG
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # a full disk stops no run
                file.write(json.dumps(sample) + "\n")

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        """Waits until the sending process has done something, has failed or does not run, for 120 s at most."""
        deadline, was_done = time.monotonic() + _SENDER_TIMEOUT, is_done()
        while self._look() and not was_done and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            was_done = is_done()  # before the last look, which shows its warnings

    def _look(self) -> bool:
        """Tells the user what the sending process recorded, and starts another if it died. Returns whether it works."""
        with self._looking:
            was_lost = False
            with contextlib.suppress(DmatError, OSError):  # a full disk
                was_lost = self._lost_senders < _MAX_SENDERS and sender.ensure(self.home, self.folder)
            self._record.refresh()
            for text in self._record["warnings"][self._shown_warnings :]:
                warnings.warn(text, stacklevel=1)
                self._shown_warnings += 1
            if problem := self._record["problem"]:
                if self._store not in _unreachable_stores:
                    _unreachable_stores.add(self._store)
                    warnings.warn(
                        f"MLflow at {self._store} cannot be reached ({problem}); the run continues, its metrics are in "
                        f"{self.folder / 'metrics.jsonl'} and are sent later",
                        stacklevel=1,
                    )
                return False
            if self._is_announced():
                _unreachable_stores.discard(self._store)
            if was_lost:
                self._lost_senders += 1
                warnings.warn(
                    "the process that sends to MLflow ended; the run continues, and another one was started",
                    stacklevel=1,
                )
            return self._lost_senders < _MAX_SENDERS


def open_run(
    home: Path,
    work: Path,
    *,
    stage: str,
    instance_name: str,
    settings: Mapping[str, Any],
    context: Mapping[str, Any] | None = None,
    inputs: "Mapping[str, InputRecord]",
    compute: Mapping[str, Any],
    root: Path | None = None,
    ancestors: Mapping[str, Mapping[str, str | None]] | None = None,
    parent: Path | None = None,
    fingerprint: str | None = None,
    tags: Mapping[str, str] | None = None,
    enabled: bool = True,
) -> Run:
    """The tracked run of a stage instance; resumed if `work` has a record. DMAT_TRACKING=off disables tracking.

    context: further parameters of the run, for searches. inputs: by name. compute: device, precision, threads. root:
    the work tree whose code and parameters are used, by default `home`. ancestors: stage instances that the inputs come
    from -> their `run` and its `parent`. parent: folder with the record of the parent run, by default that of the `dvc`
    process above, if any. fingerprint: of settings and inputs, if the work has its own.
    """
    git = origin.git(root or home)
    software = origin.software()
    about = {
        "name": f"{stage} {instance_name}",
        "settings": {**(context or {}), **settings},
        "inputs": {name: dict(source) for name, source in inputs.items()},
        "behind": {title: dict(ancestor) for title, ancestor in (ancestors or {}).items()},
        "started": time.time(),
        "git": git,
        "code": {} if origin.holds_code(root or home) else {"dmat": software["dmat"]},
        "tags": {
            "dmat.stage": stage,
            "dmat.instance": instance_name,
            **({"dmat.fingerprint": fingerprint} if fingerprint else {}),
            WORK: open_runs.relative(home, work),
            **origin.user_and_source(f"dmat {stage.replace('_', '-')}", git),
            **{f"compute.{name}": str(value) for name, value in compute.items()},
            **{f"software.{name}": version for name, version in software.items()},
            **{f"input.{name}": source["sha256"] for name, source in inputs.items()},
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
    parent_folder = (parent or parents.folder_above(home, root or home)) if enabled else None
    if enabled:
        origin.write_patch(root or home, work)
    return Run(
        home, work, about | {"parent": open_runs.relative(home, parent_folder) if parent_folder else None}, enabled
    )


def seconds_before(work: Path) -> float:
    """Seconds that earlier attempts at this work took."""
    return float(read_tracking(work).get("seconds", 0.0))


def recorded_runs(work: Path) -> tuple[str | None, str | None]:
    """Ids of the run of this work and of its parent; None where the store does not have them yet."""
    tracking = read_tracking(work)
    return tracking.get("run"), tracking.get("parent")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted name and value of each number in nested mappings; text, booleans and lists are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
