"""The paired difference of two models on the same images, which the metrics of two runs do not show."""

import dataclasses
from pathlib import Path

import numpy as np

from dmat import files, seeds
from dmat.data import npz_arrays
from dmat.evaluation.table import PER_IMAGE, read_table
from dmat.evaluation.work import AttackedShardRecord
from dmat.metrics.intervals import PairedDifference, paired_difference
from dmat.tracking import queries
from dmat.tracking.queries import TrackedRun
from dmat.workspace import RESULT, Workspace

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class _Table:
    """Results per image. images: identifies the images and the attack. columns: name -> [N], bool for an accuracy."""

    images: object
    columns: dict[str, np.ndarray]


def paired(workspace: Workspace, first: TrackedRun, second: TrackedRun) -> dict[str, PairedDifference]:
    """Paired difference second - first of every accuracy that both evaluations have, with its 95 % bootstrap interval.

    Empty unless both are evaluations of the same images and their tables still exist.
    """
    first_table, second_table = (_table(workspace, run) for run in (first, second))
    if first_table is None or second_table is None or first_table.images != second_table.images:
        return {}
    if not np.array_equal(first_table.columns.get("label", ()), second_table.columns.get("label", ())):
        return {}
    generator = seeds.stream(1, "bootstrap")
    shared = [
        name for name, values in first_table.columns.items() if values.dtype == bool and name in second_table.columns
    ]
    return {
        name: paired_difference([second_table.columns[name]], [first_table.columns[name]], _RESAMPLES, generator)
        for name in shared
        if first_table.columns[name].shape == second_table.columns[name].shape
    }


def result_folder(workspace: Workspace, run: TrackedRun) -> Path | None:
    """The result folder of a run; None if its work folder does not exist any more."""
    work = queries.work_folder(workspace.home, run)
    return work / RESULT if work else None


def _table(workspace: Workspace, run: TrackedRun) -> _Table | None:
    """The table of an evaluation (of a stage or a direct one), or of a trial ranked by AutoAttack; None if missing."""
    result = result_folder(workspace, run)
    if result is None:
        return None
    if run.stage != "evaluate_robust":
        return _table_of_shards(result.parent / "auto_attack")
    for path in (result / "evaluation" / PER_IMAGE, result.parent / PER_IMAGE):
        if path.is_file():
            return _Table(run.tags.get("input.test", run.tags.get("input.images")), read_table(path))
    return None


def _table_of_shards(folder: Path) -> _Table | None:
    """The table of a ranked trial; None while shards are missing. It has no labels: the checksum of the images
    identifies them."""
    records = [files.read_record(path, AttackedShardRecord) for path in sorted(folder.glob("shard-*.json"))]
    if not records or sum(record["images"] for record in records) != records[0]["identity"].get("images_attacked"):
        return None
    parts = [
        {name: array for name, array in npz_arrays.read_arrays(path).items() if array.ndim == 1}
        for path in sorted(folder.glob("shard-*.npz"))
    ]
    identity = {name: value for name, value in records[0]["identity"].items() if name not in ("weights", "shard")}
    return _Table(
        identity,
        {
            name: np.concatenate([part[name] for part in parts])
            for name in parts[0]
            if all(name in part for part in parts)
        },
    )
