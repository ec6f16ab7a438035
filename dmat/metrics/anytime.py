"""Bounds that hold at all times at once, for whoever looks at a measurement while it runs."""

import math

import numpy as np


def without_replacement(right: int, drawn: int, population: int, error: float = 0.05) -> tuple[int, int]:
    """Bounds of the number of right images in a finite population, which may be looked at after every draw.

    right of `drawn` images, taken in random order without replacement, are right. The true number lies within the
    bounds at all numbers of draws at once, with probability 1 - error: whoever stops when the bounds look good is still
    right. Waudby-Smith and Ramdas 2020, Confidence sequences for sampling without replacement, section 2: the ratio of
    prior to posterior at the true number is a martingale; here with the uniform prior, whose posterior is
    beta-binomial.
    """
    unseen = population - drawn
    more = np.arange(unseen + 1)  # right images among the unseen
    log_factorials = np.array([math.lgamma(k + 1) for k in range(population + 2)])
    log_posterior = (
        (log_factorials[right + more] - log_factorials[right] - log_factorials[more])
        + (log_factorials[population - right - more] - log_factorials[drawn - right] - log_factorials[unseen - more])
        - (log_factorials[population + 1] - log_factorials[drawn + 1] - log_factorials[unseen])
    )
    possible = more[log_posterior + math.log(population + 1) > math.log(error)]  # posterior / prior > error
    return right + int(possible[0]), right + int(possible[-1])
