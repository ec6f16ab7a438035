"""Samplers: (denoiser, latents, labels, settings) -> images. All of one signature.

Noise levels follow Karras et al. 2022, equation 5; the Heun sampler is their Algorithm 2 (Algorithm 1 where
s_churn is 0). Positions are accumulated in float64 as in the paper's experiments.
"""

import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (noisy [B,C,H,W], sigma [B], labels [B]) -> [B,C,H,W]
Noise = Callable[[int], Tensor]  # step -> fresh standard normal numbers shaped like the latents


class SamplerSettings(Protocol):
    """What a sampler is told; see `config.Sampler` for ranges."""

    steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    s_churn: float
    s_min: float
    s_max: float
    s_noise: float


def noise_levels(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """sigma_max ... sigma_min, 0: float64 [steps + 1] (equation 5; a single step goes from sigma_max to 0)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def heun(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None, settings: SamplerSettings, noise: Noise | None = None
) -> Tensor:
    """Algorithm 2. latents: standard normal [B, C, H, W]. 2 * steps - 1 denoiser calls.

    `noise` is needed where s_churn > 0. Returns images in about [-1, 1], float64.
    """
    levels = noise_levels(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho).tolist()
    x = latents.double() * levels[0]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x, sigma = _churn(x, sigma, step, settings, noise)
        slope = _slope(denoiser, x, sigma, labels)
        proposal = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + _slope(denoiser, proposal, sigma_next, labels)) / 2
            proposal = x + (sigma_next - sigma) * slope
        x = proposal
    return x


@torch.no_grad()
def euler(
    denoiser: Denoiser, latents: Tensor, labels: Tensor | None, settings: SamplerSettings, noise: Noise | None = None
) -> Tensor:
    """First-order steps through the same levels: `steps` denoiser calls. Arguments and result as `heun`."""
    levels = noise_levels(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho).tolist()
    x = latents.double() * levels[0]
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x, sigma = _churn(x, sigma, step, settings, noise)
        x = x + (sigma_next - sigma) * _slope(denoiser, x, sigma, labels)
    return x


SAMPLERS = {"heun": heun, "euler": euler}


def _slope(denoiser: Denoiser, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
    """dx/dsigma of the probability-flow ODE (equation 3 with s = 1): (x - D(x; sigma)) / sigma."""
    denoised = denoiser(x.float(), x.new_full((len(x),), sigma, dtype=torch.float32), labels)
    return (x - denoised.double()) / sigma


def _churn(x: Tensor, sigma: float, step: int, settings: SamplerSettings, noise: Noise | None) -> tuple[Tensor, float]:
    """Lines 4-6 of Algorithm 2: raises the noise level by the factor 1 + gamma before the step."""
    if settings.s_churn <= 0 or not settings.s_min <= sigma <= settings.s_max:
        return x, sigma
    if noise is None:
        raise ValueError("s_churn > 0 needs a source of noise")
    gamma = min(settings.s_churn / settings.steps, 2**0.5 - 1)
    raised = sigma * (1 + gamma)
    fresh = noise(step).to(x) * settings.s_noise
    return x + (raised**2 - sigma**2) ** 0.5 * fresh, raised
