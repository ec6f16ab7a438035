"""How many test images and seeds it takes to see a difference between two arms, from the variance of stored flags.

d_si is the difference of the flags of two arms (1 right, 0 wrong) for seed s and image i, so -1, 0 or 1. With one seed
its variance is what McNemar's test rests on (McNemar 1947): (b + c) / N - ((b - c) / N)^2 for b and c images that one
arm alone classifies correctly. With several seeds, d_si = difference + image_i + seed_s + residual_si, a crossed random
effects model with one value in each cell; the variances follow from the mean squares (Searle et al. 1992, chapter 4).

The mean over n images and S seeds has the variance image / n + seed / S + residual / (n S). In the normal approximation
a difference is seen with a two-sided error of 5 % and a probability `power` if it is (z_0.975 + z_power) standard
errors.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

ERROR = 0.05  # two-sided


class VarianceComponents(NamedTuple):
    """Variances of a paired difference, as squares of shares of 1.

    seed: None with one seed, where it cannot be estimated; `image` then has the variance of all but it.
    """

    image: float
    seed: float | None
    residual: float


def variance_components(differences: np.ndarray) -> VarianceComponents:
    """Estimates the variances. differences: [S, N] for S seeds and N images, N at least 2; negative estimates are 0."""
    seeds, images = differences.shape
    if seeds == 1:
        return VarianceComponents(float(differences[0].var(ddof=1)), None, 0.0)
    of_images, of_seeds = differences.mean(0), differences.mean(1)
    rest = differences - of_images - of_seeds[:, None] + differences.mean()
    residual = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
    image = float(of_images.var(ddof=1)) - residual / seeds
    seed = float(of_seeds.var(ddof=1)) - residual / images
    return VarianceComponents(max(0.0, image), max(0.0, seed), residual)


def images_needed(components: VarianceComponents, seeds: int, detect: float, power: float) -> int | None:
    """Number of test images for which a difference of `detect`, as a share of 1, is seen with probability `power`.

    None if any number of images is too small, because the seeds alone vary too much.
    """
    normal = NormalDist()
    standard_error = detect / (normal.inv_cdf(1 - ERROR / 2) + normal.inv_cdf(power))
    left = standard_error**2 - (components.seed or 0.0) / seeds
    return math.ceil((components.image + components.residual / seeds) / left) if left > 0 else None
