"""Runs one instance of a stage by the contract of every job (docs/architecture.md).

Inputs are hashed, the fingerprint of code, settings and inputs names the work folder, a lock keeps a second writer out,
the job fills `result/`, and only a complete result is hard-linked to `artifacts/`. The work folder stays, so a
result that DVC loses before it wrote its lock file is published again instead of computed again, as long as its files
are those that were computed. Nothing is published under code, settings or inputs that are not those on disk by then.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmat import devices, dvc_lock, files, processes, tracking
from dmat.config import Params
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.pipeline import code_identity, planning, results, work_folder
from dmat.pipeline.planning import Plan
from dmat.pipeline.stages import STAGES, Stage
from dmat.processes import World
from dmat.training.interruption import Interruption
from dmat.training.long_run import Watcher
from dmat.workspace import FINISHED, METRICS, PICTURES, RESULT, Workspace


def execute(
    plan: Plan,
    params: Params,
    workspace: Workspace,
    *,
    fresh: bool = False,
    quiet: bool = False,
    read_again: Callable[[], Params] | None = None,
) -> dict[str, Any]:
    """Runs, resumes or republishes one instance; returns its metrics. Raises DmatError and Interrupted.

    read_again: reads the parameter file as it is by now; None where `params` are not a file's. Under `torchrun` the
    leading process does that and the others only compute with it; they return nothing.
    """
    size = processes.wanted()  # before joining: whoever refused first would break the others' joining
    if size > 1 and plan.stage.processes == "one":
        raise DmatError(
            f"{plan.stage.name} was started in {size} processes; expected one, as only "
            f"{_words('together', 'shared')} take several; start it without torchrun"
        )
    world = processes.world()
    if not world.is_main_process:
        return _follow(plan, params, workspace, world)
    dvc_lock.remember(workspace.root, workspace.home)
    plan.work.mkdir(parents=True, exist_ok=True)
    with Interruption(at_once=True), work_folder.lock(plan.work):
        if fresh:
            work_folder.set_aside(plan.work, workspace.home)
        finished = work_folder.intact(plan.work)
        world.broadcast(None if finished else b"compute")
        if finished is None:
            finished = _compute(plan, params, workspace, quiet, fresh)
        _expect_same_code(plan, workspace)
        if read_again is not None:
            _expect_unchanged(plan, read_again, workspace)
        _publish(plan, finished, workspace)
    metrics: dict[str, Any] = finished["metrics"]
    return metrics


def _expect_same_code(plan: Plan, workspace: Workspace) -> None:
    """Raises DmatError if the code or code.yaml on disk is not what the result was computed with: DVC reads code.yaml
    again when it records the stage."""
    try:
        now = code_identity.expect(plan.stage.name, workspace.root, again=True)
        changed = f"{code_identity.NAME} said {plan.code[:12]} and says {now[:12]}" if now != plan.code else ""
    except DmatError as error:
        changed = str(error)
    if changed:
        title = f"{plan.stage.name} {plan.stage.instance_name(plan.instance)}"
        raise DmatError(f"while {title} was computed its code changed ({changed}); {_kept_advice(plan)}")


def _kept_advice(plan: Plan) -> str:
    return (
        f"expected no change until it ended; nothing was published, the result is kept in {plan.work}: bring back what "
        f"was there and run the same command again to publish it, or run it again for what is there now"
    )


def _expect_unchanged(old: Plan, read_again: Callable[[], Params], workspace: Workspace) -> None:
    """Raises DmatError if parameters or inputs on disk are not those that were computed with.

    DVC reads both again when it records the stage, so it would write this result down under what lies there now.
    """
    title = f"{old.stage.name} {old.stage.instance_name(old.instance)}"
    advice = _kept_advice(old)
    try:
        now = planning.plan(old.stage, old.instance, read_again(), workspace)
    except DmatError as error:
        raise DmatError(f"while {title} was computed its parameters or inputs changed ({error}); {advice}") from None
    if now.fingerprint == old.fingerprint:
        return
    before, after = (tracking.parameters(one.settings.plain()) for one in (old, now))
    changed = [
        f"{name} was {before.get(name, 'not there')} and is {after.get(name, 'not there')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    changed += [f"the code of {path} changed" for path in old.plugins if now.plugins.get(path) != old.plugins[path]]
    changed += [
        f"{now.inputs[name]['path']} was {entry['sha256'][:12]} and is {now.inputs[name]['sha256'][:12]}"
        for name, entry in old.inputs.items()
        if name in now.inputs and now.inputs[name]["sha256"] != entry["sha256"]
    ]
    raise DmatError(f"{'; '.join(changed) or 'what it reads changed'} while {title} was computed; {advice}")


def _follow(plan: Plan, params: Params, workspace: Workspace, world: World) -> dict[str, Any]:
    """What a process does that does not lead: the same computation, in a folder that nobody keeps."""
    if world.broadcast(None) is None:
        return {}
    if plan.stage.processes == "shared":
        run_worker(plan, params, workspace, quiet=True)
        return {}
    with tempfile.TemporaryDirectory() as folder, Interruption(at_once=True):
        run(plan, new_job(plan, params, workspace, resolve(params), Path(folder), quiet=True))
    return {}


def run_worker(plan: Plan, params: Params, workspace: Workspace, *, quiet: bool = False) -> None:
    """Computes parts of a shared stage beside the process that will publish it, which may start later."""
    if plan.stage.processes != "shared":
        raise DmatError(f"{plan.stage.name} cannot be shared; expected one of {_words('shared')}; start it once")
    if (plan.work / FINISHED).exists():
        return
    plan.work.mkdir(parents=True, exist_ok=True)
    with Interruption(at_once=True):
        plan.stage.job.run_worker(plan.settings, new_job(plan, params, workspace, resolve(params), plan.work, quiet))


def estimate(plan: Plan, params: Params, workspace: Workspace) -> dict[str, Any]:
    """How much of a shared stage is done and how long the rest takes; nothing for other stages."""
    if plan.stage.processes != "shared" or plan.finished:
        return {}
    found: dict[str, Any] = plan.stage.job.estimate(
        plan.settings, new_job(plan, params, workspace, resolve(params), plan.work, quiet=True)
    )
    return found


def _words(*processes: str) -> str:
    return ", ".join(stage.name for stage in STAGES.values() if stage.processes in processes)


def run(plan: Plan, job: Job) -> Result:
    """The job of an instance, and nothing around it."""
    found: Result = plan.stage.job.run(plan.settings, job)
    return found


def resolve(params: Params) -> Compute:
    """Device, precision and threads that a parameter file asks for."""
    wanted = params.compute
    return devices.resolve(wanted.device, wanted.precision, wanted.threads)


def new_job(
    plan: Plan, params: Params, workspace: Workspace, compute: Compute, work: Path, quiet: bool,
    watcher: Watcher | None = None, fresh: bool = False,
) -> Job:  # fmt: skip
    """What the job of an instance gets that works in the folder `work`."""
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
    """What a stage computes on."""
    compute = resolve(params)
    return compute.exact() if stage.float32 else compute


def _compute(plan: Plan, params: Params, workspace: Workspace, quiet: bool, fresh: bool) -> dict[str, Any]:
    compute = compute_of(plan.stage, params)
    started = time.time()
    tracked = tracking.open_run(
        workspace.home,
        plan.work,
        stage=plan.stage.name,
        instance_name=plan.stage.instance_name(plan.instance),
        settings=plan.settings.plain(),
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
        with Interruption(at_once=True):  # inside, so that the run hears of the signal
            result = run(plan, job)
        for name, value in result.tags.items():
            tracked.tag(name, value)
        if result.description:
            tracked.describe(result.description)
        for model in result.models:
            tracked.register(model)
        metrics, measured = dict(result.metrics), dict(result.measured)
        files.write_json(plan.work / METRICS, metrics)
        finished = {
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
                **({"plugins": plan.plugins} if plan.plugins else {}),
                "settings": plan.settings.plain(),
                "inputs": plan.inputs,
                "compute": compute.describe(),
                "seconds": round(tracking.seconds_before(plan.work) + time.time() - started, 1),
                "measured": measured,
                **({"pools": list(result.pools)} if result.pools else {}),
                "outputs": {path: files.checksum(source) for path, source in _published(plan).items()},
            },
        }
        work_folder.write_finished(plan.work, finished)
        tracked.finish_with(metrics | measured, [*sorted(job.pictures.glob("*.png")), *result.attachments])
    return finished


def _publish(plan: Plan, finished: dict[str, Any], workspace: Workspace) -> None:
    """The provenance comes last and says the checksum of everything else."""
    for path, source in _published(plan).items():
        files.publish(source, workspace.at(path))
    files.write_json(workspace.at(plan.stage.provenance_path(plan.instance)), finished["provenance"])


def _published(plan: Plan) -> dict[str, Path]:
    """Path below the project -> the file or folder of the work folder that goes there."""
    found = {path: plan.work / RESULT / name for name, path in plan.outputs.items()}
    found[plan.stage.metrics_path(plan.instance)] = plan.work / METRICS
    if (plan.work / PICTURES).exists():
        found[plan.stage.pictures_path(plan.instance)] = plan.work / PICTURES
    return found
