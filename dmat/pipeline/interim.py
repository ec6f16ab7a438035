"""Reads how far trainings and evaluations are, while others compute them. Changes nothing."""

import dataclasses
from pathlib import Path

from dmat import NONE, files
from dmat.config import Params
from dmat.evaluation.table import SUMMARY
from dmat.metrics.pictures import History
from dmat.pipeline import execution, planning
from dmat.pipeline.planning import Plan
from dmat.pipeline.stages import STAGES, Stage
from dmat.report.interim import InterimRun
from dmat.tracking.run_record import METRICS_LOG
from dmat.training import HISTORY
from dmat.workspace import RESULT, Instance, Workspace

_MEASURES = {"standard": "AutoAttack", "quick": "quick tier", NONE: "PGD"}  # setting auto_attack -> heading


def read(params: Params, workspace: Workspace) -> list[InterimRun]:
    """Every arm with every seed of the parameters, as far as it is computed.

    A result counts if the parameters, the code and the inputs that are there now would give it. Raises DmatError as
    `planning.plan` does, for instance for an input that was altered.
    """
    return [_run(instance, params, workspace) for instance in STAGES["evaluate_robust"].all_instances(params)]


def _run(instance: Instance, params: Params, workspace: Workspace) -> InterimRun:
    training, evaluation = STAGES["train_robust"], STAGES["evaluate_robust"]
    suite = params.evaluate_robust.auto_attack
    measure = _MEASURES[suite] if isinstance(suite, str) else " + ".join(suite)
    run = InterimRun(str(instance["arm"]), evaluation.instance_name(instance), "", (), measure)
    missing = _missing_inputs(training, instance, params, workspace)
    if missing:
        return dataclasses.replace(run, training=f"waits for {missing[0]}")
    trained = planning.plan(training, instance, params, workspace)
    run = dataclasses.replace(run, history=_history(trained, workspace))
    total = int(trained.settings.plain()["images_seen"])
    seen = int(run.history[-1]["images_seen"]) if run.history else 0
    run = dataclasses.replace(run, training=f"{100 * seen / total:.0f} % of {total:,} images")
    if planning.as_published(trained, workspace) is None or _missing_inputs(evaluation, instance, params, workspace):
        return run
    evaluated = planning.plan(evaluation, instance, params, workspace)
    folder = _result_folder(evaluated, "evaluation", workspace)
    if folder is not None:
        best = files.read_json(folder / SUMMARY)["best"]
        name = next((name for name in best if name == "auto_attack" or name.startswith("auto_attack_")), "pgd")
        return dataclasses.replace(run, result=best[name])
    monitor = execution.monitor(evaluated, params, workspace)
    return dataclasses.replace(run, estimate=monitor.estimate() if monitor is not None else None)


def _missing_inputs(stage: Stage, instance: Instance, params: Params, workspace: Workspace) -> list[str]:
    """Paths of inputs that do not exist yet."""
    return [path for path in stage.inputs(params, **instance).values() if not workspace.at(path).exists()]


def _result_folder(plan: Plan, output: str, workspace: Workspace) -> Path | None:
    """Folder of an output of a finished instance, published or not yet; None for one that is not finished."""
    if planning.as_published(plan, workspace) is not None:
        return workspace.at(plan.outputs[output])
    return plan.work / RESULT / output if plan.finished is not None else None


def _history(plan: Plan, workspace: Workspace) -> History:
    """The records of a training so far, with images_seen; () before the first."""
    folder = _result_folder(plan, "classifier", workspace)
    if folder is not None:
        history: History = files.read_json(folder / HISTORY)
        return history
    path = plan.work / METRICS_LOG
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # the newest line may be incomplete: a training writes it now
    return [files.parse_json(line) for line in lines if line.endswith(b"\n")]
