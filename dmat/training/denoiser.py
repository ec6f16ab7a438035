"""Training of a denoiser: one function, read from top to bottom (Karras et al. 2022, Table 1 and appendix F).

Shapes: B batch, N images, C channels, H height, W width.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from dmat import modes, seeds
from dmat.data.mixing import ShuffledSequence
from dmat.data.pixels import to_float
from dmat.devices import Compute
from dmat.diffusion import augmentation_pipe, formulations
from dmat.errors import UnfitError
from dmat.training import ema, schedules
from dmat.training.checkpoints import State
from dmat.training.long_run import LongRun, stop_if_not_finite

_DECAYS = {"cosine": schedules.ramp_then_cosine, "none": schedules.ramp_then_constant}


class DenoiserSettings(Protocol):
    """The settings of a training run; `config.Generator` satisfies this and has units and ranges."""

    @property
    def learning_rate_decay(self) -> str: ...

    conditional: bool
    augment_probability: float
    images_seen: int
    batch: int
    accumulation_steps: int
    learning_rate: float
    ramp_up: float
    ema_half_life: float
    log_every: int
    snapshot_every: int


class Judge(NamedTuple):
    """Measures snapshots of a denoiser in evaluation mode. selects: the measure that is lowest for the best of them."""

    measure: Callable[[nn.Module], Mapping[str, float]]
    selects: str


class DenoiserProgress(TypedDict):
    """What a checkpoint holds of a training run, besides weights and optimiser."""

    step: int  # next
    history: list[dict[str, float]]
    pending: list[Tensor]  # scalar losses since the last record
    snapshots: list[dict[str, float]]  # a record per judged snapshot
    best: dict[str, Tensor]  # EMA weights of the best of them


@dataclasses.dataclass(frozen=True)
class TrainedDenoiser:
    """The result of a training run: EMA weights on the CPU and measurements."""

    best: dict[str, Tensor]  # state dict of the best snapshot; the last where none was judged
    last: dict[str, Tensor]  # state dict at the end
    history: list[dict[str, float]]  # records of the loss
    snapshots: list[dict[str, float]]  # records of the judge
    best_snapshot: dict[str, float] | None  # of them; None where none was judged


def train(
    denoiser: formulations.Preconditioned,
    images: np.ndarray,
    labels: np.ndarray,
    settings: DenoiserSettings,
    seed: int,
    run: LongRun,
    compute: Compute,
    judge: Judge | None = None,
) -> TrainedDenoiser:
    """Trains `denoiser` in place for settings.images_seen images.

    images uint8 [N, H, W, C], labels int64 [N]. judge: measures the EMA weights every settings.snapshot_every images,
    and at the end. Every random number is named by `seed`. Several processes, and several parts of a batch, compute
    what one computes, but for rounding and for which activations dropout drops. Raises Interrupted on a signal, after
    saving, and Diverged on a NaN or infinite loss; the last good checkpoint stays.
    """
    world = compute.world
    parts = world.size * settings.accumulation_steps
    if settings.batch % parts:
        raise UnfitError(
            f"a batch of {settings.batch} images does not divide into {parts} parts, {settings.accumulation_steps} in "
            f"each of {world.size} processes; expected a multiple; change batch, accumulation_steps or the number of "
            f"processes"
        )
    denoiser = compute.model_to_device(denoiser)  # type: ignore[assignment]
    ema_model = copy.deepcopy(denoiser)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    order = ShuffledSequence(seed, "order/real", len(labels))
    steps = -(-settings.images_seen // settings.batch)
    log_steps = max(1, settings.log_every // settings.batch)
    snapshot_steps = max(1, settings.snapshot_every // settings.batch)
    progress: DenoiserProgress = {"step": 0, "history": [], "pending": [], "snapshots": [], "best": {}}

    if (state := run.resume()) is not None:
        denoiser.load_state_dict(state["denoiser"])
        ema_model.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        progress.update(state["progress"])
    pending, stop_requested = progress["pending"], False

    def snapshot() -> State:
        if pending:  # no checkpoint holds what a NaN loss made of the weights
            stop_if_not_finite(torch.stack(pending).mean().item(), progress["step"] * settings.batch)
        return {
            "denoiser": denoiser.state_dict(),
            # key of earlier versions: a new name would make every checkpoint useless
            "averaged": ema_model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "progress": progress,
        }

    while True:
        step, images_seen = progress["step"], progress["step"] * settings.batch
        record: dict[str, float] = {}
        if pending and (step % log_steps == 0 or step >= steps):
            record["loss"] = torch.stack(pending).mean().item()
            pending.clear()
            progress["history"].append({"images_seen": images_seen, **record})
            run.show(**record)
            stop_if_not_finite(record["loss"], images_seen)
            record["learning_rate"] = optimiser.param_groups[0]["lr"]
        # The other processes need no result of the judge; they wait for the main one in the exchange of the next step.
        if judge is not None and world.is_main_process and step and (step % snapshot_steps == 0 or step >= steps):
            record |= _judge(judge, ema_model, images_seen, progress)
        if record:
            run.metrics.write(images_seen, record)
        run.checkpoint_if_due(images_seen, snapshot, stop_requested if world.size > 1 else None)
        if step >= steps:
            break
        indices = order.at(images_seen, settings.batch)
        rng = seeds.stream(seed, "denoiser/noise", step)
        sigma = denoiser.formulation.draw_sigma(rng, settings.batch)  # [B], as all numbers here: of the whole batch
        noise = seeds.normal(rng, (settings.batch, images.shape[3], *images.shape[1:3]))  # [B, C, H, W]
        moved = None
        if settings.augment_probability:
            rng = seeds.stream(seed, "denoiser/augmentation", step)
            moved = augmentation_pipe.draw(rng, settings.batch, settings.augment_probability)
        decay = _DECAYS[settings.learning_rate_decay]
        for group in optimiser.param_groups:
            group["lr"] = decay(step / steps, settings.learning_rate, settings.ramp_up)
        optimiser.zero_grad(set_to_none=True)
        losses = []
        for rows in _parts(world.local_rows(settings.batch), settings.accumulation_steps):
            x = compute.to_device(to_float(images[indices[rows]]).mul_(2).sub_(1))  # in [-1, 1]
            y = torch.from_numpy(labels[indices[rows]]).to(compute.device) if settings.conditional else None
            augment = None
            if moved is not None:
                x = augmentation_pipe.apply(x, moved.rows(rows))
                augment = moved.rows(rows).labels().to(compute.device)
            seeds.reseed_torch(seed, f"denoiser/dropout/{rows.start}" if rows.start else "denoiser/dropout", step)
            with modes.mode(denoiser, training=True), compute.autocast():
                loss = formulations.loss(
                    denoiser, x, y, sigma[rows].to(compute.device), compute.to_device(noise[rows]), augment
                ).mean()
            (loss / parts).backward()  # the mean of the whole batch, once all gradients are summed
            losses.append(loss.detach() / parts)
        loss = torch.stack(losses).sum()
        if world.size > 1:
            packed = torch.stack([loss, loss.new_tensor(float(run.stop_requested))])
            packed = world.sum_gradients(denoiser, packed)
            loss, stop_requested = packed[0], float(packed[1]) > 0
        optimiser.step()
        ema.update(
            ema_model,
            denoiser,
            ema.half_life_decay(images_seen, settings.batch, settings.ema_half_life),
        )
        pending.append(loss)
        progress["step"] = step + 1

    last, snapshots = _cpu_copy(ema_model), progress["snapshots"]
    best = min(snapshots, key=lambda record: _rank(record, judge)) if judge is not None and snapshots else None
    return TrainedDenoiser(progress["best"] or last, last, progress["history"], snapshots, best)


def _parts(rows: slice, count: int) -> Iterator[slice]:
    """Rows of a batch in `count` equal parts."""
    size = (rows.stop - rows.start) // count
    return (slice(start, start + size) for start in range(rows.start, rows.stop, size))


def _judge(judge: Judge, ema_model: nn.Module, images_seen: int, progress: DenoiserProgress) -> dict[str, float]:
    """Judges a snapshot and keeps its weights if it is the best so far. Returns its measures.

    It returns none where a resumed run has them already.
    """
    records = progress["snapshots"]
    if records and records[-1]["images_seen"] == images_seen:
        return {}
    with modes.mode(ema_model, training=False), torch.no_grad():
        measures = dict(judge.measure(ema_model))
    if _rank(measures, judge) < min((_rank(record, judge) for record in records), default=math.inf) or not records:
        progress["best"] = _cpu_copy(ema_model)
    records.append({"images_seen": images_seen, **measures})
    return measures


def _rank(record: Mapping[str, float], judge: Judge) -> float:
    """What snapshots are compared by: smaller is better, and NaN is the worst."""
    value = record[judge.selects]
    return math.inf if math.isnan(value) else value


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, tensors of any shape, copied to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
