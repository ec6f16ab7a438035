"""The paths of the probability-flow equation: noise level sigma(t) and scale s(t) of Karras et al. 2022, Table 1.

At time t a path is at x = s(t) * (image + sigma(t) * noise), and t falls to 0, where sigma is 0 and s is 1. In x / s
and sigma all paths are one, so from equal numbers at an equal noise level they end in the same image. A solver takes
its steps in t, so with few steps it ends elsewhere on each. As sigma(t) rises with t, all is a function of sigma here.
"""

import dataclasses
from collections.abc import Callable

import torch

from dmat.diffusion.formulations import VP


@dataclasses.dataclass(frozen=True)
class Path:
    """Functions of the noise level sigma. Only `time` and `scale` are called at sigma = 0.

    time: t. sigma_rate: dsigma/dt. scale: s. log_scale_rate: d(ln s)/dt.
    """

    time: Callable[[float], float]
    sigma_rate: Callable[[float], float]
    scale: Callable[[float], float] = lambda sigma: 1.0
    log_scale_rate: Callable[[float], float] = lambda sigma: 0.0


def _vp_time(sigma: float) -> float:
    return VP().time(torch.tensor(sigma, dtype=torch.float64)).item()


def _vp_beta(sigma: float) -> float:
    """d/dt of ln(1 + sigma^2) at the time of a noise level."""
    return VP().beta(_vp_time(sigma))


SIGMA_PATH = Path(time=lambda sigma: sigma, sigma_rate=lambda sigma: 1.0)  # columns "iDDPM" and "Ours" (EDM)
VE_PATH = Path(time=lambda sigma: sigma**2, sigma_rate=lambda sigma: 0.5 / sigma)  # sigma = sqrt(t)
VP_PATH = Path(  # 1 + sigma^2 = exp(beta_d t^2 / 2 + beta_min t), s = 1 / sqrt(1 + sigma^2)
    time=_vp_time,
    sigma_rate=lambda sigma: _vp_beta(sigma) * (1 + sigma**2) / (2 * sigma),
    scale=lambda sigma: (1 + sigma**2) ** -0.5,
    log_scale_rate=lambda sigma: -_vp_beta(sigma) / 2,
)
