"""Training of an EDM denoiser: one function, read from top to bottom (Karras et al. 2022, Table 1 and appendix F)."""

import copy
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmat import modes, seeds
from dmat.data.mixing import Sequence
from dmat.data.pixels import to_float
from dmat.devices import Compute
from dmat.diffusion import edm
from dmat.training import ema, schedules
from dmat.training.long_run import LongRun, stop_if_not_finite


class DenoiserSettings(Protocol):
    """Numbers of a run; units and ranges are those of `config.Generator`, which satisfies this."""

    images_seen: int
    batch: int
    learning_rate: float
    ramp_up: float
    ema_half_life: float
    p_mean: float
    p_std: float
    log_every: int


def train(
    denoiser: edm.Preconditioned,
    images: np.ndarray,
    labels: np.ndarray,
    settings: DenoiserSettings,
    seed: int,
    run: LongRun,
    compute: Compute,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Trains for settings.images_seen images; images uint8 [N, H, W, C]. Returns averaged weights and the loss curve.

    Every random number is named by `seed`. Raises Diverged or Interrupted, both after saving.
    """
    denoiser = compute.model_to_device(denoiser)  # type: ignore[assignment]
    ema_model = copy.deepcopy(denoiser)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    order = Sequence(seed, "order/real", len(labels))
    steps = -(-settings.images_seen // settings.batch)
    log_steps = max(1, settings.log_every // settings.batch)
    progress: dict[str, Any] = {"step": 0, "history": [], "pending": []}

    if (state := run.resume()) is not None:
        denoiser.load_state_dict(state["denoiser"])
        ema_model.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        progress = state["progress"]
    pending: list[Tensor] = progress["pending"]  # losses since the last record

    def snapshot() -> dict[str, Any]:
        return {
            "denoiser": denoiser.state_dict(),
            "ema": ema_model.state_dict(),
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
        chosen = order.at(images_seen, settings.batch)
        x = compute.to_device(to_float(images[chosen]).mul_(2).sub_(1))  # [B, C, H, W] in [-1, 1]
        y = torch.from_numpy(labels[chosen]).to(compute.device)
        draw = seeds.stream(seed, "denoiser/noise", step)
        sigma = edm.sample_sigma(seeds.normal(draw, (len(y),)), settings.p_mean, settings.p_std).to(compute.device)
        noise = compute.to_device(seeds.normal(draw, tuple(x.shape)))
        seeds.reseed_torch(seed, "denoiser/dropout", step)
        for group in optimiser.param_groups:
            group["lr"] = schedules.ramp_then_cosine(step / steps, settings.learning_rate, settings.ramp_up)
        with modes.mode(denoiser, training=True), compute.autocast():
            loss = edm.loss(denoiser, x, y, sigma, noise).mean()
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
