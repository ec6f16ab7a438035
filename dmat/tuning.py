"""Tuning studies, and the only importer of Optuna: which beta, learning rate and generated share give the highest
PGD accuracy on the validation split, at equal images seen.

A trial is a short run of `train_robust` that starts from an arm. It reports at every evaluation and is stopped early
when it falls behind the others. The study lives in `runs/tune/<arm>-<fingerprint>/` and in the SQLite file beside it;
another space, arm or data set is another study. A killed command goes on with the very trial that it was at.
"""

import csv
import dataclasses
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from dmat import ARTIFACTS, config, devices, files, seeds, tracking
from dmat.config import MixImages, Params, TrainRobust, Tune
from dmat.devices import Compute
from dmat.errors import Diverged, DmatError, Pruned
from dmat.jobs import STAGES, execution, mix_images, train_robust
from dmat.jobs.execution import Job
from dmat.jobs.workspace import Workspace
from dmat.metrics import study_pictures
from dmat.training.interruption import Interruption
from dmat.training.long_run import MetricsLog

OBJECTIVE = "validation_robust"  # share of 1, of the averaged weights
MINIMUM_FOR_IMPORTANCES = 4  # complete trials
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study that a parameter file asks for; `--dry-run` prints it."""

    settings: Tune
    trial: TrainRobust  # what all trials have in common
    images_from: str
    inputs: dict[str, dict[str, str]]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def storage(self) -> str:
        """Address of the file that holds all studies of this project."""
        return f"sqlite:///{self.folder.parent / 'studies.db'}"

    def describe(self) -> dict[str, Any]:
        return {
            "study": self.name,
            "settings": self.settings.plain(),
            "trial": self.trial.plain(),
            "inputs": self.inputs,
            "storage": self.storage,
            "work": str(self.folder),
        }


def plan(params: Params, workspace: Workspace) -> Study:
    """Resolves a study. Raises DmatError if the file asks for none, or an input is missing."""
    settings = params.sections.get("tune")
    if settings is None:
        raise DmatError(
            "params.yaml has no section `tune`; add one (docs/parameters.md), or bring a recipe that has it"
        )
    trial, images_from = params.trial, params.arm_images[settings.arm]
    assert trial is not None  # as the section is there
    wanted = STAGES["mix_images"].inputs(params, settings.arm) | STAGES["train_robust"].inputs(params, settings.arm, 0)
    inputs = {
        name: {"path": path, "sha256": files.checksum(workspace.at(path))}
        for name, path in wanted.items()
        if name != "mix"  # trials make their own
    }
    identity = {
        "settings": settings.plain(),
        "trial": trial.plain(),
        "inputs": {name: entry["sha256"] for name, entry in inputs.items()},
    }
    folder = workspace.run_folder("tune", settings.arm, files.fingerprint(identity))
    return Study(settings, trial, images_from, inputs, folder)


def run(
    plan: Study, params: Params, workspace: Workspace, trials: int, *, fresh: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Runs or resumes a study until `trials` trials have ended; returns its summary.

    Raises Interrupted on a signal, with the trial at work saved, and DmatError on bad input.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with execution.lock(plan.folder), Interruption(at_once=True) as interruption:
        study = _open(plan, workspace, fresh)
        if not _finished(study, plan, trials):
            _compute(study, plan, params, workspace, trials, interruption, quiet)
        files.publish(plan.folder / "result", workspace.at(f"{ARTIFACTS}/tune/{plan.settings.arm}"))
        return _summary(study, plan)


def _compute(
    study: optuna.Study,
    plan: Study,
    params: Params,
    workspace: Workspace,
    trials: int,
    interruption: Interruption,
    quiet: bool,
) -> None:
    """Runs trials until enough have ended, and reports, as one tracked run."""
    wanted: Any = params.sections["compute"]
    compute = devices.resolve(wanted.device, wanted.precision, wanted.threads)
    tracked = tracking.open_run(
        workspace.home,
        plan.folder,
        stage="tune",
        instance=plan.settings.arm,
        settings=plan.settings.plain(),
        inputs=plan.inputs,
        compute=compute.describe(),
        root=workspace.root,
        tags={"optuna.study": plan.name, "optuna.storage": plan.storage},
    )
    import torch._dynamo  # noqa: F401 - by the first optimiser; seconds that no trial should be charged with

    worker = _Worker(plan, params, workspace, compute, wanted.save_every_seconds)
    bar = tqdm(total=trials, unit=" trials", desc=f"tune {plan.settings.arm}", disable=quiet)
    with tracked, bar, MetricsLog(plan.folder / "metrics.jsonl") as log:
        _log_ended(study, log)  # a killed process may have told the study of a trial and not this log
        while len(_ended(study)) < trials:
            _show(bar, study)
            worker.run(study, _next(study, plan))
            _log_ended(study, log)
            interruption.raise_if_asked()  # while the trial was ending
        _show(bar, study)
        summary = _summary(study, plan)
        tracked.finish_with(summary, _report(study, plan, summary))
    files.write_json(plan.folder / "finished.json", {"trials": summary["trials"]})


def _finished(study: optuna.Study, plan: Study, trials: int) -> bool:
    """Whether a report of all trials is there already and no more are wanted."""
    path = plan.folder / "finished.json"
    reported = files.read_json(path)["trials"] if path.exists() else 0
    return bool(trials <= reported == len(_ended(study)))


def _log_ended(study: optuna.Study, log: MetricsLog) -> None:
    """The best value and its parameters after each trial; the step of the study's own metrics is the number of ended
    trials. The log drops what it has already."""
    ended = _ended(study)
    for count in range(1, len(ended) + 1):
        log.write(count, _best_so_far(ended[:count]))


@dataclasses.dataclass(frozen=True)
class _Worker:
    """Runs one trial after the other."""

    plan: Study
    params: Params
    workspace: Workspace
    compute: Compute
    save_seconds: float

    def run(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """One trial to its end, in storage and in MLflow; or resumed if an earlier process was killed in it."""
        folder = self.plan.folder / f"trial-{trial.number:04d}"
        folder.mkdir(exist_ok=True)
        record = self.record(trial.params)
        tracked = tracking.open_run(
            self.workspace.home,
            folder,
            stage="train_robust",
            instance=f"trial {trial.number}",
            settings=record.plain(),
            inputs=self.plan.inputs,
            compute=self.compute.describe(),
            root=self.workspace.root,
            parent=self.plan.folder,
            tags={
                "optuna.study": self.plan.name,
                "optuna.trial": str(trial.number),
                "dmat.arm": self.plan.settings.arm,
            },
        )
        with tracked:
            started = time.time()
            try:
                state, value, reason = TrialState.COMPLETE, self.train(folder, record, _watcher(study, trial)), ""
                tracked.finish_with({f"best_{OBJECTIVE}": value}, [])
            except Pruned as stop:
                state, value, reason = TrialState.PRUNED, None, str(stop)
                tracked.end_as("KILLED", f"pruned: {reason}")
            except Diverged as error:
                state, value, reason = TrialState.FAIL, None, str(error)
                tracked.end_as("FAILED", reason)
            tracked.tag("optuna.state", state.name)
            live = optuna.Trial(study, trial._trial_id)
            live.set_user_attr("seconds", round(tracking.seconds_before(folder) + time.time() - started, 1))
            live.set_user_attr("reason", reason)
        # last, because what comes after it is lost with the process: a trial that was not told ends once more
        study.tell(trial.number, value, state)
        (folder / "checkpoint.dmat").unlink(missing_ok=True)  # as large as the network and needed no more

    def record(self, chosen: Mapping[str, float]) -> TrainRobust:
        """The settings of one trial."""
        return TrainRobust.model_validate(config.merge(self.plan.trial.plain(), chosen))

    def train(self, folder: Path, record: TrainRobust, watcher: Callable[[int, dict[str, float]], None]) -> float:
        """Best validation PGD accuracy of a training, in its own folder."""
        inputs = {name: self.workspace.at(entry["path"]) for name, entry in self.plan.inputs.items()}
        job = Job(
            inputs,
            {"arm": self.plan.settings.arm, "seed": self.plan.settings.seed},
            self.params,
            self.workspace.root,
            folder,
            folder / "result",
            folder / "pictures",
            self.compute,
            self.save_seconds,
            quiet=True,
            watcher=watcher,
        )
        mix_images.run(MixImages.of(record, self.plan.images_from), job)
        found = train_robust.run(record, dataclasses.replace(job, inputs=inputs | {"mix": folder / "result" / "mix"}))
        best: float = found["best_validation_robust"]
        return best


def _open(plan: Study, workspace: Workspace, fresh: bool) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = plan.folder.parent / "studies.db"
    try:
        return _open_storage(optuna.storages.RDBStorage(plan.storage), plan, workspace, fresh)
    except (sqlalchemy.exc.DatabaseError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise DmatError(
            f"{path} cannot be used as the storage of studies ({str(error.__cause__ or error).splitlines()[0]}); bring "
            f"back a good copy, or move it away: a new one is made and the study begins again"
        ) from error


def _open_storage(storage: optuna.storages.RDBStorage, plan: Study, workspace: Workspace, fresh: bool) -> optuna.Study:
    if fresh and plan.name in {summary.study_name for summary in optuna.get_all_study_summaries(storage)}:
        old = f"{plan.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"
        optuna.copy_study(from_study_name=plan.name, from_storage=storage, to_storage=storage, to_study_name=old)
        optuna.delete_study(study_name=plan.name, storage=storage)
        execution.set_aside(plan.folder, workspace.home)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if plan.settings.pruner == "median":
        # the warm-up is over after the report at warm_up_images
        pruner = optuna.pruners.MedianPruner(plan.settings.startup_trials, plan.settings.warm_up_images + 1)
    study = optuna.create_study(
        storage=storage, pruner=pruner, study_name=plan.name, direction="maximize", load_if_exists=True
    )
    files.write_json(plan.folder / "study.json", plan.describe())
    if not study.get_trials(deepcopy=False):
        # the arm as it is comes first: a known point, and what the others are compared with
        own: dict[str, float] = {name: getattr(plan.trial, name) for name in plan.settings.space}
        if all(wanted.low <= own[name] <= wanted.high for name, wanted in plan.settings.space.items()):
            study.enqueue_trial(own)
    return study


def _next(study: optuna.Study, plan: Study) -> FrozenTrial:
    """The trial that a killed process was at, else a new one. Its sampler is named by seed and trial, so that a
    resumed study does not repeat its start."""
    trials = study.get_trials(deepcopy=False)
    at_work = next((trial for trial in trials if trial.state == TrialState.RUNNING), None)
    number = len(trials) if at_work is None else at_work.number
    seed = int(seeds.stream(plan.settings.seed, "tune/sampler", number).integers(2**31))
    study.sampler = (
        optuna.samplers.RandomSampler(seed=seed)
        if plan.settings.sampler == "random"
        else optuna.samplers.TPESampler(seed=seed, n_startup_trials=10)
    )
    made = study.ask() if at_work is None else optuna.Trial(study, at_work._trial_id)
    for name, wanted in plan.settings.space.items():
        if name in made.params and name not in made.relative_params:  # killed between two values that are drawn singly
            # drawing the first again brings the sampler to where the second was to be drawn
            study.sampler.sample_independent(study, trials[number], name, made.distributions[name])
        made.suggest_float(name, wanted.low, wanted.high, log=wanted.scale == "log")
    return study.get_trials(deepcopy=False)[made.number]


def _watcher(study: optuna.Study, frozen: FrozenTrial) -> Callable[[int, dict[str, float]], None]:
    """Reports validation PGD accuracy against images seen; raises Pruned when the pruner says so."""
    trial = optuna.Trial(study, frozen._trial_id)
    known = set(frozen.intermediate_values)  # a resumed trial computes its last report again

    def watch(images_seen: int, values: dict[str, float]) -> None:
        if images_seen not in known:
            trial.report(values[OBJECTIVE], images_seen)
        if trial.should_prune():
            raise Pruned(f"{values[OBJECTIVE]:.4f} after {images_seen} images is below the median of the other trials")

    return watch


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=ENDED)


def _best(ended: list[FrozenTrial]) -> FrozenTrial | None:
    complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    return max(complete, key=lambda trial: trial.value or 0.0, default=None)


def _best_so_far(ended: list[FrozenTrial]) -> dict[str, float]:
    best = _best(ended)
    return {} if best is None or best.value is None else {f"best_{OBJECTIVE}": best.value, **best.params}


def _show(bar: Any, study: optuna.Study) -> None:
    ended = _ended(study)
    bar.update(len(ended) - bar.n)
    best = _best(ended)
    if best is not None:
        bar.set_postfix({"best": f"{best.value:.4f}", **{name: f"{value:.3g}" for name, value in best.params.items()}})


def _summary(study: optuna.Study, plan: Study) -> dict[str, Any]:
    """Counts, cost and the best trial."""
    ended = _ended(study)
    best = _best(ended)
    seen = sum(max(trial.intermediate_values, default=0) for trial in ended)
    full = plan.settings.images * len(ended)
    return {
        "trials": len(ended),
        **{state.name.lower(): sum(trial.state == state for trial in ended) for state in ENDED},
        "images_seen": seen,
        "images_saved_by_pruning": 1 - seen / full if full else 0.0,
        "longest_trial_seconds": max(
            (trial.user_attrs["seconds"] for trial in ended if "seconds" in trial.user_attrs), default=0.0
        ),
        "best": best and {"trial": best.number, OBJECTIVE: best.value, **best.params},
    }


def _report(study: optuna.Study, plan: Study, summary: dict[str, Any]) -> list[Path]:
    """Table, summary and pictures in the study's result folder; returns the pictures."""
    folder = plan.folder / "result"
    files.write_text(folder / "trials.csv", _table(study, plan))
    files.write_json(folder / "summary.json", {**summary, **plan.describe()})
    trials = [_seen(trial) for trial in _ended(study)]
    scales: dict[str, str] = {name: wanted.scale for name, wanted in plan.settings.space.items()}
    drawn = ["history", "curves", "slices"]
    study_pictures.history(folder / "history.png", trials)
    study_pictures.curves(folder / "curves.png", trials)
    study_pictures.slices(folder / "slices.png", trials, scales)
    if summary["complete"] >= MINIMUM_FOR_IMPORTANCES and len({trial.value for trial in trials}) > 1:
        importances = optuna.importance.get_param_importances(study)
        study_pictures.importances(folder / "importances.png", importances, summary["complete"])
        drawn.append("importances")
    return [folder / f"{name}.png" for name in drawn]


def _seen(trial: FrozenTrial) -> study_pictures.Trial:
    """A trial as pictures show it; one that was stopped early has the value it had last."""
    last = trial.intermediate_values.get(max(trial.intermediate_values, default=0))
    value = last if trial.state == TrialState.PRUNED else trial.value
    return study_pictures.Trial(trial.number, trial.state.name, trial.params, value, trial.intermediate_values)


def _table(study: optuna.Study, plan: Study) -> str:
    """One line a trial."""
    text = io.StringIO()
    names = ["trial", "state", *plan.settings.space, OBJECTIVE, "images_seen", "seconds", "reason"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for trial in _ended(study):
        writer.writerow(
            {
                "trial": trial.number,
                "state": trial.state.name,
                **trial.params,
                OBJECTIVE: trial.value,
                "images_seen": max(trial.intermediate_values, default=0),
                "seconds": trial.user_attrs.get("seconds"),
                "reason": trial.user_attrs.get("reason"),
            }
        )
    return text.getvalue()
