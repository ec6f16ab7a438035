"""Learning rates as pure functions of progress, so that a restarted run needs no scheduler state."""

import math


def epochs(every: int, batch: int, steps: int) -> tuple[int, int]:
    """Returns the steps of an epoch of `every` images, and how many epochs a run of `steps` steps begins.

    An epoch is rounded up to whole batches, as in Wang et al.'s code: 98 steps for 50,000 images in batches of 512.
    """
    epoch_steps = -(-every // batch)
    return epoch_steps, -(-steps // epoch_steps)


def one_cycle(
    step: int,
    steps: int,
    peak: float,
    *,
    warmup: float = 0.025,
    start_divisor: float = 25.0,
    end_divisor: float = 1e4,
    momentum: tuple[float, float] = (0.85, 0.95),
) -> tuple[float, float]:
    """Returns learning rate and momentum of torch's OneCycleLR with cosine annealing, at step 0 .. steps - 1.

    The learning rate rises from peak / start_divisor to peak during the first fraction `warmup` of the steps, then
    falls to peak / start_divisor / end_divisor.

    momentum = (at the peak, at both ends). The default is the cycling that Wang et al.'s run really had, because torch
    overwrites the optimiser's 0.9; two equal numbers keep the momentum fixed.

    Equal to torch's for runs of 1 / warmup steps or more. A shorter run starts at the peak (torch: just below it, or a
    division by zero at exactly 1 / warmup steps).

    The schedules `cosinew` and `cyclic` of Wang et al.'s code are this one: cosinew steps once per epoch, cyclic at
    every batch and with a warm-up of 0.25.
    """
    first, last = warmup * steps - 1, steps - 1
    start, end = peak / start_divisor, peak / start_divisor / end_divisor
    low, high = momentum
    if step < first:  # torch divides by zero where the warm-up is exactly one step; here it starts at the peak
        fraction = step / first
        return _cosine(start, peak, fraction), _cosine(high, low, fraction)
    fraction = min(1.0, (step - max(first, 0)) / max(last - max(first, 0), 1))
    return _cosine(peak, end, fraction), _cosine(low, high, fraction)


def half_cosine(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate at step 0 .. steps - 1: half a cosine from peak to (nearly) 0, without warm-up.

    The schedule `cosine` of Wang et al.'s code, from Carmon et al. 2019.
    """
    return _cosine(peak, 0.0, step / steps)


def step_decay(step: int, steps: int, peak: float, milestones: tuple[float, ...], factor: float) -> float:
    """Returns the learning rate at step 0 .. steps - 1: peak, multiplied by `factor` at each milestone.

    milestones: fractions of the run, rounded to whole steps. (0.5, 0.75) and 0.1 are those of Rice et al. 2020. The
    schedule `step` of Wang et al.'s code, torch's MultiStepLR, has epochs 100 and 105.
    """
    return peak * factor ** sum(step >= round(milestone * steps) for milestone in milestones)


def ramp_then_cosine(progress: float, peak: float, ramp: float) -> float:
    """Returns the learning rate: linear from 0 to peak during the first fraction `ramp`, then half a cosine to 0.

    progress: fraction of the run, in [0, 1].
    """
    if progress < ramp:
        return peak * progress / ramp
    return _cosine(peak, 0.0, (progress - ramp) / (1 - ramp))


def ramp_then_constant(progress: float, peak: float, ramp: float) -> float:
    """Returns the learning rate: linear from 0 to peak during the first fraction `ramp`, then peak.

    progress: fraction of the run, in [0, 1].
    """
    return peak * progress / ramp if progress < ramp else peak


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
