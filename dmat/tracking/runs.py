"""The tracked run of one stage instance: the interface of tracking for jobs."""

import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dmat.errors import Interrupted
from dmat.redaction import redacted
from dmat.tracking import open_runs, origin, overview, parents, sender, stores
from dmat.tracking.registry import RegistryCandidate
from dmat.tracking.run_record import WORK, RunRecord, read_tracking
from dmat.tracking.system import SystemMonitor

if TYPE_CHECKING:
    from dmat.workspace import CodeOrigin, InputRecord, RunOrigin

_SAMPLE_EVERY = 10.0  # seconds between two samples of system metrics
_MAX_SENDERS = 3  # senders that a run starts before it ends, if they die
_SENDER_TIMEOUT = 120.0  # seconds that the end of a stage waits for the sender to answer: sent, failed or ended
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
        self._is_closing, self._answered, self._end_sent = threading.Event(), threading.Event(), threading.Event()
        self._final_values: tuple[dict[str, float], list[str]] = ({}, [])
        self._tags: dict[str, str] = {}
        self._models: list[dict[str, Any]] = []
        self._status: tuple[str, str] | None = None
        self._started = time.time()
        self._sender_starts = 0

    def __enter__(self) -> Self:
        if self._enabled:
            self._record.update(about=self._about, ending=None, tags=self._tags)
            open_runs.write(self.home, self.folder, os.getpid())
            self._start_sender()
            threading.Thread(target=self._sample_system, daemon=True).start()
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
            self._record.update(
                seconds=self._record["seconds"] + time.time() - self._started, ending=ending, tags=self._tags
            )
        finally:
            self._is_closing.set()
            if self._enabled:
                if self._sender.has_ended:
                    self._start_sender()
                self._sender.close(self.folder)
                if self._store not in _unreachable_stores:
                    self._end_sent.wait(_SENDER_TIMEOUT)

    def finish_with(self, metrics: Mapping[str, Any], pictures: list[Path]) -> None:
        """Sets final metrics and pictures (paths in the work folder), which are sent when the block ends."""
        self._final_values = (dict(flatten(metrics)), [str(path.relative_to(self.folder)) for path in pictures])

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
            self._answered.wait(_SENDER_TIMEOUT)
            self._record.refresh()
        code: CodeOrigin = self._about["git"] | self._about["code"]
        return {
            "mlflow_run": self._record["run"],
            "mlflow_parent": self._record["parent"],
            "work": open_runs.relative(self.home, self.folder),
            **code,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host_cores": os.cpu_count(),
        }

    def _start_sender(self) -> None:
        self._end_sent.clear()
        self._sender_starts += 1
        self._sender = sender.shared_sender()
        self._sender.open(self.home, self.folder, stores.identity(self.home), self._handle_answer)

    def _sample_system(self) -> None:
        """The thread that samples system metrics until the block ends, and starts a new sender if one died."""
        monitor = SystemMonitor()
        while not self._is_closing.wait(_SAMPLE_EVERY):
            if self._sender.has_ended and self._sender_starts < _MAX_SENDERS:
                self._start_sender()
            self._sender.send_system_metrics(self.folder, monitor.sample(), time.time() - self._started)

    def _handle_answer(self, event: str, text: str) -> None:
        """Handles an answer of the sender about this run. event: `what` of a `sender.Answer`; text: its text."""
        if event == "warned":
            warnings.warn(text, stacklevel=1)
            return
        if event == "reached":
            _unreachable_stores.discard(self._store)
        elif event == "gone":
            warnings.warn(f"{text}; the run continues with a new one", stacklevel=1)
        elif event == "failed" and self._store not in _unreachable_stores:
            _unreachable_stores.add(self._store)
            warnings.warn(
                f"MLflow at {self._store} cannot be reached ({text}); the run continues, its metrics are in "
                f"{self.folder / 'metrics.jsonl'} and are sent later",
                stacklevel=1,
            )
        self._answered.set()
        if event in ("ended", "gone"):
            self._end_sent.set()


def open_run(
    home: Path,
    work: Path,
    *,
    stage: str,
    instance_name: str,
    settings: Mapping[str, Any],
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

    inputs: by name. compute: device, precision, threads. root: the work tree whose code and parameters
    are used, by default `home`. ancestors: stage instances that the inputs come from -> their `run` and its `parent`.
    parent: folder with the record of the parent run, by default that of the `dvc` process above, if any. fingerprint:
    of settings and inputs, if the work has its own.
    """
    git = origin.git(root or home)
    software = origin.software()
    about = {
        "name": f"{stage} {instance_name}",
        "settings": dict(settings),
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


def adopt(home: Path, folder: Path, run: str, name: str) -> None:
    """Writes a record of a run that another machine executes, so that child runs find their parent. Does nothing if
    `folder` has a record."""
    record = RunRecord(folder, stores.identity(home))
    with record.lock:
        record.refresh()
        if record["about"] is None:
            about = {"name": name, "tags": {}, "settings": {}, "started": time.time(), "parent": None}
            record.update(run=run, about=about)


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
            yield f"{prefix}{name}", float(value)
