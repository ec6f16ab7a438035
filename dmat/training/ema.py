"""Exponential moving averages of weights: a second model beside the live one, and the decay of every step."""

import torch
from torch import nn


def warmup_decay(step: int, steps: int, tau: float, warmup: float = 0.025) -> float:
    """Decay at step 0 .. steps - 1 of Wang et al.'s code: a plain copy during the first `warmup` share of the
    steps, then min(tau, (1 + k) / (10 + k)) with k steps since then. It counts the step that was just made, and k
    need not be whole."""
    since = step + 1 - warmup * steps
    return 0.0 if since < 0 else min(tau, (1 + since) / (10 + since))


def half_life_decay(images_seen: int, batch: int, half_life: float, ramp: float = 0.05) -> float:
    """Decay of EDM: half-life in images, at most `ramp` of the images seen before this step (Karras et al. 2022, F.2).

    0 in the first step, so the average begins as a copy of the weights after it.
    """
    life = min(half_life, ramp * images_seen)
    return 0.5 ** (batch / max(life, 1e-8))


@torch.no_grad()
def update(ema_model: nn.Module, live: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * live, parameters only."""
    mine, theirs = ([p.detach() for p in model.parameters()] for model in (ema_model, live))
    torch._foreach_lerp_(mine, theirs, 1 - decay)


@torch.no_grad()
def copy_buffers(ema_model: nn.Module, live: nn.Module) -> None:
    """Batch-norm statistics of the averaged model: those of the live one, copied (never shared)."""
    for mine, theirs in zip(ema_model.buffers(), live.buffers(), strict=True):
        mine.copy_(theirs)
