"""Accuracies as counts with 95 % intervals, and paired differences between arms."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """`right` of `n` images. low and high: 95 % interval. All shares of 1."""

    right: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.n

    def plain(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "right": self.right, "n": self.n}


def wilson(flags: np.ndarray) -> Accuracy:
    """Accuracy of boolean flags [n >= 1] with Wilson's score interval (Wilson 1927)."""
    right, n = int(flags.sum()), len(flags)
    share, z2 = right / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The interval holds the share and stays in [0, 1]; rounding may say otherwise where all or none are right.
    return Accuracy(right, n, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def paired_difference(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], resamples: int, generator: np.random.Generator
) -> dict[str, float]:
    """Mean difference of two arms on the same images, with a 95 % percentile bootstrap interval.

    ours[k], theirs[k]: boolean flags [n] of seed k, equal images in equal order. Each resample draws images with
    replacement, the same ones for both arms and every seed, so the interval is about images and not about seeds.
    """
    if len(ours) != len(theirs) or {flags.shape for flags in ours} != {flags.shape for flags in theirs}:
        raise ValueError("paired arms need the same seeds and the same images")
    per_image = np.mean([a.astype(float) - b.astype(float) for a, b in zip(ours, theirs, strict=True)], axis=0)  # [n]
    n = len(per_image)
    means = np.array([per_image[generator.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(per_image.mean()), "low": float(low), "high": float(high), "n": n, "seeds": len(ours)}


def over_seeds(flags: Sequence[np.ndarray], resamples: int, generator: np.random.Generator) -> dict[str, float]:
    """Mean accuracy of one arm over its seeds. One seed: Wilson's interval; several: a percentile bootstrap over
    images of the mean over seeds. `spread` is the sample standard deviation between seeds (0 for one)."""
    shares = [float(one.mean()) for one in flags]
    if len(flags) == 1:
        return {**wilson(flags[0]).plain(), "seeds": 1, "spread": 0.0}
    per_image = np.mean([one.astype(float) for one in flags], axis=0)  # [n]
    n = len(per_image)
    means = np.array([per_image[generator.integers(0, n, n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean(shares))
    return {
        "value": value,
        "low": min(value, float(low)),  # rounding, where all images have one mean
        "high": max(value, float(high)),
        "n": n,
        "seeds": len(flags),
        "spread": float(np.std(shares, ddof=1)),
    }
