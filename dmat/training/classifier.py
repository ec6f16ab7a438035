"""Training of a classifier, standard or adversarial: one function, read from top to bottom.

The recipe is that of Wang et al. 2023 (see docs/recipe.md): SGD with Nesterov momentum, one-cycle learning rate,
exponential moving average (EMA) of the weights, selection of the best EMA weights by PGD accuracy on the validation
split.

Shapes: B batch, N images of the validation split, C channels, H height, W width, K classes. Images are in [0, 1].
"""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat import modes, plugins, processes, seeds
from dmat.data.augmentation import AUGMENTATIONS, Augmentation, cutmix
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import iter_batches, to_float
from dmat.devices import Compute
from dmat.errors import Diverged, UnfitError
from dmat.robust import attacks, losses, weight_perturbation
from dmat.robust.attacks import Ball
from dmat.training import ema, schedules
from dmat.training.checkpoints import State
from dmat.training.compilation import Compilation
from dmat.training.long_run import LongRun
from dmat.training.prefetcher import Prefetcher

_CHECK_EVERY = 64  # steps between two checks that the loss is finite; each waits for the GPU
_ROLLBACK_FACTOR = 0.5  # on the learning rate, after a divergence
_SCHEDULED = {"learning_rate": "lr", "momentum": "momentum"}  # name in the history -> name in the optimiser


class ClassifierSettings(Protocol):
    """The settings of a training run; `config.ClassifierTraining` satisfies this and has units and ranges."""

    @property
    def loss(self) -> str: ...
    @property
    def augmentation(self) -> str: ...
    @property
    def selection_step_size(self) -> float: ...

    @property
    def on_divergence(self) -> str: ...
    @property
    def schedule(self) -> str: ...

    images_seen: int
    batch: int
    learning_rate: float
    milestones: tuple[float, ...]
    milestone_factor: float
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
    awp_gamma: float
    awp_warmup: float
    evaluate_every: int
    selection_steps: int
    patience: int


class ClassifierProgress(TypedDict):
    """What a checkpoint holds of a training run, besides weights, optimiser and class means."""

    step: int  # next
    rate_factor: float  # on the learning rate; below 1 after a roll-back
    best_accuracy: float  # in [0, 1]; -1 before the first evaluation
    best_images_seen: int
    best: dict[str, Tensor]  # EMA weights at the best evaluation
    history: list[dict[str, float]]  # a record per evaluation
    pending: list[Tensor]  # float32 [5] per step since the last evaluation, as `_step_values` gives them


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """The result of a training run: EMA weights and measurements."""

    best: dict[str, Tensor]  # state dict at the best validation accuracy
    last: dict[str, Tensor]  # state dict at the end
    best_images_seen: int
    best_accuracy: float  # the accuracy that selects: robust if selection_steps > 0, else clean; in [0, 1]
    history: list[dict[str, float]]  # a record per evaluation
    images_per_second: float  # of training steps in this process, without evaluations; 0 if it trained none
    compiled: bool  # whether steps were compiled


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
    """Trains `model` in place for settings.images_seen images.

    validation: images [N, C, H, W] in [0, 1] and labels int64 [N]. The caller initialises `model`.
    Every random number is named by `seed`, so a resumed run equals an uninterrupted one bit for bit.
    Raises Interrupted on a signal, after saving. Raises Diverged on a NaN or infinite loss; `diverged.json` names the
    batch. With on_divergence "roll_back" the first divergence returns to the last evaluation instead, and training
    resumes with half the learning rate.
    """
    world = compute.world
    if settings.batch % world.size:
        raise UnfitError(
            f"a batch of {settings.batch} images does not divide among {world.size} processes; expected a multiple; "
            f"change batch or the number of processes"
        )
    if settings.loss in losses.WITH_TWO_VIEWS and settings.batch // world.size % 2:
        raise UnfitError(
            f"a batch of {settings.batch} images in {world.size} processes splits two views of an image; expected an "
            f"even number of images in each process, as loss {settings.loss} needs; change batch"
        )
    loss_function = plugins.find(losses.LOSSES, settings.loss)
    augment = plugins.find(AUGMENTATIONS, settings.augmentation)
    model = compute.model_to_device(model)
    if settings.synchronise_batch_norm:
        processes.synchronise_batch_norm(model, world)
    ema_model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(_parameter_groups(model, settings.weight_decay), lr=0.0, momentum=0.9, nesterov=True)
    class_means = losses.ClassMeans(classes, settings.temperature, compute.device)
    steps = -(-settings.images_seen // settings.batch)
    evaluation_steps = max(1, settings.evaluate_every // settings.batch)  # steps between two evaluations
    epoch_steps, epochs = schedules.epochs(settings.schedule_every, settings.batch, steps)
    check_every = _CHECK_EVERY if world.size == 1 else 1  # all processes must reach the same result at the same step
    progress: ClassifierProgress = {
        "step": 0,
        "rate_factor": 1.0,
        "best_accuracy": -1.0,
        "best_images_seen": 0,
        "best": {},
        "history": [],
        "pending": [],
    }

    def restore(state: State) -> None:
        nonlocal progress
        model.load_state_dict(state["model"])
        ema_model.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        class_means.load(state["class_means"])
        progress = state["progress"]

    def snapshot() -> State:
        _stop_if_not_finite(progress, batches, settings.batch, run)
        return {
            "model": model.state_dict(),
            # key of earlier versions: a new name would make every checkpoint useless
            "averaged": ema_model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "class_means": class_means.state(),
            "progress": progress,
        }

    if (checkpoint := run.resume()) is not None:
        restore(checkpoint)
    compilation = Compilation(model, run, compute)
    throughput, stop_requested, rows = _Throughput(), False, world.local_rows(settings.batch)
    prefetcher = Prefetcher(lambda step: _load_step(batches, settings, loss_settings.ball, step, seed, compute), steps)
    while True:
        step, images_seen = progress["step"], progress["step"] * settings.batch
        finished = step >= steps
        evaluating = (finished or (step > 0 and step % evaluation_steps == 0)) and not (
            progress["history"] and progress["history"][-1]["images_seen"] == images_seen
        )
        try:
            if evaluating or step % check_every == 0:
                _stop_if_not_finite(progress, batches, settings.batch, run)
            run.checkpoint_if_due(images_seen, snapshot, stop_requested if world.size > 1 else None)
        except Diverged:
            if settings.on_divergence == "stop" or progress["rate_factor"] < 1:
                raise
            restore(run.load_rollback())
            progress["rate_factor"] = _ROLLBACK_FACTOR
            continue
        if evaluating:
            throughput.stop()
            ema.copy_buffers(ema_model, model)
            measured = evaluate(ema_model, validation, loss_settings.ball, settings, seed, compute)
            _update_best(progress, measured, ema_model, images_seen, robust=settings.selection_steps > 0)
            last_schedule = {name: optimiser.param_groups[0][key] for name, key in _SCHEDULED.items()}
            record = {**measured, **_mean_values(progress["pending"]), **last_schedule}
            progress["history"].append({"images_seen": images_seen, **record})
            run.metrics.write(images_seen, record)
            run.show(**measured)
            progress["pending"] = []
        if settings.on_divergence == "roll_back" and (step == 0 or evaluating):
            run.save_rollback(images_seen, snapshot())
        if finished or (evaluating and _out_of_patience(progress, settings)):
            break
        throughput.start()
        modes.set_batch_norm_momentum(
            model, settings.first_batch_norm_momentum if step == 0 else settings.batch_norm_momentum
        )
        _set_learning_rate(optimiser, step // epoch_steps, epochs, settings, progress["rate_factor"])
        if step % epoch_steps == 0:
            class_means.next_epoch()
        inputs = prefetcher.at(step)
        images, targets = _augmented(inputs, augment, batches.mix, classes, settings, step, seed, compute)
        own = slice(rows.start - inputs.first_row, rows.stop - inputs.first_row)
        images, targets, start = compute.to_device(images[own]), targets[own], compute.to_device(inputs.start)
        backward = functools.partial(_backward, loss_function, images, targets, class_means.means, compute)
        gradients = functools.partial(_gradients, backward, model, images, start, loss_settings, settings, compute)
        optimiser.zero_grad(set_to_none=True)  # before the attack, which needs neither their memory nor their type
        if compilation.due(step):
            throughput.stop()
            compilation.prepare(functools.partial(gradients, settings.awp_gamma > 0), steps - step)
            throughput.start()
        loss = gradients(settings.awp_gamma > 0 and step >= settings.awp_warmup * steps, compilation.module(step))
        if settings.loss in losses.WITH_CLASS_MEANS and loss.clean_logits is not None:
            class_means.add(world.sum(class_means.batch_sums(loss.clean_logits, targets)))
        values = _step_values(loss, targets)
        if world.size > 1:
            packed = torch.cat([values, values.new_tensor([float(run.stop_requested)])])  # [6]
            packed = world.sum_gradients(model, packed / world.size)
            values, stop_requested = packed[:-1], float(packed[-1]) > 0
        if settings.clip_gradient > 0:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient)
        optimiser.step()
        ema.update(ema_model, model, ema.warmup_decay(step, steps, settings.ema_decay, settings.ema_warmup))
        if not settings.synchronise_batch_norm:
            world.broadcast_buffers(model)
        progress["pending"].append(values)
        progress["step"] = step + 1
        throughput.count(settings.batch)

    return TrainedClassifier(
        progress["best"],
        _cpu_copy(ema_model),
        progress["best_images_seen"],
        progress["best_accuracy"],
        progress["history"],
        throughput.images_per_second(),
        bool(run.compiled),
    )


def evaluate(
    model: nn.Module,
    validation: tuple[Tensor, Tensor],
    ball: Ball,
    settings: ClassifierSettings,
    seed: int,
    compute: Compute,
) -> dict[str, float]:
    """Measures clean and PGD (CW margin) accuracy on the validation split, in [0, 1]; no PGD with 0 selection steps.

    validation: images [N, C, H, W] in [0, 1] and labels int64 [N].
    """
    images, labels = validation
    clean = robust = 0  # images that are classified correctly
    with modes.mode(model, training=False), modes.frozen(model), compute.autocast():
        for batch_rows, x, y in iter_batches(images, labels, 1000):
            rows = compute.world.local_rows(len(y))
            start = ball.random_start(seeds.stream(seed, "validation/start", batch_rows.start), tuple(x.shape))
            x, y, start = compute.to_device(x[rows]), y[rows].to(compute.device), compute.to_device(start[rows])
            with torch.no_grad():
                correct = model(x).float().argmax(1) == y  # [B]
            clean += int(correct.sum())
            if settings.selection_steps:
                adversarial = attacks.pgd(
                    model, x, attacks.margin(y), ball, start, settings.selection_steps, settings.selection_step_size
                )
                with torch.no_grad():
                    robust += int(((model(adversarial).float().argmax(1) == y) & correct).sum())
    clean, robust = compute.world.sum(torch.tensor([clean, robust], device=compute.device)).tolist()
    measured = {"validation_clean": clean / len(labels)}
    return measured | ({"validation_robust": robust / len(labels)} if settings.selection_steps else {})


def _backward(
    loss_function: losses.LossFunction,
    images: Tensor,
    targets: Tensor,
    class_means: Tensor,
    compute: Compute,
    start: Tensor,
    loss_settings: losses.LossSettings,
    model: nn.Module,
) -> losses.Loss:
    """Adds the gradients of a step to those of the model and returns its loss.

    images and start [B, C, H, W], targets [B] or [B, K], class_means [K, K].
    """
    with modes.mode(model, training=True), compute.autocast():
        loss = loss_function(model, images, targets, start, loss_settings, class_means)
    (loss.total.mean() / compute.world.size).backward()  # the mean of the whole batch, once gradients are summed
    return loss


def _gradients(
    backward: Callable[[Tensor, losses.LossSettings, nn.Module], losses.Loss],
    model: nn.Module,
    images: Tensor,
    start: Tensor,
    loss_settings: losses.LossSettings,
    settings: ClassifierSettings,
    compute: Compute,
    perturbs_weights: bool,
    module: nn.Module,
) -> losses.Loss:
    """Leaves the gradients of a step in the model, those at perturbed weights with `perturbs_weights`.

    backward: `_backward` of the step. images and start [B, C, H, W]. module: runs the model. Returns the loss.
    """
    if perturbs_weights:
        with modes.untracked_batch_norm(model):
            loss = backward(start, loss_settings, module)
        compute.world.sum_gradients(model, loss.total.new_zeros(0))
        start, loss_settings = _without_attack(loss, images, loss_settings, settings)
    with weight_perturbation.perturbed(model, settings.awp_gamma if perturbs_weights else 0.0):
        model.zero_grad(set_to_none=True)
        return backward(start, loss_settings, module)


@dataclasses.dataclass(frozen=True)
class _StepInputs:
    """The inputs of a step on the CPU, in pinned memory if there is a GPU."""

    images: Tensor  # uint8 [D, H, W, C], D images of the batch that this process needs
    labels: Tensor  # int64 [D]
    start: Tensor  # start of the attack [R, C, H, W], R = this process's rows of the batch
    first_row: int  # of `images` among the images drawn for the whole batch


def _load_step(
    batches: MixedBatches, settings: ClassifierSettings, ball: Ball, step: int, seed: int, compute: Compute
) -> _StepInputs:
    """Loads and draws the inputs of a step. They depend on (seed, step) only, so another thread may do it early."""
    height, width, channels = batches.real.shape
    shape = (settings.batch, channels, height, width)
    start = losses.draw_start(settings.loss, ball, seeds.stream(seed, "attack/start", step), shape)
    rows = compute.world.local_rows(settings.batch)
    drawn = _drawn_rows(batches, settings, rows)
    images, labels = batches.at(step, drawn)
    return _StepInputs(compute.pin(images), compute.pin(labels), compute.pin(start[rows]), drawn.start)


def _drawn_rows(batches: MixedBatches, settings: ClassifierSettings, rows: slice) -> slice:
    """The drawn images that this process loads and augments for its `rows` of the batch: whole parts.

    All with CutMix, which mixes any two images of a batch, and with two views, whose rows are not those drawn.
    """
    draws_all = settings.cutmix or settings.loss in losses.WITH_TWO_VIEWS
    return slice(0, batches.mix.drawn) if draws_all else batches.mix.rows_of_parts(rows)


def _augmented(
    inputs: _StepInputs,
    augment: Augmentation,
    mix: Mix,
    classes: int,
    settings: ClassifierSettings,
    step: int,
    seed: int,
    compute: Compute,
) -> tuple[Tensor, Tensor]:
    """Augments the inputs of a step on the device, each part of the batch with randomness named by (seed, step, part).

    Returns images [D, C, H, W] in [0, 1] and targets: labels int64 [D]. With CutMix, which needs all drawn images of
    the batch, images [B, C, H, W] and class probabilities float [B, K] for B = D * cutmix_copies. With a loss of two
    views, images [2 D, C, H, W] and labels [2 D]: each drawn image twice in a row, augmented independently.
    """
    pixels, targets = to_float(compute.to_device(inputs.images)), compute.to_device(inputs.labels)
    size = mix.drawn // mix.parts
    first = step * mix.parts + inputs.first_row // size

    def view(purpose: str) -> Tensor:
        """Augments all images: [D, C, H, W]."""
        parts = enumerate(pixels.split(size))
        return torch.cat([augment(part, seeds.stream(seed, purpose, first + k)) for k, part in parts])

    images = view("augmentation")
    if settings.loss in losses.WITH_TWO_VIEWS:
        images = torch.stack([images, view("augmentation/second view")], dim=1).flatten(0, 1)
        targets = targets.repeat_interleave(2)
    if settings.cutmix:
        one_hot, generator = F.one_hot(targets, classes).float(), seeds.stream(seed, "cutmix", step)  # [D, K]
        copies = [cutmix(images, one_hot, generator, settings.cutmix) for _ in range(settings.cutmix_copies)]
        images, targets = (torch.cat(tensors) for tensors in zip(*copies, strict=True))
    return images, targets


def _without_attack(
    loss: losses.Loss, images: Tensor, loss_settings: losses.LossSettings, settings: ClassifierSettings
) -> tuple[Tensor, losses.LossSettings]:
    """Returns start [B, C, H, W] and settings with which the same loss repeats its adversarial images without a step.

    images: [B, C, H, W]. Raises UnfitError if the loss has none.
    """
    if loss.adversarial is None:
        raise UnfitError(
            f"awp_gamma is {settings.awp_gamma} and loss {settings.loss} returns no adversarial images; expected them "
            f"in Loss.adversarial; set awp_gamma: 0.0, or return them"
        )
    start = losses.start_at(settings.loss, loss_settings.ball, images, loss.adversarial)
    return start, dataclasses.replace(loss_settings, steps=0)


class _Throughput:
    """Measures images per second of training steps, without evaluations and without the first step, the warm-up."""

    def __init__(self) -> None:
        self._images, self._seconds, self._started = 0, 0.0, 0.0
        self._warmed_up = False

    def start(self) -> None:
        """Starts the clock, or leaves it running."""
        if self._warmed_up and not self._started:
            self._started = time.monotonic()

    def stop(self) -> None:
        """Stops the clock. Call it after reading the values of the last step, which waits for the device."""
        if self._started:
            self._seconds += time.monotonic() - self._started
        self._started = 0.0

    def count(self, images: int) -> None:
        """Adds the images of a step; those of the first step do not count."""
        self._images += images if self._warmed_up else 0
        self._warmed_up = True

    def images_per_second(self) -> float:
        """Returns the images per second so far; 0 before the clock has run."""
        return self._images / self._seconds if self._seconds else 0.0


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, list[nn.Parameter] | float]]:
    """Splits parameters for the optimiser: no weight decay in normalisation layers (Wang et al.'s code)."""
    kinds = (*modes.BATCH_NORMS, nn.LayerNorm)
    norms = {id(p) for layer in model.modules() if isinstance(layer, kinds) for p in layer.parameters()}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": 0.0},
    ]


def _set_learning_rate(
    optimiser: torch.optim.Optimizer, epoch: int, epochs: int, settings: ClassifierSettings, factor: float
) -> None:
    """Sets learning rate, times `factor`, and momentum of an epoch of the schedule."""
    peak, momentum = settings.learning_rate, settings.momentum
    if settings.schedule == "cosine":
        rate = schedules.half_cosine(epoch, epochs, peak)
    elif settings.schedule == "step":
        rate = schedules.step_decay(epoch, epochs, peak, settings.milestones, settings.milestone_factor)
    else:
        rate, momentum = schedules.one_cycle(
            epoch,
            epochs,
            peak,
            warmup=settings.warmup,
            start_divisor=settings.start_divisor,
            end_divisor=settings.end_divisor,
            momentum=(settings.momentum_lowest, settings.momentum_highest)
            if settings.cycle_momentum
            else (momentum, momentum),
        )
    for group in optimiser.param_groups:
        group["lr"], group["momentum"] = factor * rate, momentum


def _update_best(
    progress: ClassifierProgress, measured: dict[str, float], ema_model: nn.Module, images_seen: int, robust: bool
) -> None:
    """Stores the EMA weights if they are the best so far. Later weights win ties, as in the published code."""
    accuracy = measured["validation_robust" if robust else "validation_clean"]
    if accuracy >= progress["best_accuracy"]:
        progress["best_accuracy"], progress["best_images_seen"] = accuracy, images_seen
        progress["best"] = _cpu_copy(ema_model)


def _out_of_patience(progress: ClassifierProgress, settings: ClassifierSettings) -> bool:
    """Whether the last `patience` evaluations brought no new best."""
    evaluations_since_best = sum(record["images_seen"] > progress["best_images_seen"] for record in progress["history"])
    return 0 < settings.patience <= evaluations_since_best


def _stop_if_not_finite(progress: ClassifierProgress, batches: MixedBatches, batch: int, run: LongRun) -> None:
    """Raises Diverged at the first step since the last evaluation with a NaN or infinite loss, and names its images."""
    pending = progress["pending"]
    if not pending:
        return
    totals = torch.stack(pending)[:, 0].tolist()  # one loss per step
    index = next((k for k, value in enumerate(totals) if not math.isfinite(value)), None)
    if index is not None:
        step = progress["step"] - len(pending) + index
        path = run.save_json("diverged.json", {"step": step, "loss": str(totals[index]), **batches.names(step)})
        raise Diverged(
            f"the loss is {totals[index]} after {step * batch} images; expected a finite number; {path} names the "
            f"images of that batch; lower the learning rate or beta, or set on_divergence: roll_back, and run again"
        )


def _step_values(loss: losses.Loss, targets: Tensor) -> Tensor:
    """Returns loss, clean loss, robust loss, clean and robust accuracy of one batch: float32 [5], on the device.

    targets [B] or [B, K]; for mixed images the class with the largest probability counts as the label. pgd_at sees no
    clean images, so its clean accuracy is NaN.
    """
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


def _mean_values(pending: list[Tensor]) -> dict[str, float]:
    """Averages `_step_values` [5] over steps and names them. NaN values are left out."""
    if not pending:
        return {}
    names = ("train_loss", "train_natural_loss", "train_robust_loss", "train_clean", "train_robust")
    values = zip(names, torch.stack(pending).mean(0).tolist(), strict=True)
    return {name: value for name, value in values if math.isfinite(value)}


def _cpu_copy(model: nn.Module) -> dict[str, Tensor]:  # any shapes
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
