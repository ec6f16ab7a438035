"""MLflow, and nobody else imports it: one run per stage instance, all runs of one `dvc repro` under one parent.

Training never waits for it. Metrics are in `metrics.jsonl` first; a background thread sends what is new in batches
and notes how far it came in `tracking.json`, so an outage loses nothing and a resumed run goes on in the same MLflow
run. Runs whose process died are ended as KILLED by the next command (`reap`).
"""

import contextlib
import json
import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import filelock
import psutil

from dmat import files
from dmat.errors import Interrupted

EXPERIMENT = "dmat"
_SEND_EVERY = 5.0  # seconds
_BATCH = 1000  # MLflow's limit of metrics in one request
_PATIENCE = 20.0  # seconds that the end of a stage waits for a slow server

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


def store(home: Path) -> str:
    """MLFLOW_TRACKING_URI, or the embedded SQLite store at an absolute path."""
    return _server() or f"sqlite:///{home / 'mlruns' / 'mlflow.db'}"


def _server() -> str:
    """MLFLOW_TRACKING_URI, where unset and empty mean the same."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def artifact_folder(home: Path) -> Path:
    return home / "mlruns" / "artifacts"


class Run:
    """The tracked run of one stage instance. As a context it ends with the status that fits how the block ended."""

    def __init__(self, home: Path, work: Path, tags: dict[str, str], settings: Mapping[str, Any], enabled: bool = True):
        self.home, self.work, self.tags, self.settings = home, work, tags, settings
        self._memory = _Memory(work / "tracking.json", store(home))
        self._client: Any = None
        self._status = "FAILED"
        self._closing, self._connected = threading.Event(), threading.Event()
        self._final: tuple[dict[str, float], list[Path]] = ({}, [])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._enabled, self._started = enabled, time.time()

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._memory.update(seconds=self._memory["seconds"] + time.time() - self._started)
        self._status = (
            "FINISHED"
            if kind is None
            else "KILLED"
            if issubclass(kind, (Interrupted, KeyboardInterrupt, SystemExit))
            else "FAILED"
        )
        self._closing.set()
        if self._enabled:
            self._thread.join(_PATIENCE)

    def finish_with(self, metrics: Mapping[str, Any], pictures: list[Path]) -> None:
        """Final numbers and pictures, sent when the block ends."""
        self._final = (dict(flatten(metrics)), pictures)

    def provenance(self) -> dict[str, Any]:
        """Where this result can be looked up: not part of any hash."""
        if self._enabled:
            self._connected.wait(_PATIENCE)
        return {
            "mlflow_run": self._memory["run"],
            "mlflow_parent": self._memory["parent"],
            **_git(self.work),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host_cores": os.cpu_count(),
        }

    def _serve(self) -> None:
        """The thread: connect, then send what is new until the block ends. Never raises."""
        try:
            self._connect()
            self._connected.set()
            while not self._closing.wait(_SEND_EVERY):
                self._send_new()
            self._send_new()
            self._send_final()
        except Exception as error:  # any failure of tracking must leave the run alone
            warnings.warn(
                f"MLflow at {store(self.home)} cannot be reached ({str(error).splitlines()[0][:200]}); the run goes "
                f"on, its metrics are in {self.work / 'metrics.jsonl'}",
                stacklevel=1,
            )
        finally:
            self._connected.set()

    def _connect(self) -> None:
        self._client, experiment = connect(self.home)
        reap(self.home, self._client)
        run_id = self._memory["run"]
        if run_id is None or _run_or_none(self._client, run_id) is None:
            self._memory.update(sent=0)
            parent = _parent(self.home, self._client, experiment)
            tags = self.tags | ({"mlflow.parentRunId": parent} if parent else {})
            run = self._client.create_run(
                experiment, tags=tags, run_name=f"{tags['dmat.stage']} {tags['dmat.instance']}"
            )
            run_id = run.info.run_id
            self._memory.update(run=run_id, parent=parent)
            _log_params(self._client, run_id, self.settings)
        else:
            self._client.update_run(run_id, status="RUNNING")
            self._client.set_tag(run_id, "dmat.resumed", "true")
        _note_active(self.home, run_id, os.getpid(), parent=False)

    def _send_new(self) -> None:
        """Whole lines of metrics.jsonl beyond what was sent, as one batch per 1,000 numbers."""
        from mlflow.entities import Metric

        path = self.work / "metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._memory["sent"])
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        now = int(time.time() * 1000)
        numbers = [
            Metric(name, value, now, record["images_seen"])
            for record in map(json.loads, new.splitlines())
            for name, value in record.items()
            if name != "images_seen"
        ]
        for start in range(0, len(numbers), _BATCH):
            self._client.log_batch(self._memory["run"], metrics=numbers[start : start + _BATCH])
        if new:
            self._memory.update(sent=self._memory["sent"] + len(new))

    def _send_final(self) -> None:
        from mlflow.entities import Metric

        run_id, (metrics, pictures) = self._memory["run"], self._final
        now = int(time.time() * 1000)
        numbers = [Metric(name, value, now, 0) for name, value in metrics.items()]
        for start in range(0, len(numbers), _BATCH):
            self._client.log_batch(run_id, metrics=numbers[start : start + _BATCH])
        for picture in pictures:
            self._client.log_artifact(run_id, str(picture))
        self._client.set_terminated(run_id, status=self._status)
        _forget_active(self.home, run_id)


def open_run(
    home: Path,
    work: Path,
    *,
    stage: str,
    instance: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    compute: Mapping[str, Any],
) -> Run:
    """The run of a stage instance; resumed where `work` remembers one. DMAT_TRACKING=off makes it silent."""
    git = _git(work)
    tags = {
        "dmat.stage": stage,
        "dmat.instance": instance,
        "dmat.fingerprint": work.name.rpartition("-")[2],
        **{f"compute.{name}": str(value) for name, value in compute.items()},
        **{f"input.{name}": entry["sha256"] for name, entry in inputs.items()},
        **{f"git.{name.removeprefix('git_')}": str(value) for name, value in git.items()},
        **{
            tag: os.environ[name]
            for name, tag in (("DVC_STAGE", "dvc.stage"), ("DVC_EXP_NAME", "dvc.exp"))
            if name in os.environ
        },
    }
    return Run(home, work, tags, settings, enabled=os.environ.get("DMAT_TRACKING", "on") != "off")


def seconds_before(work: Path) -> float:
    """Time that earlier attempts at this work spent."""
    path = work / "tracking.json"
    return float(files.read_json(path)["seconds"]) if path.exists() else 0.0


def connect(home: Path) -> tuple[Any, str]:
    """An MLflow client and the id of the experiment. Creates the embedded store under a lock, since two processes that
    open a fresh SQLite store at once do not both survive."""
    from mlflow import MlflowClient

    folder = home / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "create.lock", timeout=60), _quiet():
        client = MlflowClient(store(home))
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            where = None if _server() else artifact_folder(home).as_uri()
            return client, client.create_experiment(EXPERIMENT, artifact_location=where)
        return client, found.experiment_id


def reap(home: Path, client: Any = None) -> list[str]:
    """Ends tracked runs of this machine whose process is gone; returns a line for each.

    A stage ends KILLED; a parent ends FINISHED if all its children did, else FAILED.
    """
    ended = []
    for path in sorted((home / "mlruns" / "active").glob("*.json")):
        note = files.read_json(path)
        if note["store"] != store(home) or _alive(note["pid"], note["started"]):
            continue
        if client is None:
            client, _ = connect(home)
        run = _run_or_none(client, path.stem)
        if run is None:  # the store was replaced by another one at the same address
            path.unlink(missing_ok=True)
            continue
        status = "KILLED"
        if note["parent"]:
            children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{path.stem}'")
            status = "FINISHED" if all(child.info.status == "FINISHED" for child in children) else "FAILED"
        if run.info.status == "RUNNING":
            client.set_terminated(path.stem, status=status)
            ended.append(f"{run.info.run_name}: {status}")
        path.unlink(missing_ok=True)
    return ended


def _run_or_none(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings as dotted names; text and lists are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


class _Memory:
    """What the next attempt must know about the tracked run; lives in the work folder. Runs belong to one store."""

    def __init__(self, path: Path, address: str):
        self._path = path
        fresh: dict[str, Any] = {"store": address, "run": None, "parent": None, "sent": 0, "seconds": 0.0}
        known = files.read_json(path) if path.exists() else fresh
        self._values = known if known["store"] == address else {**fresh, "seconds": known["seconds"]}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def update(self, **values: Any) -> None:
        with self._lock:
            self._values |= values
            files.write_json(self._path, self._values)


def _parent(home: Path, client: Any, experiment: str) -> str | None:
    """The run of the `dvc` process above this one, made by its first stage; None for a direct command."""
    above = [p for p in psutil.Process().parents() if "dvc" in {Path(word).name for word in p.cmdline()[:3]}]
    if not above:
        return None
    dvc = above[-1]
    note = home / "mlruns" / "parents" / f"{dvc.pid}-{dvc.create_time():.2f}-{files.fingerprint(store(home))}"
    note.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(home / "mlruns" / "parents.lock", timeout=60):
        if not note.exists():
            command = " ".join(["dvc", *dvc.cmdline()[2:]])
            run = client.create_run(
                experiment,
                run_name=command,
                tags={"dmat.stage": "dvc", "dmat.command": command, **{k: str(v) for k, v in _git(home).items()}},
            )
            _note_active(home, run.info.run_id, dvc.pid, parent=True)
            files.write_text(note, run.info.run_id)
        return note.read_text()


def _note_active(home: Path, run_id: str, pid: int, parent: bool) -> None:
    files.write_json(
        home / "mlruns" / "active" / f"{run_id}.json",
        {"pid": pid, "started": psutil.Process(pid).create_time(), "parent": parent, "store": store(home)},
    )


def _forget_active(home: Path, run_id: str) -> None:
    (home / "mlruns" / "active" / f"{run_id}.json").unlink(missing_ok=True)


def _alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False


def _log_params(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    pairs = [Param(name, str(value)[:6000]) for name, value in _leaves(settings)]
    for start in range(0, len(pairs), 100):
        client.log_batch(run_id, params=pairs[start : start + 100])


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _git(folder: Path) -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty outside a repository."""

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=_existing(folder), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "git_commit": ask("rev-parse", "HEAD"),
            "git_dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow and alembic announce every migration of a fresh store; people need none of it."""
    import logging

    names = ("mlflow", "alembic")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
