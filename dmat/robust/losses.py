"""Training losses of a classifier, one signature: loss(model, images, labels, start, recipe) -> Loss.

The model is in training mode; how batch norm behaves in each forward pass is part of a loss and stated in it.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from dmat import modes
from dmat.robust import attacks
from dmat.robust.attacks import Ball


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a loss. step_size in pixels of [0, 1]; beta weighs robustness against clean accuracy."""

    ball: Ball
    steps: int
    step_size: float
    beta: float
    label_smoothing: float


@dataclasses.dataclass(frozen=True)
class Loss:
    """Per-image values [B] (the caller averages) and the logits [B, K] that made them, detached."""

    total: Tensor
    natural: Tensor  # label-smoothed cross-entropy on the natural images
    robust: Tensor  # the adversarial term before beta; zeros for standard training
    natural_logits: Tensor
    adversarial_logits: Tensor | None


LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, Recipe], Loss]


def trades(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, recipe: Recipe) -> Loss:
    """TRADES (Zhang et al. 2019) as in Wang et al. 2023's code.

    Cross-entropy(natural) + beta * KL(p_natural || p_adversarial), with the gradient through both branches of the
    KL. The inner attack maximises the KL to the detached natural prediction on batch statistics without tracking;
    then two tracked forward passes follow, natural first.
    """
    with modes.frozen(model), modes.untracked_batch_norm(model):
        target = model(images).detach().float().log_softmax(1)
        adversarial = attacks.pgd(
            model, images, attacks.divergence(target), recipe.ball, start, recipe.steps, recipe.step_size
        )
    natural_logits = model(images).float()
    adversarial_logits = model(adversarial).float()
    natural = F.cross_entropy(natural_logits, labels, label_smoothing=recipe.label_smoothing, reduction="none")
    # log_target keeps 0 * log 0 at 0; the clamped version of other implementations changes the gradient.
    robust = F.kl_div(
        adversarial_logits.log_softmax(1), natural_logits.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    return Loss(
        natural + recipe.beta * robust,
        natural.detach(),
        robust.detach(),
        natural_logits.detach(),
        adversarial_logits.detach(),
    )


def standard(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, recipe: Recipe) -> Loss:
    """Label-smoothed cross-entropy on the images as they are; `start` is not used."""
    logits = model(images).float()
    natural = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="none")
    return Loss(natural, natural.detach(), natural.detach() * 0, logits.detach(), None)


LOSSES: dict[str, LossFunction] = {"trades": trades, "standard": standard}
