"""Runs one instance of a stage by the contract of every job (docs/architecture.md).

Inputs are hashed, the fingerprint of code, settings and inputs names the work folder, a lock keeps a second writer out,
the job fills `result/`, and only a complete result is hard-linked to `artifacts/`. The work folder stays, so a
result that DVC loses before it wrote its lock file is published again instead of computed again, as long as its files
are those that were computed. Nothing is published under code, settings or inputs that are not those on disk by then.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from dmat import ARTIFACTS, NONE, SOURCES, devices, dvc_lock, files, processes, tracking
from dmat.config import Params, Record
from dmat.data.shard_pool import ShardPool
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.jobs import code_identity, lineage
from dmat.jobs.stages import STAGES, Stage
from dmat.jobs.workspace import Workspace
from dmat.processes import World
from dmat.training.interruption import Interruption
from dmat.training.long_run import LongRun, Watcher

FINISHED = "finished.json"  # of a work folder: metrics, notes, code, provenance, and the checksum of every file
METRICS = "metrics.json"
POOLS = "pools"  # folder in runs/ of shards that several sets share
FOLDERS = ("result", "pictures")  # of a work folder; with METRICS all that goes to artifacts/
TOGETHER = ("train_scorer", "train_robust")  # stages that several processes compute in step with each other
EXACT = ("evaluate_robust",)  # stages that compute in float32 whatever the precision of the others
SHARED = ("evaluate_robust",)  # stages whose work several processes divide, each at its own pace


@dataclasses.dataclass(frozen=True)
class Job:
    """What a job's run() gets besides its settings: where to read, where to write, how to compute, whom to tell."""

    inputs: Mapping[str, Path]
    chosen: Mapping[str, Any]  # the options that name this instance
    params: Params
    root: Path  # the project's folder
    work: Path  # for state that a restart needs
    result: Path  # for what is published, one folder per output
    pictures: Path  # for PNG files that people look at and no stage reads
    compute: Compute
    save_seconds: float
    quiet: bool
    code: str = ""  # identity of the code
    fresh: bool = False  # compute what earlier work left anew
    watcher: Watcher | None = None  # of the metrics of a long run
    # filled by the job: numbers that differ from run to run, such as speed; for provenance and MLflow alone
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    pools: list[str] = dataclasses.field(default_factory=list)  # those that `pool` gave; for provenance alone
    # filled by the job: what a reader must know of this result; tags of the MLflow run, sentences for who started it
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    # filled by the job: files below `result` that people will want to open where they look at the run
    attachments: list[Path] = dataclasses.field(default_factory=list)
    described: list[str] = dataclasses.field(default_factory=list)  # filled by the job: Markdown, what came out
    models: list[tracking.Candidate] = dataclasses.field(default_factory=list)  # filled by the job: for the registry

    def pool(self, identity: Mapping[str, Any], arrays: Sequence[str]) -> ShardPool:
        """The pool of shards that everything in `identity` and the code decide (docs/architecture.md)."""
        whole = {"stage": self.work.parent.name, "code": self.code, **identity}
        folder = self.work.parent.parent / POOLS / f"{self.work.parent.name}-{files.fingerprint(whole)}"
        self.pools.append(folder.name)
        return ShardPool(folder, whole, arrays, self.fresh)

    def long_run(self, total: int) -> LongRun:
        """Checkpoints, metrics and progress bar of this instance."""
        return LongRun(
            self.work,
            self.compute,
            total,
            label=self.work.parent.name,
            quiet=self.quiet,
            save_seconds=self.save_seconds,
            watcher=self.watcher,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command would do; `--dry-run` prints it."""

    stage: Stage
    chosen: Mapping[str, Any]
    settings: Record
    inputs: dict[str, dict[str, str]]  # name -> path, sha256
    outputs: dict[str, str]
    code: str  # identity, as code.yaml names it
    fingerprint: str
    work: Path

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of a complete result."""
        return _finished(self.work)

    @property
    def state(self) -> str:
        if self.finished:
            return "finished: the result is published again"
        return "resumes" if kept(self.work) else "starts"

    def describe(self) -> dict[str, Any]:
        return {
            "stage": self.stage.word,
            "instance": self.stage.instance(self.chosen),
            "state": self.state,
            "code": self.code,
            "settings": self.settings.plain(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "work": str(self.work),
        }


def plan(
    stage: Stage, chosen: Mapping[str, Any], params: Params, workspace: Workspace, code: str | None = None
) -> Plan:
    """Resolves settings and inputs. Raises DmatError for an unknown instance, a missing input, or code that is not that
    of the project's code.yaml.

    code: an identity to plan with, whatever the loaded code is.
    """
    valid = stage.choices(params)
    if dict(chosen) not in valid:
        known = ", ".join(stage.instance(one) for one in valid) or "(none)"
        raise DmatError(
            f"{stage.word} has no instance {stage.instance(chosen)!r} in params.yaml; expected one of {known}"
        )
    code = code_identity.expect(stage.word, workspace.root) if code is None else code
    settings = stage.settings(params, **chosen)
    inputs = {
        name: {"path": path, "sha256": _checksum(stage.word, settings, workspace.at(path))}
        for name, path in stage.inputs(params, **chosen).items()
    }
    if any(entry["path"].startswith(f"{ARTIFACTS}/prepare_data/") for entry in inputs.values()):
        _expect_known_source(params, workspace)
    _expect_unaltered({entry["path"] for entry in inputs.values()}, params, workspace)
    identity = {
        "stage": stage.word,
        "code": code,
        "chosen": dict(chosen),
        "settings": settings.plain(),
        "inputs": {name: entry["sha256"] for name, entry in inputs.items()},
        **stage_identity(stage, chosen, params),
    }
    fingerprint = files.fingerprint(identity)
    work = workspace.run_folder(stage.word, stage.instance(chosen), fingerprint)
    return Plan(stage, chosen, settings, inputs, stage.outputs(params, **chosen), code, fingerprint, work)


def _checksum(word: str, settings: Record, path: Path) -> str:
    """Of an input; of a source of real images the files that are read count, not what lies beside them."""
    if word == "prepare_data":  # asked by name: an import would make every stage depend on how sources are read
        path = importlib.import_module("dmat.jobs.prepare_data").location(settings, path)
    return files.checksum(path)


def _expect_known_source(params: Params, workspace: Workspace) -> None:
    """Raises DmatError if the splits were made of other bytes than their source holds now: a stage that is started
    directly has nobody else who would look.

    A source that is not on this machine, or of which it is not known what was read, is nobody's concern here.
    """
    settings = params.prepare_data
    stage = STAGES["prepare_data"]
    note = workspace.at(stage.provenance_path({}))
    if settings.path == NONE or not note.exists():
        return
    known = files.read_json(note).get("inputs", {}).get("source")
    try:
        found = _checksum(stage.word, settings, workspace.at(f"{SOURCES}/{settings.path}"))
    except DmatError:
        return
    if known and known["path"] == f"{SOURCES}/{settings.path}" and known["sha256"] != found:
        raise DmatError(
            f"{SOURCES}/{settings.path} has checksum {found[:12]}; the splits in {ARTIFACTS}/prepare_data were made "
            f"when it had {known['sha256'][:12]}; bring the old files back, or run `dvc repro` (without DVC: `dmat "
            f"{stage.command}` and the rest after it)"
        )


def _expect_unaltered(read: Collection[str], params: Params, workspace: Workspace) -> None:
    """Raises DmatError if what a stage published at or below one of these paths is not what it published.

    DVC compares before it starts a stage; a stage that is started directly has nobody else who would.
    """
    for word, stage in STAGES.items():
        for chosen in stage.choices(params):
            below = [
                path
                for path in published_paths(stage, params, chosen)
                if any(path == one or path.startswith(f"{one}/") for one in read)
            ]
            record = workspace.at(stage.provenance_path(chosen))
            recorded = files.read_record(record).get("outputs", {}) if below and record.exists() else {}
            for path in below:
                if path in recorded and (found := files.checksum(workspace.at(path))) != recorded[path]:
                    raise DmatError(
                        f"{path} has checksum {found[:12]}; {word} wrote {recorded[path][:12]}: it was altered since; "
                        f"restore it (`dvc checkout`) or run that stage again"
                    )


def published_paths(stage: Stage, params: Params, chosen: Mapping[str, Any]) -> list[str]:
    """Where an instance publishes what others read; its provenance says the checksum of each."""
    return [
        *stage.outputs(params, **chosen).values(),
        stage.pictures_path(chosen),
        stage.metrics_path(chosen),
    ]


def stage_identity(stage: Stage, chosen: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """What else decides a result: what there is to report."""
    if stage.word == "write_report":
        return {"reported": {word: [one.instance(c) for c in one.choices(params)] for word, one in STAGES.items()}}
    return {}


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
    if size > 1 and plan.stage.word not in TOGETHER + SHARED:
        raise DmatError(
            f"{plan.stage.word} was started in {size} processes; expected one, as only "
            f"{', '.join(TOGETHER + SHARED)} take several; start it without torchrun"
        )
    world = processes.world()
    if not world.leads:
        return _follow(plan, params, workspace, world)
    dvc_lock.remember(workspace.root, workspace.home)
    plan.work.mkdir(parents=True, exist_ok=True)
    with Interruption(at_once=True), lock(plan.work):
        if fresh:
            set_aside(plan.work, workspace.home)
        finished = _intact(plan)
        world.share(None if finished else b"compute")
        if finished is None:
            finished = _compute(plan, params, workspace, quiet, fresh)
        _expect_same_code(plan, workspace)
        if read_again is not None:
            _expect_unchanged(plan, read_again, workspace)
        _publish(plan, finished, workspace)
    metrics: dict[str, Any] = finished["metrics"]
    return metrics


def _finished(work: Path) -> dict[str, Any] | None:
    """The record of a complete result in a work folder. A damaged one counts as none."""
    with contextlib.suppress(DmatError):
        record = files.read_record(work / FINISHED, metrics=dict, code=str, files=dict, provenance=dict)
        if record.pop("checksum", None) == files.fingerprint(record):
            return record
    return None


def _write_finished(work: Path, record: dict[str, Any]) -> None:
    """With a checksum of its own, so that no altered number is ever published."""
    files.write_json(work / FINISHED, record | {"checksum": files.fingerprint(record)})


def _intact(plan: Plan) -> dict[str, Any] | None:
    """The record of the finished result, if each of its files still is what was computed.

    Otherwise what is not goes aside, and so does the record: the job then computes again what is missing, from its
    checkpoint, shards or inputs. Files that no job wrote go aside too.
    """
    path, finished = plan.work / FINISHED, plan.finished
    if not path.exists():
        return None
    found, recorded = _files_of(plan.work), finished["files"] if finished else {}
    damaged = [] if finished else [FINISHED]
    damaged += sorted(name for name, digest in recorded.items() if found.get(name) != digest)
    strange = sorted(found.keys() - recorded.keys()) if finished else []
    aside = [*strange, *(name for name in damaged if (plan.work / name).exists())]
    if damaged:
        aside = list(dict.fromkeys([FINISHED, *aside]))
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        tqdm.write(
            f"note: {plan.work}: {damaged[0]}{more} changed after the result was computed; it is computed again, and "
            f"what lies there is kept in before-*/",
            file=sys.stderr,
        )
    old = _before(plan.work)
    for name in aside:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(plan.work / name, old / name)
    return None if damaged else finished


def _files_of(work: Path) -> dict[str, str]:
    """Name below the work folder -> SHA-256 of every file that is published."""
    folders = {f"{part}/{name}": one for part in FOLDERS for name, one in files.checksums(work / part).items()}
    return folders | ({METRICS: files.sha256(work / METRICS)} if (work / METRICS).is_file() else {})


def _expect_same_code(plan: Plan, workspace: Workspace) -> None:
    """Raises DmatError if the code or code.yaml on disk is not what the result was computed with: DVC reads code.yaml
    again when it records the stage."""
    try:
        now = code_identity.expect(plan.stage.word, workspace.root, again=True)
        changed = f"{code_identity.NAME} said {plan.code[:12]} and says {now[:12]}" if now != plan.code else ""
    except DmatError as error:
        changed = str(error)
    if changed:
        title = f"{plan.stage.word} {plan.stage.instance(plan.chosen)}"
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
    title = f"{old.stage.word} {old.stage.instance(old.chosen)}"
    advice = _kept_advice(old)
    try:
        now = plan(old.stage, old.chosen, read_again(), workspace)
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
    changed += [
        f"{now.inputs[name]['path']} was {entry['sha256'][:12]} and is {now.inputs[name]['sha256'][:12]}"
        for name, entry in old.inputs.items()
        if name in now.inputs and now.inputs[name]["sha256"] != entry["sha256"]
    ]
    raise DmatError(f"{'; '.join(changed) or 'what it reads changed'} while {title} was computed; {advice}")


def _follow(plan: Plan, params: Params, workspace: Workspace, world: World) -> dict[str, Any]:
    """What a process does that does not lead: the same computation, in a folder that nobody keeps."""
    if world.share(None) is None:
        return {}
    if plan.stage.word in SHARED:
        assist(plan, params, workspace, quiet=True)
        return {}
    with tempfile.TemporaryDirectory() as folder, Interruption(at_once=True):
        module = importlib.import_module(f"dmat.jobs.{plan.stage.word}")
        module.run(plan.settings, new_job(plan, params, workspace, resolve(params), Path(folder), quiet=True))
    return {}


def assist(plan: Plan, params: Params, workspace: Workspace, *, quiet: bool = False) -> None:
    """Computes parts of a stage in `SHARED` beside the process that will publish it, which may start later."""
    if plan.stage.word not in SHARED:
        raise DmatError(f"{plan.stage.word} cannot be shared; expected one of {', '.join(SHARED)}; start it once")
    if (plan.work / FINISHED).exists():
        return
    plan.work.mkdir(parents=True, exist_ok=True)
    with Interruption(at_once=True):
        module = importlib.import_module(f"dmat.jobs.{plan.stage.word}")
        module.assist(plan.settings, new_job(plan, params, workspace, resolve(params), plan.work, quiet))


def outlook(plan: Plan, params: Params, workspace: Workspace) -> dict[str, Any]:
    """How much of a stage in `SHARED` is done and how long the rest takes; nothing for other stages."""
    if plan.stage.word not in SHARED or plan.finished:
        return {}
    module = importlib.import_module(f"dmat.jobs.{plan.stage.word}")
    found: dict[str, Any] = module.outlook(
        plan.settings, new_job(plan, params, workspace, resolve(params), plan.work, quiet=True)
    )
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
    wanted = params.compute
    return Job(
        {name: workspace.at(entry["path"]) for name, entry in plan.inputs.items()},
        plan.chosen,
        params,
        workspace.root,
        work,
        work / "result",
        work / "pictures",
        compute,
        wanted.save_every_seconds,
        quiet,
        plan.code,
        fresh,
        watcher,
    )


def compute_of(stage: Stage, params: Params) -> Compute:
    """What a stage computes on."""
    compute = resolve(params)
    return compute.exact() if stage.word in EXACT else compute


def _compute(plan: Plan, params: Params, workspace: Workspace, quiet: bool, fresh: bool) -> dict[str, Any]:
    compute = compute_of(plan.stage, params)
    started = time.time()
    run = tracking.open_run(
        workspace.home,
        plan.work,
        stage=plan.stage.word,
        instance=plan.stage.instance(plan.chosen),
        settings=plan.settings.plain(),
        inputs=plan.inputs,
        compute=compute.describe(),
        root=workspace.root,
        fingerprint=plan.fingerprint,
        behind={
            step.title: {"run": step.run, "parent": step.parent}
            for step in lineage.behind_inputs(plan.inputs, params, workspace)
        },
    )
    job = new_job(plan, params, workspace, compute, plan.work, quiet, fresh=fresh)
    with run:  # ends the tracked run with the status that fits what happened inside
        module = importlib.import_module(f"dmat.jobs.{plan.stage.word}")
        with Interruption(at_once=True):  # inside, so that the run hears of the signal
            metrics = module.run(plan.settings, job)
        for name, value in job.tags.items():
            run.tag(name, value)
        if job.described:
            run.describe("\n\n".join(job.described))
        for model in job.models:
            run.register(model)
        files.write_json(plan.work / METRICS, metrics)
        finished = {
            "metrics": metrics,
            "notes": job.notes,
            "code": plan.code,
            "files": _files_of(plan.work),
            "provenance": {
                **run.provenance(),
                "stage": plan.stage.word,
                "instance": plan.stage.instance(plan.chosen),
                "fingerprint": plan.fingerprint,
                "code": plan.code,
                "settings": plan.settings.plain(),
                "inputs": plan.inputs,
                "compute": compute.describe(),
                "seconds": round(_spent(plan.work) + time.time() - started, 1),
                "measured": job.measured,
                **({"pools": job.pools} if job.pools else {}),
                "outputs": {path: files.checksum(source) for path, source in _published(plan).items()},
            },
        }
        _write_finished(plan.work, finished)
        run.finish_with(metrics | job.measured, [*sorted(job.pictures.glob("*.png")), *job.attachments])
    return finished


def _publish(plan: Plan, finished: dict[str, Any], workspace: Workspace) -> None:
    """The provenance comes last and says the checksum of everything else."""
    for path, source in _published(plan).items():
        files.publish(source, workspace.at(path))
    files.write_json(workspace.at(plan.stage.provenance_path(plan.chosen)), finished["provenance"])


def _published(plan: Plan) -> dict[str, Path]:
    """Path below the project -> the file or folder of the work folder that goes there."""
    found = {path: plan.work / "result" / name for name, path in plan.outputs.items()}
    found[plan.stage.metrics_path(plan.chosen)] = plan.work / METRICS
    if (plan.work / "pictures").exists():
        found[plan.stage.pictures_path(plan.chosen)] = plan.work / "pictures"
    return found


@contextlib.contextmanager
def lock(work: Path) -> Iterator[None]:
    """Keeps a second writer out of a work folder. Raises DmatError with the process that is at work."""
    held = filelock.FileLock(work / "lock", timeout=0)
    holder = work / "holder.json"
    try:
        held.acquire()
    except filelock.Timeout:
        who = json.loads(holder.read_text())["pid"] if holder.exists() else "unknown"
        raise DmatError(
            f"{work} is being computed by process {who}; wait for it, or stop it and run the same command "
            f"again: it goes on from the last checkpoint"
        ) from None
    try:
        files.write_json(holder, {"pid": os.getpid()})
        yield
    finally:
        held.release()


def kept(work: Path) -> list[Path]:
    """State of an earlier attempt that this one goes on from."""
    about = ("lock", "holder.json", *tracking.FILES)
    found = sorted(work.iterdir()) if work.exists() else []
    return [path for path in found if path.name not in about and not path.name.startswith(("before-", "."))]


def _before(work: Path) -> Path:
    """A folder for what is set aside now, which is not there yet."""
    while (old := work / f"before-{time.strftime('%Y%m%d-%H%M%S')}").exists():  # set aside twice within a second
        time.sleep(0.2)
    return old


def set_aside(work: Path, home: Path, keep: Collection[str] = ()) -> None:
    """Earlier state moves to `before-<time>/` beside the new one; nothing is deleted. keep: names that stay."""
    old = _before(work)
    tracking.set_aside(home, work, old)
    stay = {"lock", "holder.json", *tracking.FILES, *keep}
    for path in [p for p in work.iterdir() if p.name not in stay and not p.name.startswith("before-")]:
        old.mkdir(exist_ok=True)
        path.rename(old / path.name)


def _spent(work: Path) -> float:
    """Seconds that earlier, interrupted attempts took, noted by the tracker."""
    return tracking.seconds_before(work)
