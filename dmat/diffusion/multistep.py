"""Solvers of the probability-flow equation that use earlier results of the denoiser, so a step costs one call.

In lambda = -ln sigma the flow is dx/dlambda = D - x (Karras et al. 2022, equation 3 with s = 1). Exponential methods
solve the part -x exactly and extrapolate D from earlier steps; iPNDM extrapolates the slope dx/dsigma. A solver starts
with fewer earlier results than its order wants and ends with few steps left: its order is then lower.
Shapes: B batch, C channels, H height, W width.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class DenoiserCall(NamedTuple):
    """A result of the denoiser: D(x; sigma), float64 [B, C, H, W], and the noise level sigma."""

    sigma: float
    denoised: Tensor
    x: Tensor  # where the denoiser was called, [B, C, H, W]


Denoise = Callable[[Tensor, float], Tensor]  # x [B, C, H, W] float64, sigma -> D(x; sigma), float64 of that shape


class Step(Protocol):
    """The rule of a solver: from x at the newest level to x at the next."""

    def __call__(self, x: Tensor, results: Sequence[DenoiserCall], sigma_next: float, order: int) -> Tensor:
        """x [B, C, H, W]; results: newest first, at least `order` of them. Returns x [B, C, H, W] at sigma_next."""
        ...


def integrate(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[float],
    step: Step,
    order: int,
    correct: Step | None = None,
    results: Sequence[DenoiserCall] = (),
) -> Tensor:
    """Follows the flow through noise levels, highest first; the last may be 0. Returns x at the last level.

    x: float64 [B, C, H, W] at levels[0]. step: predicts x at the next level. correct: computes x at a level again once
    the denoiser was called there. results: of earlier calls at higher levels, newest first; usually there are none.
    """
    history, last_order = list(results), 0
    x_before = x
    for number, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        newest = DenoiserCall(sigma, denoise(x, sigma), x)
        if correct is not None and last_order:
            x = correct(x_before, [newest, *history], sigma, last_order)
        history = [newest, *history[: order - 1]]
        remaining = len(levels) - 1 - number if levels[-1] == 0 else order  # a step to 0 is of first order
        last_order = min(order, len(history), remaining)
        x_before, x = x, step(x, history, sigma_next, last_order)
    return x


def _log_ratio(sigma: float, sigma_next: float) -> float:
    """The difference of lambda; infinite for a step to 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def dpm_solver_pp(x: Tensor, results: Sequence[DenoiserCall], sigma_next: float, order: int) -> Tensor:
    """DPM-Solver++ for multistep (Lu et al. 2022, arXiv 2211.01095): 2M is Algorithm 2, 3M has a third point.

    x [B, C, H, W] -> [B, C, H, W]. Third order integrates the parabola through three results exactly.
    """
    newest = results[0]
    decay = sigma_next / newest.sigma  # exp(-h)
    if order == 1:
        return decay * x + (1 - decay) * newest.denoised
    h = _log_ratio(newest.sigma, sigma_next)
    h_before = _log_ratio(results[1].sigma, newest.sigma)
    difference = newest.denoised - results[1].denoised
    if order == 2:
        return decay * x + (1 - decay) * (newest.denoised + difference * h / (2 * h_before))
    slope = difference / h_before
    h_first = _log_ratio(results[2].sigma, results[1].sigma)
    bend = (slope - (results[1].denoised - results[2].denoised) / h_first) / (h_before + h_first)
    # Integrals of exp(s - h) s^k for s from 0 to h, by parts.
    constant = -math.expm1(-h)
    linear = h - constant
    square = h**2 - 2 * linear
    return decay * x + constant * newest.denoised + linear * slope + (square + h_before * linear) * bend


def _unipc(x: Tensor, h: float, decay: float, base: DenoiserCall, points: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The update of UniPC (Zhao et al. 2023, equations 3, 8 and 9, B(h) = exp(h) - 1 as for B_2).

    points: differences to base's D, [B, C, H, W], with their distances from base in units of h. Returns [B, C, H, W].
    """
    x = decay * x + (1 - decay) * base.denoised
    if not points:
        return x
    scale = math.expm1(-h)
    phi, factorial, right = scale / -h - 1, 1, list[float]()
    for k in range(1, len(points) + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    ratios = torch.tensor([ratio for ratio, _ in points], dtype=torch.float64)
    matrix = torch.stack([ratios**k for k in range(len(points))])
    # With one point the paper takes 1/2, which gives the same order.
    weights = (
        [0.5] if len(points) == 1 else torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
    )
    total = sum(weight * difference / ratio for weight, (ratio, difference) in zip(weights, points, strict=True))
    return x - scale * total


def unipc_predict(x: Tensor, results: Sequence[DenoiserCall], sigma_next: float, order: int) -> Tensor:
    """The predictor UniP. x [B, C, H, W] -> [B, C, H, W]."""
    base = results[0]
    h, decay = _log_ratio(base.sigma, sigma_next), sigma_next / base.sigma
    return _unipc(x, h, decay, base, _points(results[:order], h))


def unipc_correct(x: Tensor, results: Sequence[DenoiserCall], sigma_next: float, order: int) -> Tensor:
    """The corrector UniC, once results[0] at sigma_next is there.

    x [B, C, H, W] at the level of results[1] -> [B, C, H, W] at sigma_next.
    """
    newest, base = results[0], results[1]
    h, decay = _log_ratio(base.sigma, sigma_next), sigma_next / base.sigma
    points = [*_points(results[1 : 1 + order], h), (1.0, newest.denoised - base.denoised)]
    return _unipc(x, h, decay, base, points)


def _points(results: Sequence[DenoiserCall], h: float) -> list[tuple[float, Tensor]]:
    """Earlier results relative to the newest: distance in lambda in units of h, and difference [B, C, H, W]."""
    newest, *others = results
    return [(_log_ratio(newest.sigma, other.sigma) / h, other.denoised - newest.denoised) for other in others]


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(x: Tensor, results: Sequence[DenoiserCall], sigma_next: float, order: int) -> Tensor:
    """iPNDM (Zhang and Chen 2023, arXiv 2204.13902, section 3.4): Adams-Bashforth weights of equal steps in sigma.

    x [B, C, H, W] -> [B, C, H, W].
    """
    slopes = [(call.x - call.denoised) / call.sigma for call in results[:order]]
    slope = sum(weight * slope for weight, slope in zip(_ADAMS_BASHFORTH[order - 1], slopes, strict=True))
    return x + (sigma_next - results[0].sigma) * slope
