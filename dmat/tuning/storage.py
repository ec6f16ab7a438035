"""The storage of studies: a SQLite file of the project, or a database server for several machines."""

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from dmat import redaction
from dmat.errors import DmatError, first_line
from dmat.tuning import space
from dmat.tuning.plan import MAX_LOST_WORKERS, Study
from dmat.workspace import sqlite_path

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
HEARTBEAT, GRACE = 20, 120  # seconds: between two signs of life of a running trial; without one it counts as lost
_TRANSFER_KEY, _READY = "dmat.kin", "dmat.ready"  # attributes of a study
_FIRST_TABLE, _FIRST_COLUMN = "studies", "study_id"  # that Optuna creates
_WAIT = 60.0  # seconds for another process that writes to the same SQLite file
_IMPORT_TIMEOUT = 10.0  # seconds for the process that created the study to import trials


@contextlib.contextmanager
def explain_storage_errors(url: str) -> Iterator[None]:
    """Turns errors of the storage inside the block into DmatError with a clear message."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        first = first_line(error.__cause__ or error, url)
        if (path := sqlite_path(url)) is not None:
            raise DmatError(
                f"{path} cannot be used as the storage of studies ({first}); bring back a good copy, or move it away: "
                f"a new one is created and the study starts again; or name another with --storage"
            ) from error
        raise DmatError(
            f"the storage of studies {redaction.address(url)} cannot be reached ({first}); expected a database that "
            f"answers; start it, or correct --storage; the same command resumes from the last checkpoints"
        ) from error


def connect(url: str, create: bool = True) -> RDBStorage:
    """Opens the storage; creates it if it does not exist. Raises DmatError if that fails.

    create: False to raise DmatError, and to write no file, where no study was begun yet in a file of SQLite.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # heartbeats have been called so since Optuna 2.9
    try:
        parsed = sqlalchemy.engine.make_url(url)
        dialect = parsed.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise DmatError(
            "the storage of studies is not a URL; expected one such as postgresql+psycopg://user@host/database"
        ) from None
    if parsed.host and "@" in parsed.host:
        raise DmatError(
            f"the storage of studies {redaction.address(url)} has a plain @ in its user or password; expected %40; "
            f"write it so"
        )
    if url.rstrip("/") in ("sqlite:", "sqlite"):
        raise DmatError("the storage of studies is a database in memory, which no other worker sees; expected a file")
    if (path := sqlite_path(url)) is not None:
        _expect_studies(url, path, create)
        path.parent.mkdir(parents=True, exist_ok=True)
    options = {"connect_args": {"timeout": _WAIT}} if dialect == "sqlite" else {"pool_pre_ping": True}
    try:
        with explain_storage_errors(url):
            try:
                return _open(url, options)
            except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError):
                time.sleep(1)  # another process is creating the tables
                return _open(url, options)
    except RuntimeError as error:
        raise DmatError(
            f"the studies in {redaction.address(url)} were written by another version of Optuna than the "
            f"{optuna.__version__} here ({first_line(error, url)}); expected one that this version knows; install "
            f"dmat's pinned set, or name another storage"
        ) from error
    except ImportError as error:
        raise DmatError(
            f"the storage of studies {redaction.address(url)} cannot be reached ({first_line(error, url)}); expected a "
            f"database whose driver is installed; pip install 'dmat[team]' brings postgresql+psycopg"
        ) from error


def _expect_studies(url: str, path: Path, create: bool) -> None:
    """Raises DmatError for the file of another programme, and for one without a study unless `create`."""
    tables, columns = list[str](), list[str]()
    if path.exists():
        with explain_storage_errors(url):
            engine = sqlalchemy.create_engine(url)
            inspector = sqlalchemy.inspect(engine)
            tables = inspector.get_table_names()
            if _FIRST_TABLE in tables:
                columns = [column["name"] for column in inspector.get_columns(_FIRST_TABLE)]
            engine.dispose()
    if tables and _FIRST_COLUMN not in columns:
        raise DmatError(
            f"{path} is the database of another programme, with the table {tables[0]}; expected one with studies, or a "
            f"new file; name another with --storage"
        )
    if not tables and not create:
        raise DmatError(
            f"{path} {'has no study' if path.exists() else 'does not exist'}; expected the studies that `dmat tune "
            f"start` writes there; start one, or say with --storage where it is"
        )


def _open(url: str, options: dict[str, Any]) -> RDBStorage:
    retry = RetryHeartbeatStaleTrialCallback(MAX_LOST_WORKERS, inherit_intermediate_values=True)
    return RDBStorage(
        url,
        engine_kwargs=options,
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=retry,
    )


@contextlib.contextmanager
def heartbeats(storage: RDBStorage, running: Mapping[int, FrozenTrial]) -> Iterator[None]:
    """Inside the block a thread gives signs of life of the running trials, which may change meanwhile."""
    closing = threading.Event()

    def record_until_closed() -> None:
        while not closing.wait(HEARTBEAT):
            # Tried again; a storage that stays away ends the study at the next report.
            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, StorageInternalError):
                for trial in tuple(running.values()):
                    storage.record_heartbeat(trial._trial_id)

    thread = threading.Thread(target=record_until_closed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def find(storage: RDBStorage, name: str) -> optuna.Study | None:
    """The study of this name, or None."""
    names = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    return optuna.load_study(study_name=name, storage=storage) if name in names else None


def begin(storage: RDBStorage, plan: Study, pruner: BasePruner) -> optuna.Study:
    """Opens the study; creates it if needed, with the trials of related studies that fit its space."""
    try:
        study = optuna.create_study(storage=storage, study_name=plan.name, direction="maximize", pruner=pruner)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=plan.name, pruner=pruner)
        deadline = time.monotonic() + _IMPORT_TIMEOUT  # after it, the process that created the study has ended
        while not study.user_attrs.get(_READY) and time.monotonic() < deadline:
            time.sleep(0.2)
    if not study.user_attrs.get(_READY):
        study.set_user_attr(_TRANSFER_KEY, plan.transfer_key)
        origins = [space.origin(plan.name, trial) for trial in study.get_trials(deepcopy=False)]
        for other in _related_studies(storage, plan):
            for trial in space.fitting(plan, other.study_name, current_trials(other)):
                origin = trial.user_attrs[space.ORIGIN]
                # Not trials of this study from one that was set aside.
                if origin not in origins and origin["study"] != plan.name:
                    study.add_trial(trial)
                    origins.append(origin)
        study.set_user_attr(_READY, True)
    return study


def set_aside(storage: RDBStorage, study: optuna.Study) -> None:
    """Renames the study. All its trials are kept."""
    study.set_user_attr(_TRANSFER_KEY, "set aside")
    old = f"{study.study_name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
    optuna.copy_study(from_study_name=study.study_name, from_storage=storage, to_storage=storage, to_study_name=old)
    optuna.delete_study(study_name=study.study_name, storage=storage)


def current_trials(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those that were lost and that a later one repeats."""
    trials = study.get_trials(deepcopy=False)
    repeated = {number for trial in trials for number in space.earlier_numbers(trial)}
    return [trial for trial in trials if trial.number not in repeated]


def own_trials(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that this study computes itself, without imported ones; `--trials` counts these."""
    return [trial for trial in trials if space.ORIGIN not in trial.user_attrs]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """All ended trials, including imported ones."""
    return [trial for trial in current_trials(study) if trial.state.is_finished()]


def _related_studies(storage: RDBStorage, plan: Study) -> list[optuna.Study]:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    names = [summary.study_name for summary in summaries if summary.user_attrs.get(_TRANSFER_KEY) == plan.transfer_key]
    return [optuna.load_study(study_name=name, storage=storage) for name in sorted(names) if name != plan.name]
