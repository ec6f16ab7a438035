"""Multistep solvers against a Gaussian mixture whose flow is known, against formulas, and against diffusers.

The data are one pixel: a mixture of Gaussians, whose optimal denoiser has a closed form. Run alone:
pytest tests/test_multistep.py
"""

import functools
import itertools
import math

import pytest
import torch

from dmat.diffusion import multistep
from dmat.diffusion.multistep import DenoiserCall, integrate

MEANS = torch.tensor([-0.7, 0.1, 0.9], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.25, 0.4], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
HIGH, LOW = 80.0, 0.5
START = HIGH * torch.tensor([-1.3, -0.4, 0.2, 0.9, 1.8], dtype=torch.float64).reshape(-1, 1, 1, 1)

SOLVERS = {  # name -> step and order
    "euler in lambda": (multistep.dpm_solver_pp, 1),
    "dpmpp_2m": (multistep.dpm_solver_pp, 2),
    "dpmpp_3m": (multistep.dpm_solver_pp, 3),
    "unip_2": (multistep.unipc_predict, 2),
    "unip_3": (multistep.unipc_predict, 3),
}


def denoise(x, sigma):
    """E[data | x] of the mixture: the posterior weight of each part times its shrunken mean. x [B, 1, 1, 1]."""
    variance = SPREADS**2 + sigma**2
    log_weight = WEIGHTS.log() - 0.5 * variance.log() - (x - MEANS) ** 2 / (2 * variance)  # [B, 1, 1, parts]
    shrunken = (SPREADS**2 * x + sigma**2 * MEANS) / variance
    return (log_weight.softmax(-1) * shrunken).sum(-1, keepdim=True)


@functools.cache
def exact(*sigmas):
    """x at each of the levels, by 4,096 steps of Runge-Kutta 4 in lambda from HIGH; float64 [levels, B, 1, 1, 1]."""
    path, x, sigma = [], START, HIGH
    for target in sigmas:
        count = max(1, math.ceil(4096 * math.log(sigma / target) / math.log(HIGH / LOW)))
        h = math.log(sigma / target) / count if target < sigma else 0.0
        for _ in range(count if h else 0):
            slope = lambda x, s: denoise(x, s) - x  # noqa: E731
            middle, end = sigma * math.exp(-h / 2), sigma * math.exp(-h)
            k1 = slope(x, sigma)
            k2 = slope(x + h / 2 * k1, middle)
            k3 = slope(x + h / 2 * k2, middle)
            k4 = slope(x + h * k3, end)
            x, sigma = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), end
        path.append(x)
    return torch.stack(path)


def geometric(steps):
    return [HIGH * (LOW / HIGH) ** (k / steps) for k in range(steps + 1)]


def error(name, steps, with_history, correct=None):
    """Largest error at LOW. with_history: the first steps are given, on the exact path."""
    step, order = SOLVERS[name]
    levels = geometric(steps)
    given = order - 1 if with_history else 0
    path = exact(*levels[: given + 1])
    results = [DenoiserCall(s, denoise(x, s), x) for s, x in zip(levels[:given], path, strict=False)][::-1]
    end = integrate(denoise, path[-1] if given else START, levels[given:], step, order, correct, results)
    return (end - exact(LOW)[0]).abs().max().item()


@pytest.mark.parametrize("name", SOLVERS)
def test_error_falls_with_the_order(name):
    errors = [error(name, steps, with_history=True) for steps in (64, 128, 256, 512)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(SOLVERS[name][1], abs=0.1), measured


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_of_low_order_costs_little(name):
    """The first step is Euler's, which limits the order to 2. It is taken where D hardly changes."""
    errors = [error(name, steps, with_history=False) for steps in (64, 128, 256, 512)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured[-1] > min(SOLVERS[name][1], 2) - 0.1, measured


@pytest.mark.parametrize(("name", "order"), [("unip_2", 3), ("unip_3", 4)])
def test_the_corrector_raises_the_order_by_one(name, order):
    """Zhao et al. 2023, Theorem 3.1, for an exact history."""
    errors = [error(name, steps, True, multistep.unipc_correct) for steps in (64, 128, 256, 512)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(order, abs=0.4), (measured, errors)


def test_ipndm_is_of_order_four_in_equal_steps_of_sigma():
    high, low, errors = 10.0, 0.5, []
    (start,) = exact(high)
    (end,) = exact(low)
    for steps in (64, 128, 256, 512):
        levels = [high + (low - high) * k / steps for k in range(steps + 1)]
        path = exact(*levels[:4])
        results = [DenoiserCall(s, denoise(x, s), x) for s, x in zip(levels[:3], path, strict=False)][::-1]
        x = integrate(denoise, path[3], levels[3:], multistep.ipndm, 4, None, results)
        errors.append((x - end).abs().max().item())
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(4, abs=0.3), (measured, errors)
    assert start.shape == end.shape


def test_third_order_is_exact_for_parabolas_in_lambda():
    """Where D is a parabola in lambda the integrals are exact, whatever the steps."""
    coefficients = (0.3, -0.2, 0.07)

    def parabola(x, sigma):
        lam = -math.log(sigma)
        return torch.full_like(x, coefficients[0] + coefficients[1] * lam + coefficients[2] * lam**2)

    levels = [5.0, 3.1, 2.9, 1.4, 0.6]
    results = [DenoiserCall(s, parabola(START, s), START) for s in (6.5, 9.0)]
    end = integrate(parabola, START, levels, multistep.dpm_solver_pp, 3, None, results)
    # dx/dlam = D - x has the solution p(lam) + (x0 - p(lam0)) exp(-(lam - lam0)), p' + p = D.
    a, b, c = coefficients
    p = lambda lam: (a - b + 2 * c) + (b - 2 * c) * lam + c * lam**2  # noqa: E731
    first, last = -math.log(levels[0]), -math.log(levels[-1])
    torch.testing.assert_close(end, p(last) + (START - p(first)) * math.exp(first - last))


def test_orders_are_low_where_results_or_steps_are_missing():
    orders = []

    def step(x, results, sigma_next, order):
        orders.append((order, len(results)))
        return x

    integrate(denoise, START, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], step, 3)
    assert orders == [(1, 1), (2, 2), (3, 3), (2, 3), (1, 3)]
    orders.clear()
    integrate(denoise, START, [5.0, 4.0, 3.0, 2.0], step, 3)
    assert orders == [(1, 1), (2, 2), (3, 3)]
