"""Training of a denoiser: one function, read from top to bottom (Karras et al. 2022, Table 1 and appendix F).

Shapes: B batch, N images, C channels, H height, W width.
"""

import copy
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from dmat import modes, seeds
from dmat.data.mixing import ShuffledSequence
from dmat.data.pixels import to_float
from dmat.devices import Compute
from dmat.diffusion import formulations
from dmat.training import ema, schedules
from dmat.training.checkpoints import State
from dmat.training.long_run import LongRun, stop_if_not_finite


class DenoiserSettings(Protocol):
    """The settings of a training run; `config.Generator` satisfies this and has units and ranges."""

    images_seen: int
    batch: int
    learning_rate: float
    ramp_up: float
    ema_half_life: float
    log_every: int


class DenoiserProgress(TypedDict):
    """What a checkpoint holds of a training run, besides weights and optimiser."""

    step: int  # next
    history: list[dict[str, float]]
    pending: list[Tensor]  # scalar losses since the last record


def train(
    denoiser: formulations.Preconditioned,
    images: np.ndarray,
    labels: np.ndarray,
    settings: DenoiserSettings,
    seed: int,
    run: LongRun,
    compute: Compute,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Trains `denoiser` in place for settings.images_seen images. Returns EMA weights and the history of the loss.

    images uint8 [N, H, W, C], labels int64 [N]. Every random number is named by `seed`. Raises Interrupted on a signal,
    after saving, and Diverged on a NaN or infinite loss; the last good checkpoint stays.
    """
    denoiser = compute.model_to_device(denoiser)  # type: ignore[assignment]
    ema_model = copy.deepcopy(denoiser)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    order = ShuffledSequence(seed, "order/real", len(labels))
    steps = -(-settings.images_seen // settings.batch)
    log_steps = max(1, settings.log_every // settings.batch)
    progress: DenoiserProgress = {"step": 0, "history": [], "pending": []}

    if (state := run.resume()) is not None:
        denoiser.load_state_dict(state["denoiser"])
        ema_model.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        progress = state["progress"]
    pending = progress["pending"]

    def snapshot() -> State:
        return {
            "denoiser": denoiser.state_dict(),
            # key of earlier versions: a new name would make every checkpoint useless
            "averaged": ema_model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "progress": progress,
        }

    while True:
        step, images_seen = progress["step"], progress["step"] * settings.batch
        if pending and (step % log_steps == 0 or step >= steps):
            value = torch.stack(pending).mean().item()
            pending.clear()
            progress["history"].append({"images_seen": images_seen, "loss": value})
            run.metrics.write(images_seen, {"loss": value, "learning_rate": optimiser.param_groups[0]["lr"]})
            run.show(loss=value)
            stop_if_not_finite(value, images_seen)
        run.checkpoint_if_due(images_seen, snapshot)
        if step >= steps:
            break
        indices = order.at(images_seen, settings.batch)
        x = compute.to_device(to_float(images[indices]).mul_(2).sub_(1))  # [B, C, H, W] in [-1, 1]
        y = torch.from_numpy(labels[indices]).to(compute.device)  # [B]
        rng = seeds.stream(seed, "denoiser/noise", step)
        sigma = denoiser.formulation.draw_sigma(rng, len(y)).to(compute.device)
        noise = compute.to_device(seeds.normal(rng, tuple(x.shape)))
        seeds.reseed_torch(seed, "denoiser/dropout", step)
        for group in optimiser.param_groups:
            group["lr"] = schedules.ramp_then_cosine(step / steps, settings.learning_rate, settings.ramp_up)
        with modes.mode(denoiser, training=True), compute.autocast():
            loss = formulations.loss(denoiser, x, y, sigma, noise).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        ema.update(
            ema_model,
            denoiser,
            ema.half_life_decay(images_seen, settings.batch, settings.ema_half_life),
        )
        pending.append(loss.detach())
        progress["step"] = step + 1

    return {name: tensor.detach().cpu().clone() for name, tensor in ema_model.state_dict().items()}, progress["history"]
