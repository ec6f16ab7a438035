"""The comparison of `dmat lock --same`, after which results of a stage stay valid although its code changed.

The new code recomputes a part of a finished result in a temporary folder and must find the same bytes. Nothing is
published.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from dmat import files
from dmat.config import Params
from dmat.data import npz_arrays, shards
from dmat.errors import DmatError, Pruned
from dmat.job import Job
from dmat.jobs import evaluate_robust, generate_images
from dmat.pipeline import Stage, code_identity, execution, planning
from dmat.pipeline.planning import Plan
from dmat.workspace import METRICS, ComputeRecord, Provenance, Workspace

_COMPUTE: Final = ("device", "precision", "threads", "processes", "torch")  # what the last digits of a result depend on


def accept(workspace: Workspace, params: Params, stage: Stage, why: str) -> str:
    """Keeps the identity of a stage whose code changed, if the new code computes the same result.

    Writes code.yaml with `why` and a description of what was compared, and returns that description. Raises DmatError
    if the code did not change, computes something else, or cannot be compared here.
    """
    locked, code = code_identity.read(workspace.root), code_identity.of_stage(stage.name)
    if locked.accepts(stage.name, code):
        raise DmatError(f"the code of {stage.name} is that of {code_identity.NAME}; expected other code; nothing to do")
    compared = _compare_results(stage, workspace, params, locked.identity_of(stage.name))
    if code_identity.of_stage(stage.name) != code:
        raise DmatError(f"the code of {stage.name} changed while it was compared; expected no change; run it again")
    entry = {"code": code, "why": why, "compared": compared}
    same = {**locked.same, stage.name: [*locked.same.get(stage.name, ()), entry]}
    code_identity.write(workspace.root, dataclasses.replace(locked, same=same))
    return compared


def _compare_results(stage: Stage, workspace: Workspace, params: Params, identity: str) -> str:
    """Recomputes parts of finished results. Returns a description of what was compared; raises DmatError if it differs,
    or if there is nothing to compare."""
    compute, reasons, descriptions = execution.compute_of(stage, params), list[str](), dict[str, str]()
    for plan, recorded_compute in _finished_results(stage, workspace, params, identity):
        instance_name, compute_now = stage.instance_name(plan.instance), compute.describe()
        # Every image set; of other stages one instance.
        group = instance_name if stage.name == "generate_images" else ""
        title = f"{stage.name} {instance_name}"
        differences = [
            f"{name} {recorded_compute.get(name)} and not {compute_now[name]}"
            for name in _COMPUTE
            if compute_now[name] != recorded_compute.get(name)
        ]
        if group in descriptions:
            continue
        if differences:
            reasons.append(f"{title} was computed on {', '.join(differences)}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            # As deep as any work folder, so that pools of shards are in the temporary folder too.
            work = Path(folder) / stage.name / "work"
            work.mkdir(parents=True)
            recorded = dataclasses.replace(compute, compile="on" if recorded_compute.get("compiled") else "off")
            job = execution.new_job(
                plan, params, workspace, recorded, work, quiet=True, watcher=_stop_at_first_record, fresh=True
            )
            compare = _COMPARISONS.get(stage.name, _compare_all)
            try:
                descriptions[group] = f"{title}: {compare(plan, job, workspace)}"
            except FileNotFoundError as error:
                reasons.append(f"{title} lacks {error.filename}")
    if not descriptions:
        reason = "; ".join(reasons) or "there is no result of that code with these parameters and inputs"
        raise DmatError(
            f"{stage.name} has nothing to compare with ({reason}); expected a finished result with its work folder; "
            f"run {stage.name} first, with the code that {code_identity.NAME} names, or `dmat lock`"
        )
    return "; ".join(descriptions.values())


def _finished_results(
    stage: Stage, workspace: Workspace, params: Params, identity: str
) -> Iterator[tuple[Plan, ComputeRecord]]:
    """Plans of finished instances of that code with the present parameters and inputs, and their recorded compute."""
    for instance in stage.all_instances(params):
        try:
            published = planning.as_published(planning.plan(stage, instance, params, workspace, identity), workspace)
        except DmatError:
            continue  # an input or the result is missing
        if published is not None:
            record = files.read_record(workspace.at(stage.provenance_path(instance)), Provenance)
            yield published, record["compute"]


def _stop_at_first_record(images_seen: int, values: dict[str, float]) -> None:
    raise Pruned("the first record is written")


def _compare_first_block(plan: Plan, job: Job, workspace: Workspace) -> str:
    """Compares the first block of images of a set."""
    _, images, labels = generate_images.block_of(0, plan.settings, job)  # type: ignore[arg-type]
    finished_images, finished_labels = shards.open_shards(workspace.at(plan.outputs["images"])).take(
        np.arange(len(labels))
    )
    differing = int((images != finished_images).any(axis=(1, 2, 3)).sum() + (labels != finished_labels).sum())
    _expect_same(plan, f"{differing} of the first {len(labels)} images" if differing else "")
    return f"the first {len(labels)} images"


def _compare_first_record(plan: Plan, job: Job, workspace: Workspace) -> str:
    """Compares a training from its start to its first record in metrics.jsonl."""
    with open(plan.work / "metrics.jsonl", encoding="utf-8") as file:
        finished_record = file.readline().strip()
    with contextlib.suppress(Pruned):
        execution.run(plan, job)
    new_record = (job.work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    _expect_same(
        plan,
        f"the first record of metrics.jsonl, {new_record} and not {finished_record},"
        if new_record != finished_record
        else "",
    )
    return f"the first record of metrics.jsonl, {new_record}"


def _compare_first_shard(plan: Plan, job: Job, workspace: Workspace) -> str:
    """Compares the first shard of an evaluation."""
    task = evaluate_robust.first_shard(plan.settings, job)  # type: ignore[arg-type]
    finished_arrays = npz_arrays.read_arrays(plan.work / task.path.with_suffix(".npz").relative_to(job.work))
    task.path.parent.mkdir(parents=True)
    task.compute()
    new_arrays = task.read()
    differing = [
        name
        for name in sorted({*new_arrays, *finished_arrays})
        if _bytes(new_arrays.get(name)) != _bytes(finished_arrays.get(name))
    ]
    _expect_same(plan, f"{', '.join(differing)} of the first shard" if differing else "")
    return f"the first shard, {task.images} images"


def _bytes(array: np.ndarray | None) -> tuple[Any, ...]:
    """Type, shape and bytes of an array of any shape; () for None."""
    return () if array is None else (array.dtype.str, array.shape, array.tobytes())


def _compare_all(plan: Plan, job: Job, workspace: Workspace) -> str:
    """Compares all outputs of an instance, and its metrics."""
    metrics = execution.run(plan, job).metrics
    differing, count = [], 0
    for name, path in plan.outputs.items():
        workspace.at(path).stat()  # raises FileNotFoundError if the output is missing
        new_checksums, finished_checksums = files.checksums(job.result / name), files.checksums(workspace.at(path))
        differing += [
            f"{path}/{file}"
            for file in sorted({*new_checksums, *finished_checksums})
            if new_checksums.get(file) != finished_checksums.get(file)
        ]
        count += len(finished_checksums)
    path = plan.stage.metrics_path(plan.instance)
    files.write_json(job.work / METRICS, dict(metrics))
    differing += [path] if files.sha256(job.work / METRICS) != files.sha256(workspace.at(path)) else []
    _expect_same(plan, ", ".join(differing))
    return f"all {count} files and the metrics"


def _expect_same(plan: Plan, differing: str) -> None:
    if differing:
        raise DmatError(
            f"{plan.stage.name} {plan.stage.instance_name(plan.instance)}: {differing} differ from the finished "
            f"result; expected the same bytes; the code computes something else: `dmat lock`, and the stage reruns"
        )


_COMPARISONS: dict[str, Callable[[Plan, Job, Workspace], str]] = {
    "generate_images": _compare_first_block,
    "evaluate_robust": _compare_first_shard,
    **dict.fromkeys(("train_scorer", "train_diffusion", "train_robust"), _compare_first_record),
}
