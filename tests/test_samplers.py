"""The samplers solve the probability-flow equation: noise levels of equation 5, Algorithm 2 of Karras et al. 2022.

Oracles: the exact denoiser of a finite data set, a Gaussian whose solution is known in closed form, and a second
implementation of the algorithm written line by line in numpy, whose time and scale are derived by complex numbers. Run
alone: pytest tests/test_samplers.py
"""

import dataclasses
import fractions
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch

from dmat.diffusion.exact import ExactDenoiser
from dmat.diffusion.formulations import DDPM, IDDPM, VE, VP
from dmat.diffusion.samplers import (
    CHURNED,
    MAX_STEPS,
    PATHS,
    SAMPLERS,
    SEARCHED,
    called_levels,
    denoiser_calls,
    guided,
    noise_levels,
)
from tests.test_formulations import u_of_table_1


@dataclasses.dataclass
class Settings:
    steps: int = 8
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    schedule: str = "edm"
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = 1e9
    s_noise: float = 1.0


SCHEDULES = [schedule for schedule in PATHS if schedule != SEARCHED]  # those whose levels need no denoiser

CASES = {
    "usual": Settings(),
    "one step": Settings(steps=1),
    "two steps": Settings(steps=2),
    "short": Settings(steps=5, rho=2.0, sigma_max=5.0),
    "churned": Settings(steps=12, s_churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.003),
}


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def named_noise(*shape):
    """Returns noise by step: the same step gives the same noise."""
    return lambda step: latents(*shape, seed=1000 + step)


class Recorder:
    """A denoiser that records every call."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    def __call__(self, noisy, sigma, labels):
        self.calls.append((noisy, sigma, labels))
        return self.denoiser(noisy, sigma, labels)

    def sigmas(self):
        return [sigma[0].item() for _, sigma, _ in self.calls]


def gaussian(spread):
    """The optimal denoiser of images whose pixels are independent, of mean 0 and standard deviation `spread`."""
    return lambda noisy, sigma, labels: (
        noisy * (spread**2 / (spread**2 + sigma.double() ** 2))[:, None, None, None].to(noisy)
    )


# --- noise levels


@pytest.mark.parametrize("steps", [2, 3, 18, 40])
@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.01, 10.0, 1.0), (0.5, 2.0, 3.0)])
def test_noise_levels_are_equation_5(steps, low, high, rho):
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)
    ]
    levels = noise_levels(Settings(steps, low, high, rho))
    assert levels.dtype == torch.float64
    assert levels.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert levels[0].item() == pytest.approx(high)
    assert levels[-2].item() == pytest.approx(low)


def test_one_step_goes_from_the_highest_level_to_zero():
    for schedule in ("edm", "log_snr"):
        assert noise_levels(Settings(1, schedule=schedule)).tolist() == pytest.approx([80.0, 0.0])


def test_equal_steps_of_the_log_snr_are_the_limit_of_equation_5():
    levels = noise_levels(Settings(9, 0.01, 10.0, schedule="log_snr")).tolist()
    assert levels == pytest.approx([*np.geomspace(10, 0.01, 9), 0.0])
    assert levels == pytest.approx(noise_levels(Settings(9, 0.01, 10.0, rho=1e6)).tolist(), rel=1e-4)


BETA_D, BETA_MIN = 19.9, 0.1  # Table 1, column "VP"


def sigma_of_vp(t):
    return np.sqrt(np.exp(BETA_D * t**2 / 2 + BETA_MIN * t) - 1)


@pytest.mark.parametrize("steps", [2, 3, 18, 256, 992])
def test_levels_of_vp_ve_and_iddpm_are_table_1(steps):
    ramp = [i / (steps - 1) for i in range(steps)]
    vp = [sigma_of_vp(1 + part * (1e-3 - 1)) for part in ramp]
    assert noise_levels(Settings(steps, schedule="vp")).tolist() == pytest.approx([*vp, 0.0], rel=1e-9)
    squares = [100**2 * (0.02**2 / 100**2) ** part for part in ramp]
    ve = noise_levels(Settings(steps, 0.02, 100.0, schedule="ve"))
    assert ve.tolist() == pytest.approx([*(math.sqrt(t) for t in squares), 0.0], rel=1e-12)
    u = u_of_table_1()
    part, half = fractions.Fraction(999 - 8, steps - 1), fractions.Fraction(1, 2)
    iddpm = [u[math.floor(8 + part * i + half)] for i in range(steps)]
    assert noise_levels(Settings(steps, schedule="iddpm")).tolist() == pytest.approx([*iddpm, 0.0], rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_from_one_step_to_the_most_steps(schedule):
    for steps in (1, 2, 7, MAX_STEPS.get(schedule, 2000)):
        levels = noise_levels(Settings(steps, schedule=schedule))
        assert (levels.dtype, len(levels), levels[-1].item()) == (torch.float64, steps + 1, 0)
        assert (levels.diff() < 0).all()
    assert MAX_STEPS["iddpm"] == 992
    assert torch.equal(noise_levels(Settings(992, schedule="iddpm"))[:-1], IDDPM().levels[:992].flip(0))


def test_levels_of_earlier_schedules_keep_their_bytes():
    for steps in (1, 2, 18, 100):
        ramp, zero = torch.linspace(0, 1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        edm = (80.0 ** (1 / 7.0) + ramp * (0.002 ** (1 / 7.0) - 80.0 ** (1 / 7.0))) ** 7.0
        log_snr = (math.log(80.0) + ramp * (math.log(0.002) - math.log(80.0))).exp()
        ddpm = DDPM().levels[torch.linspace(999, 0, steps, dtype=torch.float64).round().long()]
        for schedule, levels in (("edm", edm), ("log_snr", log_snr), ("ddpm", ddpm)):
            assert torch.equal(noise_levels(Settings(steps, schedule=schedule)), torch.cat([levels, zero])), schedule


# --- every sampler


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_one_image_every_path_ends_there(name, case):
    image = latents(1, 3, 4, 4, seed=1).double().clamp(-1, 1) / 3  # not a float32 number
    start = latents(5, 3, 4, 4, seed=2)
    samples = SAMPLERS[name](ExactDenoiser(image), start, None, CASES[case], named_noise(5, 3, 4, 4))
    assert samples.dtype == torch.float64
    torch.testing.assert_close(samples, image.expand(5, -1, -1, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_images_of_the_class_asked_for(name, schedule):
    """The exact denoiser of ten images in three classes: every sample must be one of them, but for the noise that "vp"
    and "ve" leave: their last step is not to D, and 18 steps are few for them."""
    data, labels = latents(10, 1, 6, 6, seed=3).clamp(-1, 1), torch.arange(10) % 3
    requested = torch.arange(12) % 3
    start, noise = latents(12, 1, 6, 6, seed=4), named_noise(12, 1, 6, 6)
    settings = Settings(steps=18, schedule=schedule)
    samples = SAMPLERS[name](ExactDenoiser(data, labels), start, requested, settings, noise)
    distance = (samples[:, None] - data.double()[None]).flatten(2).norm(dim=2)
    bound = 1.0 if schedule in ("vp", "ve") else 0.01  # images are about 5 apart
    assert (distance.amin(1) < bound).all(), distance.amin(1)
    assert torch.equal(labels[distance.argmin(1)], requested)
    assert len(distance.argmin(1).unique()) > 3  # not one image per class


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_of_the_denoiser(name, schedule):
    """2 n - 1 calls of Heun and n of the others, each with the level as [B] float32 and the labels as they came."""
    recorder, labels = Recorder(gaussian(0.5)), torch.tensor([3, 1])
    settings = Settings(steps=8, schedule=schedule)
    SAMPLERS[name](recorder, latents(2, 1, 4, 4), labels, settings, named_noise(2, 1, 4, 4))
    levels = called_levels(noise_levels(settings).tolist(), settings)[:-1]
    expected = levels if name != "heun" else [levels[0], *(s for level in levels[1:] for s in (level, level))]
    assert recorder.sigmas() == pytest.approx(expected)
    assert len(recorder.calls) == denoiser_calls(name, 8)
    for noisy, sigma, call_labels in recorder.calls:
        assert (noisy.dtype, sigma.dtype, sigma.shape) == (torch.float32, torch.float32, (2,))
        assert call_labels is labels


@pytest.mark.parametrize("weight", [1, 1.5])
def test_calls_of_the_network_with_guidance(weight):
    recorder = Recorder(gaussian(0.5))
    SAMPLERS["heun"](guided(recorder, weight), latents(2, 1, 4, 4), torch.tensor([3, 1]), Settings(steps=8))
    assert len(recorder.calls) == denoiser_calls("heun", 8, weight)


@pytest.mark.parametrize("name", SAMPLERS)
def test_missing_labels_stay_missing(name):
    recorder = Recorder(gaussian(0.5))
    SAMPLERS[name](recorder, latents(2, 1, 4, 4), None, Settings(), named_noise(2, 1, 4, 4))
    assert {labels for _, _, labels in recorder.calls} == {None}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_keeps_no_graph_and_leaves_the_latents(name):
    weight, start = torch.nn.Parameter(torch.tensor(0.3)), latents(2, 1, 4, 4)
    before = start.clone()
    noise = named_noise(2, 1, 4, 4)
    samples = SAMPLERS[name](lambda x, sigma, labels: x * weight, start, None, Settings(), noise)
    assert not samples.requires_grad
    assert torch.equal(start, before)


@pytest.mark.parametrize("case", ["usual", "churned"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_neighbours(name, case):
    settings = CASES[case]
    data, start, noise = latents(10, 1, 4, 4, seed=3), latents(6, 1, 4, 4), named_noise(6, 1, 4, 4)
    together = SAMPLERS[name](ExactDenoiser(data), start, None, settings, noise)
    alone = [
        SAMPLERS[name](ExactDenoiser(data), start[k : k + 1], None, settings, lambda step, k=k: noise(step)[k : k + 1])
        for k in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


# --- accuracy on a Gaussian, where the solution is known


def relative_error(name, steps, spread=0.5):
    """Of the position at sigma_min, against the solution x(sigma) ~ sqrt(spread^2 + sigma^2) of the flow.

    The last step, to 0, is D itself for every sampler and is divided out.
    """
    settings = Settings(steps=steps, sigma_min=0.02, sigma_max=20.0, rho=3.0)
    start = torch.ones(1, 1, 1, 1)
    end = SAMPLERS[name](gaussian(spread), start, None, settings).item()
    at_sigma_min = end * (spread**2 + 0.02**2) / spread**2
    exact = 20.0 * math.sqrt(spread**2 + 0.02**2) / math.sqrt(spread**2 + 20.0**2)
    return abs(at_sigma_min / exact - 1)


@pytest.mark.parametrize(("name", "order", "bound"), [("euler", 1, 0.05), ("heun", 2, 0.002)])
def test_error_falls_with_the_order_of_the_method(name, order, bound):
    coarse, middle, fine = (relative_error(name, steps) for steps in (33, 65, 129))
    assert fine < bound
    assert coarse / middle == pytest.approx(2**order, rel=0.25)
    assert middle / fine == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize(("steps", "bound"), [(18, 0.06), (40, 0.012)])
def test_heun_with_the_published_levels_is_close_to_the_solution(steps, bound):
    start = latents(50, 1, 2, 2)
    samples = SAMPLERS["heun"](gaussian(0.5), start, None, Settings(steps=steps))
    exact = 80 * start.double() * 0.5 / math.sqrt(0.5**2 + 80**2)
    torch.testing.assert_close(samples, exact, rtol=bound, atol=0)


def test_levels_that_churn_raises_are_known():
    """What a sampler will ask the denoiser for, before it runs."""
    settings = Settings(steps=10, sigma_min=0.02, sigma_max=10.0, s_churn=4.0, s_min=0.1, s_max=5.0)
    recorder, zeros = Recorder(gaussian(0.5)), torch.zeros(1, 1, 2, 2)
    SAMPLERS["heun"](recorder, latents(1, 1, 2, 2), None, settings, lambda step: zeros)
    levels = called_levels(noise_levels(settings).tolist(), settings)
    assert set(recorder.sigmas()[::2]) <= {torch.tensor(level, dtype=torch.float32).item() for level in levels}
    assert (min(levels), max(levels)) == pytest.approx((0.02, 10.0))
    settings = dataclasses.replace(settings, s_max=20.0)
    assert max(called_levels(noise_levels(settings).tolist(), settings)) == pytest.approx(14.0)


@pytest.mark.parametrize("churn", [0.0, 4.0])
@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule not in ("vp", "ve")])
@pytest.mark.parametrize("name", CHURNED)
def test_where_sigma_is_the_time_every_byte_is_that_of_algorithm_2(name, schedule, churn):
    """Results of earlier versions stay valid: this is their code, in sigma alone."""
    settings = Settings(steps=9, schedule=schedule, s_churn=churn, s_min=0.05, s_max=50.0, s_noise=1.003)
    start, noise, levels = latents(3, 1, 4, 4), named_noise(3, 1, 4, 4), noise_levels(settings).tolist()
    denoiser = ExactDenoiser(latents(10, 1, 4, 4, seed=3))

    def slope(x, sigma):
        return (x - denoiser(x.float(), x.new_full((3,), sigma, dtype=torch.float32), None).double()) / sigma

    x = start.double() * levels[0]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        if churn and 0.05 <= sigma <= 50.0:
            raised = sigma * (1 + min(churn / 9, 2**0.5 - 1))
            epsilon = noise(step).to(x) * settings.s_noise
            x, sigma = x + (raised**2 - sigma**2) ** 0.5 * epsilon, raised
        first = slope(x, sigma)
        proposal = x + (sigma_next - sigma) * first
        if name == "heun" and sigma_next > 0:
            proposal = x + (sigma_next - sigma) * ((first + slope(proposal, sigma_next)) / 2)
        x = proposal
    assert torch.equal(SAMPLERS[name](denoiser, start, None, settings, noise), x)


# --- time and scale of the schedules


# Schedule -> sigma(t) and s(t) of Table 1, and a range of times that holds every raised level.
TABLE_1 = {
    "vp": (sigma_of_vp, lambda t: 1 / np.sqrt(1 + sigma_of_vp(t) ** 2), (1e-6, 2.0)),
    "ve": (np.sqrt, lambda t: 1.0 + 0 * t, (1e-9, 1e6)),
    "iddpm": (lambda t: t, lambda t: 1.0 + 0 * t, (1e-9, 1e6)),
    "edm": (lambda t: t, lambda t: 1.0 + 0 * t, (1e-9, 1e6)),
}


def derivative(function, t):
    """By a complex step, exact to the last digits (Squire and Trapp 1998)."""
    return (function(t + 1e-30j)).imag / 1e-30


def time_of(sigma, schedule):
    function, _, (low, high) = TABLE_1[schedule]
    return scipy.optimize.brentq(lambda t: function(t) - sigma, low, high, xtol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("schedule", TABLE_1)
def test_paths_are_table_1(schedule):
    sigma_of, scale_of, _ = TABLE_1[schedule]
    path = PATHS[schedule]
    for sigma in (0.0105, 0.3, 1.0, 20.0, 150.0):
        t = time_of(sigma, schedule)
        assert path.time(sigma) == pytest.approx(t, rel=1e-10)
        assert path.sigma_rate(sigma) == pytest.approx(derivative(sigma_of, t), rel=1e-9)
        assert path.scale(sigma) == pytest.approx(scale_of(t), rel=1e-10)
        assert path.log_scale_rate(sigma) == pytest.approx(derivative(scale_of, t) / scale_of(t), rel=1e-9)
    assert (path.time(0.0), path.scale(0.0)) == (0, 1), "every path ends at the image itself"


def algorithm_1(denoise, start, settings, noise, second_order):
    """Karras et al. 2022, Algorithm 1 (its slope is equation 4), in numpy float64; churn in x / s."""
    sigma, scale, _ = TABLE_1[settings.schedule]
    times = [time_of(level, settings.schedule) for level in noise_levels(settings).tolist()[:-1]] + [0.0]

    def slope(x, t):
        s, s_rate, sigma_rate = scale(t), derivative(scale, t), derivative(sigma, t)
        factor = s_rate / s + sigma_rate / sigma(t)
        return factor * x - sigma_rate * s / sigma(t) * denoise(x / s, sigma(t))

    x = sigma(times[0]) * scale(times[0]) * start
    for i in range(settings.steps):
        t = times[i]
        if settings.s_churn and settings.s_min <= sigma(t) <= settings.s_max:
            raised = sigma(t) * (1 + min(settings.s_churn / settings.steps, math.sqrt(2) - 1))
            t_hat = time_of(raised, settings.schedule)
            unscaled = x / scale(t) + math.sqrt(raised**2 - sigma(t) ** 2) * settings.s_noise * noise(i)
            x, t = unscaled * scale(t_hat), t_hat
        d = slope(x, t)
        proposal = x + (times[i + 1] - t) * d
        if second_order and times[i + 1] != 0:
            proposal = x + (times[i + 1] - t) * (d + slope(proposal, times[i + 1])) / 2
        x = proposal
    return x


@pytest.mark.parametrize("churn", [0.0, 4.0])
@pytest.mark.parametrize("schedule", TABLE_1)
@pytest.mark.parametrize("name", CHURNED)
def test_agrees_with_algorithm_1_written_line_by_line(name, schedule, churn):
    settings = Settings(12, 0.02, 80.0, schedule=schedule, s_churn=churn, s_min=0.05, s_max=50.0, s_noise=1.003)
    data = 2 * latents(5, 1, 3, 3, seed=8)
    start, noise, exact = latents(4, 1, 3, 3, seed=9), named_noise(4, 1, 3, 3), ExactDenoiser(data)
    samples = SAMPLERS[name](exact, start, None, settings, noise)
    expected = algorithm_1(
        lambda x, sigma: exact(torch.from_numpy(x), torch.full((4,), sigma, dtype=torch.float64)).numpy(),
        start.double().numpy(), settings, lambda step: noise(step).double().numpy(), name == "heun",
    )  # fmt: skip
    np.testing.assert_allclose(samples.numpy(), expected, rtol=0, atol=1e-4)


def error_at_the_lowest_level(name, schedule, steps):
    """Relative, of x / s at the last call of the denoiser. The solution of the flow is as sqrt(spread^2 + sigma^2)."""
    settings, recorder = Settings(steps, 0.02, 80.0, schedule=schedule), Recorder(gaussian(0.5))
    SAMPLERS[name](recorder, torch.ones(1, 1, 1, 1), None, settings)
    levels = noise_levels(settings).tolist()
    exact = levels[0] * math.sqrt((0.25 + levels[-2] ** 2) / (0.25 + levels[0] ** 2))
    return abs(recorder.calls[-1][0].item() / exact - 1)


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule not in MAX_STEPS])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_the_order_holds_on_every_path(name, order, schedule):
    coarse, middle, fine = (error_at_the_lowest_level(name, schedule, 1 + 64 * parts) for parts in (1, 2, 4))
    assert fine < (0.1 if order == 1 else 0.003)
    assert coarse / middle == pytest.approx(2**order, rel=0.25)
    assert middle / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["heun", "euler", "dpmpp_2m", "ipndm"])
def test_every_schedule_ends_in_the_same_image(name, schedule):
    """With many steps: that of the equation. Where a lowest level stays, half of it is left at most."""
    start = latents(20, 1, 2, 2)
    settings = Settings(steps=900, schedule=schedule)
    samples = SAMPLERS[name](gaussian(0.5), start, None, settings)
    highest, *_, lowest, _ = noise_levels(settings).tolist()
    exact = highest * start.double() * 0.5 / math.sqrt(0.5**2 + highest**2)
    bound = 2 * lowest**2 + (0.03 if name == "euler" else 1e-3)  # D of the lowest level shrinks by (lowest / 0.5)^2
    torch.testing.assert_close(samples, exact, rtol=bound, atol=0)


@pytest.mark.parametrize("schedule", ["vp", "ve"])
def test_the_last_step_of_vp_and_ve_leaves_about_half_of_the_noise(schedule):
    """Table 1 ends with Euler's step in t, and sigma is about the root of t there."""
    recorder, settings = Recorder(ExactDenoiser(torch.zeros(1, 1, 2, 2))), Settings(18, 0.02, schedule=schedule)
    samples = SAMPLERS["heun"](recorder, latents(3, 1, 2, 2), None, settings)
    torch.testing.assert_close(samples / recorder.calls[-1][0], torch.full_like(samples, 0.5), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("formulation", "schedules"),
    [
        (VP(), ("vp", "edm", "log_snr", "ve", "iddpm")),
        (VE(), ("ve",)),
        (DDPM(), ("ddpm", "vp")),
        (IDDPM(), ("iddpm", "vp", "ddpm")),
    ],
    ids=["vp", "ve", "ddpm", "iddpm"],
)
def test_a_model_accepts_the_levels_of_its_schedules(formulation, schedules):
    """The check before images are generated compares these two."""
    low, high = formulation.sigma_range
    for schedule in schedules:
        range_of_model = {"sigma_min": 0.02, "sigma_max": 100.0} if schedule == "ve" else {}
        for steps in (1, 18, 992):
            settings = Settings(steps, schedule=schedule, **range_of_model)
            called = called_levels(noise_levels(settings).tolist(), settings)
            assert low * (1 - 1e-6) <= min(called) <= max(called) <= high * (1 + 1e-6), (schedule, steps)


# --- ancestral sampling


def test_ancestral_sampling_draws_from_the_posterior():
    """For a Gaussian every step is linear, so the spread of the samples follows from the levels in closed form."""

    def spread(settings):
        levels, variance = noise_levels(settings).tolist(), settings.sigma_max**2
        for sigma, sigma_next in itertools.pairwise(levels):
            kept = (sigma_next / sigma) ** 2
            slope = kept + (1 - kept) * 0.25 / (0.25 + sigma**2)  # of D and of x together
            variance = slope**2 * variance + sigma_next**2 * (1 - kept)
        return variance**0.5

    settings, shape = Settings(steps=100, sigma_min=0.02, sigma_max=20.0, rho=3.0), (20_000, 1, 1, 1)
    samples = SAMPLERS["ancestral"](gaussian(0.5), latents(*shape), None, settings, named_noise(*shape))
    assert samples.std().item() == pytest.approx(spread(settings), abs=0.01)  # standard error 0.0025
    assert spread(dataclasses.replace(settings, steps=10_000)) == pytest.approx(0.5, abs=0.001)
    correlation = np.corrcoef(samples.flatten().numpy(), latents(*shape).flatten().numpy())[0, 1]
    assert abs(correlation) < 0.05


def test_ancestral_sampling_without_noise_is_refused():
    with pytest.raises(ValueError, match="needs a source of noise"):
        SAMPLERS["ancestral"](gaussian(0.5), latents(1, 1, 2, 2), None, Settings())


def test_levels_of_ddpm_are_evenly_spaced_steps():
    levels = noise_levels(Settings(1000, schedule="ddpm"))
    assert torch.equal(levels[:-1], DDPM().levels.flip(0))
    few = noise_levels(Settings(4, schedule="ddpm"))
    assert torch.equal(few, torch.cat([DDPM().levels[[999, 666, 333, 0]], torch.zeros(1)]))


# --- guidance


def test_guidance_goes_on_from_the_unlabelled_denoiser_through_the_labelled_one():
    def denoiser(noisy, sigma, labels):
        return 0.5 * noisy if labels is None else 0.2 * noisy + labels[:, None, None, None]

    noisy, sigma, labels = latents(3, 1, 2, 2), torch.ones(3), torch.tensor([0, 1, 2])
    assert guided(denoiser, 1.0) is denoiser
    for weight in (0.0, 0.5, 3.0):
        expected = (1 - weight) * denoiser(noisy, sigma, None) + weight * denoiser(noisy, sigma, labels)
        torch.testing.assert_close(guided(denoiser, weight)(noisy, sigma, labels), expected)


# --- churn


@pytest.mark.parametrize("s_churn", [1.0, 4.0, 1000.0])
@pytest.mark.parametrize("name", CHURNED)
def test_churn_raises_the_level_by_gamma_inside_its_window(name, s_churn):
    settings = Settings(steps=10, sigma_min=0.02, sigma_max=10.0, s_churn=s_churn, s_min=0.1, s_max=5.0)
    noise_steps, recorder = [], Recorder(gaussian(0.5))

    def noise(step):
        noise_steps.append(step)
        return torch.zeros(1, 1, 2, 2)

    SAMPLERS[name](recorder, latents(1, 1, 2, 2), None, settings, noise)
    levels = noise_levels(settings).tolist()[:-1]
    gamma = min(s_churn / 10, math.sqrt(2) - 1)
    inside = [0.1 <= level <= 5.0 for level in levels]
    assert 2 < sum(inside) < 9  # the window excludes both ends
    assert noise_steps == [step for step in range(10) if inside[step]]
    raised = [level * (1 + gamma) if within else level for level, within in zip(levels, inside, strict=True)]
    first_calls = recorder.sigmas() if name == "euler" else recorder.sigmas()[::2]
    assert first_calls == pytest.approx(raised)


@pytest.mark.parametrize("edge", ["s_min", "s_max"])
def test_churn_window_includes_its_edges(edge):
    """Algorithm 2: S_tmin <= t <= S_tmax."""
    levels = noise_levels(Settings(5, 0.02, 10.0)).tolist()
    settings = Settings(steps=5, sigma_min=0.02, sigma_max=10.0, s_churn=1.0, **{edge: levels[2]})
    noise_steps = []
    SAMPLERS["heun"](
        gaussian(0.5),
        latents(1, 1, 2, 2),
        None,
        settings,
        lambda step: noise_steps.append(step) or torch.zeros(1, 1, 2, 2),
    )
    assert noise_steps == ([0, 1, 2] if edge == "s_min" else [2, 3, 4])


def test_churn_adds_the_noise_that_the_raised_level_lacks():
    """One step of one pixel: the denoiser is given x + sqrt(raised^2 - sigma^2) * s_noise * noise."""
    settings = Settings(steps=2, sigma_min=1.0, sigma_max=3.0, s_churn=0.5, s_noise=1.5)
    recorder = Recorder(lambda noisy, sigma, labels: torch.zeros_like(noisy))
    SAMPLERS["euler"](recorder, torch.full((1, 1, 1, 1), 2.0), None, settings, lambda step: torch.ones(1, 1, 1, 1))
    raised = 3 * 1.25
    assert recorder.calls[0][0].item() == pytest.approx(2 * 3 + math.sqrt(raised**2 - 9) * 1.5)


def test_churn_keeps_the_spread_of_the_data():
    """The noise added and the noise removed balance: samples of a Gaussian stay samples of it."""
    settings = Settings(steps=96, sigma_min=0.02, sigma_max=20.0, rho=3.0, s_churn=16.0)
    shape = (20_000, 1, 1, 1)
    samples = SAMPLERS["heun"](gaussian(0.5), latents(*shape), None, settings, named_noise(*shape))
    assert samples.std().item() == pytest.approx(0.5, abs=0.01)  # standard error 0.0025
    # and the paths really were stirred: end points no longer follow from the latents
    correlation = np.corrcoef(samples.flatten().numpy(), latents(*shape).flatten().numpy())[0, 1]
    assert abs(correlation) < 0.1


@pytest.mark.parametrize("name", CHURNED)
def test_churn_without_noise_is_refused(name):
    with pytest.raises(ValueError, match=r"s_churn > 0 needs a source of noise"):
        SAMPLERS[name](gaussian(0.5), latents(1, 1, 2, 2), None, Settings(s_churn=1.0))


def test_window_that_no_level_meets_needs_no_noise():
    quiet = SAMPLERS["heun"](gaussian(0.5), latents(1, 1, 2, 2), None, Settings())
    aside = Settings(s_churn=1.0, s_min=100.0)
    assert torch.equal(SAMPLERS["heun"](gaussian(0.5), latents(1, 1, 2, 2), None, aside), quiet)


# --- a second implementation


def algorithm_2(denoise, start, settings, noise, second_order):
    """Karras et al. 2022, Algorithm 2, line by line for one image in numpy float64."""
    n = settings.steps
    t = [
        (
            settings.sigma_max ** (1 / settings.rho)
            + i / (n - 1) * (settings.sigma_min ** (1 / settings.rho) - settings.sigma_max ** (1 / settings.rho))
        )
        ** settings.rho
        for i in range(n)
    ] + [0.0]
    x = t[0] * start  # line 2
    for i in range(n):  # line 3
        gamma = min(settings.s_churn / n, math.sqrt(2) - 1) if settings.s_min <= t[i] <= settings.s_max else 0.0
        epsilon = settings.s_noise * noise(i)  # line 4
        t_hat = t[i] + gamma * t[i]  # line 5
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * epsilon  # line 6
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat  # line 7
        x = x_hat + (t[i + 1] - t_hat) * d  # line 8
        if second_order and t[i + 1] != 0:  # line 9
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]  # line 10
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)  # line 11
    return x


@pytest.mark.parametrize("case", ["usual", "two steps", "short", "churned"])
@pytest.mark.parametrize("name", CHURNED)
def test_agrees_with_algorithm_2_written_line_by_line(name, case):
    settings = CASES[case]
    # wide data, so that paths keep bending between images instead of settling at once
    data = 2 * latents(5, 1, 3, 3, seed=8)
    start, noise = latents(4, 1, 3, 3, seed=9), named_noise(4, 1, 3, 3)
    samples = SAMPLERS[name](ExactDenoiser(data), start, None, settings, noise)

    def denoise(x, t):
        weights = np.array([-((x - image) ** 2).sum() / (2 * t**2) for image in data.double().numpy()])
        weights = np.exp(weights - weights.max())
        return sum(w * image for w, image in zip(weights / weights.sum(), data.double().numpy(), strict=True))

    for k in range(4):
        expected = algorithm_2(
            denoise,
            start[k].double().numpy(),
            settings,
            lambda step, k=k: noise(step)[k].double().numpy(),
            second_order=name == "heun",
        )
        np.testing.assert_allclose(samples[k].numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["usual", "churned"])
@pytest.mark.parametrize("name", CHURNED)
def test_positions_are_kept_in_float64(name, case):
    """With a denoiser that computes in float32, as networks do, everything else agrees to the digits of float64."""
    start, noise = latents(1, 1, 8, 8, seed=9), named_noise(1, 1, 8, 8)
    levels = np.geomspace(0.001, 200, 400)
    table = (0.25 / (0.25 + levels**2)).astype(np.float32)  # of a Gaussian's denoiser, so that no rounding differs

    def factor(sigma):
        return table[min(int(np.searchsorted(levels, sigma)), 399)]

    samples = SAMPLERS[name](lambda x, sigma, labels: x * factor(sigma[0].item()), start, None, CASES[case], noise)
    expected = algorithm_2(
        lambda x, t: (x.astype(np.float32) * factor(np.float32(t))).astype(np.float64),
        start.double().numpy(),
        CASES[case],
        lambda step: noise(step).double().numpy(),
        second_order=name == "heun",
    )
    np.testing.assert_allclose(samples.numpy(), expected, rtol=0, atol=1e-12)
