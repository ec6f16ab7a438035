"""Samplers. All have one signature: (denoiser, latents, labels, settings, noise) -> images.

Heun and Euler follow Karras et al. 2022, Algorithm 2, which is Algorithm 1 where s_churn is 0, in the time and scale of
the schedule (`paths`). The others call the denoiser once in a step (`multistep`); they work in sigma alone and take the
noise levels of a schedule, not its time and scale. The state x is kept in float64, as in the paper's experiments.
Shapes: B batch, C channels, H height, W width.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dmat.diffusion import multistep
from dmat.diffusion.formulations import DDPM, DDPM_STEPS, IDDPM, VP
from dmat.diffusion.multistep import Step
from dmat.diffusion.paths import SIGMA_PATH, VE_PATH, VP_PATH, Path

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (noisy [B,C,H,W], sigma [B], labels [B]) -> [B,C,H,W]
Noise = Callable[[int], Tensor]  # step -> fresh standard normal numbers shaped like the latents

_VP_LAST_TIME = 1e-3  # epsilon_s of Karras et al. 2022, Table 1
# Schedules with a fixed list of levels -> how many there are. That of iDDPM starts at its j_0 = 8, at sigma = 80.2:
# the levels above go up to 20,291.
SEARCHED = "searched"  # the schedule whose levels `schedule_search` finds for a denoiser
MAX_STEPS = {"ddpm": DDPM_STEPS, "iddpm": DDPM_STEPS - 8, SEARCHED: 100}


class SamplerSettings(Protocol):
    """The settings of a sampler; `config.Sampler` satisfies this and has units and ranges."""

    steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    s_churn: float
    s_min: float
    s_max: float
    s_noise: float

    @property
    def schedule(self) -> str: ...


def noise_levels(settings: SamplerSettings) -> Tensor:
    """Computes the noise levels from the highest to the lowest, then 0: float64 [T + 1] for T steps.

    From sigma_max to sigma_min: "edm" is equation 5 of Karras et al. 2022; "log_snr" has equal steps of ln sigma (Lu
    et al. 2022), to which "edm" tends as rho grows; "ve" has the same levels, as sigma^2 is geometric in Table 1 of
    Karras et al. Over their own range: "ddpm" takes levels of the 1,000 steps of DDPM, evenly spaced from the last to
    the first (Nichol and Dhariwal 2021, section 4); "iddpm" and "vp" are the columns of that table: levels of the
    cosine schedule, and equal steps of the time of VP. A single step goes from the highest level to 0.
    Heun's and Euler's last step on "vp" and "ve" leaves noise, so that a single step there returns the latents.
    Raises ValueError for "searched", whose levels are not known without a denoiser.
    """
    steps, low, high, rho = settings.steps, settings.sigma_min, settings.sigma_max, settings.rho
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    match settings.schedule:
        case "ddpm":
            ddpm_steps = torch.linspace(DDPM_STEPS - 1, 0, steps, dtype=torch.float64).round().long()
            levels = DDPM().levels[ddpm_steps]
        case "iddpm":
            first, parts = MAX_STEPS["iddpm"] - 1, max(1, steps - 1)
            passed = (2 * first * torch.arange(steps) + parts) // (2 * parts)  # first * i / parts + 1/2, rounded down
            levels = IDDPM().levels[first - passed]
        case "vp":
            levels = VP().sigma(1 + ramp * (_VP_LAST_TIME - 1))
        case "searched":
            raise ValueError("the levels of a searched schedule are given by schedule_search")
        case "log_snr" | "ve":
            levels = (math.log(high) + ramp * (math.log(low) - math.log(high))).exp()
        case _:
            levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def called_levels(levels: Sequence[float], settings: SamplerSettings) -> list[float]:
    """Noise levels above 0 at which a sampler of SAMPLERS calls the denoiser, with those that churn raises.

    levels: from the highest to the lowest, then 0.
    """
    return [sigma * (1 + _gamma(sigma, settings)) for sigma in levels[:-1]] + [levels[-2]]


def denoiser_calls(sampler: str, steps: int, guidance: float = 1) -> int:
    """How often a sampler of SAMPLERS calls the network for an image. guidance: the weight of `guided`."""
    calls = 2 * steps - 1 if sampler == "heun" else steps
    return calls * (1 if guidance == 1 else 2)


def _gamma(sigma: float, settings: SamplerSettings) -> float:
    """By how much churn raises a noise level (Karras et al. 2022, Algorithm 2)."""
    inside = settings.s_churn > 0 and settings.s_min <= sigma <= settings.s_max
    return min(settings.s_churn / settings.steps, 2**0.5 - 1) if inside else 0.0


def guided(denoiser: Denoiser, weight: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): D without label + weight * (D with label - D without label).

    1 is the denoiser itself; above 1, images are more typical of their class and less diverse, and each call costs two.
    """
    if weight == 1:
        return denoiser

    def guide(noisy: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """noisy [B, C, H, W], sigma [B], labels [B] -> [B, C, H, W]."""
        unlabelled = denoiser(noisy, sigma, None)
        return torch.lerp(unlabelled, denoiser(noisy, sigma, labels), weight)

    return guide


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    settings: SamplerSettings,
    noise: Noise | None = None,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Samples images with Heun's method (Algorithm 2), in 2 * steps - 1 denoiser calls.

    The last step, to noise level 0, is Euler's: where sigma(t) = t it gives D; on "vp" and "ve", about half of the
    lowest noise stays, as the paper has it.
    latents: standard normal [B, C, H, W]; labels: int64 [B] or None; `noise` is required where s_churn > 0. levels:
    from the highest to the lowest, then 0; None: those of the schedule.
    Returns images [B, C, H, W] in about [-1, 1], float64.
    """
    path, levels = PATHS[settings.schedule], levels or noise_levels(settings).tolist()
    x = latents.double() * (path.scale(levels[0]) * levels[0])
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x, sigma = _churn(x, sigma, path, step, settings, noise)
        duration = path.time(sigma_next) - path.time(sigma)
        slope = _slope(denoiser, x, sigma, path, labels)
        proposal = x + duration * slope
        if sigma_next > 0:
            slope = (slope + _slope(denoiser, proposal, sigma_next, path, labels)) / 2
            proposal = x + duration * slope
        x = proposal
    return x


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    settings: SamplerSettings,
    noise: Noise | None = None,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Samples images with Euler's method through the same noise levels, in `steps` denoiser calls.

    latents [B, C, H, W] -> images [B, C, H, W]; arguments and result are those of `heun`.
    """
    path, levels = PATHS[settings.schedule], levels or noise_levels(settings).tolist()
    x = latents.double() * (path.scale(levels[0]) * levels[0])
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x, sigma = _churn(x, sigma, path, step, settings, noise)
        x = x + (path.time(sigma_next) - path.time(sigma)) * _slope(denoiser, x, sigma, path, labels)
    return x


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    settings: SamplerSettings,
    noise: Noise | None = None,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), in `steps` denoiser calls.

    A step draws from the posterior of the next level given x and D (their equations 6 and 7), here in terms of sigma.
    latents [B, C, H, W] -> images [B, C, H, W]; arguments and result are those of `heun`, and `noise` is required.
    """
    if noise is None:
        raise ValueError("ancestral sampling needs a source of noise")
    levels = levels or noise_levels(settings).tolist()
    x = latents.double() * levels[0]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(denoiser, labels, x, sigma)
        kept = (sigma_next / sigma) ** 2
        x = denoised + kept * (x - denoised)
        if sigma_next > 0:
            x = x + sigma_next * (1 - kept) ** 0.5 * noise(step).to(x)
    return x


@torch.no_grad()
def _by_multistep(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None,
    settings: SamplerSettings,
    noise: Noise | None = None,
    levels: Sequence[float] | None = None,
    *,
    step: Step,
    order: int,
    correct: Step | None = None,
) -> Tensor:
    """Samples images with a solver of `multistep`, in `steps` denoiser calls. No noise is added on the way.

    latents [B, C, H, W] -> images [B, C, H, W]; arguments and result are those of `heun`.
    """
    levels = levels or noise_levels(settings).tolist()
    return multistep.integrate(
        functools.partial(denoise, denoiser, labels), latents.double() * levels[0], levels, step, order, correct
    )


_unipc = functools.partial(_by_multistep, step=multistep.unipc_predict, correct=multistep.unipc_correct)
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "heun": heun,
    "euler": euler,
    "ancestral": ancestral,
    "dpmpp_2m": functools.partial(_by_multistep, step=multistep.dpm_solver_pp, order=2),
    "dpmpp_3m": functools.partial(_by_multistep, step=multistep.dpm_solver_pp, order=3),
    "unipc_2": functools.partial(_unipc, order=2),
    "unipc_3": functools.partial(_unipc, order=3),
    "ipndm": functools.partial(_by_multistep, step=multistep.ipndm, order=4),
}
CHURNED = ("heun", "euler")  # those that s_churn has an effect on
PATHS = {  # schedule -> the path that heun and euler follow
    "edm": SIGMA_PATH,
    "log_snr": SIGMA_PATH,
    "ddpm": SIGMA_PATH,
    "iddpm": SIGMA_PATH,
    SEARCHED: SIGMA_PATH,
    "ve": VE_PATH,
    "vp": VP_PATH,
}


def denoise(denoiser: Denoiser, labels: Tensor | None, x: Tensor, sigma: float) -> Tensor:
    """D(x; sigma), float64 [B, C, H, W]. x [B, C, H, W] float64, labels [B]."""
    return denoiser(x.float(), x.new_full((len(x),), sigma, dtype=torch.float32), labels).double()


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, path: Path, labels: Tensor | None) -> Tensor:
    """Computes dx/dt of the probability-flow ODE: s sigma' (x / s - D(x / s; sigma)) / sigma + (s' / s) x (equation 4).

    x [B, C, H, W] float64, labels [B] -> [B, C, H, W].
    """
    scale = path.scale(sigma)
    unscaled = x / scale
    slope = (unscaled - denoise(denoiser, labels, unscaled, sigma)) / sigma
    return scale * path.sigma_rate(sigma) * slope + path.log_scale_rate(sigma) * x


def _churn(
    x: Tensor, sigma: float, path: Path, step: int, settings: SamplerSettings, noise: Noise | None
) -> tuple[Tensor, float]:
    """Raises the noise level by the factor 1 + gamma before a step: lines 4-6 of Algorithm 2, in x / s.

    x [B, C, H, W] at noise level sigma -> x [B, C, H, W] at the raised level, and that level.
    """
    gamma = _gamma(sigma, settings)
    if not gamma:
        return x, sigma
    if noise is None:
        raise ValueError("s_churn > 0 needs a source of noise")
    sigma_hat = sigma * (1 + gamma)
    scale = path.scale(sigma_hat)
    epsilon = noise(step).to(x) * settings.s_noise
    return x * (scale / path.scale(sigma)) + scale * (sigma_hat**2 - sigma**2) ** 0.5 * epsilon, sigma_hat
