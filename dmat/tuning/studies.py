"""Runs a study: the command around its driver, which has the MLflow run and writes the report."""

import dataclasses
import functools
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from tqdm import tqdm

from dmat import files, processes, redaction, tracking
from dmat.config import Params
from dmat.engine import EngineOptions, open_engine
from dmat.errors import DmatError
from dmat.pipeline import code_identity, execution, work_folder
from dmat.pipeline.division import WorkerCompute, gpu_environments
from dmat.training.interruption import Interruption
from dmat.training.long_run import MetricsLog
from dmat.tuning import driver, driver_identity, rank_task, ranking, report, sampling, storage, trials
from dmat.tuning.plan import CODE_STAGES, MAX_LOST_WORKERS, STAGE_NAME, Study, changes_images
from dmat.tuning.state import folder_of
from dmat.tuning.storage import explain_storage_errors
from dmat.tuning.trials import TrialContext
from dmat.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Options of a command. total: trials of the study. engine: where trials run."""

    total: int
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    fresh: bool = False
    quiet: bool = False


def run(plan: Study, params: Params, workspace: Workspace, options: StudyOptions) -> dict[str, Any]:
    """Runs or resumes a study until enough trials have ended and the best are ranked; returns its summary.

    Raises Interrupted on a signal, after saving the running trials, and DmatError on bad input, if another process
    computes this study in this folder, or if the code is not that of code.yaml.
    """
    for stage_name in CODE_STAGES:
        code_identity.expect(stage_name, workspace.root)
    # Before joining the group: the first process that fails would break it for the others.
    if (process_count := processes.torchrun_processes()) > 1 and changes_images(plan.settings.space):
        raise DmatError(
            f"the space of study {plan.name} changes images, which one process makes, and {process_count} were "
            f"started; expected one for each trial; remove compute.processes and torchrun"
        )
    # Trials are short, and their values must not depend on a measured time.
    compute = dataclasses.replace(execution.resolve(params), compile="off")
    context = TrialContext(plan, params, workspace, compute)
    if not compute.world.is_main_process:
        trials.follow(context)
        return {}
    plan.folder.mkdir(parents=True, exist_ok=True)
    import torch._dynamo  # noqa: F401 - by the first optimiser; seconds that no trial should be charged with

    advice = "expected one `dmat tune start` in a folder; wait for it; --workers and --cluster run trials side by side"
    # Errors of the storage are explained for all access inside.
    with (
        work_folder.lock(plan.folder, advice),
        Interruption(at_once=not options.engine.has_workers) as interruption,
        explain_storage_errors(plan.storage),
    ):
        rdb = storage.connect(plan.storage)
        if options.fresh:
            _start_over(plan, workspace, rdb)
        study = storage.begin(rdb, plan, sampling.pruner(plan.settings))
        if not _finished(plan, study, options.total):
            _compute(context, study, rdb, options, interruption)
        files.publish(plan.folder / "result", workspace.at(str(folder_of(plan))))
        return report.summary(plan, study)


def _compute(
    context: TrialContext, study: optuna.Study, rdb: RDBStorage, options: StudyOptions, interruption: Interruption
) -> None:
    """Runs trials until enough have ended, and writes the report, as one tracked run."""
    plan = context.plan
    tracked = tracking.open_run(
        context.workspace.home,
        plan.folder,
        stage=STAGE_NAME,
        instance_name=plan.settings.arm,
        settings=plan.settings.plain(),
        inputs=plan.inputs,
        compute=context.compute.describe(),
        root=context.workspace.root,
        fingerprint=plan.fingerprint,
        tags={"optuna.study": plan.name, "optuna.storage": redaction.address(plan.storage)},
    )
    files.write_json(plan.folder / "study.json", plan.describe())
    bar = tqdm(total=options.total, unit=" trials", desc=f"tune {plan.settings.arm}", disable=options.quiet)
    expect = functools.partial(trials.expect, context.workspace.root, WorkerCompute.of(context.compute))
    engine_options = dataclasses.replace(
        options.engine, allowed_failures=MAX_LOST_WORKERS, environments=gpu_environments()
    )
    with tracked, bar, MetricsLog(plan.folder / "metrics.jsonl") as log, open_engine(engine_options, expect) as engine:

        def on_trial_end() -> None:
            """Writes all rows again: a killed process may have reported a trial to the study but not to this log, which
            ignores rows that it has."""
            for count, values in report.course(study):
                log.write(count, values)
            bar.update(len(storage.own_trials(storage.ended(study))) - bar.n)
            if (best := ranking.best(plan, study)) is not None:
                bar.set_postfix_str(report.in_words(best))

        on_trial_end()
        in_process = not engine_options.has_workers
        work = driver.Driver(context, study, rdb, options.total, in_process, on_trial_end, options.quiet)
        work.run(engine, interruption.raise_if_received)
        summary, attachments = report.write(plan, study)
        tracked.describe(report.markdown(plan, study))
        tracked.finish_with(summary, attachments)
    files.write_json(plan.folder / "finished.json", {"trials": summary["trials"], "ranked": summary["ranked"]})


def _start_over(plan: Study, workspace: Workspace, rdb: RDBStorage) -> None:
    """Sets the study aside. Raises DmatError if a driver of another folder computes one of its trials."""
    study = storage.find(rdb, plan.name)
    if study is None:
        return
    optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if not driver_identity.is_of_folder(trial, plan.folder):
            raise DmatError(
                f"trial {trial.number} of study {plan.name} is being computed by {driver_identity.process_of(trial)}; "
                f"expected nobody at work where --fresh sets it aside; stop that command first"
            )
    storage.set_aside(rdb, study)
    work_folder.set_aside(plan.folder, workspace.home)


def _finished(plan: Study, study: optuna.Study, total: int) -> bool:
    """Whether the report covers all trials, enough have ended, and nothing is left to rank."""
    path = plan.folder / "finished.json"
    ended = storage.ended(study)
    current = {"trials": len(ended), "ranked": sorted(ranking.auto_attack_results(study))}
    reported = path.exists() and files.read_record(path, dict[str, object]).items() >= current.items()
    return reported and total <= len(storage.own_trials(ended)) and not rank_task.missing(plan, study)
