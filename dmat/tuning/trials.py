"""One trial: a short run of `train_robust` that reports to its study, and exactly one recorded state for any outcome.

Under `torchrun` all processes train; only the leading one speaks to the study, and tells the others at each report
whether they go on, so that all stop at the same step.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from dmat import files, tracking
from dmat.config import MixImages, Params, TrialSettings
from dmat.devices import Compute
from dmat.errors import Diverged, DmatError, Interrupted, Pruned, UnfitError, first_line
from dmat.job import Job
from dmat.jobs import mix_images, train_robust
from dmat.pipeline import code_identity, work_folder
from dmat.training.long_run import Watcher
from dmat.tuning import images, sampling
from dmat.tuning.claims import RENEW, Claims
from dmat.tuning.plan import CODE, Study, own_code
from dmat.tuning.storage import speaking
from dmat.workspace import PICTURES, RESULT, Workspace

NOTE = "trial.json"  # in a trial's folder: its values
OBJECTIVE = "validation_robust"  # share of 1, of the averaged weights
MAX_LOST_WORKERS = 5  # workers that may be killed in a trial before it is the trial's fault
_GO_ON, _PRUNED, _STOP = "", "pruned ", "stop "  # what the leading process tells the others at a report


class LostError(DmatError):
    """Another worker has this trial by now."""


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    state: TrialState
    value: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class TrialContext:
    """What a worker computes trials with. study and claims: of the leading process alone."""

    plan: Study
    params: Params
    workspace: Workspace
    compute: Compute
    save_seconds: float
    study: optuna.Study | None = None
    claims: Claims | None = None


def trial_key(number: int) -> str:
    """A trial as a claim."""
    return f"trial-{number:04d}"


def run(context: TrialContext, trial: FrozenTrial) -> TrialOutcome | None:
    """A trial to its end, in the study and in MLflow, from where an earlier worker left it.

    None: another process still computes it after all. Raises LostError if another worker took it meanwhile, Interrupted
    on a signal (its state is saved), and DmatError where the study cannot go on.
    """
    assert context.study is not None and context.claims is not None
    folder = context.plan.trial_folder(trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock", timeout=0)  # a holder that only slept, on this file system
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
    spent = _Spent()
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
        outcome = _outcome(context, trial, folder, _watcher(context, study, claims, trial, spent))
        for word in CODE:  # what other code found is never told
            code_identity.expect(word, context.workspace.root, again=True)
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
            live.set_user_attr("report_seconds", round(spent.seconds / max(1, spent.reports), 4))
            live.set_user_attr("workers_killed", claims.lost_workers(trial_key(trial.number)))
    # last, because what comes after it is lost with the process: a trial that was not told ends once more
    if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
        raise _ended_elsewhere(trial)
    study.tell(trial.number, outcome.value, outcome.state)
    (folder / "checkpoint.dmat").unlink(missing_ok=True)  # as large as the network and needed no more
    return outcome


def expect_same_plugins(plan: Study) -> None:
    """Raises DmatError if code of the project is not what the study was planned with."""
    now = own_code(plan.settings, plan.trial)
    if changed := [word for word, digest in plan.plugins.items() if now.get(word) != digest]:
        raise DmatError(
            f"the code of {', '.join(changed)} changed while the study was at work; expected no change until it ended; "
            f"bring back what was there and run the same command again, or run it for what is there now: that is "
            f"another study"
        )


def _expect_own_files(context: TrialContext, trial: FrozenTrial, folder: Path) -> None:
    """What lies in a trial's folder may be of a study whose storage was moved away: a checkpoint says nothing of the
    values that it was trained with. Then it is set aside."""
    note = folder / NOTE
    if note.exists() and files.read_json(note) != {"params": trial.params}:
        work_folder.set_aside(folder, context.workspace.home)
    files.write_json(note, {"params": trial.params})


def _settings(plan: Study, trial: FrozenTrial) -> dict[str, Any]:
    try:
        return plan.trial.with_values(trial.params).plain()
    except UnfitError:
        return {**plan.trial.plain(), **trial.params}


def _outcome(context: TrialContext, trial: FrozenTrial, folder: Path, watcher: Watcher) -> TrialOutcome:
    """Whatever happens in a trial, as its state. Only what ends the study or the worker is raised."""
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
            if context.compute.world.size > 1:  # the others are still at the step: all are started again
                raise
            if attempts > context.plan.settings.retries:
                what = f"{type(error).__name__}: {first_line(error)}"
                return TrialOutcome(TrialState.FAIL, None, f"ended with an exception {attempts} times, last {what}")


def compute(context: TrialContext, values: Mapping[str, Any], folder: Path, watcher: Watcher) -> float:
    """Best validation PGD accuracy of a training in its own folder; goes on from a checkpoint there."""
    plan, chosen = context.plan, _chosen(context.plan, values)
    own = images.workspace_of(plan, chosen, context.params, context.workspace)
    inputs = {name: context.workspace.at(entry["path"]) for name, entry in plan.inputs.items()}
    inputs["selection"] = own.at(plan.inputs["selection"]["path"])
    job = Job(
        inputs,
        {"arm": plan.settings.arm, "seed": plan.settings.seed},
        own.root,
        folder,
        context.compute,
        context.save_seconds,
        quiet=True,
        watcher=watcher,
    )
    mix_images.run(MixImages.of(chosen.arm), job)
    found = train_robust.run(chosen.arm, dataclasses.replace(job, inputs=inputs | {"mix": folder / RESULT / "mix"}))
    best: float = found.metrics["best_validation_robust"]
    return best


def follow(context: TrialContext, values: Mapping[str, Any]) -> None:
    """What a process under `torchrun` does that does not lead: the same training, in a folder that nobody keeps."""

    def watch(images_seen: int, _: dict[str, float]) -> None:
        told = (context.compute.world.broadcast(None) or b"").decode()
        if told.startswith(_PRUNED):
            raise Pruned(told.removeprefix(_PRUNED))
        if told.startswith(_STOP):
            raise DmatError(told.removeprefix(_STOP))

    with tempfile.TemporaryDirectory() as folder:
        try:
            compute(context, values, Path(folder), watch)
        except (Pruned, Diverged, UnfitError):
            return  # all found the same


def _watcher(
    context: TrialContext, study: optuna.Study, claims: Claims, frozen: FrozenTrial, spent: "_Spent"
) -> Watcher:
    """Reports validation PGD accuracy against images seen; raises Pruned when the study says so, in all processes."""
    trial = optuna.Trial(study, frozen._trial_id)
    known = set(frozen.intermediate_values)  # a resumed trial computes its last report again
    world = context.compute.world

    def watch(images_seen: int, values: dict[str, float]) -> None:
        try:
            with spent.counted(), speaking(context.plan.storage), _unless_ended(frozen):
                _expect_held(claims, frozen, within=RENEW + 5)
                if images_seen not in known:
                    trial.report(values[OBJECTIVE], images_seen)
                    known.add(images_seen)
                stop = sampling.should_stop(trial, images_seen, context.plan.settings)
        except DmatError as error:
            world.broadcast(f"{_STOP}{error}".encode())
            raise
        pruner = context.plan.settings.pruner
        reason = f"{values[OBJECTIVE]:.4f} after {images_seen} images is behind the other trials ({pruner})"
        world.broadcast(f"{_PRUNED}{reason}".encode() if stop else _GO_ON.encode())
        if stop:
            raise Pruned(reason)

    return watch


def _expect_held(claims: Claims, trial: FrozenTrial, within: float = 0.0) -> None:
    if not claims.holds(trial_key(trial.number), within):
        raise LostError(
            f"trial {trial.number} was taken by another worker, because this one did not answer for a minute; it goes "
            f"on there"
        )


@contextmanager
def _unless_ended(trial: FrozenTrial) -> Iterator[None]:
    """Optuna refuses to change a trial that has ended: another worker ended it."""
    try:
        yield
    except optuna.exceptions.UpdateFinishedTrialError as error:
        raise _ended_elsewhere(trial) from error


def _ended_elsewhere(trial: FrozenTrial) -> LostError:
    return LostError(f"trial {trial.number} was ended by another worker; what it found stands")


def _chosen(plan: Study, values: Mapping[str, Any]) -> TrialSettings:
    """A trial's settings. Each value is possible by itself (`config` has seen to that); together they may not be."""
    chosen = plan.trial.with_values(values)
    drawn = chosen.arm.batch // chosen.arm.cutmix_copies
    generated = round(drawn * chosen.arm.generated_share)
    if chosen.selection is not None and not 0 < generated < drawn:
        raise UnfitError(
            f"generated_share {chosen.arm.generated_share} of {drawn} images leaves {generated} generated ones; "
            f"expected some of both kinds"
        )
    return chosen


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class _Spent:
    """Time that reports took: what a study costs its trainings."""

    def __init__(self) -> None:
        self.seconds, self.reports = 0.0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started
        self.reports += 1
