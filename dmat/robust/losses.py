"""Training losses of a classifier, one signature: loss(model, images, targets, start, recipe, class_means) -> Loss.

targets: labels int64 [B], or shares of the classes float [B, K] (mixed images; these are not smoothed, as published).
start: where the attack begins, [B, C, H, W], as `draw_start` draws it for the loss. class_means: [K, K], what `ikl`
weighs with; others ignore it.
The model is in training mode; how batch norm behaves in each forward pass is part of a loss and stated in it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat import modes, seeds
from dmat.robust import attacks
from dmat.robust.attacks import Ball


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The numbers of a loss. step_size in pixels of [0, 1]; beta weighs robustness against clean accuracy."""

    ball: Ball
    steps: int
    step_size: float
    beta: float
    label_smoothing: float
    alpha: float = 0.0  # of ikl: the weight of its cross-entropy


@dataclasses.dataclass(frozen=True)
class Loss:
    """Per-image values [B] (the caller averages) and the logits [B, K] that made them, detached."""

    total: Tensor
    clean: Tensor  # label-smoothed cross-entropy on the clean images; pgd_at has none: zeros
    robust: Tensor  # the adversarial term before beta; zeros for standard training
    clean_logits: Tensor | None
    adversarial_logits: Tensor | None


LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, LossSettings, Tensor | None], Loss]


def draw_start(name: str, ball: Ball, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """The `start` of the loss of that name, [B, C, H, W]: perturbations, but for `pgd_at` in l2 images in [0, 1]."""
    if name == "pgd_at" and ball.norm == "l2":
        return seeds.uniform(generator, shape)
    return ball.training_start(generator, shape)


def trades(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """TRADES (Zhang et al. 2019) as in Wang et al. 2023's code.

    Cross-entropy(clean) + beta * KL(p_clean || p_adversarial), with the gradient through both branches of the
    KL. The inner attack maximises the KL to the detached clean prediction (of mixed images: to their targets) on
    batch statistics without tracking. Two passes are tracked, clean first.
    """
    clean_logits, adversarial_logits = _both(model, images, targets, start, settings)
    clean = _cross_entropy(clean_logits, targets, settings)
    # log_target keeps 0 * log 0 at 0; the clamped version of other implementations changes the gradient.
    robust = F.kl_div(
        adversarial_logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    return _of(clean + settings.beta * robust, clean, robust, clean_logits, adversarial_logits)


def ikl(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """Improved KL (Cui et al. 2023, "Decoupled Kullback-Leibler Divergence Loss"); the attack is that of `trades`.

    Cross-entropy(clean) + beta * wMSE + alpha * cross-entropy(detached p_clean, p_adversarial). wMSE is a quarter
    of the squared differences between clean and adversarial logit gaps o_j - o_k over all pairs of classes, weighted
    by w_j w_k, where w is the mean prediction for the class of the image: row of class_means [K, K]. The gradient
    reaches both branches of wMSE. `robust` is (beta * wMSE + alpha * cross-entropy) / beta.
    """
    if class_means is None:
        raise TypeError("ikl needs class_means")
    clean_logits, adversarial_logits = _both(model, images, targets, start, settings)
    clean = _cross_entropy(clean_logits, targets, settings)
    weights = class_means[targets] if targets.ndim == 1 else targets @ class_means  # [B, K], rows add up to 1
    difference = clean_logits - adversarial_logits
    # sum_jk w_j w_k (d_j - d_k)^2 / 4 is half the variance of d under w: K terms instead of K^2
    centred = difference - (weights * difference).sum(1, keepdim=True)
    squared = (weights * centred**2).sum(1) / 2
    soft = -(clean_logits.detach().softmax(1) * adversarial_logits.log_softmax(1)).sum(1)
    adversarial = settings.beta * squared + settings.alpha * soft
    robust = adversarial / settings.beta if settings.beta else adversarial
    return _of(clean + adversarial, clean, robust, clean_logits, adversarial_logits)


def pgd_at(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """Adversarial training (Madry et al. 2018): cross-entropy on the images that maximise it. One tracked pass.

    The attack sees the model in evaluation mode and starts, in l2, on the sphere in the direction of a random image,
    as in Wang et al.'s code base: `start` is that image, uniform in [0, 1]. Label smoothing is the recipe's.
    """
    if settings.ball.norm == "l2":
        start = settings.ball.project(start - images)  # inside [0, 1], as it lies between two images
    with modes.frozen(model), modes.mode(model, training=False):
        adversarial = attacks.pgd(
            model, images, attacks.cross_entropy(targets), settings.ball, start, settings.steps, settings.step_size
        )
    logits = model(adversarial).float()
    robust = _cross_entropy(logits, targets, settings)
    return Loss(robust, robust.detach() * 0, robust.detach(), None, logits.detach())


def standard(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """Label-smoothed cross-entropy on the images as they are; `start` is not used."""
    logits = model(images).float()
    clean = _cross_entropy(logits, targets, settings)
    return Loss(clean, clean.detach(), clean.detach() * 0, logits.detach(), None)


LOSSES: dict[str, LossFunction] = {"trades": trades, "standard": standard, "pgd_at": pgd_at, "ikl": ikl}
ADVERSARIAL = ("trades", "pgd_at", "ikl")  # these attack
WITH_CLASS_MEANS = ("ikl",)


class ClassMeans:
    """Mean prediction of the clean images of each class, [K, K]: that of the last epoch, while this one is summed.

    Uniform in the first epoch (Cui et al. 2023 and their code). Predictions are softened by a temperature.
    """

    def __init__(self, classes: int, temperature: float, device: torch.device):
        self.temperature = temperature
        self.means = torch.full((classes, classes), 1 / classes, device=device)
        self._sums = torch.zeros_like(self.means)

    def sums_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[K, K]: what a batch adds. logits [B, K] of clean images; targets as a loss takes them."""
        shares = F.one_hot(targets, len(self.means)).float() if targets.ndim == 1 else targets
        return shares.T @ (logits / self.temperature).softmax(1)

    def add(self, sums: Tensor) -> None:
        self._sums += sums

    def next_epoch(self) -> None:
        """A class that the epoch did not show keeps its row."""
        mass = self._sums.sum(1, keepdim=True)
        self.means = torch.where(mass > 0, self._sums / mass.clamp(min=1e-12), self.means)
        self._sums = torch.zeros_like(self.means)

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means, "sums": self._sums}

    def load(self, state: dict[str, Tensor]) -> None:
        self.means, self._sums = state["means"].to(self.means.device), state["sums"].to(self.means.device)


def _both(
    model: nn.Module, images: Tensor, targets: Tensor, start: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Natural and adversarial logits [B, K], float32, with gradients.

    The tracked clean pass comes before the attack, which needs its prediction: the same numbers as one more pass
    without tracking, as published, and one pass of 27 less. The l2 start is not clipped to [0, 1], as published.
    """
    clean_logits = model(images).float()
    target = clean_logits.detach().log_softmax(1) if targets.ndim == 1 else targets.clamp(min=1e-30).log()
    with modes.frozen(model), modes.untracked_batch_norm(model):
        adversarial = attacks.pgd(
            model,
            images,
            attacks.divergence(target),
            settings.ball,
            start,
            settings.steps,
            settings.step_size,
            clip_start=settings.ball.norm == "linf",
        )
    return clean_logits, model(adversarial).float()


def _cross_entropy(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:
    smoothing = settings.label_smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")


def _of(total: Tensor, clean: Tensor, robust: Tensor, clean_logits: Tensor, adversarial_logits: Tensor) -> Loss:
    return Loss(total, clean.detach(), robust.detach(), clean_logits.detach(), adversarial_logits.detach())
