"""Training of a classifier, standard or adversarial: one function, read from top to bottom.

The recipe is that of Wang et al. 2023 (see docs/recipe.md): SGD with Nesterov momentum, one-cycle learning rate,
weight averaging, selection of the best averaged weights by PGD accuracy on the validation split.
"""

import copy
import dataclasses
import math
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat import modes, plugins, processes, seeds
from dmat.data.augmentation import AUGMENTATIONS, Augmentation, cutmix
from dmat.data.batches import MixedBatches
from dmat.data.pixels import iter_batches
from dmat.devices import Compute
from dmat.errors import Diverged, UnfitError
from dmat.robust import attacks, losses
from dmat.robust.attacks import Ball
from dmat.training import ema, schedules
from dmat.training.long_run import LongRun
from dmat.training.prefetcher import Prefetcher

_CHECK_EVERY = 64  # steps between two looks at the loss, which a GPU has to be waited for
_ROLL_BACK_FACTOR = 0.5  # on the learning rate, after a divergence
_SCHEDULED = {"learning_rate": "lr", "momentum": "momentum"}  # name in a history -> name in the optimiser


class ClassifierSettings(Protocol):
    """Numbers of a run; units and ranges are those of `config.ClassifierTraining`, which satisfies this."""

    @property
    def loss(self) -> str: ...
    @property
    def augmentation(self) -> str: ...
    @property
    def selection_step_size(self) -> float: ...

    @property
    def on_divergence(self) -> str: ...

    images_seen: int
    batch: int
    learning_rate: float
    warmup: float
    start_divisor: float
    end_divisor: float
    schedule_every: int
    cycle_momentum: bool
    momentum: float
    momentum_lowest: float
    momentum_highest: float
    weight_decay: float
    clip_gradient: float
    ema_decay: float
    ema_warmup: float
    batch_norm_momentum: float
    first_batch_norm_momentum: float
    synchronise_batch_norm: bool
    cutmix: float
    cutmix_copies: int
    temperature: float
    evaluate_every: int
    selection_steps: int
    patience: int


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """Averaged weights at the best validation accuracy and at the end, and what was measured on the way."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_images_seen: int
    best_accuracy: float  # the selecting accuracy: robust if selection_steps > 0, else clean; share of 1
    history: list[dict[str, float]]
    images_per_second: float  # of training steps in this process, evaluations left out; 0 if it made none


def train(
    model: nn.Module,
    classes: int,
    batches: MixedBatches,
    validation: tuple[Tensor, Tensor],
    loss_settings: losses.LossSettings,
    settings: ClassifierSettings,
    seed: int,
    run: LongRun,
    compute: Compute,
) -> TrainedClassifier:
    """Trains `model` in place for settings.images_seen images. validation: images in [0, 1] and labels.

    `model` must be initialised by the caller; every random number is named by `seed`, so a resumed run continues
    bit for bit. Raises Interrupted on a signal, after saving, and Diverged on a loss that is not finite, with the
    batch named in `diverged.json`; on_divergence "roll_back" goes back to the last evaluation once instead, and on
    with half the learning rate.
    """
    world = compute.world
    if settings.batch % world.size:
        raise UnfitError(
            f"a batch of {settings.batch} images does not divide among {world.size} processes; expected a multiple; "
            f"change batch or the number of processes"
        )
    loss_of = plugins.find(losses.LOSSES, settings.loss)
    augment = plugins.find(AUGMENTATIONS, settings.augmentation)
    model = compute.model_to_device(model)
    if settings.synchronise_batch_norm:
        processes.synchronise_batch_norm(model, world)
    ema_model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(_groups(model, settings.weight_decay), lr=0.0, momentum=0.9, nesterov=True)
    class_means = losses.ClassMeans(classes, settings.temperature, compute.device)
    steps = -(-settings.images_seen // settings.batch)
    every = max(1, settings.evaluate_every // settings.batch)
    epoch_steps, epochs = schedules.epochs(settings.schedule_every, settings.batch, steps)
    check_every = _CHECK_EVERY if world.size == 1 else 1  # all processes must find the same at the same step
    progress: dict[str, Any] = {
        "step": 0,
        "rate_factor": 1.0,
        "best_accuracy": -1.0,
        "best_images_seen": 0,
        "best": {},
        "history": [],
        "pending": [],
    }

    def restore(state: dict[str, Any]) -> None:
        nonlocal progress
        model.load_state_dict(state["model"])
        ema_model.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        class_means.load(state["class_means"])
        progress = state["progress"]

    def snapshot() -> dict[str, Any]:
        _stop_if_not_finite(progress, batches, settings.batch, run)
        return {
            "model": model.state_dict(),
            "ema": ema_model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "class_means": class_means.state(),
            "progress": progress,
        }

    if (found := run.resume()) is not None:
        restore(found)
    clock, asked, mine = _Clock(), False, world.local_rows(settings.batch)
    next_steps = Prefetcher(lambda step: _draw(batches, settings, loss_settings.ball, step, seed, compute), steps)
    while True:
        step, images_seen = progress["step"], progress["step"] * settings.batch
        done = step >= steps
        evaluating = (done or (step > 0 and step % every == 0)) and not (
            progress["history"] and progress["history"][-1]["images_seen"] == images_seen
        )
        try:
            if evaluating or step % check_every == 0:
                _stop_if_not_finite(progress, batches, settings.batch, run)
            run.checkpoint_if_due(images_seen, snapshot, asked if world.size > 1 else None)
        except Diverged:
            if settings.on_divergence == "stop" or progress["rate_factor"] < 1:
                raise
            restore(run.kept())
            progress["rate_factor"] = _ROLL_BACK_FACTOR
            continue
        if evaluating:
            clock.stop()
            ema.copy_buffers(ema_model, model)
            measured = evaluate(ema_model, validation, loss_settings.ball, settings, seed, compute)
            _keep_best(progress, measured, ema_model, images_seen, robust=settings.selection_steps > 0)
            of_last_step = {name: optimiser.param_groups[0][key] for name, key in _SCHEDULED.items()}
            record = {**measured, **_mean(progress["pending"]), **of_last_step}
            progress["history"].append({"images_seen": images_seen, **record})
            run.metrics.write(images_seen, record)
            run.show(**measured)
            progress["pending"] = []
        if settings.on_divergence == "roll_back" and (step == 0 or evaluating):
            run.keep(images_seen, snapshot())
        if done or (evaluating and _out_of_patience(progress, settings)):
            break
        clock.start()
        modes.set_batch_norm_momentum(
            model, settings.first_batch_norm_momentum if step == 0 else settings.batch_norm_momentum
        )
        _set_rate(optimiser, step // epoch_steps, epochs, settings, progress["rate_factor"])
        if step % epoch_steps == 0:
            class_means.next_epoch()
        drawn = next_steps.at(step)
        images, targets = _inputs(drawn, augment, classes, settings, step, seed, compute)
        images, targets, start = compute.to_device(images[mine]), targets[mine], compute.to_device(drawn.start)
        with modes.mode(model, training=True), compute.autocast():
            loss = loss_of(model, images, targets, start, loss_settings, class_means.means)
        if settings.loss in losses.WITH_CLASS_MEANS and loss.clean_logits is not None:
            class_means.add(world.sum(class_means.sums_of(loss.clean_logits, targets)))
        optimiser.zero_grad(set_to_none=True)
        (loss.total.mean() / world.size).backward()  # of the whole batch, once gradients are summed
        values = _step_values(loss, targets)
        if world.size > 1:
            told = torch.cat([values, values.new_tensor([float(run.asked)])])
            told = world.sum_gradients(model, told / world.size)
            values, asked = told[:-1], float(told[-1]) > 0
        if settings.clip_gradient > 0:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient)
        optimiser.step()
        ema.update(ema_model, model, ema.warmup_decay(step, steps, settings.ema_decay, settings.ema_warmup))
        if not settings.synchronise_batch_norm:
            world.broadcast_buffers(model)
        progress["pending"].append(values)
        progress["step"] = step + 1
        clock.count(settings.batch)

    return TrainedClassifier(
        progress["best"],
        _cpu_copy(ema_model),
        progress["best_images_seen"],
        progress["best_accuracy"],
        progress["history"],
        clock.rate(),
    )


def evaluate(
    model: nn.Module,
    validation: tuple[Tensor, Tensor],
    ball: Ball,
    settings: ClassifierSettings,
    seed: int,
    compute: Compute,
) -> dict[str, float]:
    """Clean and PGD (CW margin) accuracy of the validation split, as shares of 1; PGD is left out with 0 steps."""
    images, labels = validation
    clean = robust = 0
    with modes.mode(model, training=False), modes.frozen(model), compute.autocast():
        for where, x, y in iter_batches(images, labels, 1000):
            mine = compute.world.local_rows(len(y))
            start = ball.random_start(seeds.stream(seed, "validation/start", where.start), tuple(x.shape))
            x, y, start = compute.to_device(x[mine]), y[mine].to(compute.device), compute.to_device(start[mine])
            with torch.no_grad():
                right = model(x).float().argmax(1) == y
            clean += int(right.sum())
            if settings.selection_steps:
                adversarial = attacks.pgd(
                    model, x, attacks.margin(y), ball, start, settings.selection_steps, settings.selection_step_size
                )
                with torch.no_grad():
                    robust += int(((model(adversarial).float().argmax(1) == y) & right).sum())
    clean, robust = compute.world.sum(torch.tensor([clean, robust], device=compute.device)).tolist()
    measured = {"validation_clean": clean / len(labels)}
    return measured | ({"validation_robust": robust / len(labels)} if settings.selection_steps else {})


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What a step starts from, on the CPU, ready to be sent: images, labels, and where this process's attack starts."""

    images: Tensor
    labels: Tensor
    start: Tensor


def _draw(
    batches: MixedBatches, settings: ClassifierSettings, ball: Ball, step: int, seed: int, compute: Compute
) -> _Drawn:
    """Named by (seed, step), so that it may be drawn early and by another thread."""
    images, labels = batches.at(step)
    shape = (settings.batch, *images.shape[1:])
    start = losses.draw_start(settings.loss, ball, seeds.stream(seed, "attack/start", step), shape)
    mine = compute.world.local_rows(settings.batch)
    return _Drawn(compute.ready(images), compute.ready(labels), compute.ready(start[mine]))


def _inputs(
    drawn: _Drawn,
    augment: Augmentation,
    classes: int,
    settings: ClassifierSettings,
    step: int,
    seed: int,
    compute: Compute,
) -> tuple[Tensor, Tensor]:
    """Augmented images and targets of one step, on the device, named by (seed, step)."""
    images, targets = compute.to_device(drawn.images), compute.to_device(drawn.labels)
    images = augment(images, seeds.stream(seed, "augmentation", step))
    if settings.cutmix:
        one_hot, generator = F.one_hot(targets, classes).float(), seeds.stream(seed, "cutmix", step)
        copies = [cutmix(images, one_hot, generator, settings.cutmix) for _ in range(settings.cutmix_copies)]
        images, targets = (torch.cat(parts) for parts in zip(*copies, strict=True))
    return images, targets


class _Clock:
    """Images a second, evaluations left out. Runs from the first counted step on, whose start-up is not counted."""

    def __init__(self) -> None:
        self._images, self._seconds, self._since = 0, 0.0, 0.0
        self._warm = False

    def start(self) -> None:
        if self._warm and not self._since:
            self._since = time.monotonic()

    def stop(self) -> None:
        """After what was waited for: the values of the last step were read from the device."""
        if self._since:
            self._seconds += time.monotonic() - self._since
        self._since = 0.0

    def count(self, images: int) -> None:
        self._images += images if self._warm else 0
        self._warm = True

    def rate(self) -> float:
        return self._images / self._seconds if self._seconds else 0.0


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay everywhere but on the parameters of normalisation layers (Wang et al.'s code)."""
    normal = {id(p) for layer in model.modules() if isinstance(layer, modes.BATCH_NORMS) for p in layer.parameters()}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in normal], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in normal], "weight_decay": 0.0},
    ]


def _set_rate(
    optimiser: torch.optim.Optimizer, epoch: int, epochs: int, settings: ClassifierSettings, factor: float
) -> None:
    rate, momentum = schedules.one_cycle(
        epoch,
        epochs,
        settings.learning_rate,
        warmup=settings.warmup,
        start_divisor=settings.start_divisor,
        end_divisor=settings.end_divisor,
        momentum=(settings.momentum_lowest, settings.momentum_highest)
        if settings.cycle_momentum
        else (settings.momentum, settings.momentum),
    )
    for group in optimiser.param_groups:
        group["lr"], group["momentum"] = factor * rate, momentum


def _keep_best(
    progress: dict[str, Any], measured: dict[str, float], ema_model: nn.Module, images_seen: int, robust: bool
) -> None:
    """Later weights win ties, as in the published code."""
    accuracy = measured["validation_robust" if robust else "validation_clean"]
    if accuracy >= progress["best_accuracy"]:
        progress |= {"best_accuracy": accuracy, "best_images_seen": images_seen, "best": _cpu_copy(ema_model)}


def _out_of_patience(progress: dict[str, Any], settings: ClassifierSettings) -> bool:
    """Whether the last `patience` evaluations brought no new best."""
    since = sum(record["images_seen"] > progress["best_images_seen"] for record in progress["history"])
    return 0 < settings.patience <= since


def _stop_if_not_finite(progress: dict[str, Any], batches: MixedBatches, batch: int, run: LongRun) -> None:
    """Raises Diverged at the first step since the last evaluation whose loss is not finite, and names its images."""
    pending: list[Tensor] = progress["pending"]
    if not pending:
        return
    totals = torch.stack(pending)[:, 0].tolist()
    bad = next((k for k, value in enumerate(totals) if not math.isfinite(value)), None)
    if bad is not None:
        step = progress["step"] - len(pending) + bad
        path = run.note("diverged.json", {"step": step, "loss": str(totals[bad]), **batches.names(step)})
        raise Diverged(
            f"the loss is {totals[bad]} after {step * batch} images; expected a finite number; {path} names the images "
            f"of that batch; lower the learning rate or beta, or say on_divergence: roll_back, and run again"
        )


def _step_values(loss: losses.Loss, targets: Tensor) -> Tensor:
    """Loss, its two terms, and clean and robust accuracy of one batch, kept on the device: float32 [5]. Of mixed images
    the larger share counts as the label; pgd_at sees no clean images, so its clean accuracy is NaN."""
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    clean_logits = loss.adversarial_logits if loss.clean_logits is None else loss.clean_logits
    adversarial_logits = loss.clean_logits if loss.adversarial_logits is None else loss.adversarial_logits
    assert clean_logits is not None
    assert adversarial_logits is not None
    clean = (clean_logits.argmax(1) == labels).float().mean()
    return torch.stack(
        [
            loss.total.detach().mean(),
            loss.clean.mean(),
            loss.robust.mean(),
            clean if loss.clean_logits is not None else torch.full_like(clean, torch.nan),
            (adversarial_logits.argmax(1) == labels).float().mean(),
        ]
    )


def _mean(pending: list[Tensor]) -> dict[str, float]:
    if not pending:
        return {}
    names = ("train_loss", "train_natural_loss", "train_robust_loss", "train_clean", "train_robust")
    values = zip(names, torch.stack(pending).mean(0).tolist(), strict=True)
    return {name: value for name, value in values if math.isfinite(value)}


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
