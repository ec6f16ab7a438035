"""Accuracies with 95 % confidence intervals, and paired differences between arms."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np

_Z = 1.959964  # 97.5 % quantile of the normal distribution


class Interval(TypedDict):
    """An accuracy, in [0, 1], or a difference of accuracies, in [-1, 1], with its 95 % interval."""

    value: float
    low: float
    high: float


class AccuracyRecord(Interval):
    """An accuracy as results hold it: `right` of `n` images are classified correctly."""

    right: int
    n: int


class PairedDifference(Interval):
    """The mean difference of two arms over `n` images, each with `seeds` seeds."""

    n: int
    seeds: int


class ArmAccuracy(Interval):
    """The mean accuracy of an arm over its seeds."""

    n: int  # images
    seeds: int
    spread: float  # sample standard deviation between seeds; 0 for one seed
    right: NotRequired[int]  # with one seed only


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """An accuracy: `right` of `n` images are classified correctly."""

    right: int
    n: int
    low: float  # 95 % interval, in [0, 1]
    high: float

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.right / self.n

    def plain(self) -> AccuracyRecord:
        """Returns the record that results hold: value, low, high, right, n."""
        return {"value": self.value, "low": self.low, "high": self.high, "right": self.right, "n": self.n}


def wilson(flags: np.ndarray) -> Accuracy:
    """Computes accuracy with Wilson's score interval (Wilson 1927). flags: bool [N], N >= 1, True where right."""
    right, n = int(flags.sum()), len(flags)
    value, z2 = right / n, _Z * _Z
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half_width = _Z / (1 + z2 / n) * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    # The interval contains the value and stays in [0, 1]; rounding may break this where all or none are right.
    return Accuracy(right, n, min(value, max(0.0, centre - half_width)), max(value, min(1.0, centre + half_width)))


def paired_difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], resamples: int, generator: np.random.Generator
) -> PairedDifference:
    """Computes the mean difference of two arms, first minus second, with a 95 % percentile bootstrap interval.

    first[k], second[k]: bool [N] of seed k, True where right, for the same images in the same order. Each resample
    draws images with replacement, the same ones for both arms and all seeds: the interval is about images, not about
    seeds. Raises ValueError if the arms differ in seeds or number of images.
    """
    if len(first) != len(second) or {flags.shape for flags in first} != {flags.shape for flags in second}:
        raise ValueError("paired arms need the same seeds and the same images")
    per_image = np.mean([a.astype(float) - b.astype(float) for a, b in zip(first, second, strict=True)], axis=0)  # [N]
    n = len(per_image)
    means = np.array([per_image[generator.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(per_image.mean()), "low": float(low), "high": float(high), "n": n, "seeds": len(first)}


def over_seeds(flags: Sequence[np.ndarray], resamples: int, generator: np.random.Generator) -> ArmAccuracy:
    """Computes the mean accuracy of one arm over its seeds, with a 95 % interval.

    flags[k]: bool [N] of seed k, True where right. One seed: Wilson's interval. Several seeds: a percentile bootstrap
    over images of the mean over seeds. `spread` is the sample standard deviation between seeds (0 for one seed).
    """
    accuracies = [float(seed_flags.mean()) for seed_flags in flags]
    if len(flags) == 1:
        return {**wilson(flags[0]).plain(), "seeds": 1, "spread": 0.0}
    per_image = np.mean([seed_flags.astype(float) for seed_flags in flags], axis=0)  # [N]
    n = len(per_image)
    means = np.array([per_image[generator.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean(accuracies))
    return {
        "value": value,
        "low": min(value, float(low)),  # against rounding, where all images have the same mean
        "high": max(value, float(high)),
        "n": n,
        "seeds": len(flags),
        "spread": float(np.std(accuracies, ddof=1)),
    }
