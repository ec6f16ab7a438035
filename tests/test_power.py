"""What a difference needs: formulas against independent computations, and the command on stored tables."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from dmat import ARTIFACTS, config, recipes
from dmat.errors import DmatError
from dmat.evaluation.table import PER_IMAGE, write_table
from dmat.metrics.power import VarianceComponents, images_needed, variance_components
from dmat.pipeline import detection
from dmat.workspace import Workspace


def test_one_seed_has_the_variance_of_mcnemars_test():
    first_alone, second_alone, count = 37, 21, 500
    differences = np.concatenate([np.ones(first_alone), -np.ones(second_alone),
                                  np.zeros(count - first_alone - second_alone)])[None]  # fmt: skip
    components = variance_components(differences)
    exact = (first_alone + second_alone) / count - ((first_alone - second_alone) / count) ** 2
    assert components.image == pytest.approx(exact * count / (count - 1), rel=1e-12)
    assert components.seed is None
    assert components.residual == 0


def test_components_are_unbiased():
    generator = np.random.default_rng(1)
    true = VarianceComponents(0.04, 0.01, 0.09)
    drawn = [
        variance_components(
            0.2
            + generator.normal(0, true.image**0.5, (1, 200))
            + generator.normal(0, true.seed**0.5, (6, 1))
            + generator.normal(0, true.residual**0.5, (6, 200))
        )
        for _ in range(400)
    ]
    assert np.mean(drawn, 0) == pytest.approx(tuple(true), rel=0.08)


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_the_number_of_images_gives_the_power(seeds):
    components = VarianceComponents(0.05, 2e-6, 0.06)
    images = images_needed(components, seeds, 0.005, 0.8)
    for count, is_enough in ((images, True), (images - 1, False)):
        error = math.sqrt(components.image / count + components.seed / seeds + components.residual / (count * seeds))
        power = NormalDist().cdf(0.005 / error - NormalDist().inv_cdf(0.975))
        assert (power >= 0.8) is is_enough


def test_no_number_of_images_replaces_seeds():
    assert images_needed(VarianceComponents(0.05, 1e-4, 0.05), 2, 0.005, 0.8) is None
    assert images_needed(VarianceComponents(0.05, None, 0.0), 1, 0.005, 0.8) > 0


@pytest.fixture
def workspace(tmp_path):
    """Tables of two arms and two seeds with flags of 400 images."""
    generator = np.random.default_rng(2)
    for arm, share in (("real_only", 0.5), ("generated", 0.6)):
        for seed in (1, 2):
            flags = {"best_auto_attack": generator.random(400) < share, "best_pgd": np.ones(400, bool)}
            folder = tmp_path / ARTIFACTS / "evaluate_robust" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            write_table(folder / PER_IMAGE, flags)
    return Workspace(tmp_path, tmp_path)


def test_the_plan_reads_the_headline_of_all_seeds(workspace):
    params = config.check({**recipes.load("digits").values, "seeds": [1, 2]})[0]
    (result,) = detection.plan(params, workspace, 0.005, 0.8)
    assert (result.arm, result.baseline, result.measure) == ("generated", "real_only", "best_auto_attack")
    assert (result.images, result.seeds) == (400, 2)
    assert 0.02 < result.difference < 0.18
    assert list(result.needed) == [1, 2, 3, 5, 10, 20]
    with pytest.raises(DmatError, match="--detect is out of range"):
        detection.plan(params, workspace, 0.0, 0.8)
    more = config.check({**recipes.load("digits").values, "seeds": [1, 2, 3]})[0]
    with pytest.raises(DmatError, match=r"real_only-3.* does not exist"):
        detection.plan(more, workspace, 0.005, 0.8)
    single = config.check({**recipes.load("digits").values, "seeds": [2]})[0]
    (result,) = detection.plan(single, workspace, 0.005, 0.8)
    assert list(result.needed) == [1]  # how seeds vary is unknown
