"""Attacks as compositions: objective x ball x start x steps.

    pgd(logits_of, images, objective, ball, start, steps, step_size) -> adversarial images

Every attack maximises a per-image objective of the logits inside a ball around the images and inside [0, 1], takes
its random start as an argument (so it draws nothing itself), and leaves the mode of the model to the caller: wrap
calls in `modes.mode` and `modes.frozen`. Updates are in float32 whatever the precision of the model.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmat import seeds

NORMS = ("linf", "l2")
Logits = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> logits [B, K]
Objective = Callable[[Tensor], Tensor]  # logits [B, K] -> [B], larger is worse for the model


@dataclasses.dataclass(frozen=True)
class Ball:
    """Allowed perturbations: norm "linf" or "l2" of each image's perturbation at most epsilon (pixels in [0, 1])."""

    norm: str
    epsilon: float

    def project(self, perturbation: Tensor) -> Tensor:
        """The nearest perturbation inside the ball. [B, C, H, W]."""
        if self.norm == "linf":
            return perturbation.clamp(-self.epsilon, self.epsilon)
        length = _length(perturbation).clamp(min=1e-12)
        return perturbation * (self.epsilon / length).clamp(max=1)

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent of unit size: the sign (linf) or the gradient over its length (l2)."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _length(gradient).clamp(min=1e-12)

    def size(self, perturbation: Tensor) -> Tensor:
        """The norm of each image's perturbation, [B]."""
        if self.norm == "linf":
            return perturbation.flatten(1).abs().amax(1)
        return _length(perturbation).flatten()

    def training_start(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Start of TRADES's inner attack (Wang et al.'s code): linf uniform in the ball, l2 0.001 x Gaussian.

        Published, the linf start is clipped to [0, 1] and the l2 start is not: `pgd` with clip_start=False.
        """
        if self.norm == "linf":
            return seeds.uniform(generator, shape, -self.epsilon, self.epsilon)
        return 0.001 * seeds.normal(generator, shape)

    def random_start(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Start of an evaluation: uniform in the ball. l2: a random direction, radius epsilon * u^(1/dim)."""
        if self.norm == "linf":
            return seeds.uniform(generator, shape, -self.epsilon, self.epsilon)
        radius = self.epsilon * seeds.uniform(generator, (shape[0], 1, 1, 1)) ** (1 / float(np.prod(shape[1:])))
        return radius * self.direction(seeds.normal(generator, shape))


def pgd(
    logits_of: Logits,
    images: Tensor,
    objective: Objective,
    ball: Ball,
    start: Tensor,
    steps: int,
    step_size: float,
    clip_start: bool = True,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018). Returns the last iterate, detached, float32.

    clip_start: the first gradient is taken inside [0, 1] and the ball; False takes it at images + start as given.
    Every later iterate, and so the result, is inside.
    """
    adversarial = _inside(images, start, ball) if clip_start or not steps else (images + start).detach()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            value = objective(logits_of(adversarial)).sum()
        (gradient,) = torch.autograd.grad(value, adversarial)
        with torch.no_grad():
            step = step_size * ball.direction(gradient.float())
            adversarial = _inside(images, adversarial + step - images, ball)
    return adversarial.detach()


def fgsm(logits_of: Logits, images: Tensor, objective: Objective, ball: Ball) -> Tensor:
    """One step of the ball's whole radius from the image itself (Goodfellow et al. 2015)."""
    return pgd(logits_of, images, objective, ball, torch.zeros_like(images), 1, ball.epsilon)


def pgd_with_restarts(
    logits_of: Logits,
    images: Tensor,
    labels: Tensor,
    objective_of: Callable[[Tensor], Objective],
    ball: Ball,
    starts: Sequence[Tensor],
    steps: int,
    step_size: float,
) -> Tensor:
    """PGD from each start in turn, on the images that none before has broken. Of a robust image: the last attempt.

    objective_of: labels -> objective, such as `OBJECTIVES["cw"]`. starts: one perturbation [B, C, H, W] a restart.
    """
    found = images.detach().clone()
    left = torch.arange(len(images), device=images.device)
    for start in starts:
        if not len(left):
            break
        x, y = images[left], labels[left]
        found[left] = pgd(logits_of, x, objective_of(y), ball, start[left], steps, step_size)
        with torch.no_grad():
            left = left[logits_of(found[left]).argmax(1) == y]
    return found


def cross_entropy(labels: Tensor) -> Objective:
    """-log p(label). labels int64 [B]."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="none")


def margin(labels: Tensor) -> Objective:
    """Carlini and Wagner 2017: largest wrong logit minus the logit of the label; above 0 means misclassified."""
    return lambda logits: -logit_margin(logits.float(), labels)


def logit_ratio(labels: Tensor) -> Objective:
    """The negative difference of logits ratio (Croce and Hein 2020, equation 3): the margin over the gap between the
    first and the third logit, which the scale of the logits does not change. Needs three classes."""

    def objective(logits: Tensor) -> Tensor:
        best = logits.float().topk(3, dim=1).values  # [B, 3]
        return -logit_margin(logits.float(), labels) / (best[:, 0] - best[:, 2] + 1e-12)

    return objective


OBJECTIVES: dict[str, Callable[[Tensor], Objective]] = {"ce": cross_entropy, "cw": margin, "dlr": logit_ratio}


def divergence(target_log_probabilities: Tensor) -> Objective:
    """KL(target || model): TRADES's inner objective (Zhang et al. 2019, equation 5). Targets [B, K], detached."""
    target = target_log_probabilities.detach()
    return lambda logits: F.kl_div(logits.float().log_softmax(1), target, reduction="none", log_target=True).sum(1)


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, [B]: negative where the prediction is wrong."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return own - others


def _inside(images: Tensor, perturbation: Tensor, ball: Ball) -> Tensor:
    """images + perturbation, pulled back into [0, 1] and into the ball.

    Either only shortens a perturbation of an image inside [0, 1], so the result is in both. l2 is clipped first, as in
    Wang et al.'s code: what clipping takes off leaves more of the ball to the other pixels. linf: no difference.
    """
    if ball.norm == "l2":
        perturbation = (images + perturbation).clamp(0, 1) - images
    return (images + ball.project(perturbation)).clamp(0, 1).detach()


def _length(perturbation: Tensor) -> Tensor:
    return perturbation.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
