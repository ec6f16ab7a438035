"""How a raw network becomes a denoiser, and which noise and weight its training sees: EDM, VP, VE, DDPM, iDDPM.

All are written in terms of sigma, the standard deviation of the noise that is added to images in [-1, 1], as Karras et
al. 2022 write them (Table 1, their s(t) = 1). So samplers need not know which formulation a denoiser has.
Shapes: B batch, C channels, H height, W width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmat import seeds

DDPM_STEPS = 1000  # of the noise processes of Ho et al. 2020 and of Nichol and Dhariwal 2021


class Formulation(Protocol):
    """Preconditioning, loss weight and noise distribution of a denoiser."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level that the network knows; 0 and infinity: no limit."""
        ...

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes c_skip, c_out, c_in and c_noise. sigma: any shape, above 0; results: same."""
        ...

    def weight(self, sigma: Tensor) -> Tensor:
        """Computes the weight of the squared error of D. sigma: any shape; result: same."""
        ...

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """Draws noise levels for training, float32 [B] for B = `count`."""
        ...


@dataclasses.dataclass(frozen=True)
class EDM:
    """Karras et al. 2022, section 5 and Table 1, column "Ours". sigma_data: standard deviation of the images.

    Training noise has ln sigma ~ N(p_mean, p_std^2).
    """

    sigma_data: float
    p_mean: float = -1.2
    p_std: float = 1.2

    @property
    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Formulation.scalings`: any shape -> same."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total, sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / c_out^2 (equation 8). sigma: any shape; result: same."""
        return 1 / self.scalings(sigma)[1] ** 2

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """See `Formulation.draw_sigma`: [B]."""
        return (seeds.normal(generator, (count,)) * self.p_std + self.p_mean).exp()


@dataclasses.dataclass(frozen=True)
class VP:
    """The variance-preserving process of Song et al. 2021 (Karras et al. 2022, Table 1, column "VP").

    sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), t in [epsilon_t, 1] uniform in training.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5
    steps: int = 1000  # that c_noise counts

    def sigma(self, t: Tensor) -> Tensor:
        """t: any shape, in [0, 1]; result: same, float64."""
        return (self.beta_d / 2 * t.double() ** 2 + self.beta_min * t.double()).expm1().sqrt()

    def beta(self, t: float) -> float:
        """The rate at which ln(1 + sigma^2) grows with t."""
        return self.beta_d * t + self.beta_min

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse of `sigma`. sigma: any shape; result: same, float64."""
        logarithm = (sigma.double() ** 2).log1p()
        return ((self.beta_min**2 + 2 * self.beta_d * logarithm).sqrt() - self.beta_min) / self.beta_d

    @property
    def sigma_range(self) -> tuple[float, float]:
        low, high = self.sigma(torch.tensor([self.epsilon_t, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Formulation.scalings`: any shape -> same."""
        return _predicting_noise(sigma, ((self.steps - 1) * self.time(sigma)).to(sigma.dtype))

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2: the squared error of the noise. sigma: any shape; result: same."""
        return sigma**-2

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """See `Formulation.draw_sigma`: [B]."""
        return self.sigma(seeds.uniform(generator, (count,), self.epsilon_t, 1.0)).float()


def _linear_betas(steps: int, start: float, end: float) -> Tensor:
    """Equal steps, float64 [N] for N = `steps` (Ho et al. 2020, section 4)."""
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")


def _scaled_linear_betas(steps: int, start: float, end: float) -> Tensor:
    """Equal steps of their square roots, float64 [N] for N = `steps` (Rombach et al. 2022)."""
    return _linear_betas(steps, math.sqrt(start), math.sqrt(end)) ** 2


_C_1, _C_2 = 0.001, 0.008  # of the cosine schedule (Karras et al. 2022, Table 1)


def _cosine_betas(steps: int, c_1: float, c_2: float) -> Tensor:
    """Those of a product that falls as a squared cosine (Nichol and Dhariwal 2021, equation 17).

    c_2 shifts the cosine, so that the first step adds some noise; each step keeps at least c_1. float64 [N] for N =
    `steps`.
    """
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")
    kept = ((time + c_2) / (1 + c_2) * (math.pi / 2)).cos() ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=1 - c_1)


# Names as diffusers has them. Betas are functions of (steps, start, end), on the CPU even where networks are on "meta".
BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "squaredcos_cap_v2": lambda steps, start, end: _cosine_betas(steps, _C_1, _C_2),
}
# What the network predicts -> c_skip and c_out for sigma and c_in: the noise, v = a noise - s image (Salimans and Ho
# 2022) with a = c_in and s = sigma c_in, or the image.
PREDICTION_TYPES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda sigma, c_in: (torch.ones_like(sigma), -sigma),
    "v_prediction": lambda sigma, c_in: (c_in**2, -sigma * c_in),
    "sample": lambda sigma, c_in: (torch.zeros_like(sigma), torch.ones_like(sigma)),
}


@dataclasses.dataclass(frozen=True)
class VE:
    """The variance-exploding process of Song et al. 2021 (Karras et al. 2022, Table 1, column "VE").

    The network predicts the noise with its sign reversed. Training noise has ln sigma uniform over sigma_range.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Formulation.scalings`: any shape -> same."""
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2: the squared error of the noise. sigma: any shape; result: same."""
        return sigma**-2

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """See `Formulation.draw_sigma`: [B]."""
        return seeds.uniform(generator, (count,), math.log(self.sigma_min), math.log(self.sigma_max)).exp()


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Ho et al. 2020: 1,000 steps, betas in equal steps, the network predicts the noise (their equation 14).

    Step j, from 0, has sigma_j = sqrt((1 - a_j) / a_j) with a_j the product of 1 - beta up to j; c_noise is j, and
    between two of the levels it is interpolated in ln sigma. Published models may have other numbers; their meaning is
    that of `BETA_SCHEDULES` and `PREDICTION_TYPES`.
    """

    steps: int = DDPM_STEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        """Raises ValueError for a process whose levels do not rise, or exceed what single precision can hold."""
        if not self.levels[-1] < 1e30 or not (self.levels.diff() > 0).all():
            raise ValueError(f"its noise process has levels up to {self.levels[-1].item()}; expected rising ones")

    @functools.cached_property
    def levels(self) -> Tensor:
        """sigma of the steps, rising, float64 [N] for N steps."""
        return _levels_of(BETA_SCHEDULES[self.beta_schedule](self.steps, self.beta_start, self.beta_end))

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.levels[0].item(), self.levels[-1].item()

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Formulation.scalings`: any shape -> same."""
        c_in = (1 + sigma**2).rsqrt()
        return *PREDICTION_TYPES[self.prediction_type](sigma, c_in), c_in, self._step(sigma)

    def _step(self, sigma: Tensor) -> Tensor:
        """The step of noise levels, interpolated: any shape -> same."""
        logarithms = self.levels.log().to(sigma.device)
        logarithm = sigma.double().log()
        above = torch.bucketize(logarithm, logarithms).clamp(1, self.steps - 1)
        low, high = logarithms[above - 1], logarithms[above]
        return (above - 1 + (logarithm - low) / (high - low)).clamp(0, self.steps - 1).to(sigma.dtype)

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2: the squared error of the noise. sigma: any shape; result: same."""
        return sigma**-2

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """See `Formulation.draw_sigma`: [B]."""
        return self.levels[torch.from_numpy(generator.integers(0, self.steps, count))].float()


@dataclasses.dataclass(frozen=True)
class IDDPM:
    """Nichol and Dhariwal 2021: DDPM with the cosine schedule (Karras et al. 2022, Table 1, column "iDDPM").

    After step t of `steps` the fraction cos^2 of the image's variance is left. c_1 and c_2 are those of
    `_cosine_betas`. c_noise is the number of the nearest level, counted from 0.
    """

    c_1: float = _C_1
    c_2: float = _C_2
    steps: int = DDPM_STEPS

    @functools.cached_property
    def levels(self) -> Tensor:
        """sigma of the steps, rising, float64 [M] for M = `steps`. u_j of the paper's table is levels[M - 1 - j]."""
        return _levels_of(_cosine_betas(self.steps, self.c_1, self.c_2))

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.levels[0].item(), self.levels[-1].item()

    def scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Formulation.scalings`: any shape -> same."""
        distance = (sigma.double()[..., None] - self.levels.to(sigma.device)).abs()  # [..., steps]
        return _predicting_noise(sigma, distance.argmin(-1).to(sigma.dtype))

    def weight(self, sigma: Tensor) -> Tensor:
        """1 / sigma^2: the squared error of the noise. sigma: any shape; result: same."""
        return sigma**-2

    def draw_sigma(self, generator: np.random.Generator, count: int) -> Tensor:
        """See `Formulation.draw_sigma`: [B]."""
        return self.levels[torch.from_numpy(generator.integers(0, self.steps, count))].float()


def _predicting_noise(sigma: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scalings of a network that sees images of unit variance and predicts their noise: any shape -> same."""
    return torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), c_noise


def _levels_of(betas: Tensor) -> Tensor:
    """sigma after each step of a process whose steps add noise of variance beta: float64 [J] -> [J]."""
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt()


class FormulationSettings(Protocol):
    """The settings of a formulation; `config.DenoiserTraining` satisfies this and has units and ranges."""

    @property
    def sigma_data(self) -> float: ...
    @property
    def p_mean(self) -> float: ...
    @property
    def p_std(self) -> float: ...


FORMULATIONS: dict[str, Callable[[FormulationSettings], Formulation]] = {
    "edm": lambda settings: EDM(settings.sigma_data, settings.p_mean, settings.p_std),
    "vp": lambda settings: VP(),
    "ve": lambda settings: VE(),
    "ddpm": lambda settings: DDPM(),
    "iddpm": lambda settings: IDDPM(),
}


class Preconditioned(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a raw network F (equation 7).

    network: F(x [B, C, H, W], c_noise [B], labels int64 [B] or None, augment [B, A] or None) -> [B, C, H, W].
    """

    def __init__(self, network: nn.Module, formulation: Formulation):
        super().__init__()
        self.network = network
        self.formulation = formulation

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None, augment: Tensor | None = None) -> Tensor:
        """Estimates the clean images, float32 [B, C, H, W].

        noisy [B, C, H, W], sigma [B], labels int64 [B] or None, augmentation labels [B, A] or None.
        """
        c_skip, c_out, c_in, c_noise = self.formulation.scalings(sigma.float())  # [B] each
        output = self.network(_per_image(c_in) * noisy.float(), c_noise, labels, augment)
        return _per_image(c_skip) * noisy.float() + _per_image(c_out) * output.float()


def loss(
    denoiser: Preconditioned,
    images: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    augment: Tensor | None = None,
) -> Tensor:
    """Computes the weighted squared error per image, [B] (equation 2 with the weight of the formulation).

    It is the mean over pixels and channels. images in [-1, 1] and noise (standard normal): [B, C, H, W];
    labels int64 [B] or None; sigma [B]; augment: augmentation labels [B, A] or None.
    """
    error = denoiser(images + _per_image(sigma) * noise, sigma, labels, augment) - images
    return denoiser.formulation.weight(sigma) * error.square().flatten(1).mean(1)


def _per_image(values: Tensor) -> Tensor:  # [B] -> [B, 1, 1, 1], to broadcast over images
    return values.reshape(-1, 1, 1, 1)
