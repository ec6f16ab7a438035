"""What a study has so far: its summary, and its best trial for params.yaml. Loads no torch."""

from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from dmat import ARTIFACTS
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline import work_folder
from dmat.tuning import applying, driver_identity, ranking, report, storage
from dmat.tuning.plan import STAGE_NAME, Study
from dmat.tuning.storage import explain_storage_errors


def folder_of(plan: Study) -> Path:
    """Folder in which the report of a study is published."""
    return Path(ARTIFACTS) / STAGE_NAME / plan.settings.arm


def status(plan: Study) -> dict[str, Any]:
    """The summary so far, and who computes each unfinished trial. Raises DmatError if the study does not exist."""
    rdb = storage.connect(plan.storage, create=False)
    with explain_storage_errors(plan.storage):
        study = _begun(plan, rdb)
        at_work = [
            f"trial {trial.number}: {len(trial.intermediate_values)} reports, "
            f"{_process_of(trial, plan) or 'no process; `dmat tune start` resumes it'}"
            for trial in storage.current_trials(study)
            if not trial.state.is_finished()
        ]
        return {**report.summary(plan, study), "at_work": at_work}


def _process_of(trial: FrozenTrial, plan: Study) -> str:
    """The process that drives a trial, as it named itself; "" if that has ended, as far as this folder shows."""
    if trial.state != TrialState.RUNNING:
        return ""
    is_left = driver_identity.is_of_folder(trial, plan.folder) and not work_folder.is_locked(plan.folder)
    return "" if is_left else driver_identity.process_of(trial)


def apply_best(
    path: Path, plan: Study, params: Params, name: str, seeds: list[int], project: Path
) -> tuple[int, list[str]]:
    """Writes the best trial as an arm into the file. Returns its number and the written keys. project: its folder."""
    rdb = storage.connect(plan.storage, create=False)
    with explain_storage_errors(plan.storage):
        winner = ranking.best(plan, _begun(plan, rdb))
    if winner is None:
        raise DmatError(f"study {plan.name} has no complete trial; expected one; `dmat tune start` runs some")
    return winner.number, applying.apply(path, plan, params, winner, name, seeds, project)


def _begun(plan: Study, rdb: RDBStorage) -> optuna.Study:
    study = storage.find(rdb, plan.name)
    if study is None:
        raise DmatError(
            f"study {plan.name} was not begun in {plan.describe()['storage']}; expected one of these settings and "
            f"data; start it with `dmat tune start`, or say with --storage where it is"
        )
    return study
