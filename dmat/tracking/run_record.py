"""The record of a tracked run in its work folder, and its upload to MLflow.

A `RunRecord` holds all that is needed to create the run, send its metrics and end it. So another process can complete
the upload after the death of a process or an outage of the store.
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
from dmat.workspace import InputRecord

_METRICS_PER_REQUEST = 1000  # limit of MLflow
_MAX_DIGEST = 36  # characters of the digest of a data set, limit of MLflow
_MAX_PARAMETER = 6000  # characters; MLflow allows 6,000
_MAX_TAG = 7900  # characters; MLflow allows 8,000
DEFAULTS: dict[str, Any] = {
    "run": None,  # id in the store
    "parent": None,  # id of the parent run
    "sent": 0,  # bytes of metrics.jsonl that the store has
    "sent_system": 0,  # bytes of system.jsonl that the store has
    "seconds": 0.0,  # duration of all attempts so far
    # name, tags, settings, inputs, started, git, code, folder of the parent's record, behind (the ancestors); of a
    # parent also root (the folder with dvc.lock) and dvc (its pid)
    "about": None,
    "tags": {},  # set after the start of the run
    "ending": None,  # status, error, metrics, pictures, models, ended; None while the run is active
    "announced": None,  # `started` of the attempt that the store has as active
    "problem": "",  # why the last attempt to send failed
    "warnings": [],  # sentences for the user about what the store did not take
    "restored": {},  # of a parent: stage instances that DVC restored -> ids of the runs that computed them
    "stopped": None,  # of a parent: status and error if `dvc` or a stage failed in a way that no child run shows
}
WORK = "dmat.work"  # tag: the work folder of a run, relative to the project's home where it is below
SYSTEM = "system/"  # MLflow's group of system metrics
RECORD, METRICS_LOG, SYSTEM_LOG = "tracking.json", "metrics.jsonl", "system.jsonl"  # in the folder of a run
FILES = (RECORD, SYSTEM_LOG, "tracking.lock", "sending.lock", origin.PATCH)


class RunDeletedError(DmatError):
    """The run was deleted in its store, which accepts no change of it any more."""


class RunRecord:
    """The file `tracking.json` of a folder. A record belongs to one store; with another store it starts empty,
    but for `seconds`.

    Several threads and processes may hold the record of one run (a study and its trials), so `update` merges its values
    into the present content of the file. lock: held only for that, never during requests to a store.
    """

    def __init__(self, folder: Path, store_identity: str):
        """store_identity: see `stores.identity`."""
        self.folder, self._identity = folder, store_identity
        self._path = folder / RECORD
        self.lock = filelock.FileLock(folder / "tracking.lock", timeout=60)
        self._values = self._read()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def update(self, **values: Any) -> None:
        """Writes these values into the file; all others stay as they are there."""
        with self.lock:
            self._values = self._read() | values
            files.write_json(self._path, self._values)

    def refresh(self) -> None:
        """Reads the file again, for what other processes wrote."""
        self._values = self._read()

    def detect_kill(self, home: Path) -> None:
        """Sets `stopped` to KILLED if the ended `dvc` process of this parent run was killed."""
        about = self["about"] or {}
        if "dvc" in about and dvc_process.was_killed(home / about["root"], about["dvc"]):
            self.update(stopped={"status": "KILLED", "error": "dvc was killed while it reproduced a stage"})

    def _read(self) -> dict[str, Any]:
        values = read_tracking(self.folder)
        # earlier versions wrote a password into the store's address
        same_store = redaction.address(str(values.get("store"))) == self._identity
        return {
            **DEFAULTS,
            **(values if same_store else {"seconds": values.get("seconds", 0.0)}),
            "store": self._identity,
        }


def read_tracking(folder: Path) -> dict[str, Any]:
    """Content of tracking.json of a folder; empty if it is missing. A damaged file gives a warning and an empty result,
    because tracking never stops a run."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        values = files.read_json(path)
    except (DmatError, OSError):
        values = None
    if not isinstance(values, dict):
        warnings.warn(f"{path} is damaged; MLflow gets a new run for this work", stacklevel=2)
        return {}
    return values


class RunUploader:
    """Uploads the record of one run to its store. Every method may raise any exception of MLflow and can be repeated.

    Call all methods but the constructor inside `exclusive()`.
    """

    def __init__(self, home: Path, record: RunRecord):
        self.home, self.record = home, record
        self._client: Any = None
        self._is_connected = False
        self._sent_points: set[tuple[str, int]] | None = None  # name and step; None: ask the store
        self._sent_tags: dict[str, str] = {}

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Excludes other threads and processes from uploading this run; first reads what they wrote into the record.

        An error of MLflow in the block becomes a RunDeletedError if it is because the run was deleted there.
        """
        with filelock.FileLock(self.record.folder / "sending.lock", timeout=120):
            self.record.refresh()
            try:
                yield
            except Exception as error:
                if self._was_deleted():
                    name = self.record["about"]["name"]
                    raise RunDeletedError(
                        f"{name}: its run was deleted in MLflow; it is not tracked further"
                    ) from error
                raise

    def _was_deleted(self) -> bool:
        with contextlib.suppress(Exception):  # the store does not answer
            run = stores.run_or_none(self._client, self.record["run"])
            return run is not None and stores.is_deleted(run)
        return False

    def connect(self) -> None:
        """Creates the run in the store, or finds it and tells the store that it was started again."""
        about = self.record["about"]
        is_announced = self.record["announced"] == about["started"]
        if self._is_connected and is_announced:
            return
        self._client, experiment = stores.connect(self.home)
        existing_run = stores.run_or_none(self._client, self.record["run"])
        if existing_run is not None and stores.is_deleted(existing_run) and not is_announced:
            existing_run = None  # the work was started again
        if existing_run is None:
            parent_run_id = self._parent_run_id(about["parent"])
            tags = about["tags"] | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
            run = self._client.create_run(
                experiment, start_time=int(1000 * about["started"]), tags=tags, run_name=about["name"]
            )
            self._log_params(run.info.run_id, about["settings"])
            self._log_inputs(run.info.run_id, about.get("inputs", {}))
            self._sent_points, self._sent_tags = set(), {}
            self.record.update(run=run.info.run_id, parent=parent_run_id, sent=0, sent_system=0)
            self._link_restored_runs(about)
        elif not is_announced:
            self._client.update_run(self.record["run"], status="RUNNING")
            self.tag("dmat.resumed", "true")
            if "dmat.error" in existing_run.data.tags:  # of an earlier attempt
                self._client.delete_tag(self.record["run"], "dmat.error")
        if (existing_run is None or not is_announced) and (patch := self.record.folder / origin.PATCH).exists():
            self._client.log_artifact(self.record["run"], str(patch))
        self.record.update(announced=about["started"])
        self._is_connected = True

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        self._client.set_tag(self.record["run"], name, value)

    def send_tags(self) -> None:
        """Sends the tags that were set since the run began."""
        for name, value in self.record["tags"].items():
            if self._sent_tags.get(name) != value:
                self.tag(name, value)
                self._sent_tags[name] = value

    def send_new_metrics(self) -> None:
        """Sends the complete lines of metrics.jsonl and system.jsonl that were not sent yet."""
        for batch in self._unsent(METRICS_LOG, "sent"):
            self._log(self._without_sent([point for line in batch for point in _metric_points(line, "images_seen")]))
            self.record.update(sent=self.record["sent"] + sum(map(len, batch)))
        for batch in self._unsent(SYSTEM_LOG, "sent_system"):  # a sample that arrives twice does no harm
            self._log_now([point for line in batch for point in _metric_points(line, "seconds")])
            self.record.update(sent_system=self.record["sent_system"] + sum(map(len, batch)))

    def _unsent(self, name: str, sent: str) -> Iterator[list[bytes]]:
        """Batches of complete lines of a file. sent: key of the record that says how many bytes the store has."""
        path = self.record.folder / name
        if path.exists():
            with open(path, "rb") as file:
                file.seek(self.record[sent])
                unsent = file.read()
            yield from _batches(unsent[: unsent.rfind(b"\n") + 1].splitlines(keepends=True))

    def send_end(self, status: str, ending: Mapping[str, Any]) -> None:
        """Sends final metrics, pictures, tags, models and the status. ending: see `ending` of the record.

        A metric with a curve is not sent again: MLflow would draw it at step 0, before the curve.
        """
        run = self.record["run"]
        self.send_tags()
        curves = self._names_of_curves()
        self._log([(name, value, 0) for name, value in ending["metrics"].items() if name not in curves])
        for picture in ending["pictures"]:
            if (path := self.record.folder / picture).exists():
                self._client.log_artifact(run, str(path))
        if ending["error"]:
            self.tag("dmat.error", ending["error"][:4000])
        for model in ending.get("models", []):
            candidate = RegistryCandidate.from_plain(model)
            candidate = dataclasses.replace(candidate, weights=self.home / candidate.weights)
            if problem := registry.register(self._client, run, candidate):
                self.tag("dmat.not_registered", problem[:_MAX_TAG])
                self.record.update(warnings=[*self.record["warnings"], problem])
        self._client.set_terminated(run, status=status, end_time=int(1000 * ending["ended"]))

    def _names_of_curves(self) -> set[str]:
        path = self.record.folder / METRICS_LOG
        lines = path.read_bytes().splitlines() if path.exists() else []
        return {name for line in lines for name, _, _ in _metric_points(line, "images_seen")}

    def ending_by_children(self) -> dict[str, Any]:
        """Status, error and end time of a parent whose process has ended.

        Also gives the run the descriptions of its children and, as its headlines, the metrics of those described.
        """
        run = self._client.get_run(self.record["run"])
        experiment = run.info.experiment_id
        condition = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        children = stores.search_runs(self._client, experiment, condition)
        self.tag(
            overview.DESCRIPTION_TAG, overview.description(children, self.record["restored"], experiment)[:_MAX_TAG]
        )
        described = [child for child in children if overview.DESCRIPTION_TAG in child.data.tags]
        headlines = {name: value for child in described for name, value in child.data.metrics.items()}
        self._log([(name, value, 0) for name, value in headlines.items() if not name.startswith(SYSTEM)])
        last_end = max((child.info.end_time or 0 for child in children), default=0) / 1000
        self.record.detect_kill(self.home)
        return self._combined_status(children) | {"ended": last_end or time.time()}

    def _combined_status(self, children: list[Any]) -> dict[str, str]:
        """Status and error of a parent: those of its process, unless the children ended with a worse status."""
        stopped = self.record["stopped"] or {"status": "FINISHED", "error": ""}
        finished = {child.info.run_id for child in children if child.info.status == "FINISHED"}
        if stopped["status"] == "KILLED":
            return stopped
        if any(child.info.status == "FAILED" for child in children):
            return stopped | {"status": "FAILED"}
        if len(finished) < len(children):  # one was killed, or is still running although its `dvc` has ended
            return stopped | {"status": "KILLED"}
        root = self.record["about"].get("root")
        if (
            root is not None
            and not stopped["error"]
            and (missing := dvc_process.unrecorded(self.home / root, finished))
        ):
            return {"status": "FAILED", "error": f"dvc did not record the result of {', '.join(missing)}"}
        return stopped

    def _parent_run_id(self, folder: str | None) -> str | None:
        """Run id of the parent whose record is in `folder`; the run is created if it is missing in the store."""
        if folder is None:
            return None
        uploader = RunUploader(self.home, RunRecord(self.home / folder, self.record["store"]))
        if uploader.record["about"] is None:  # the record belongs to another store
            return None
        with uploader.exclusive():
            uploader.connect()
            return None if uploader._was_deleted() else uploader.record["run"]

    def _link_restored_runs(self, about: Mapping[str, Any]) -> None:
        """Links, in the parent run of a whole `dvc repro`, the runs of this run's ancestors that DVC restored."""
        folder, ancestors = about["parent"], about.get("behind") or {}
        parent_run_id = self.record["parent"]
        restored_runs = {
            title: ancestor["run"]
            for title, ancestor in ancestors.items()
            if ancestor["run"] and ancestor["parent"] != parent_run_id
        }
        if folder is None or parent_run_id is None or not restored_runs:
            return
        parent_record = RunRecord(self.home / folder, self.record["store"])
        with parent_record.lock:
            parent_record.refresh()
            linked = parent_record["restored"]
            parent_record.update(restored=linked | restored_runs)
        for title in [title for title in restored_runs if title not in linked][
            : max(0, overview.MAX_RESTORED_TAGS - len(linked))
        ]:
            self._client.set_tag(parent_run_id, f"{overview.RESTORED_PREFIX}{title}", restored_runs[title])

    def _without_sent(self, points: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
        """The points that the store lacks: a process may have died between sending points and recording it."""
        if self._sent_points is None:
            names = sorted({name for name, _, _ in points})
            histories = [self._client.get_metric_history(self.record["run"], name) for name in names]
            self._sent_points = {(point.key, point.step) for history in histories for point in history}
        return [point for point in points if (point[0], point[2]) not in self._sent_points]

    def _log(self, points: list[tuple[str, float, int]]) -> None:
        try:
            self._log_now(points)
        except Exception:
            self._sent_points = None  # it is unknown which points arrived
            raise

    def _log_now(self, points: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metric_list = [Metric(name, value, now, step) for name, value, step in points]
        for start in range(0, len(metric_list), _METRICS_PER_REQUEST):
            self._client.log_batch(self.record["run"], metrics=metric_list[start : start + _METRICS_PER_REQUEST])

    def _log_inputs(self, run: str, inputs: Mapping[str, InputRecord]) -> None:
        """Logs the inputs of the run as MLflow data sets: path, hash, and the name of the input as context."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [
            DatasetInput(
                Dataset(entry["path"], entry["sha256"][:_MAX_DIGEST], "local", json.dumps({"uri": entry["path"]})),
                [InputTag("mlflow.data.context", name)],
            )
            for name, entry in inputs.items()
        ]
        if datasets:
            self._client.log_inputs(run, datasets)

    def _log_params(self, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        param_list = [Param(name, value) for name, value in parameters(settings).items()]
        for start in range(0, len(param_list), 100):
            self._client.log_batch(run, params=param_list[start : start + 100])


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as parameters of a run: dotted name -> value as text."""
    return {name: as_written(str(value))[:_MAX_PARAMETER] for name, value in _leaves(settings)}


def as_written(value: str) -> str:
    """A value as people write it: 3 and not 3.0, because MLflow compares parameters as text."""
    return value.removesuffix(".0")


def _metric_points(line: bytes, step: str) -> list[tuple[str, float, int]]:
    """Name, value and step of each number in a line of JSON; empty for a damaged line. step: name of the step in it."""
    try:
        record = files.parse_json(line)
        return [(name, float(value), int(record[step])) for name, value in record.items() if name != step]
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _batches(lines: list[bytes]) -> Iterator[list[bytes]]:
    """Groups lines so that each group has about as many numbers as one request may hold."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        numbers = line.count(b":")
        if group and size + numbers > _METRICS_PER_REQUEST:
            yield group
            group, size = [], 0
        group.append(line)
        size += numbers
    if group:
        yield group


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
