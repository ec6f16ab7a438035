"""A study in its storage: a SQLite file of the project, or a database server that many machines reach."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from dmat import redaction
from dmat.errors import DmatError, first_line
from dmat.tuning import sampling, space
from dmat.tuning.claims import Claims
from dmat.tuning.plan import Study

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_KIN, _READY = "dmat.kin", "dmat.ready"  # attributes of a study
_WAIT = 60.0  # seconds for another process that writes to the same SQLite file


@contextlib.contextmanager
def speaking(url: str) -> Iterator[None]:
    """What goes wrong with a storage inside the block becomes a sentence."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        first = first_line(error.__cause__ or error, url)
        if url.startswith("sqlite:"):
            path = url.removeprefix("sqlite:///")
            raise DmatError(
                f"{path} cannot be used as the storage of studies ({first}); bring back a good copy, or move it away: "
                f"a new one is made and the study begins again"
            ) from error
        raise DmatError(
            f"the storage of studies {redaction.address(url)} cannot be reached ({first}); expected a database that "
            f"answers; start it, or correct --storage; the same command goes on from the last checkpoints"
        ) from error


def connect(url: str) -> RDBStorage:
    """Raises DmatError. Made if it is not there yet."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        parsed = sqlalchemy.engine.make_url(url)
        dialect = parsed.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise DmatError(
            "the storage of studies is no URL; expected one such as postgresql+psycopg://user@host/database"
        ) from None
    if parsed.host and "@" in parsed.host:
        raise DmatError(
            f"the storage of studies {redaction.address(url)} has a plain @ in its user or password; expected %40; "
            f"write it so"
        )
    if url.rstrip("/") in ("sqlite:", "sqlite"):
        raise DmatError("the storage of studies is a database in memory, which no other worker sees; expected a file")
    options = {"connect_args": {"timeout": _WAIT}} if dialect == "sqlite" else {"pool_pre_ping": True}
    try:
        with speaking(url):
            try:
                return RDBStorage(url, engine_kwargs=options)
            except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError):
                time.sleep(1)  # another process is just making the tables
                return RDBStorage(url, engine_kwargs=options)
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


def find(storage: RDBStorage, name: str) -> optuna.Study | None:
    """A study that may not have been begun."""
    names = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    return optuna.load_study(study_name=name, storage=storage) if name in names else None


def begin(storage: RDBStorage, plan: Study, claims: Claims) -> optuna.Study:
    """The study, made if it is not there yet: with the trials of its kin that fit its space."""
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        direction="maximize",
        load_if_exists=True,
        pruner=sampling.pruner(plan.settings),
        sampler=optuna.samplers.RandomSampler(),  # never asked: `sampling.propose` gives all values
    )
    if study.user_attrs.get(_READY):
        return study
    with claims.turn():
        if not study.user_attrs.get(_READY):
            study.set_user_attr(_KIN, plan.transfer_key)
            known = [space.origin(plan.name, trial) for trial in study.get_trials(deepcopy=False)]
            for other in _kin(storage, plan):
                for trial in space.fitting(plan, other.study_name, other.get_trials(deepcopy=False)):
                    origin = trial.user_attrs[space.ORIGIN]
                    if origin not in known and origin["study"] != plan.name:  # its own came back from one set aside
                        study.add_trial(trial)
                        known.append(origin)
            study.set_user_attr(_READY, True)
    return study


def set_aside(storage: RDBStorage, study: optuna.Study) -> None:
    """The study under another name. Nothing is deleted but the name."""
    study.set_user_attr(_KIN, "set aside")
    old = f"{study.study_name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
    optuna.copy_study(from_study_name=study.study_name, from_storage=storage, to_storage=storage, to_study_name=old)
    optuna.delete_study(study_name=study.study_name, storage=storage)


def own(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Those that this study makes itself: what `--trials` counts."""
    return [trial for trial in trials if space.ORIGIN not in trial.user_attrs]


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Imported ones included."""
    return study.get_trials(deepcopy=False, states=ENDED)


def _kin(storage: RDBStorage, plan: Study) -> list[optuna.Study]:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    transfer_key = [one.study_name for one in summaries if one.user_attrs.get(_KIN) == plan.transfer_key]
    return [optuna.load_study(study_name=name, storage=storage) for name in sorted(transfer_key) if name != plan.name]
