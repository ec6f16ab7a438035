"""Exponential moving average (EMA) of weights: a second model beside the live one, and the decay of every step."""

import torch
from torch import nn


def warmup_decay(step: int, steps: int, max_decay: float, warmup: float = 0.025) -> float:
    """Returns the decay at step 0 .. steps - 1, in [0, 1), as in Wang et al.'s code.

    It is 0, a plain copy, during the first fraction `warmup` of the steps, then min(max_decay, (1 + k) / (10 + k)) with
    k steps since the warm-up. k counts the step just made and need not be an integer.
    """
    k = step + 1 - warmup * steps
    return 0.0 if k < 0 else min(max_decay, (1 + k) / (10 + k))


def half_life_decay(images_seen: int, batch: int, half_life: float, ramp: float = 0.05) -> float:
    """Returns the decay of a step of EDM (Karras et al. 2022, F.2).

    half_life is in images; it is limited to the fraction `ramp` of the images seen before this step. The decay is 0 in
    the first step, so the average starts as a copy of the weights after it.
    """
    ramped_half_life = min(half_life, ramp * images_seen)
    return 0.5 ** (batch / max(ramped_half_life, 1e-8))


@torch.no_grad()
def update(ema_model: nn.Module, live: nn.Module, decay: float) -> None:
    """Updates the parameters in place: ema = decay * ema + (1 - decay) * live. Buffers stay as they are."""
    ema_parameters, live_parameters = ([p.detach() for p in model.parameters()] for model in (ema_model, live))
    torch._foreach_lerp_(ema_parameters, live_parameters, 1 - decay)


@torch.no_grad()
def copy_buffers(ema_model: nn.Module, live: nn.Module) -> None:
    """Copies the batch-norm statistics of the live model into the EMA model; the two never share memory."""
    for ema_buffer, live_buffer in zip(ema_model.buffers(), live.buffers(), strict=True):
        ema_buffer.copy_(live_buffer)
