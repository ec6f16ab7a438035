"""Noise levels that are searched for one denoiser and one number of steps, after Chen et al. 2024 (arXiv 2405.11326).

Paths of the probability-flow equation have much the same shape for all images, so levels that suit a few paths suit the
others. An accurate solver follows a few paths through a fine grid. The error of an Euler step between any two levels of
the grid is then known without another call of the denoiser, and dynamic programming finds the sequence with the
smallest sum. Unlike theirs, an error counts relative to the size of what the network sees at that level: absolute
errors are largest at high noise, where they change the image least (docs/diffusion.md has the numbers).
Shapes: B batch, C channels, H height, W width, L levels of the grid, T steps.
"""

import itertools

import torch
from torch import Tensor

from dmat.diffusion.samplers import Denoiser, denoise

IMAGES = 64  # paths that are followed
_GRID_STEPS = 60
_SPREAD = 0.5  # about the standard deviation of images


@torch.no_grad()
def search(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, steps: int, low: float, high: float) -> Tensor:
    """Searches noise levels for T = `steps` steps: float64 [T + 1], from `high` down to 0.

    latents: standard normal [B, C, H, W]; labels: int64 [B] or None. low, high: range of the levels above 0.
    """
    ramp = torch.linspace(0, 1, max(_GRID_STEPS, 2 * steps), dtype=torch.float64)
    grid = torch.cat([(high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7, ramp.new_zeros(1)])
    points, slopes = _paths(denoiser, latents, labels, grid.tolist())
    return grid[_cheapest(_errors(points, slopes, grid), steps)]


def _paths(denoiser: Denoiser, latents: Tensor, labels: Tensor | None, grid: list[float]) -> tuple[Tensor, Tensor]:
    """Follows paths by Heun's method. Returns x at each level, [L, B, C, H, W], and dx/dsigma at all but the last."""
    x = latents.double() * grid[0]
    points, slopes = [x], []
    slope = (x - denoise(denoiser, labels, x, grid[0])) / grid[0]
    for sigma, sigma_next in itertools.pairwise(grid):
        slopes.append(slope)
        proposal = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            following = (proposal - denoise(denoiser, labels, proposal, sigma_next)) / sigma_next
            x = x + (sigma_next - sigma) * (slope + following) / 2
            slope = (x - denoise(denoiser, labels, x, sigma_next)) / sigma_next
        else:
            x = proposal
        points.append(x)
    return torch.stack(points), torch.stack(slopes)


def _errors(points: Tensor, slopes: Tensor, grid: Tensor) -> Tensor:
    """Mean relative error of an Euler step from each level to each lower one: float64 [L, L], infinite elsewhere.

    points: [L, B, C, H, W]; slopes: [L - 1, B, C, H, W]; grid [L].
    """
    errors = torch.full((len(grid), len(grid)), torch.inf, dtype=torch.float64)
    for start, slope in enumerate(slopes):
        durations = (grid[start + 1 :] - grid[start]).to(slope.device)[:, None, None, None, None]
        jumps = points[start] + durations * slope - points[start + 1 :]
        sizes = (_SPREAD**2 + grid[start + 1 :] ** 2).sqrt()
        errors[start, start + 1 :] = jumps.flatten(2).norm(dim=2).mean(1).cpu() / sizes
    return errors


def _cheapest(errors: Tensor, steps: int) -> list[int]:
    """Levels of the cheapest way from the first to the last in T = `steps` steps. errors: [L, L]."""
    costs, choices = torch.full((len(errors),), torch.inf, dtype=torch.float64), []
    costs[-1] = 0
    for _ in range(steps):  # costs[i]: of the cheapest way from level i to the last in so many steps
        costs, choice = (errors + costs).min(1)
        choices.append(choice.tolist())
    way = [0]
    for choice in reversed(choices):
        way.append(choice[way[-1]])
    return way
