"""Samplers against those of diffusers, number by number: an independent implementation of the same papers.

Its schedulers keep float32 levels, so paths agree to that precision. Run alone: pytest tests/test_diffusers.py
"""

import sys

import pytest
import torch

from dmat.diffusion.samplers import SAMPLERS, noise_levels
from tests.test_multistep import denoise as mixture
from tests.test_samplers import Settings

diffusers = pytest.importorskip("diffusers")


LATENTS = torch.tensor([-1.3, -0.4, 0.2, 0.9, 1.8]).reshape(-1, 1, 1, 1)
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "num_train_timesteps": 1000}


def denoiser(noisy, sigma, labels):
    """The optimal denoiser of a mixture of Gaussians, one pixel. noisy [B, 1, 1, 1]."""
    return mixture(noisy.double(), sigma[0].item())


def by_edm_scheduler(scheduler, settings):
    """The path of an EDM scheduler, which is given the raw output F that its preconditioning turns into D."""
    scheduler.set_timesteps(settings.steps)
    levels = noise_levels(settings)
    torch.testing.assert_close(scheduler.sigmas.double(), levels, rtol=1e-5, atol=1e-6)
    scheduler.sigmas = levels  # in float64, so that only the rules are compared
    x = LATENTS.double() * levels[0]
    for number, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)
        sigma = levels[number].item()
        total = sigma**2 + 0.5**2
        raw = (denoiser(x, torch.tensor([sigma]), None) - 0.25 / total * x) / (sigma * 0.5 / total**0.5)
        x = scheduler.step(raw, timestep, x).prev_sample
    return x


def test_euler_agrees():
    scheduler = diffusers.EDMEulerScheduler(**EDM)
    expected = by_edm_scheduler(scheduler, Settings(12))
    samples = SAMPLERS["euler"](denoiser, LATENTS, None, Settings(12))
    torch.testing.assert_close(samples, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 12, 30])
def test_dpm_solver_pp_2m_agrees(steps):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(**EDM, solver_order=2, final_sigmas_type="zero")
    settings = Settings(steps)
    expected = by_edm_scheduler(scheduler, settings)
    samples = SAMPLERS["dpmpp_2m"](denoiser, LATENTS, None, settings)
    torch.testing.assert_close(samples, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # torch under numpy 2, in diffusers
@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_agrees(order, steps):
    """Its scheduler follows the variance-preserving path; x there is x / sqrt(1 + sigma^2) here."""
    settings = Settings(steps)
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type="bh2", prediction_type="sample", final_sigmas_type="zero",
        use_flow_sigmas=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    levels = noise_levels(settings)
    scheduler.sigmas = levels
    scheduler.num_inference_steps = steps
    x = LATENTS.double() * levels[0] / (1 + levels[0] ** 2) ** 0.5
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = levels[number].item()
        x = scheduler.step(denoiser(x * (1 + sigma**2) ** 0.5, torch.tensor([sigma]), None), timestep, x).prev_sample
    samples = SAMPLERS[f"unipc_{order}"](denoiser, LATENTS, None, settings)
    torch.testing.assert_close(samples, x.double(), rtol=1e-5, atol=1e-5)


def by_ddpm_scheduler(scheduler, steps, noise):
    """A path of variance-preserving steps that are given the noise that the denoiser implies; and its noise levels."""
    scheduler.set_timesteps(steps)
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    levels = ((1 - kept) / kept).sqrt()
    x = LATENTS.double() * levels[0] * kept[0].sqrt()
    for number, timestep in enumerate(scheduler.timesteps):
        sigma, scale = levels[number], kept[number].sqrt()
        denoised = denoiser(x / scale, sigma[None], None)
        scheduler.drawn = noise(number)
        x = scheduler.step((x / scale - denoised) / sigma, timestep, x).prev_sample.double()
    return x, torch.cat([levels, levels.new_zeros(1)])


def drawn(step):
    return torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(step)).double()


@pytest.mark.parametrize("steps", [10, 1000])
def test_ancestral_sampling_agrees_with_ddpm(monkeypatch, steps):
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    module = sys.modules[diffusers.DDPMScheduler.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: scheduler.drawn)
    expected, levels = by_ddpm_scheduler(scheduler, steps, drawn)
    samples = SAMPLERS["ancestral"](denoiser, LATENTS, None, Settings(steps), drawn, levels.tolist())
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)
    if steps == 1000:
        torch.testing.assert_close(levels, noise_levels(Settings(1000, schedule="ddpm")), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 50])
def test_euler_agrees_with_ddim(steps):
    """DDIM (Song et al. 2021) is Euler's method in sigma."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    expected, levels = by_ddpm_scheduler(scheduler, steps, drawn)
    samples = SAMPLERS["euler"](denoiser, LATENTS, None, Settings(steps), levels=levels.tolist())
    torch.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-4)
