"""One trial: a short run of `train_robust` that reports to its study, and exactly one recorded state for any outcome.

Under `torchrun` all processes train. Only the main process uses the study. At each report it tells the others whether
to continue, so that all stop at the same step.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import filelock
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from dmat import NONE, files, tracking
from dmat.config import MixImages, Params, TrialSettings
from dmat.devices import Compute
from dmat.errors import Diverged, DmatError, Interrupted, Pruned, UnfitError, first_line
from dmat.job import Job
from dmat.jobs import mix_images, train_robust
from dmat.pipeline import code_identity, work_folder
from dmat.training.long_run import Watcher
from dmat.tuning import images, sampling
from dmat.tuning.claims import RENEW, Claims
from dmat.tuning.plan import CODE_STAGES, Study, plugin_identities
from dmat.tuning.storage import explain_storage_errors
from dmat.workspace import PICTURES, RESULT, Workspace

VALUES_FILE = "trial.json"  # in the folder of a trial: its values
OBJECTIVE = "validation_robust"  # accuracy in [0, 1] of the EMA weights
MAX_LOST_WORKERS = 5  # killed workers that a trial survives; one more and it counts as failed
_CONTINUE, _PRUNED, _STOP = "", "pruned ", "stop "  # messages of the main process to the others at a report


class LostError(DmatError):
    """Another worker has taken this trial."""


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    """The recorded end of a trial. value: the objective, None unless complete. reason: "" if complete."""

    state: TrialState
    value: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class TrialContext:
    """What a worker needs to compute trials. study, claims: only in the main process."""

    plan: Study
    params: Params
    workspace: Workspace
    compute: Compute
    save_seconds: float
    study: optuna.Study | None = None
    claims: Claims | None = None


def trial_key(number: int) -> str:
    """Key of the claim for computing a trial."""
    return f"trial-{number:04d}"


def run(context: TrialContext, trial: FrozenTrial) -> TrialOutcome | None:
    """Computes a trial to its end and records it in the study and in MLflow; resumes the work of an earlier worker.

    Returns None if another process still computes it. Raises LostError if another worker took it meanwhile, Interrupted
    on a signal (after saving its state), and DmatError if the study cannot continue.
    """
    assert context.study is not None and context.claims is not None
    folder = context.plan.trial_folder(trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    # Against an earlier holder on this file system that only slept.
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    try:
        _expect_own_files(context, trial, folder)
        return _run(context, context.study, context.claims, trial, folder)
    finally:
        lock.release()


def _run(context: TrialContext, study: optuna.Study, claims: Claims, trial: FrozenTrial, folder: Path) -> TrialOutcome:
    report_time = _ReportTime()
    tracked = tracking.open_run(
        context.workspace.home,
        folder,
        stage="train_robust",
        instance_name=f"trial {trial.number}",
        settings=_settings(context.plan, trial),
        inputs=context.plan.inputs,
        compute=context.compute.describe(),
        root=context.workspace.root,
        parent=context.plan.folder,
        tags={
            "optuna.study": context.plan.name,
            "optuna.trial": str(trial.number),
            "dmat.arm": context.plan.settings.arm,
        },
    )
    with tracked:
        started = time.time()
        outcome = _compute_outcome(context, trial, folder, _watcher(context, study, claims, trial, report_time))
        for stage_name in CODE_STAGES:  # results of other code are never reported
            code_identity.expect(stage_name, context.workspace.root, again=True)
        expect_same_plugins(context.plan)
        if outcome.state == TrialState.COMPLETE:
            tracked.finish_with({f"best_{OBJECTIVE}": outcome.value}, sorted((folder / PICTURES).glob("*.png")))
        elif outcome.state == TrialState.PRUNED:
            tracked.end_as("KILLED", f"pruned: {outcome.reason}")
        else:
            tracked.end_as("FAILED", outcome.reason)
        tracked.tag("optuna.state", outcome.state.name)
        _expect_held(claims, trial)
        with _unless_ended(trial):
            live = optuna.Trial(study, trial._trial_id)
            live.set_user_attr("seconds", round(tracking.seconds_before(folder) + time.time() - started, 1))
            live.set_user_attr("reason", outcome.reason)
            live.set_user_attr("report_seconds", round(report_time.seconds / max(1, report_time.reports), 4))
            live.set_user_attr("workers_killed", claims.lost_workers(trial_key(trial.number)))
    # last: all else is recorded before, and a kill before this line only makes the trial end once more
    if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
        raise _ended_elsewhere(trial)
    study.tell(trial.number, outcome.value, outcome.state)
    (folder / "checkpoint.dmat").unlink(missing_ok=True)  # as large as the network, and not needed any more
    return outcome


def expect_same_plugins(plan: Study) -> None:
    """Raises DmatError if the code of a plugin changed since the study was planned."""
    current = plugin_identities(plan.settings, plan.trial)
    if changed := [import_path for import_path, digest in plan.plugins.items() if current.get(import_path) != digest]:
        raise DmatError(
            f"the code of {', '.join(changed)} changed while the study was running; expected no change until it ended; "
            f"restore the old code and run the same command again, or run it with the new code: that is "
            f"another study"
        )


def _expect_own_files(context: TrialContext, trial: FrozenTrial, folder: Path) -> None:
    """Sets the folder of a trial aside if it has other values: it may be of a study whose storage was moved away, and a
    checkpoint does not contain the values of its trial."""
    values_path = folder / VALUES_FILE
    if values_path.exists() and files.read_json(values_path) != {"params": trial.params}:
        work_folder.set_aside(folder, context.workspace.home)
    files.write_json(values_path, {"params": trial.params})


def _settings(plan: Study, trial: FrozenTrial) -> dict[str, Any]:
    try:
        return plan.trial.with_values(trial.params).plain()
    except UnfitError:
        return {**plan.trial.plain(), **trial.params}


def _compute_outcome(context: TrialContext, trial: FrozenTrial, folder: Path, watcher: Watcher) -> TrialOutcome:
    """Computes a trial and turns its end into a state. Raises only errors that end the study or the worker."""
    assert context.claims is not None
    if (lost_workers := context.claims.lost_workers(trial_key(trial.number))) > MAX_LOST_WORKERS:
        return TrialOutcome(TrialState.FAIL, None, f"{lost_workers} workers were killed in it")
    context.compute.world.broadcast(json.dumps({"values": trial.params}).encode())  # `worker.follow` waits for it
    attempts = 0
    while True:
        try:
            return TrialOutcome(TrialState.COMPLETE, compute(context, trial.params, folder, watcher), "")
        except Pruned as stop:
            return TrialOutcome(TrialState.PRUNED, None, str(stop))
        except (Diverged, UnfitError) as error:
            return TrialOutcome(TrialState.FAIL, None, str(error))
        except (DmatError, Interrupted):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                return TrialOutcome(TrialState.FAIL, None, f"out of memory: {first_line(error)}")
            attempts += 1
            if context.compute.world.size > 1:  # the other processes are still in the step: all are started again
                raise
            if attempts > context.plan.settings.retries:
                last_error = f"{type(error).__name__}: {first_line(error)}"
                return TrialOutcome(
                    TrialState.FAIL, None, f"ended with an exception {attempts} times, last {last_error}"
                )


def compute(context: TrialContext, values: Mapping[str, Any], folder: Path, watcher: Watcher) -> float:
    """Trains in `folder`, resuming from a checkpoint there. Returns the best validation PGD accuracy, in [0, 1]."""
    plan, trial_settings = context.plan, _trial_settings(context.plan, values)
    trial_workspace = images.workspace_of(plan, trial_settings, context.params, context.workspace)
    inputs = {name: context.workspace.at(entry["path"]) for name, entry in plan.inputs.items()}
    inputs["selection"] = trial_workspace.at(plan.inputs["selection"]["path"])
    job = Job(
        inputs,
        {"arm": plan.settings.arm, "seed": plan.settings.seed},
        trial_workspace.root,
        folder,
        context.compute,
        context.save_seconds,
        quiet=True,
        watcher=watcher,
    )
    mix_images.run(MixImages.from_arm(trial_settings.arm), job)
    result = train_robust.run(
        trial_settings.arm, dataclasses.replace(job, inputs=inputs | {"mix": folder / RESULT / "mix"})
    )
    return cast(float, result.metrics["best_validation_robust"])


def follow(context: TrialContext, values: Mapping[str, Any]) -> None:
    """The part of the other processes under `torchrun`: the same training, in a temporary folder."""

    def watch(images_seen: int, _: dict[str, float]) -> None:
        message = (context.compute.world.broadcast(None) or b"").decode()
        if message.startswith(_PRUNED):
            raise Pruned(message.removeprefix(_PRUNED))
        if message.startswith(_STOP):
            raise DmatError(message.removeprefix(_STOP))

    with tempfile.TemporaryDirectory() as folder:
        try:
            compute(context, values, Path(folder), watch)
        except (Pruned, Diverged, UnfitError):
            return  # in all processes alike


def _watcher(
    context: TrialContext, study: optuna.Study, claims: Claims, frozen: FrozenTrial, report_time: "_ReportTime"
) -> Watcher:
    """Reports validation PGD accuracy against images seen; raises Pruned when the study says so, in all processes."""
    trial = optuna.Trial(study, frozen._trial_id)
    reported = set(frozen.intermediate_values)  # a resumed trial repeats its last report
    world = context.compute.world

    def watch(images_seen: int, values: dict[str, float]) -> None:
        try:
            with report_time.counted(), explain_storage_errors(context.plan.storage), _unless_ended(frozen):
                _expect_held(claims, frozen, within=RENEW + 5)
                if images_seen not in reported:
                    trial.report(values[OBJECTIVE], images_seen)
                    reported.add(images_seen)
                stop = sampling.should_stop(trial, images_seen, context.plan.settings)
        except DmatError as error:
            world.broadcast(f"{_STOP}{error}".encode())
            raise
        pruner = context.plan.settings.pruner
        reason = f"{values[OBJECTIVE]:.4f} after {images_seen} images is behind the other trials ({pruner})"
        world.broadcast(f"{_PRUNED}{reason}".encode() if stop else _CONTINUE.encode())
        if stop:
            raise Pruned(reason)

    return watch


def _expect_held(claims: Claims, trial: FrozenTrial, within: float = 0.0) -> None:
    if not claims.holds(trial_key(trial.number), within):
        raise LostError(
            f"trial {trial.number} was taken by another worker, because this one did not answer for a minute; "
            f"that worker resumes it"
        )


@contextmanager
def _unless_ended(trial: FrozenTrial) -> Iterator[None]:
    """Raises LostError if Optuna refuses a change because another worker ended the trial."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError as error:
        raise _ended_elsewhere(trial) from error


def _ended_elsewhere(trial: FrozenTrial) -> LostError:
    return LostError(f"trial {trial.number} was ended by another worker, whose result is kept")


def _trial_settings(plan: Study, values: Mapping[str, Any]) -> TrialSettings:
    """Settings of a trial. `config` has checked each value alone. Raises UnfitError if they do not fit together."""
    settings = plan.trial.with_values(values)
    drawn = settings.arm.batch // settings.arm.cutmix_copies
    generated = int(drawn * settings.arm.generated_share)
    if settings.arm.images != NONE and not 0 < generated < drawn:
        raise UnfitError(
            f"generated_share {settings.arm.generated_share} of {drawn} images leaves {generated} generated ones; "
            f"expected some of both kinds"
        )
    return settings


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class _ReportTime:
    """Measures the time that reports take: the cost of a study for its trainings."""

    def __init__(self) -> None:
        self.seconds, self.reports = 0.0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started
        self.reports += 1
