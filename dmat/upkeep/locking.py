"""`dmat lock`: code.yaml as the code is now, and the comparison that lets changed code keep a stage's results.

Code that is said to compute the same makes part of a finished result again, in a folder that nobody keeps, and must
find the same bytes. Nothing is published.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.config import Params
from dmat.data import shards
from dmat.errors import DmatError, Pruned
from dmat.job import Job
from dmat.jobs import evaluate_robust, generate_images
from dmat.pipeline import Stage, code_identity, execution, planning
from dmat.pipeline.planning import Plan
from dmat.workspace import METRICS, Workspace

_COMPUTE = ("device", "precision", "threads", "processes", "torch")  # what the last digits of a result depend on


def accept(workspace: Workspace, params: Params, stage: Stage, why: str) -> str:
    """Keeps the identity of a stage whose code changed, if the new code computes the same. Returns what was compared.

    Raises DmatError if the code did not change, computes something else, or cannot be compared here.
    """
    locked, code = code_identity.read(workspace.root), code_identity.of_stage(stage.name)
    if locked.accepts(stage.name, code):
        raise DmatError(f"the code of {stage.name} is that of {code_identity.NAME}; expected other code; nothing to do")
    compared = _compared(stage, workspace, params, locked.of(stage.name))
    if code_identity.of_stage(stage.name) != code:
        raise DmatError(f"the code of {stage.name} changed while it was compared; expected no change; run it again")
    entry = {"code": code, "why": why, "compared": compared}
    same = {**locked.same, stage.name: [*locked.same.get(stage.name, ()), entry]}
    code_identity.write(workspace.root, dataclasses.replace(locked, same=same))
    return compared


def _compared(stage: Stage, workspace: Workspace, params: Params, identity: str) -> str:
    """What was made again and is the same. Raises DmatError."""
    compute, reasons, done = execution.compute_of(stage, params), list[str](), dict[str, str]()
    for plan, made_on in _results(stage, workspace, params, identity):
        instance_name, here = stage.instance_name(plan.instance), compute.describe()
        group = instance_name if stage.name == "generate_images" else ""  # every set that is there; else one instance
        title = f"{stage.name} {instance_name}"
        other = [
            f"{name} {made_on.get(name)} and not {here[name]}" for name in _COMPUTE if here[name] != made_on.get(name)
        ]
        if group in done:
            continue
        if other:
            reasons.append(f"{title} was made on {', '.join(other)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder) / stage.name / "work"  # as deep as any, so that pools of shards are in the folder too
            work.mkdir(parents=True)
            job = execution.new_job(plan, params, workspace, compute, work, quiet=True, watcher=_stop, fresh=True)
            compare = _COMPARE.get(stage.name, _whole)
            try:
                done[group] = f"{title}: {compare(plan, job, workspace)}"
            except FileNotFoundError as error:
                reasons.append(f"{title} lacks {error.filename}")
    if not done:
        found = "; ".join(reasons) or "no result of that code, with these parameters and inputs, is here"
        raise DmatError(
            f"{stage.name} has nothing to compare with ({found}); expected a finished result with its work folder; run "
            f"{stage.name} first, with the code that {code_identity.NAME} names, or `dmat lock`"
        )
    return "; ".join(done.values())


def _results(
    stage: Stage, workspace: Workspace, params: Params, identity: str
) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """Finished instances of that code, by present parameters and inputs, and what they were computed on."""
    for instance in stage.choices(params):
        try:
            plan = planning.plan(stage, instance, params, workspace, identity)
            about = files.read_record(workspace.at(stage.provenance_path(instance)), fingerprint=str, compute=dict)
        except DmatError:
            continue  # an input or the result is not here
        if about["fingerprint"] == plan.fingerprint:
            yield plan, about["compute"]


def _stop(images_seen: int, values: dict[str, float]) -> None:
    raise Pruned("the first record is there")


def _first_blocks(plan: Plan, job: Job, workspace: Workspace) -> str:
    images, labels = generate_images.first_block(plan.settings, job)  # type: ignore[arg-type]
    made, known = shards.open_shards(workspace.at(plan.outputs["images"])).take(np.arange(len(labels)))
    differing = int((images != made).any(axis=(1, 2, 3)).sum() + (labels != known).sum())
    _expect_same(plan, f"{differing} of the first {len(labels)} images" if differing else "")
    return f"the first {len(labels)} images"


def _first_record(plan: Plan, job: Job, workspace: Workspace) -> str:
    """The training from its start to its first record in metrics.jsonl."""
    with open(plan.work / "metrics.jsonl") as file:
        was = file.readline().strip()
    with contextlib.suppress(Pruned):
        execution.run(plan, job)
    now = (job.work / "metrics.jsonl").read_text().splitlines()[0]
    _expect_same(plan, f"the first record of metrics.jsonl, {now} and not {was}," if now != was else "")
    return f"the first record of metrics.jsonl, {now}"


def _one_shard(plan: Plan, job: Job, workspace: Workspace) -> str:
    unit = evaluate_robust.first_shard(plan.settings, job)  # type: ignore[arg-type]
    with np.load(plan.work / unit.path.with_suffix(".npz").relative_to(job.work), allow_pickle=False) as saved:
        was = {name: saved[name] for name in saved.files}
    unit.path.parent.mkdir(parents=True)
    unit.compute()
    now = unit.read()
    differing = [name for name in sorted({*now, *was}) if _bytes(now.get(name)) != _bytes(was.get(name))]
    _expect_same(plan, f"{', '.join(differing)} of the first shard" if differing else "")
    return f"the first shard, {unit.images} images"


def _bytes(array: np.ndarray | None) -> tuple[Any, ...]:
    return () if array is None else (array.dtype.str, array.shape, array.tobytes())


def _whole(plan: Plan, job: Job, workspace: Workspace) -> str:
    """All outputs of an instance, and its metrics."""
    metrics = execution.run(plan, job).metrics
    differing, count = [], 0
    for name, path in plan.outputs.items():
        workspace.at(path).stat()  # an output that is gone is nothing to compare with
        now, was = files.checksums(job.result / name), files.checksums(workspace.at(path))
        differing += [f"{path}/{file}" for file in sorted({*now, *was}) if now.get(file) != was.get(file)]
        count += len(was)
    path = plan.stage.metrics_path(plan.instance)
    files.write_json(job.work / METRICS, dict(metrics))
    differing += [path] if files.sha256(job.work / METRICS) != files.sha256(workspace.at(path)) else []
    _expect_same(plan, ", ".join(differing))
    return f"all {count} files and the metrics"


def _expect_same(plan: Plan, differing: str) -> None:
    if differing:
        raise DmatError(
            f"{plan.stage.name} {plan.stage.instance_name(plan.instance)}: {differing} differ from the finished result; "
            f"expected the same bytes; the code computes something else: `dmat lock`, and the stage reruns"
        )


_COMPARE: dict[str, Callable[[Plan, Job, Workspace], str]] = {
    "generate_images": _first_blocks,
    "evaluate_robust": _one_shard,
    **dict.fromkeys(("train_scorer", "train_diffusion", "train_robust"), _first_record),
}
