"""Where tracked runs are kept: the server that MLFLOW_TRACKING_URI names, or SQLite inside the project."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from dmat import redaction
from dmat.errors import DmatError, first_line

EXPERIMENT = "dmat"
EMBEDDED = "embedded"  # what a project calls its own store, wherever the project is moved
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens its view for language models

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # the files are small
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for what people asked for


def store(home: Path) -> str:
    """MLFLOW_TRACKING_URI, or the embedded SQLite store at an absolute path. May hold a password: see `shown`."""
    return _server() or f"sqlite:///{home / 'mlruns' / 'mlflow.db'}"


def shown(home: Path) -> str:
    """`store` as messages name it: without a password."""
    return redaction.address(store(home))


def identity(home: Path) -> str:
    """What a run remembers of its store: the server's address without a password, or that it is the project's own."""
    return redaction.address(_server()) or EMBEDDED


def _server() -> str:
    """MLFLOW_TRACKING_URI, where unset and empty mean the same."""
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def artifact_folder(home: Path) -> Path:
    return home / "mlruns" / "artifacts"


def connect(home: Path) -> tuple[Any, str]:
    """An MLflow client and the id of the experiment. Creates the embedded store under a lock, since two processes that
    open a fresh SQLite store at once do not both survive."""
    from mlflow import MlflowClient

    folder = home / "mlruns"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "create.lock", timeout=60), _quiet():
        if not _server():
            _follow_a_move(home)
        client = MlflowClient(store(home))
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            where = None if _server() else artifact_folder(home).as_uri()
            return client, client.create_experiment(EXPERIMENT, artifact_location=where, tags=_KIND)
        return client, found.experiment_id


def reach(home: Path) -> tuple[Any, str]:
    """`connect` for a command that cannot do without: raises DmatError where the store does not answer."""
    try:
        return connect(home)
    except DmatError:
        raise
    except Exception as error:
        raise DmatError(
            f"MLflow at {shown(home)} cannot be reached ({first_line(error)}); expected a store that answers; start "
            f"it, or correct MLFLOW_TRACKING_URI"
        ) from error


def _follow_a_move(home: Path) -> None:
    """MLflow keeps the artifact folder as an absolute address, in the experiment and in every run, and has no call to
    change it. After a project was moved or copied, its pictures would go to the old place."""
    path = home / "mlruns" / "mlflow.db"
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
        known = "select name from sqlite_master where type = 'table' and name = 'experiments'"
        if database.execute(known).fetchone() is None:
            return
        ask = "select artifact_location from experiments where name = ?"
        (old,) = database.execute(ask, (EXPERIMENT,)).fetchone() or (None,)
        here = artifact_folder(home).as_uri()
        if old is None or old == here:
            return
        with database:  # both or neither
            database.execute("update experiments set artifact_location = ? where name = ?", (here, EXPERIMENT))
            database.execute(
                "update runs set artifact_uri = ? || substr(artifact_uri, ?) where substr(artifact_uri, 1, ?) = ?",
                (here, len(old) + 1, len(old), old),
            )


def run_or_none(client: Any, run_id: str | None) -> Any:
    """The run, or None if the store does not know it: another store may stand at the same address by now."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


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
