"""What is remembered of a tracked run between processes, in the work folder, and how it is sent to MLflow.

A `RunRecord` is enough to make the run, send its metrics and end it, so another process can finish what a dead one or an
outage left.
"""

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from dmat import files, redaction
from dmat.errors import DmatError
from dmat.tracking import dvc_process, origin, overview, registry, stores
from dmat.tracking.registry import RegistryCandidate

_BATCH = 1000  # MLflow's limit of metrics in one request
_DIGEST = 36  # and of characters in the digest of a data set
_LONGEST_PARAMETER = 6000
_LONGEST_TAG = 7900  # characters; MLflow takes 8,000
FRESH: dict[str, Any] = {
    "run": None,  # id in the store
    "parent": None,
    "sent": 0,  # bytes of metrics.jsonl
    "seconds": 0.0,  # that attempts spent so far
    "about": None,  # name, tags, settings, started, parent's folder, behind
    "tags": {},  # that became known while the run goes on
    "ending": None,  # status, error, metrics, pictures, models, ended; None while the run goes on
    "restored": {},  # of a parent: stage instances that DVC did not run again -> the runs that made them
    "stopped": None,  # of a parent: status and error, where `dvc` or a stage ended in a way that no child tells of
}
WORK = "dmat.work"  # tag: the work folder of a run, relative to the project's home where it is below
FILES = ("tracking.json", "tracking.lock", "sending.lock", origin.PATCH)


class RunRecord:
    """The file `tracking.json` of a folder. A run belongs to one store; another store starts anew.

    Several threads and processes may remember the same run (a study and its trials): a change is merged into what the
    file holds by then. lock: held for that alone, never while a store is spoken to.
    """

    def __init__(self, folder: Path, identity: str):
        """identity: the store's, as `stores.identity` has it."""
        self.folder, self._identity = folder, identity
        self._path = folder / "tracking.json"
        self.lock = filelock.FileLock(folder / "tracking.lock", timeout=60)
        self._values = self._read()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def update(self, **values: Any) -> None:
        with self.lock:
            self._values = self._read() | values
            files.write_json(self._path, self._values)

    def refresh(self) -> None:
        """Takes in what others wrote."""
        self._values = self._read()

    def note_a_kill(self, home: Path) -> None:
        """Of the run of a whole `dvc repro` whose process is gone: whether it was killed."""
        about = self["about"] or {}
        if "dvc" in about and dvc_process.was_killed(home / about["root"], about["dvc"]):
            self.update(stopped={"status": "KILLED", "error": "dvc was killed while it reproduced a stage"})

    def _read(self) -> dict[str, Any]:
        known = remembered(self.folder)
        # earlier versions wrote a password into the store's address
        ours = redaction.address(str(known.get("store"))) == self._identity
        return {**FRESH, **(known if ours else {"seconds": known.get("seconds", 0.0)}), "store": self._identity}


def remembered(folder: Path) -> dict[str, Any]:
    """What tracking.json of a folder says. A damaged one says nothing: tracking never stops a run."""
    path = folder / "tracking.json"
    if not path.exists():
        return {}
    try:
        known = files.read_json(path)
    except (DmatError, OSError):
        known = None
    if not isinstance(known, dict):
        warnings.warn(f"{path} is damaged; MLflow gets a new run for this work", stacklevel=2)
        return {}
    return known


class RunUploader:
    """Carries one memory to its store. Every method may raise whatever MLflow raises and can be called again.

    All but the constructor are to be called inside `turn()`.
    """

    def __init__(self, home: Path, record: RunRecord):
        self.home, self.record = home, record
        self._client: Any = None
        self._already: set[tuple[str, int]] | None = None
        self._told: dict[str, str] = {}  # tags that the store has

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other thread or process speaks to the store about this run; what they did before is known."""
        with filelock.FileLock(self.record.folder / "sending.lock", timeout=120):
            self.record.refresh()
            yield

    def connect(self, live: bool) -> None:
        """Makes the run, or finds it. live: it goes on now; otherwise it is only caught up with."""
        self._client, experiment = stores.connect(self.home)
        about = self.record["about"]
        known = stores.run_or_none(self._client, self.record["run"])
        if known is None:
            parent = self._parent(about["parent"])
            tags = about["tags"] | ({"mlflow.parentRunId": parent} if parent else {})
            run = self._client.create_run(
                experiment, start_time=int(1000 * about["started"]), tags=tags, run_name=about["name"]
            )
            self._log_params(run.info.run_id, about["settings"])
            self._log_inputs(run.info.run_id, about.get("inputs", {}))
            self._already = set()
            self.record.update(run=run.info.run_id, parent=parent, sent=0)
            self._tell_parent(about)
        elif live:
            self._client.update_run(self.record["run"], status="RUNNING")
            self.tag("dmat.resumed", "true")
            if "dmat.error" in known.data.tags:  # how an earlier attempt ended
                self._client.delete_tag(self.record["run"], "dmat.error")
        if (known is None or live) and (patch := self.record.folder / origin.PATCH).exists():
            self._client.log_artifact(self.record["run"], str(patch))

    def tag(self, name: str, value: str) -> None:
        self._client.set_tag(self.record["run"], name, value)

    def send_tags(self) -> None:
        """Those that became known since the run began."""
        for name, value in self.record["tags"].items():
            if self._told.get(name) != value:
                self.tag(name, value)
                self._told[name] = value

    def send_system(self, values: Mapping[str, float], seconds: float) -> None:
        """A sample of what the machine is busy with, so many seconds into the run."""
        self._log_now([(name, value, int(seconds)) for name, value in values.items()])

    def send_new(self) -> None:
        """Whole lines of metrics.jsonl beyond what was sent, in batches of whole lines."""
        path = self.record.folder / "metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self.record["sent"])
            new = file.read()
        lines = new[: new.rfind(b"\n") + 1].splitlines(keepends=True)
        for batch in _batches(lines):
            self._log(self._unknown([point for line in batch for point in _points(line)]))
            self.record.update(sent=self.record["sent"] + sum(map(len, batch)))

    def send_end(self, status: str, end: Mapping[str, Any]) -> None:
        """Final numbers, pictures, tags and status. end: as in `ending` of the memory."""
        run = self.record["run"]
        self.send_tags()
        self._log([(name, value, 0) for name, value in end["metrics"].items()])
        for picture in end["pictures"]:
            if (path := self.record.folder / picture).exists():
                self._client.log_artifact(run, str(path))
        if end["error"]:
            self.tag("dmat.error", end["error"][:4000])
        for model in end.get("models", []):
            candidate = RegistryCandidate.of(model)
            candidate = dataclasses.replace(candidate, weights=self.home / candidate.weights)
            if refused := registry.register(self._client, run, candidate):
                self.tag("dmat.not_registered", refused[:_LONGEST_TAG])
                warnings.warn(refused, stacklevel=1)
        self._client.set_terminated(run, status=status, end_time=int(1000 * end["ended"]))

    def ending_by_children(self) -> dict[str, Any]:
        """How a parent whose process is gone ended: status, error, ended. Describes the run by its children too."""
        run = self._client.get_run(self.record["run"])
        experiment = run.info.experiment_id
        ours, children, token = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", list[Any](), None
        while True:
            page = self._client.search_runs([experiment], ours, page_token=token)
            children += page
            token = page.token
            if not token:
                break
        self.tag(overview.NOTE, overview.description(children, self.record["restored"], experiment)[:_LONGEST_TAG])
        ended = max((child.info.end_time or 0 for child in children), default=0) / 1000
        self.record.note_a_kill(self.home)
        return self._together(children) | {"ended": ended or time.time()}

    def _together(self, children: list[Any]) -> dict[str, str]:
        """Status and error of a parent. What is known of its process counts where the children tell nothing worse."""
        stopped = self.record["stopped"] or {"status": "FINISHED", "error": ""}
        finished = {child.info.run_id for child in children if child.info.status == "FINISHED"}
        if stopped["status"] == "KILLED":
            return stopped
        if any(child.info.status == "FAILED" for child in children):
            return stopped | {"status": "FAILED"}
        if len(finished) < len(children):  # one that still goes on has lost its `dvc`
            return stopped | {"status": "KILLED"}
        root = self.record["about"].get("root")
        if root is not None and not stopped["error"] and (lost := dvc_process.unrecorded(self.home / root, finished)):
            return {"status": "FAILED", "error": f"dvc did not record the result of {', '.join(lost)}"}
        return stopped

    def _parent(self, folder: str | None) -> str | None:
        """The run of the folder that the parent is remembered in; made if it is not there yet."""
        if folder is None:
            return None
        uploader = RunUploader(self.home, RunRecord(self.home / folder, self.record["store"]))
        if uploader.record["about"] is None:  # remembered for another store
            return None
        with uploader.turn():
            uploader.connect(live=False)
        run: str = uploader.record["run"]
        return run

    def _tell_parent(self, about: Mapping[str, Any]) -> None:
        """The parent of a whole `dvc repro` links the runs of what this run reads and DVC did not make again."""
        folder, ancestors = about["parent"], about.get("behind") or {}
        mine = self.record["parent"]
        older = {title: one["run"] for title, one in ancestors.items() if one["run"] and one["parent"] != mine}
        if folder is None or mine is None or not older:
            return
        parent = RunRecord(self.home / folder, self.record["store"])
        with parent.lock:
            parent.refresh()
            known = parent["restored"]
            parent.update(restored=known | older)
        for title in [title for title in older if title not in known][: max(0, overview.MOST_TAGS - len(known))]:
            self._client.set_tag(mine, f"{overview.RESTORED}{title}", older[title])

    def _unknown(self, points: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
        """Points that the store has not: a process may have died between sending and remembering that it sent."""
        if self._already is None:
            names = sorted({name for name, _, _ in points})
            histories = [self._client.get_metric_history(self.record["run"], name) for name in names]
            self._already = {(point.key, point.step) for history in histories for point in history}
        return [point for point in points if (point[0], point[2]) not in self._already]

    def _log(self, points: list[tuple[str, float, int]]) -> None:
        try:
            self._log_now(points)
        except Exception:
            self._already = None  # an answer that was lost does not tell what arrived
            raise

    def _log_now(self, points: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = [Metric(name, value, now, step) for name, value, step in points]
        for start in range(0, len(numbers), _BATCH):
            self._client.log_batch(self.record["run"], metrics=numbers[start : start + _BATCH])

    def _log_inputs(self, run: str, inputs: Mapping[str, Mapping[str, str]]) -> None:
        """What the run reads, as MLflow's data sets: path, hash, and what it is used as."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        sets = [
            DatasetInput(
                Dataset(entry["path"], entry["sha256"][:_DIGEST], "local", json.dumps({"uri": entry["path"]})),
                [InputTag("mlflow.data.context", name)],
            )
            for name, entry in inputs.items()
        ]
        if sets:
            self._client.log_inputs(run, sets)

    def _log_params(self, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        pairs = [Param(name, value) for name, value in parameters(settings).items()]
        for start in range(0, len(pairs), 100):
            self._client.log_batch(run, params=pairs[start : start + 100])


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a run's parameters: dotted names, values as text."""
    return {name: str(value)[:_LONGEST_PARAMETER] for name, value in _leaves(settings)}


def _points(line: bytes) -> list[tuple[str, float, int]]:
    """Name, value, step of a record; nothing of a line that a crash of the machine left damaged."""
    try:
        record = json.loads(line)
        return [(name, value, record["images_seen"]) for name, value in record.items() if name != "images_seen"]
    except (ValueError, KeyError, AttributeError):
        return []


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Lines in groups of about as many numbers as one request may hold."""
    group: list[bytes] = []
    held = 0
    for line in lines:
        numbers = line.count(b":")
        if group and held + numbers > _BATCH:
            yield group
            group, held = [], 0
        group.append(line)
        held += numbers
    if group:
        yield group


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
