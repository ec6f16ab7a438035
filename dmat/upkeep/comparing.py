"""Two evaluated models on the same images: the paired difference, which the numbers of two runs do not tell."""

from pathlib import Path

import numpy as np

from dmat import seeds
from dmat.evaluation.table import read_table
from dmat.jobs.workspace import Workspace
from dmat.metrics.intervals import paired_difference
from dmat.tracking.queries import TrackedRun

_RESAMPLES = 2000


def paired(place: Workspace, first: TrackedRun, second: TrackedRun) -> dict[str, dict[str, float]]:
    """Difference second - first of every accuracy that both evaluations have, with its 95 % interval; empty unless both
    are evaluations of the same images whose tables are still there."""
    tables = [_table(place, run) for run in (first, second)]
    if tables[0] is None or tables[1] is None:
        return {}
    same = first.tags.get("input.test") == second.tags.get("input.test")
    if not same or not np.array_equal(tables[0]["label"], tables[1]["label"]):
        return {}
    draw = seeds.stream(1, "bootstrap")
    shared = [name for name, values in tables[0].items() if values.dtype == bool and name in tables[1]]
    return {name: paired_difference([tables[1][name]], [tables[0][name]], _RESAMPLES, draw) for name in shared}


def _table(place: Workspace, run: TrackedRun) -> dict[str, np.ndarray] | None:
    path = result_of(place, run) / "evaluation" / "per_image.parquet"
    return read_table(path) if run.stage == "evaluate_robust" and path.is_file() else None


def result_of(place: Workspace, run: TrackedRun) -> Path:
    """Where the result of a run is, if it is still there."""
    return place.run_folder(run.stage, run.instance, run.tags.get("dmat.fingerprint", "")) / "result"
