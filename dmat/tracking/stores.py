"""The store of tracked runs: the MLflow server that MLFLOW_TRACKING_URI names, or a SQLite file in the project."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from dmat import redaction
from dmat.errors import DmatError, first_line
from dmat.workspace import sqlite_url

EXPERIMENT = "dmat"
_DELETED = "deleted"  # lifecycle stage in MLflow: hidden, with its name taken, until `mlflow gc`
EMBEDDED = "embedded"  # identity of a project's own store; stays the same when the project is moved
# Without it the UI opens its view for language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # the files are small
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for what people asked for


def store_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, or the URI of the embedded SQLite store. May hold a password: see `masked_uri`."""
    return _server() or sqlite_url(home / "mlruns" / "mlflow.db")


def masked_uri(home: Path) -> str:
    """`store_uri` for messages, with a masked password."""
    return redaction.address(store_uri(home))


def identity(home: Path) -> str:
    """Name of the store in records of runs: the address of the server with a masked password, or EMBEDDED."""
    return redaction.address(_server()) or EMBEDDED


def _server() -> str:
    """MLFLOW_TRACKING_URI; "" if it is unset or empty."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def artifact_folder(home: Path) -> Path:
    """Where the embedded store keeps artifacts."""
    return home / "mlruns" / "artifacts"


def connect(home: Path) -> tuple[Any, str]:
    """An MLflow client and the id of the experiment, which is created if missing and restored if it was deleted.

    A lock protects the creation of the embedded store: if two processes open a new SQLite store at once, one fails.
    """
    from mlflow import MlflowClient

    folder = home / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "create.lock", timeout=60), _quiet_logging():
        if not _server():
            _update_artifact_location(home)
        client = MlflowClient(store_uri(home))
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = None if _server() else artifact_folder(home).as_uri()
            return client, client.create_experiment(EXPERIMENT, artifact_location=location, tags=_EXPERIMENT_TAGS)
        if experiment.lifecycle_stage == _DELETED:  # its name stays taken: no other can be created
            client.restore_experiment(experiment.experiment_id)
        return client, experiment.experiment_id


def connect_or_raise(home: Path) -> tuple[Any, str]:
    """`connect` for commands that need the store: raises DmatError if it does not answer."""
    try:
        return connect(home)
    except DmatError:
        raise
    except Exception as error:
        raise DmatError(
            f"MLflow at {masked_uri(home)} cannot be reached ({first_line(error)}); expected a store that answers; "
            f"start it, or correct MLFLOW_TRACKING_URI"
        ) from error


def _update_artifact_location(home: Path) -> None:
    """Corrects the artifact location in the embedded store after the project was moved or copied.

    MLflow stores it as an absolute URI, in the experiment and in every run, and has no call to change it. Without the
    correction, pictures would be written to the old folder.
    """
    path = home / "mlruns" / "mlflow.db"
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
        find_table = "select name from sqlite_master where type = 'table' and name = 'experiments'"
        if database.execute(find_table).fetchone() is None:
            return
        select_location = "select artifact_location from experiments where name = ?"
        (old_location,) = database.execute(select_location, (EXPERIMENT,)).fetchone() or (None,)
        location = artifact_folder(home).as_uri()
        if old_location is None or old_location == location:
            return
        with database:  # both or neither
            database.execute("update experiments set artifact_location = ? where name = ?", (location, EXPERIMENT))
            database.execute(
                "update runs set artifact_uri = ? || substr(artifact_uri, ?) where substr(artifact_uri, 1, ?) = ?",
                (location, len(old_location) + 1, len(old_location), old_location),
            )


def run_or_none(client: Any, run_id: str | None) -> Any:
    """The MLflow run, or None if the store has no such run: another store may have the same address by now."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def is_deleted(run: Any) -> bool:
    """Whether an MLflow run was deleted, as in the UI. It accepts no change any more."""
    return bool(run.info.lifecycle_stage == _DELETED)


def search_runs(client: Any, experiment: str, condition: str = "", limit: int = 0) -> list[Any]:
    """MLflow runs of an experiment that meet a condition, the newest first. limit: at most so many; 0: all."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            condition,
            max_results=min(1000, limit - len(runs)) if limit else 1000,
            order_by=["start_time DESC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token or len(runs) == limit:
            return runs


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Hides what MLflow and alembic log about every migration of a new store."""
    import logging

    names = ("mlflow", "alembic")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
