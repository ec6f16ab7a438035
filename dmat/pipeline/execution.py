"""Runs one instance of a stage by the contract of every job (docs/architecture.md).

Inputs are hashed. The fingerprint of code, settings and inputs names the work folder. A lock keeps a second writer out.
The job fills `result/`, and only a complete result is hard-linked to `artifacts/`. The work folder stays: a result that
DVC lost before it wrote its lock file is published again instead of computed again, as long as its files are those that
were computed. Nothing is published if code, settings or inputs on disk differ by then from those that were used.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dmat import devices, dvc_lock, files, processes, tracking
from dmat.config import Params
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.evaluation.work import Monitor
from dmat.job import Job, Metrics, Result
from dmat.pipeline import code_identity, planning, results, work_folder
from dmat.pipeline.planning import Plan
from dmat.pipeline.stages import STAGES, Stage
from dmat.pipeline.work_folder import Finished
from dmat.processes import World
from dmat.training.interruption import Interruption
from dmat.training.long_run import Watcher
from dmat.workspace import METRICS, PICTURES, RESULT, ProvenanceExtras, Workspace


def execute(
    plan: Plan,
    params: Params,
    workspace: Workspace,
    *,
    fresh: bool = False,
    quiet: bool = False,
    reload_params: Callable[[], Params] | None = None,
    compute_shards: Callable[[Plan, Job], None] | None = None,
) -> Metrics:
    """Runs, resumes or republishes one instance; returns its metrics.

    fresh: sets earlier work aside and starts over. quiet: no progress bar.
    reload_params: reads the parameter file again, to detect changes before publishing; None if `params` does not come
    from a file. compute_shards: computes all shards elsewhere before the job, which then finds them; for a stage with
    `by_shards`. Under `torchrun` the main process does all this. The others only take part in the computation and
    return {}.
    Raises DmatError, and Interrupted on a signal.
    """
    # Before joining the group: the first process that fails would break it for the others.
    process_count = processes.torchrun_processes()
    if process_count > 1 and plan.stage.processes == "one":
        raise DmatError(
            f"{plan.stage.name} was started in {process_count} processes; expected one, as only "
            f"{_stage_names()} take several; start it without torchrun"
        )
    world = processes.world()
    if not world.is_main_process:
        return _run_follower(plan, params, workspace, world)
    dvc_lock.remember(workspace.root, workspace.home)
    plan.work.mkdir(parents=True, exist_ok=True)
    with Interruption(at_once=True), work_folder.lock(plan.work):
        if fresh:
            work_folder.set_aside(plan.work, workspace.home)
        finished = work_folder.verify_finished(plan.work)
        world.broadcast(None if finished else b"compute")
        if finished is None:
            finished = _compute(plan, params, workspace, quiet, fresh, compute_shards)
        _expect_same_code(plan, workspace)
        if reload_params is not None:
            _expect_unchanged(plan, reload_params, workspace)
        _publish(plan, finished, workspace)
    return finished["metrics"]


def _expect_same_code(plan: Plan, workspace: Workspace) -> None:
    """Raises DmatError if the code or code.yaml on disk is not what the result was computed with.

    DVC reads code.yaml again when it records the stage.
    """
    try:
        current = code_identity.expect(plan.stage.name, workspace.root, again=True)
        changed = f"{code_identity.NAME} said {plan.code[:12]} and says {current[:12]}" if current != plan.code else ""
    except DmatError as error:
        changed = str(error)
    if changed:
        title = f"{plan.stage.name} {plan.stage.instance_name(plan.instance)}"
        raise DmatError(f"while {title} was computed its code changed ({changed}); {_advice(plan)}")


def _advice(plan: Plan) -> str:
    return (
        f"expected no change until it ended; nothing was published, the result is kept in {plan.work}: restore the "
        f"earlier state and run the same command again to publish it, or run it again to compute with the current state"
    )


def _expect_unchanged(planned: Plan, reload_params: Callable[[], Params], workspace: Workspace) -> None:
    """Raises DmatError if parameters or inputs on disk are not those of the computation.

    DVC reads both again when it records the stage, so it would record this result under the changed ones.
    """
    title = f"{planned.stage.name} {planned.stage.instance_name(planned.instance)}"
    advice = _advice(planned)
    try:
        replanned = planning.plan(planned.stage, planned.instance, reload_params(), workspace)
    except DmatError as error:
        raise DmatError(f"while {title} was computed its parameters or inputs changed ({error}); {advice}") from None
    if replanned.fingerprint == planned.fingerprint:
        return
    old_values, new_values = (tracking.parameters(version.settings.plain()) for version in (planned, replanned))
    changed = [
        f"{name} was {old_values.get(name, 'not there')} and is {new_values.get(name, 'not there')}"
        for name in sorted({*old_values, *new_values})
        if old_values.get(name) != new_values.get(name)
    ]
    changed += [
        f"the code of {path} changed"
        for path in planned.plugins
        if replanned.plugins.get(path) != planned.plugins[path]
    ]
    changed += [
        f"{replanned.inputs[name]['path']} was {entry['sha256'][:12]} and is {replanned.inputs[name]['sha256'][:12]}"
        for name, entry in planned.inputs.items()
        if name in replanned.inputs and replanned.inputs[name]["sha256"] != entry["sha256"]
    ]
    raise DmatError(f"{'; '.join(changed) or 'what it reads changed'} while {title} was computed; {advice}")


def _run_follower(plan: Plan, params: Params, workspace: Workspace, world: World) -> Metrics:
    """The part of every process under `torchrun` but the main one: the same computation, in a temporary folder."""
    if world.broadcast(None) is None:
        return {}
    with tempfile.TemporaryDirectory() as folder, Interruption(at_once=True):
        run(plan, new_job(plan, params, workspace, resolve(params), Path(folder), quiet=True))
    return {}


def run_shards(
    plan: Plan,
    params: Params,
    workspace: Workspace,
    numbers: range,
    *,
    quiet: bool = False,
    compute: Compute | None = None,
    fresh: bool = False,
) -> None:
    """Computes some shards of an instance and publishes nothing: a later run of the whole instance finds them.

    Any number of processes may do so at once, on machines that share the project's `runs/`. numbers: of the shards.
    compute: what to compute with; None: as the parameters say. fresh: computes shards again that are there.
    """
    with Interruption(at_once=True):
        compute = _for_stage(plan.stage, compute or resolve(params))
        plan.work.mkdir(parents=True, exist_ok=True)
        job = new_job(plan, params, workspace, compute, plan.work, quiet, fresh=fresh)
        plan.stage.job.run_shards(plan.settings, job, numbers)


def estimate(plan: Plan, params: Params, workspace: Workspace) -> dict[str, object]:
    """How much is done and how long the rest takes; {} for stages that cannot tell, and for finished results."""
    if plan.finished or not hasattr(plan.stage.job, "estimate"):
        return {}
    values: dict[str, object] = plan.stage.job.estimate(
        plan.settings, new_job(plan, params, workspace, resolve(params), plan.work, quiet=True)
    )
    return values


def monitor(plan: Plan, params: Params, workspace: Workspace) -> Monitor | None:
    """Reads how far the evaluation of an instance is; None for other stages, and for finished results."""
    if plan.finished or not hasattr(plan.stage.job, "monitor"):
        return None
    job = new_job(plan, params, workspace, resolve(params), plan.work, quiet=True)
    stage_monitor: Monitor = plan.stage.job.monitor(plan.settings, job)
    return stage_monitor


def _stage_names() -> str:
    """Names of the stages that several processes compute together, for a message."""
    return ", ".join(stage.name for stage in STAGES.values() if stage.processes == "together")


def run(plan: Plan, job: Job) -> Result:
    """Runs the job of an instance and nothing around it: no lock, no tracking, no publishing."""
    result: Result = plan.stage.job.run(plan.settings, job)
    return result


def resolve(params: Params) -> Compute:
    """Resolves the device, precision and threads that a parameter file asks for."""
    settings = params.compute
    return devices.resolve(settings.device, settings.precision, settings.threads, settings.compile)


def new_job(
    plan: Plan, params: Params, workspace: Workspace, compute: Compute, work: Path, quiet: bool,
    watcher: Watcher | None = None, fresh: bool = False,
) -> Job:  # fmt: skip
    """The `Job` of an instance that works in the folder `work`."""
    return Job(
        {name: workspace.at(entry["path"]) for name, entry in plan.inputs.items()},
        plan.instance,
        workspace.root,
        work,
        compute,
        params.compute.save_every_seconds,
        quiet,
        files.fingerprint([plan.code, plan.plugins]) if plan.plugins else plan.code,
        fresh,
        watcher,
    )


def compute_of(stage: Stage, params: Params) -> Compute:
    """Device, precision and threads of a stage; single precision for a stage with `float32`."""
    return _for_stage(stage, resolve(params))


def _for_stage(stage: Stage, compute: Compute) -> Compute:
    return compute.exact() if stage.float32 else compute


def _compute(
    plan: Plan, params: Params, workspace: Workspace, quiet: bool, fresh: bool,
    compute_shards: Callable[[Plan, Job], None] | None,
) -> Finished:  # fmt: skip
    compute = compute_of(plan.stage, params)
    started = time.time()
    tracked = tracking.open_run(
        workspace.home,
        plan.work,
        stage=plan.stage.name,
        instance_name=plan.stage.instance_name(plan.instance),
        settings=plan.settings.plain(),
        context=plan.stage.context(params, plan.instance),
        inputs=plan.inputs,
        compute=compute.describe(),
        root=workspace.root,
        fingerprint=plan.fingerprint,
        ancestors={
            step.title: {"run": step.run, "parent": step.parent}
            for step in results.ancestors_of_inputs(plan.inputs, params, workspace)
        },
    )
    job = new_job(plan, params, workspace, compute, plan.work, quiet, fresh=fresh)
    with tracked:  # ends the tracked run with the status that fits what happened inside
        with Interruption(at_once=True):  # inside, so that the tracked run records the signal
            if compute_shards is not None:
                compute_shards(plan, job)
                job = dataclasses.replace(job, fresh=False)
            result = run(plan, job)
        for name, value in result.tags.items():
            tracked.tag(name, value)
        if result.description:
            tracked.describe(result.description)
        for model in result.models:
            tracked.register(model)
        record = compute.describe()
        if result.compiled:
            record["compiled"] = True
            tracked.tag("compute.compiled", str(True))
        metrics, measured = dict(result.metrics), dict(result.measured)
        files.write_json(plan.work / METRICS, metrics)
        extras: ProvenanceExtras = {}
        if plan.plugins:
            extras["plugins"] = plan.plugins
        if result.pools:
            extras["pools"] = list(result.pools)
        finished: Finished = {
            "metrics": metrics,
            "notes": list(result.notes),
            "code": plan.code,
            "files": work_folder.files_of(plan.work),
            "provenance": {
                **tracked.provenance(),
                "stage": plan.stage.name,
                "instance": plan.stage.instance_name(plan.instance),
                "fingerprint": plan.fingerprint,
                "code": plan.code,
                **extras,
                "settings": plan.settings.plain(),
                "inputs": plan.inputs,
                "compute": record,
                "seconds": round(tracking.seconds_before(plan.work) + time.time() - started, 1),
                "measured": measured,
                "outputs": {path: files.checksum(source) for path, source in _published_sources(plan).items()},
            },
        }
        work_folder.write_finished(plan.work, finished)
        tracked.finish_with(
            metrics | measured | dict(result.headlines), [*sorted(job.pictures.glob("*.png")), *result.attachments]
        )
    return finished


def _publish(plan: Plan, finished: Finished, workspace: Workspace) -> None:
    """Publishes a result. The provenance comes last, because it holds the checksum of everything else."""
    for path, source in _published_sources(plan).items():
        files.publish(source, workspace.at(path))
    files.write_json(workspace.at(plan.stage.provenance_path(plan.instance)), finished["provenance"])


def _published_sources(plan: Plan) -> dict[str, Path]:
    """Path below the project -> the file or folder of the work folder that is published there."""
    sources = {path: plan.work / RESULT / name for name, path in plan.outputs.items()}
    sources[plan.stage.metrics_path(plan.instance)] = plan.work / METRICS
    if (plan.work / PICTURES).exists():
        sources[plan.stage.pictures_path(plan.instance)] = plan.work / PICTURES
    return sources
