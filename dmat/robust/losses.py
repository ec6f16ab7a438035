"""Training losses of a classifier. All have one signature:

    loss(model, images, targets, start, settings, class_means) -> Loss

images: [B, C, H, W] in [0, 1]; for losses in `WITH_TWO_VIEWS` rows 2 k and 2 k + 1 are two views of one image.
targets: labels int64 [B], or class probabilities float [B, K] of mixed images (these are not smoothed, as published).
start: where the attack begins, [B, C, H, W], as `draw_start` draws it for the loss.
class_means: [K, K], the weights of `ikl`; other losses ignore it.

The model is in training mode. How batch norm behaves in each forward pass is part of a loss; its docstring says it.
Shapes: B batch, C channels, H height, W width, K classes.
"""

import dataclasses
import math
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
    alpha: float = 0.0  # weight of the cross-entropy of ikl, of the divergence between views of consistency
    temperature: float = 1.0  # of the two predictions that consistency compares
    gkl_gamma: float = 1.0  # exponent of the class means of ikl


@dataclasses.dataclass(frozen=True)
class Loss:
    """Per-image values [B], which the caller averages, and the logits [B, K] behind them. Detached, but for `total`."""

    total: Tensor
    clean: Tensor  # the term on the clean images; zeros for pgd_at and mart, which have none
    robust: Tensor  # the adversarial term before beta; zeros for standard training
    clean_logits: Tensor | None
    adversarial_logits: Tensor | None
    adversarial: Tensor | None = None  # the images [B, C, H, W] that the attack ended with


LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, LossSettings, Tensor | None], Loss]


def draw_start(name: str, ball: Ball, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Draws the `start` [B, C, H, W] of the loss `name`: perturbations, but images in [0, 1] for `pgd_at` in l2."""
    if name == "pgd_at" and ball.norm == "l2":
        return seeds.uniform(generator, shape)
    if name == "mart":
        return 0.001 * seeds.normal(generator, shape)  # in both norms
    return ball.training_start(generator, shape)


def start_at(name: str, ball: Ball, images: Tensor, adversarial: Tensor) -> Tensor:
    """Returns the `start` from which the loss `name` arrives at `adversarial` without a step. All [B, C, H, W]."""
    return adversarial if name == "pgd_at" and ball.norm == "l2" else adversarial - images


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
    passes = _trades_passes(model, images, targets, start, settings)
    clean, robust = _cross_entropy(passes.clean_logits, targets, settings), passes.divergence()
    return passes.loss(clean + settings.beta * robust, clean, robust)


def consistency(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """TRADES with consistency regularisation (Tack et al. 2022), as in Wang et al. 2023's code.

    `trades` + alpha * JS(p_adversarial of the first view || that of the second), both softened by settings.temperature.
    JS is the Jensen-Shannon divergence: the mean of KL(p || m) and KL(q || m) with m the mean of p and q. Its gradient
    reaches both views. Rows 2 k and 2 k + 1 are views of one image: independent augmentations with attacks of their
    own. Both get the value of their pair, so the mean over images is the mean over pairs. `robust` is (beta * KL +
    alpha * JS) / beta. Attack, passes and shapes are those of `trades`.
    images and start [B, C, H, W], B even, targets [B] or [B, K] -> values [B].
    """
    passes = _trades_passes(model, images, targets, start, settings)
    clean = _cross_entropy(passes.clean_logits, targets, settings)
    softened = (passes.adversarial_logits / settings.temperature).log_softmax(1)
    pairs = _jensen_shannon(softened[0::2], softened[1::2])  # [B / 2]
    adversarial = settings.beta * passes.divergence() + settings.alpha * pairs.repeat_interleave(2)
    return passes.loss(clean + adversarial, clean, _before_beta(adversarial, settings))


def lse(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """Squared error in place of TRADES's cross-entropy and KL: LSE, which trains for SCORE (Pang et al. 2022).

    |p_clean - y|^2 + beta * |p_adversarial - p_clean|^2, squared l2 distances of probabilities, with the gradient
    through both predictions. The inner attack maximises the distance to the detached clean prediction (for mixed
    images: to their targets). Label smoothing s makes y 1 - s at the label and s / (K - 1) elsewhere, as published:
    unlike the other losses it leaves no mass of s at the label. The published code can also clip the robust term; here
    it is not clipped, which is its default. Passes and start are those of `trades`.
    images and start [B, C, H, W], targets [B] or [B, K] -> values [B].
    """
    passes = _trades_passes(model, images, targets, start, settings, attacks.squared_error)
    clean_probabilities = passes.clean_logits.softmax(1)
    classes = clean_probabilities.shape[1]
    if targets.ndim == 1:
        other = settings.label_smoothing / (classes - 1)
        targets = (1 - classes * other) * F.one_hot(targets, classes) + other
    clean = ((clean_probabilities - targets) ** 2).sum(1)
    robust = ((passes.adversarial_logits.softmax(1) - clean_probabilities) ** 2).sum(1)
    return passes.loss(clean + settings.beta * robust, clean, robust)


def mart(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    class_means: Tensor | None = None,
) -> Loss:
    """MART (Wang et al. 2020, the surrogate of its equation 7): misclassified clean images count more.

    BCE(p_adversarial, y) + beta * KL(p_clean || p_adversarial) * (1 - p_clean(y)), where BCE is -log p(y) -
    log(1 - the largest probability of another class). The gradient flows through all of them. Logarithms are exact;
    the published code adds 1e-4 and smaller constants inside them. label_smoothing smooths the first term of BCE; the
    paper has none. `robust` is the whole loss. The attack maximises the cross-entropy, with the model in evaluation
    mode; its first gradient is taken at images + start, not clipped. Two passes update running statistics, the clean
    one first. The published code has linf alone; in l2 the same is done in the l2 ball.
    images and start [B, C, H, W], labels [B] -> values [B]. Raises TypeError for mixed targets [B, K].
    """
    if targets.ndim != 1:
        raise TypeError("mart needs labels; mixed images have none")
    with modes.frozen(model), modes.mode(model, training=False):
        adversarial = attacks.pgd(
            model,
            images,
            attacks.cross_entropy(targets),
            settings.ball,
            start,
            settings.steps,
            settings.step_size,
            clip_start=False,
        )
    passes = _TrainedPasses(model(images).float(), model(adversarial).float(), adversarial)
    logits, label = passes.adversarial_logits, targets[:, None]
    # log(1 - p_j) as log sum of the others minus log sum of all: exact where p_j is near 1
    strongest_other = logits.scatter(1, label, -torch.inf).argmax(1, keepdim=True)  # [B, 1]
    log_rest = logits.scatter(1, strongest_other, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    boosted = _cross_entropy(logits, targets, settings) - log_rest
    misclassified = 1 - passes.clean_logits.softmax(1).gather(1, label)[:, 0]
    total = boosted + settings.beta * passes.divergence() * misclassified
    return passes.loss(total, torch.zeros_like(total), total)


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
    With settings.gkl_gamma below 1 it is GKL (Cui et al. 2025, "Generalized Kullback-Leibler Divergence Loss"): w is
    w ** gamma, smoother, and the sum of all w_j w_k over the batch is scaled to B, as in the published code, so that
    images of classes with flat means weigh more.
    images and start [B, C, H, W], targets [B] or [B, K] -> values [B].
    """
    if class_means is None:
        raise TypeError("ikl needs class_means")
    passes = _trades_passes(model, images, targets, start, settings)
    clean_logits, adversarial_logits = passes.clean_logits, passes.adversarial_logits
    clean = _cross_entropy(clean_logits, targets, settings)
    weights = class_means[targets] if targets.ndim == 1 else targets @ class_means  # [B, K], rows sum to 1
    image_weights = None
    if settings.gkl_gamma != 1:
        weights = weights**settings.gkl_gamma
        mass = weights.sum(1, keepdim=True)  # [B, 1]; its square is the sum of w_j w_k
        weights, image_weights = weights / mass, mass[:, 0] ** 2
    difference = clean_logits - adversarial_logits  # [B, K]
    # sum_jk w_j w_k (d_j - d_k)^2 / 4 is half the variance of d under w: K terms instead of K^2
    centred = difference - (weights * difference).sum(1, keepdim=True)
    weighted_mse = (weights * centred**2).sum(1) / 2  # [B]
    if image_weights is not None:
        weighted_mse = weighted_mse * image_weights / image_weights.mean()
    soft_cross_entropy = -(clean_logits.detach().softmax(1) * adversarial_logits.log_softmax(1)).sum(1)  # [B]
    adversarial = settings.beta * weighted_mse + settings.alpha * soft_cross_entropy
    return passes.loss(clean + adversarial, clean, _before_beta(adversarial, settings))


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
    return Loss(robust, robust.detach() * 0, robust.detach(), None, logits.detach(), adversarial)


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


LOSSES: dict[str, LossFunction] = {
    "trades": trades,
    "standard": standard,
    "pgd_at": pgd_at,
    "ikl": ikl,
    "mart": mart,
    "lse": lse,
    "consistency": consistency,
}
ADVERSARIAL = tuple(name for name in LOSSES if name != "standard")  # losses that run an attack
WITH_CLASS_MEANS = ("ikl",)  # losses that need class_means
WITH_TWO_VIEWS = ("consistency",)  # losses of pairs of rows
WITHOUT_MIXED_TARGETS = ("mart",)  # losses that need labels [B]


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


@dataclasses.dataclass(frozen=True)
class _TrainedPasses:
    """The two trained passes of a step: logits [B, K], float32, with gradients. adversarial: images [B, C, H, W]."""

    clean_logits: Tensor
    adversarial_logits: Tensor
    adversarial: Tensor

    def divergence(self) -> Tensor:
        """Returns KL(p_clean || p_adversarial), [B]."""
        # log_target keeps 0 * log 0 at 0; the clamped version of other implementations changes the gradient.
        return F.kl_div(
            self.adversarial_logits.log_softmax(1), self.clean_logits.log_softmax(1), reduction="none", log_target=True
        ).sum(1)

    def loss(self, total: Tensor, clean: Tensor, robust: Tensor) -> Loss:
        """Returns the result of a loss; detaches all but the total. total, clean and robust [B]."""
        return Loss(
            total,
            clean.detach(),
            robust.detach(),
            self.clean_logits.detach(),
            self.adversarial_logits.detach(),
            self.adversarial,
        )


def _trades_passes(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    start: Tensor,
    settings: LossSettings,
    objective: Callable[[Tensor], attacks.Objective] = attacks.divergence,
) -> _TrainedPasses:
    """Runs the attack of `trades` on an objective of the detached log-probabilities of the clean pass [B, K].

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
            objective(target),
            settings.ball,
            start,
            settings.steps,
            settings.step_size,
            clip_start=settings.ball.norm == "linf",
        )
    return _TrainedPasses(clean_logits, model(adversarial).float(), adversarial)


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:  # log-probabilities [B, K] each -> [B]
    mean = torch.logaddexp(first, second) - math.log(2)
    divergences = (F.kl_div(mean, side, reduction="none", log_target=True).sum(1) for side in (first, second))
    return sum(divergences, start=torch.zeros_like(first[:, 0])) / 2


def _before_beta(adversarial: Tensor, settings: LossSettings) -> Tensor:  # [B] -> [B]
    return adversarial / settings.beta if settings.beta else adversarial


def _cross_entropy(logits: Tensor, targets: Tensor, settings: LossSettings) -> Tensor:  # [B, K], [B(, K)] -> [B]
    smoothing = settings.label_smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
