"""One trial: a short run of `train_robust` as a task of the engine. It reports to the driver and waits for the verdict.

A trial whose process was killed resumes from the checkpoint in its folder, wherever it runs next. Under `torchrun` all
processes train. The main process talks to the driver. At each report it tells the others whether to continue, so that
all stop at the same step.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from optuna.trial import TrialState
from typing_extensions import TypedDict

from dmat import NONE, files, tracking
from dmat.config import MixImages, Params, TrialSettings
from dmat.devices import Compute
from dmat.engine import TaskContext
from dmat.errors import Diverged, DmatError, Interrupted, Pruned, UnfitError, first_line
from dmat.job import Job
from dmat.jobs import mix_images, train_robust
from dmat.pipeline import code_identity, work_folder
from dmat.pipeline.division import WorkerCompute
from dmat.training.long_run import Watcher
from dmat.tuning import images
from dmat.tuning.plan import CODE_STAGES, MAX_LOST_WORKERS, OBJECTIVE, Study, plugin_identities
from dmat.workspace import PICTURES, RESULT, Workspace

VALUES_FILE = "trial.json"  # in the folder of a trial: its values
CONTINUE, PRUNE, LOST = "continue", "prune", "lost"  # verdicts of the driver on a report
NO_TRIAL = b"none"  # what the other processes get, before their patience ends, while there is nothing to train
_LOCK_TIMEOUT = 120.0  # seconds for the process that computed a trial before to save and end
_CONTINUE, _PRUNED, _STOP = "", "pruned ", "stop "  # messages of the main process to the others at a report


class TrialValues(TypedDict):
    """Content of `VALUES_FILE`."""

    params: dict[str, object]


@dataclasses.dataclass(frozen=True)
class TrialContext:
    """What all trials of a study have in common."""

    plan: Study
    params: Params
    workspace: Workspace
    compute: Compute

    @property
    def for_workers(self) -> "TrialContext":
        """Without the address of the storage, which may hold a password and which only the driver uses."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, storage=""))


@dataclasses.dataclass(frozen=True)
class TrialTask:
    """A trial to compute. folder: its work folder; lost_workers: how many processes were killed in it."""

    number: int
    values: dict[str, Any]
    folder: Path
    lost_workers: int = 0


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    """The end of a trial. value: the objective, None unless complete. reason: "" if complete.

    state: None if the trial belongs to another driver now. seconds: of all attempts. report_seconds: mean time that the
    training waited for a verdict.
    """

    state: TrialState | None
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    report_seconds: float = 0.0


class _LostError(DmatError):
    """Another driver resumed this trial."""


def expect(root: Path, compute: WorkerCompute) -> None:
    """Raises DmatError in a worker that has other code than the driver, or cannot compute as the driver would.

    root: of the project.
    """
    for stage_name in CODE_STAGES:
        code_identity.expect(stage_name, root)
    compute.resolve()


def run(engine: TaskContext, context: TrialContext, trial: TrialTask) -> TrialOutcome:
    """Computes a trial to its end and records it in MLflow; resumes the work of an earlier process.

    Raises Interrupted, after saving, if it has to stop, and DmatError if the study cannot continue.
    """
    plan, workspace = context.plan, context.workspace
    trial.folder.mkdir(parents=True, exist_ok=True)
    with work_folder.lock(trial.folder, timeout=_LOCK_TIMEOUT):
        _expect_own_files(trial, workspace)
        reporter = _Reporter(engine, context)
        tracked = tracking.open_run(
            workspace.home,
            trial.folder,
            stage="train_robust",
            instance_name=f"trial {trial.number}",
            settings=_settings(plan, trial.values),
            inputs=plan.inputs,
            compute=context.compute.describe(),
            root=workspace.root,
            parent=plan.folder,
            tags={"optuna.study": plan.name, "optuna.trial": str(trial.number), "dmat.arm": plan.settings.arm},
        )
        with tracked:
            outcome = _compute_outcome(context, trial, reporter)
            for stage_name in CODE_STAGES:  # results of other code are never reported
                code_identity.expect(stage_name, workspace.root, again=True)
            expect_same_plugins(plan)
            if outcome.state == TrialState.COMPLETE:
                tracked.finish_with(
                    {f"best_{OBJECTIVE}": outcome.value}, sorted((trial.folder / PICTURES).glob("*.png"))
                )
            elif outcome.state == TrialState.FAIL:
                tracked.end_as("FAILED", outcome.reason)
            else:
                tracked.end_as("KILLED", f"pruned: {outcome.reason}" if outcome.state else outcome.reason)
            tracked.tag("optuna.state", outcome.state.name if outcome.state else "LOST")
        seconds = round(tracking.seconds_before(trial.folder), 1)
    return dataclasses.replace(outcome, seconds=seconds, report_seconds=reporter.mean_seconds)


def expect_same_plugins(plan: Study) -> None:
    """Raises DmatError if the code of a plugin changed since the study was planned."""
    current = plugin_identities(plan.settings, plan.trial)
    if changed := [import_path for import_path, digest in plan.plugins.items() if current.get(import_path) != digest]:
        raise DmatError(
            f"the code of {', '.join(changed)} changed while the study was running; expected no change until it ended; "
            f"restore the old code and run the same command again, or run it with the new code: that is "
            f"another study"
        )


def _expect_own_files(trial: TrialTask, workspace: Workspace) -> None:
    """Sets the folder of a trial aside if it has other values: it may be of a study whose storage was moved away, and a
    checkpoint does not contain the values of its trial."""
    values_path = trial.folder / VALUES_FILE
    if values_path.exists() and files.read_json(values_path) != {"params": trial.values}:
        work_folder.set_aside(trial.folder, workspace.home)
    files.write_json(values_path, {"params": trial.values})


def _settings(plan: Study, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return plan.trial.with_values(values).plain()
    except UnfitError:
        return {**plan.trial.plain(), **values}


def _compute_outcome(context: TrialContext, trial: TrialTask, reporter: "_Reporter") -> TrialOutcome:
    """Computes a trial and turns its end into a state. Raises only errors that end the study or the worker."""
    if trial.lost_workers > MAX_LOST_WORKERS:
        return TrialOutcome(TrialState.FAIL, reason=f"{trial.lost_workers} workers were killed in it")
    world, attempts = context.compute.world, 0
    world.broadcast(json.dumps(trial.values).encode())  # `follow` waits for it
    while True:
        try:
            return TrialOutcome(TrialState.COMPLETE, compute(context, trial.values, trial.folder, reporter))
        except Pruned as stop:
            return TrialOutcome(TrialState.PRUNED, reason=str(stop))
        except _LostError as error:
            return TrialOutcome(None, reason=str(error))
        except (Diverged, UnfitError) as error:
            return TrialOutcome(TrialState.FAIL, reason=str(error))
        except (DmatError, Interrupted):
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                return TrialOutcome(TrialState.FAIL, reason=f"out of memory: {first_line(error)}")
            attempts += 1
            if world.size > 1:  # the other processes are still in the step: all are started again
                raise
            if attempts > context.plan.settings.retries:
                last_error = f"{type(error).__name__}: {first_line(error)}"
                return TrialOutcome(
                    TrialState.FAIL, reason=f"ended with an exception {attempts} times, last {last_error}"
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
        context.params.compute.save_every_seconds,
        quiet=True,
        watcher=watcher,
    )
    mix_images.run(MixImages.from_arm(trial_settings.arm), job)
    result = train_robust.run(
        trial_settings.arm, dataclasses.replace(job, inputs=inputs | {"mix": folder / RESULT / "mix"})
    )
    return cast(float, result.metrics["best_validation_robust"])


def follow(context: TrialContext) -> None:
    """The part of the other processes under `torchrun`: the same trainings, in temporary folders, until the main
    process broadcasts b"". It broadcasts NO_TRIAL while it waits."""

    def watch(images_seen: int, _: dict[str, float]) -> None:
        message = (context.compute.world.broadcast(None) or b"").decode()
        if message.startswith(_PRUNED):
            raise Pruned(message.removeprefix(_PRUNED))
        if message.startswith(_STOP):
            raise DmatError(message.removeprefix(_STOP))

    while message := context.compute.world.broadcast(None):
        if message == NO_TRIAL:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                compute(context, json.loads(message), Path(folder), watch)
            except (Pruned, Diverged, UnfitError):
                continue  # in all processes alike


class _Reporter:
    """The watcher of a trial: reports validation PGD accuracy against images seen and waits for the verdict. Raises
    Pruned, in all processes, if the driver says so."""

    def __init__(self, engine: TaskContext, context: TrialContext):
        self._engine, self._context = engine, context
        self._seconds, self._reports = 0.0, 0

    @property
    def mean_seconds(self) -> float:
        """Time per report: what the study costs its trainings."""
        return round(self._seconds / max(1, self._reports), 4)

    def __call__(self, images_seen: int, values: dict[str, float]) -> None:
        world, started = self._context.compute.world, time.monotonic()
        try:
            verdict = self._engine.ask({"images_seen": images_seen, "value": values[OBJECTIVE]})["verdict"]
        except (DmatError, Interrupted) as error:
            world.broadcast(f"{_STOP}{error}".encode())
            raise
        self._seconds += time.monotonic() - started
        self._reports += 1
        pruner = self._context.plan.settings.pruner
        reason = f"{values[OBJECTIVE]:.4f} after {images_seen} images is behind the other trials ({pruner})"
        world.broadcast((_CONTINUE if verdict == CONTINUE else f"{_PRUNED}{reason}").encode())
        if verdict == LOST:
            raise _LostError("another driver resumed it, because this one gave no sign of life for too long")
        if verdict == PRUNE:
            raise Pruned(reason)


def _trial_settings(plan: Study, values: Mapping[str, Any]) -> TrialSettings:
    """Settings of a trial. `config` has checked each value alone. Raises UnfitError if they do not fit together."""
    settings = plan.trial.with_values(values)
    drawn = settings.arm.batch // settings.arm.copies
    generated = int(drawn * settings.arm.generated_share)
    if settings.arm.images != NONE and not 0 < generated < drawn:
        raise UnfitError(
            f"generated_share {settings.arm.generated_share} of {drawn} images leaves {generated} generated ones; "
            f"expected some of both kinds"
        )
    return settings


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
