"""What it takes to see a small difference between two arms, from their stored tables."""

from typing import NamedTuple

import numpy as np

from dmat import ARTIFACTS
from dmat.config import Params
from dmat.errors import DmatError
from dmat.evaluation.table import PER_IMAGE, read_table
from dmat.metrics import power
from dmat.metrics.power import VarianceComponents
from dmat.pipeline.stages import STAGES
from dmat.report.comparison import HEADLINE, MEASURES, ArmMeasure
from dmat.workspace import Workspace

SEEDS = (1, 2, 3, 5, 10, 20)


class Detection(NamedTuple):
    """What an arm and the baseline say about it. Differences are shares of 1.

    needed: number of seeds -> of test images; None where any number is too small. Of one seed if there is one.
    """

    arm: str
    baseline: str
    measure: ArmMeasure
    images: int  # in each table
    seeds: int
    difference: float  # of accuracies, arm minus baseline
    components: VarianceComponents
    needed: dict[int, int | None]


def plan(params: Params, workspace: Workspace, detect: float, probability: float) -> list[Detection]:
    """One record per arm beside the baseline of the report, by AutoAttack, else by PGD.

    detect: the difference to see, as a share of 1. probability: of seeing it. Raises DmatError for values outside of
    (0, 1), without a second arm, and where an evaluation is missing.
    """
    for option, value, advice in (("--detect", 100 * detect, "0.5 points"), ("--power", 100 * probability, "0.8")):
        if not 0 < value < 100:
            raise DmatError(f"{option} is out of range; expected more than 0 and less than all, for example {advice}")
    baseline = params.write_report.baseline
    arms = [arm for arm in params.arms if arm != baseline]
    if not arms:
        raise DmatError(f"params.yaml has the arm {baseline} alone; expected a second one to compare; add it to arms")
    tables = {arm: _tables(arm, params, workspace) for arm in (baseline, *arms)}
    return [_detection(arm, baseline, tables, detect, probability) for arm in arms]


def _tables(arm: str, params: Params, workspace: Workspace) -> list[dict[str, np.ndarray]]:
    """The per-image table of each seed: columns [N]."""
    tables = []
    for seed in params.seeds:
        name = STAGES["evaluate_robust"].instance_name({"arm": arm, "seed": seed})
        path = workspace.at(f"{ARTIFACTS}/evaluate_robust/{name}") / PER_IMAGE
        if not path.is_file():
            raise DmatError(
                f"{path} does not exist; expected the evaluation of every arm and seed; run "
                f"`dmat evaluate-robust --arm {arm} --seed {seed}`, or `dvc pull --allow-missing`"
            )
        tables.append(read_table(path))
    return tables


def _detection(
    arm: str, baseline: str, tables: dict[str, list[dict[str, np.ndarray]]], detect: float, probability: float
) -> Detection:
    """tables: arm -> for each seed the columns [N]."""
    both = (*tables[arm], *tables[baseline])
    order: tuple[ArmMeasure, ...] = (HEADLINE, "best_pgd", *MEASURES)
    measure = next(name for name in order if all(name in table for table in both))
    flags = [np.stack([table[measure] for table in tables[name]]).astype(float) for name in (arm, baseline)]  # [S, N]
    differences = flags[0] - flags[1]
    components = power.variance_components(differences)
    answerable = SEEDS if components.seed is not None else SEEDS[:1]  # of one seed alone nothing says how seeds vary
    return Detection(
        arm,
        baseline,
        measure,
        differences.shape[1],
        len(differences),
        float(differences.mean()),
        components,
        {seeds: power.images_needed(components, seeds, detect, probability) for seeds in answerable},
    )
