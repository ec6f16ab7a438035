"""Training of a classifier, standard or adversarial: one function, read from top to bottom.

The recipe is that of Wang et al. 2023 (see docs/recipe.md): SGD with Nesterov momentum, one-cycle learning rate,
weight averaging, selection of the best averaged weights by PGD accuracy on the validation split.
"""

import copy
import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmat import modes, seeds
from dmat.data.augmentation import AUGMENTATIONS
from dmat.data.batches import MixedBatches
from dmat.data.pixels import in_order
from dmat.devices import Compute
from dmat.robust import attacks, losses
from dmat.robust.attacks import Ball
from dmat.training import averaging, schedules
from dmat.training.long_run import LongRun, stop_if_not_finite


class Settings(Protocol):
    """Numbers of a run; units and ranges are those of `config.ClassifierTraining`, which satisfies this."""

    @property
    def loss(self) -> str: ...
    @property
    def augmentation(self) -> str: ...
    @property
    def selection_step_size(self) -> float: ...

    images: int
    batch: int
    learning_rate: float
    warm_up: float
    schedule_every: int
    cycle_momentum: bool
    weight_decay: float
    clip_gradient: float
    average_tau: float
    evaluate_every: int
    selection_steps: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Averaged weights at the best validation accuracy and at the end, and what was measured on the way."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    best_images_seen: int
    best_accuracy: float  # the selecting accuracy: robust if selection_steps > 0, else clean; share of 1
    history: list[dict[str, float]]


def train(
    model: nn.Module,
    batches: MixedBatches,
    validation: tuple[Tensor, Tensor],
    recipe: losses.Recipe,
    settings: Settings,
    seed: int,
    run: LongRun,
    compute: Compute,
) -> Outcome:
    """Trains `model` in place for settings.images images. validation: images in [0, 1] and labels.

    `model` must be initialised by the caller; every random number is named by `seed`, so a resumed run continues
    bit for bit. Raises Diverged on a loss that is not finite and Interrupted on a signal, both after saving.
    """
    loss_of = losses.LOSSES[settings.loss]
    augment = AUGMENTATIONS[settings.augmentation]
    model = compute.place_model(model)
    averaged = copy.deepcopy(model)
    optimiser = torch.optim.SGD(_groups(model, settings.weight_decay), lr=0.0, momentum=0.9, nesterov=True)
    steps = -(-settings.images // settings.batch)
    progress: dict[str, Any] = {
        "step": 0,
        "best_accuracy": -1.0,
        "best_images_seen": 0,
        "best": {},
        "history": [],
        "pending": [],
    }

    if (state := run.resume()) is not None:
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        progress = state["progress"]

    def snapshot() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "averaged": averaged.state_dict(),
            "optimiser": optimiser.state_dict(),
            "progress": progress,
        }

    pending: list[Tensor] = progress["pending"]  # values of the steps since the last evaluation
    while True:
        step, images_seen = progress["step"], progress["step"] * settings.batch
        done = step >= steps
        if (done or (step and step % max(1, settings.evaluate_every // settings.batch) == 0)) and not (
            progress["history"] and progress["history"][-1]["images_seen"] == images_seen
        ):
            averaging.copy_buffers(averaged, model)
            measured = evaluate(averaged, validation, recipe.ball, settings, seed, compute)
            _keep_best(progress, measured, averaged, images_seen, robust=settings.selection_steps > 0)
            training = _mean(pending)
            progress["history"].append({"images_seen": images_seen, **measured, **training})
            run.metrics.write(
                images_seen,
                {
                    **measured,
                    **training,
                    "learning_rate": optimiser.param_groups[0]["lr"],
                    "momentum": optimiser.param_groups[0]["momentum"],
                },
            )
            run.show(**measured)
            pending.clear()
            stop_if_not_finite(training.get("train_loss", 0.0), images_seen)
        run.turn(images_seen, snapshot)
        if done:
            break
        modes.set_batch_norm_momentum(model, 1.0 if step == 0 else 0.01)
        _set_rate(optimiser, images_seen, settings)
        images, labels, start = _inputs(batches, augment, recipe.ball, step, seed, compute)
        with modes.mode(model, training=True), compute.autocast():
            loss = loss_of(model, images, labels, start, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.total.mean().backward()
        if settings.clip_gradient > 0:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient)
        optimiser.step()
        averaging.update(
            averaged, model, averaging.classifier_decay(step, steps, settings.average_tau, settings.warm_up)
        )
        pending.append(_step_values(loss, labels))
        progress["step"] = step + 1

    return Outcome(
        progress["best"],
        _cpu_copy(averaged),
        progress["best_images_seen"],
        progress["best_accuracy"],
        progress["history"],
    )


def evaluate(
    model: nn.Module, validation: tuple[Tensor, Tensor], ball: Ball, settings: Settings, seed: int, compute: Compute
) -> dict[str, float]:
    """Clean and PGD (CW margin) accuracy of the validation split, as shares of 1; PGD is left out with 0 steps."""
    images, labels = validation
    clean = robust = 0
    with modes.mode(model, training=False), modes.frozen(model), compute.autocast():
        for where, x, y in in_order(images, labels, 1000):
            x, y = compute.place(x), y.to(compute.device)
            with torch.no_grad():
                right = model(x).float().argmax(1) == y
            clean += int(right.sum())
            if settings.selection_steps:
                start = compute.place(ball.random_start(seeds.stream(seed, "validation/start", where.start), x.shape))
                adversarial = attacks.pgd(
                    model, x, attacks.margin(y), ball, start, settings.selection_steps, settings.selection_step_size
                )
                with torch.no_grad():
                    robust += int(((model(adversarial).float().argmax(1) == y) & right).sum())
    measured = {"validation_clean": clean / len(labels)}
    return measured | ({"validation_robust": robust / len(labels)} if settings.selection_steps else {})


def _inputs(
    batches: MixedBatches, augment: Any, ball: Ball, step: int, seed: int, compute: Compute
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and the attack's start of one step, all named by (seed, step)."""
    images, labels = batches.at(step)
    images = augment(images, seeds.stream(seed, "augmentation", step))
    start = ball.training_start(seeds.stream(seed, "attack/start", step), tuple(images.shape))
    return compute.place(images), labels.to(compute.device), compute.place(start)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay everywhere but on the parameters of normalisation layers (Wang et al.'s code)."""
    normal = {id(p) for layer in model.modules() if isinstance(layer, modes.BATCH_NORMS) for p in layer.parameters()}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in normal], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in normal], "weight_decay": 0.0},
    ]


def _set_rate(optimiser: torch.optim.Optimizer, images_seen: int, settings: Settings) -> None:
    rate, momentum = schedules.one_cycle(
        images_seen // settings.schedule_every,
        -(-settings.images // settings.schedule_every),
        settings.learning_rate,
        warm_up=settings.warm_up,
        momentum=(0.85, 0.95) if settings.cycle_momentum else None,
    )
    for group in optimiser.param_groups:
        group["lr"], group["momentum"] = rate, momentum


def _keep_best(
    progress: dict[str, Any], measured: dict[str, float], averaged: nn.Module, images_seen: int, robust: bool
) -> None:
    """Later weights win ties, as in the published code."""
    accuracy = measured["validation_robust" if robust else "validation_clean"]
    if accuracy >= progress["best_accuracy"]:
        progress |= {"best_accuracy": accuracy, "best_images_seen": images_seen, "best": _cpu_copy(averaged)}


def _step_values(loss: losses.Loss, labels: Tensor) -> Tensor:
    """Loss, its two terms, and clean and robust accuracy of one batch, kept on the device: float32 [5]."""
    attacked = loss.natural_logits if loss.adversarial_logits is None else loss.adversarial_logits
    return torch.stack(
        [
            loss.total.detach().mean(),
            loss.natural.mean(),
            loss.robust.mean(),
            (loss.natural_logits.argmax(1) == labels).float().mean(),
            (attacked.argmax(1) == labels).float().mean(),
        ]
    )


def _mean(pending: list[Tensor]) -> dict[str, float]:
    if not pending:
        return {}
    names = ("train_loss", "train_natural_loss", "train_robust_loss", "train_clean", "train_robust")
    return dict(zip(names, torch.stack(pending).mean(0).tolist(), strict=True))


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
