"""Two models evaluated on the same images: the paired difference, which the numbers of two runs do not tell."""

import dataclasses
from pathlib import Path

import numpy as np

from dmat import files, seeds
from dmat.evaluation.table import PER_IMAGE, read_table
from dmat.metrics.intervals import paired_difference
from dmat.tracking import queries
from dmat.tracking.queries import TrackedRun
from dmat.workspace import RESULT, Workspace

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class _Table:
    """images: names the images and how they were attacked. columns [N]: bool of an accuracy, and others."""

    images: object
    columns: dict[str, np.ndarray]


def paired(workspace: Workspace, first: TrackedRun, second: TrackedRun) -> dict[str, dict[str, float]]:
    """Difference second - first of every accuracy that both evaluations have, with its 95 % interval; empty unless both
    are evaluations of the same images whose tables are still there."""
    one, other = (_table(workspace, run) for run in (first, second))
    if one is None or other is None or one.images != other.images:
        return {}
    if not np.array_equal(one.columns.get("label", ()), other.columns.get("label", ())):
        return {}
    draw = seeds.stream(1, "bootstrap")
    shared = [name for name, values in one.columns.items() if values.dtype == bool and name in other.columns]
    return {
        name: paired_difference([other.columns[name]], [one.columns[name]], _RESAMPLES, draw)
        for name in shared
        if one.columns[name].shape == other.columns[name].shape
    }


def result_of(workspace: Workspace, run: TrackedRun) -> Path | None:
    """Where the result of a run is; None if its work folder is not there any more."""
    work = queries.work_folder(workspace.home, run)
    return work / RESULT if work else None


def _table(workspace: Workspace, run: TrackedRun) -> _Table | None:
    """Of an evaluation of a stage, of a model from elsewhere, or of a trial that AutoAttack ranked."""
    result = result_of(workspace, run)
    if result is None:
        return None
    if run.stage != "evaluate_robust":
        return _of_shards(result.parent / "auto_attack")
    for path in (result / "evaluation" / PER_IMAGE, result.parent / PER_IMAGE):
        if path.is_file():
            return _Table(run.tags.get("input.test", run.tags.get("input.images")), read_table(path))
    return None


def _of_shards(folder: Path) -> _Table | None:
    """What a ranked trial keeps; None while shards are missing. Labels are not in it: the images' checksum stands for
    them."""
    notes = [files.read_json(path) for path in sorted(folder.glob("shard-*.json"))]
    if not notes or sum(note["images"] for note in notes) != notes[0]["identity"]["images_attacked"]:
        return None
    parts = []
    for path in sorted(folder.glob("shard-*.npz")):
        with np.load(path, allow_pickle=False) as saved:
            parts.append({name: saved[name] for name in saved.files if saved[name].ndim == 1})
    identity = {name: value for name, value in notes[0]["identity"].items() if name not in ("weights", "shard")}
    return _Table(identity, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
