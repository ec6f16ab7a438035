"""Training losses of a classifier. All have one signature:

    loss(model, images, targets, start, settings, class_means) -> Loss

images: [B, C, H, W] in [0, 1].
targets: labels int64 [B], or class probabilities float [B, K] of mixed images (these are not smoothed, as published).
start: where the attack begins, [B, C, H, W], as `draw_start` draws it for the loss.
class_means: [K, K], the weights of `ikl`; other losses ignore it.

The model is in training mode. How batch norm behaves in each forward pass is part of a loss; its docstring says it.
Shapes: B batch, C channels, H height, W width, K classes.
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
    """The hyper-parameters of a loss."""

    ball: Ball
    steps: int  # of the attack
    step_size: float  # in pixels of [0, 1]
    beta: float  # weight of the adversarial term: robustness against clean accuracy
    label_smoothing: float
    alpha: float = 0.0  # ikl only: weight of its cross-entropy


@dataclasses.dataclass(frozen=True)
class Loss:
    """Per-image values [B], which the caller averages, and the logits [B, K] behind them. Detached, but for `total`."""

    total: Tensor
    clean: Tensor  # label-smoothed cross-entropy on the clean images; zeros for pgd_at, which has none
    robust: Tensor  # the adversarial term before beta; zeros for standard training
    clean_logits: Tensor | None
    adversarial_logits: Tensor | None


LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, LossSettings, Tensor | None], Loss]


def draw_start(name: str, ball: Ball, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draws the `start` [B, C, H, W] of the loss `name`: perturbations, but images in [0, 1] for `pgd_at` in l2."""
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

    Cross-entropy(clean) + beta * KL(p_clean || p_adversarial), with the gradient through both branches of the KL.
    The inner attack maximises the KL to the detached clean prediction (for mixed images: to their targets).
    It uses batch statistics and does not update running statistics. Two passes update them, the clean one first.
    images and start [B, C, H, W], targets [B] or [B, K] -> values [B].
    """
    clean_logits, adversarial_logits = _clean_and_adversarial_logits(model, images, targets, start, settings)
    clean = _cross_entropy(clean_logits, targets, settings)
    # log_target keeps 0 * log 0 at 0; the clamped version of other implementations changes the gradient.
    robust = F.kl_div(
        adversarial_logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    return _detached(clean + settings.beta * robust, clean, robust, clean_logits, adversarial_logits)


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
    by w_j w_k, where w is the mean prediction for the class of the image: a row of class_means [K, K]. The gradient
    reaches both branches of wMSE. `robust` is (beta * wMSE + alpha * cross-entropy) / beta.
    images and start [B, C, H, W], targets [B] or [B, K] -> values [B].
    """
    if class_means is None:
        raise TypeError("ikl needs class_means")
    clean_logits, adversarial_logits = _clean_and_adversarial_logits(model, images, targets, start, settings)
    clean = _cross_entropy(clean_logits, targets, settings)
    weights = class_means[targets] if targets.ndim == 1 else targets @ class_means  # [B, K], rows sum to 1
    difference = clean_logits - adversarial_logits  # [B, K]
    # sum_jk w_j w_k (d_j - d_k)^2 / 4 is half the variance of d under w: K terms instead of K^2
    centred = difference - (weights * difference).sum(1, keepdim=True)
    weighted_mse = (weights * centred**2).sum(1) / 2  # [B]
    soft_cross_entropy = -(clean_logits.detach().softmax(1) * adversarial_logits.log_softmax(1)).sum(1)  # [B]
    adversarial = settings.beta * weighted_mse + settings.alpha * soft_cross_entropy
    robust = adversarial / settings.beta if settings.beta else adversarial
    return _detached(clean + adversarial, clean, robust, clean_logits, adversarial_logits)


def pgd_at(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """Adversarial training (Madry et al. 2018): cross-entropy on the images that maximise it.

    The attack sees the model in evaluation mode. One pass updates running statistics, the one on adversarial images.
    In l2 the attack starts on the sphere in the direction of a random image, as in Wang et al.'s code base: `start` is
    that image, uniform in [0, 1]. The loss uses settings.label_smoothing; the attack's objective does not.
    images and start [B, C, H, W], targets [B] or [B, K] -> values [B].
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
    """Label-smoothed cross-entropy on clean images [B, C, H, W]; `start` is not used. targets [B] or [B, K] -> [B]."""
    logits = model(images).float()
    clean = _cross_entropy(logits, targets, settings)
    return Loss(clean, clean.detach(), clean.detach() * 0, logits.detach(), None)


LOSSES: dict[str, LossFunction] = {"trades": trades, "standard": standard, "pgd_at": pgd_at, "ikl": ikl}
ADVERSARIAL = ("trades", "pgd_at", "ikl")  # losses that run an attack
WITH_CLASS_MEANS = ("ikl",)  # losses that need class_means


class ClassMeans:
    """Mean prediction for the clean images of each class: `means` [K, K], a row per class.

    `means` is that of the last epoch while the current one is summed; uniform in the first epoch (Cui et al. 2023 and
    their code). Predictions are softened by a temperature.
    """

    def __init__(self, classes: int, temperature: float, device: torch.device):
        self.temperature = temperature
        self.means = torch.full((classes, classes), 1 / classes, device=device)
        self._sums = torch.zeros_like(self.means)

    def batch_sums(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the contribution of a batch, [K, K], for `add`.

        logits [B, K] of clean images; targets [B] or [B, K], as a loss takes them.
        """
        probabilities = F.one_hot(targets, len(self.means)).float() if targets.ndim == 1 else targets  # [B, K]
        return probabilities.T @ (logits / self.temperature).softmax(1)

    def add(self, sums: Tensor) -> None:
        """Adds the contribution of a batch, [K, K]."""
        self._sums += sums

    def next_epoch(self) -> None:
        """Turns the sums of the epoch into `means`. A class without images in the epoch keeps its row."""
        mass = self._sums.sum(1, keepdim=True)  # [K, 1]
        self.means = torch.where(mass > 0, self._sums / mass.clamp(min=1e-12), self.means)
        self._sums = torch.zeros_like(self.means)

    def state(self) -> dict[str, Tensor]:
        """Returns the state for a checkpoint: "means" and "sums", [K, K] each."""
        return {"means": self.means, "sums": self._sums}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned: "means" and "sums", [K, K] each."""
        self.means, self._sums = state["means"].to(self.means.device), state["sums"].to(self.means.device)


def _clean_and_adversarial_logits(
    model: nn.Module, images: Tensor, targets: Tensor, start: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Returns clean and adversarial logits [B, K], float32, with gradients.

    images and start [B, C, H, W], targets [B] or [B, K]. The clean pass, which updates running statistics, comes before
    the attack, which needs its prediction. The numbers equal those of one more pass without tracking, as published, at
    one pass of 27 less. The l2 start is not clipped to [0, 1], as published.
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


def _cross_entropy(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:  # [B, K], [B(, K)] -> [B]
    smoothing = settings.label_smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")


def _detached(total: Tensor, clean: Tensor, robust: Tensor, clean_logits: Tensor, adversarial_logits: Tensor) -> Loss:
    """Detaches all but the total. total, clean and robust [B]; logits [B, K]."""
    return Loss(total, clean.detach(), robust.detach(), clean_logits.detach(), adversarial_logits.detach())
