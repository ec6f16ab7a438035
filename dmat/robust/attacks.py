"""Attacks as compositions: objective x ball x start x steps.

    pgd(logits_of, images, objective, ball, start, steps, step_size) -> adversarial images

Every attack maximises a per-image objective of the logits, inside a ball around the images and inside [0, 1]. It takes
its random start as an argument and draws nothing itself. It leaves the mode of the model to the caller: wrap calls in
`modes.mode` and `modes.frozen`. Updates are in float32 whatever the precision of the model.

Shapes: B batch, C channels, H height, W width, K classes. Labels are int64.
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
    """The set of allowed perturbations: their norm, "linf" or "l2", is at most epsilon for each image.

    epsilon is in pixels of [0, 1]. Perturbations and gradients are [B, C, H, W].
    """

    norm: str
    epsilon: float

    def project(self, perturbation: Tensor) -> Tensor:
        """Returns the nearest perturbation inside the ball, [B, C, H, W]."""
        if self.norm == "linf":
            return perturbation.clamp(-self.epsilon, self.epsilon)
        length = _l2_norm(perturbation).clamp(min=1e-12)  # [B, 1, 1, 1]
        return perturbation * (self.epsilon / length).clamp(max=1)

    def direction(self, gradient: Tensor) -> Tensor:
        """Returns the steepest ascent direction of unit norm, [B, C, H, W].

        This is the sign of the gradient (linf) or the gradient divided by its length (l2).
        """
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _l2_norm(gradient).clamp(min=1e-12)

    def size(self, perturbation: Tensor) -> Tensor:
        """Returns the norm of each image's perturbation, [B]."""
        if self.norm == "linf":
            return perturbation.flatten(1).abs().amax(1)
        return _l2_norm(perturbation).flatten()

    def training_start(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Draws the start of TRADES's inner attack, a perturbation of `shape` [B, C, H, W] (Wang et al.'s code).

        linf: uniform in the ball. l2: 0.001 times Gaussian noise. In the published code the linf start is clipped to
        [0, 1] and the l2 start is not, so call `pgd` with clip_start=False for l2.
        """
        if self.norm == "linf":
            return seeds.uniform(generator, shape, -self.epsilon, self.epsilon)
        return 0.001 * seeds.normal(generator, shape)

    def random_start(self, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        """Draws the start of an evaluation attack, a perturbation of `shape` [B, C, H, W], uniform in the ball.

        l2: a random direction with radius epsilon * u^(1/d), u uniform in [0, 1), d = C * H * W.
        """
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
    """Runs projected gradient ascent (Madry et al. 2018). Returns the last iterate [B, C, H, W], detached, float32.

    images [B, C, H, W] in [0, 1]; start: perturbation [B, C, H, W]; step_size in pixels of [0, 1].
    clip_start=True takes the first gradient inside [0, 1] and the ball; False takes it at images + start as given.
    Every later iterate, and so the result, is inside.
    """
    adversarial = _perturb(images, start, ball) if clip_start or not steps else (images + start).detach()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            value = objective(logits_of(adversarial)).sum()  # scalar
        (gradient,) = torch.autograd.grad(value, adversarial)
        with torch.no_grad():
            step = step_size * ball.direction(gradient.float())
            adversarial = _perturb(images, adversarial + step - images, ball)
    return adversarial.detach()


def fgsm(logits_of: Logits, images: Tensor, objective: Objective, ball: Ball) -> Tensor:
    """Takes one step of size epsilon from the clean images (Goodfellow et al. 2015).

    images [B, C, H, W] in [0, 1] -> adversarial images [B, C, H, W].
    """
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
    """Runs PGD from each start, on the images that no earlier start has broken. Returns [B, C, H, W].

    The result of a robust image is its last attempt. images [B, C, H, W] in [0, 1], labels [B].
    objective_of: labels -> objective, such as `OBJECTIVES["cw"]`. starts: one perturbation [B, C, H, W] per restart.
    """
    adversarial = images.detach().clone()
    robust = torch.arange(len(images), device=images.device)  # indices of images that no start has broken yet
    for start in starts:
        if not len(robust):
            break
        x, y = images[robust], labels[robust]
        adversarial[robust] = pgd(logits_of, x, objective_of(y), ball, start[robust], steps, step_size)
        with torch.no_grad():
            robust = robust[logits_of(adversarial[robust]).argmax(1) == y]
    return adversarial


def cross_entropy(labels: Tensor) -> Objective:
    """Returns the objective -log p(label). labels int64 [B]."""
    return lambda logits: F.cross_entropy(logits.float(), labels, reduction="none")


def margin(labels: Tensor) -> Objective:
    """Returns the objective of Carlini and Wagner 2017: largest wrong logit minus the logit of the label. labels [B].

    Above 0 means misclassified.
    """
    return lambda logits: -logit_margin(logits.float(), labels)


def logit_ratio(labels: Tensor) -> Objective:
    """Returns the DLR objective, the difference of logits ratio (Croce and Hein 2020, equation 3). labels [B].

    It is `margin` divided by the gap between the largest and the third largest logit, so the scale of the logits does
    not change it. Needs three classes.
    """

    def objective(logits: Tensor) -> Tensor:  # [B, K] -> [B]
        largest = logits.float().topk(3, dim=1).values  # [B, 3]
        return -logit_margin(logits.float(), labels) / (largest[:, 0] - largest[:, 2] + 1e-12)

    return objective


OBJECTIVES: dict[str, Callable[[Tensor], Objective]] = {"ce": cross_entropy, "cw": margin, "dlr": logit_ratio}


def divergence(target_log_probabilities: Tensor) -> Objective:
    """Returns the objective KL(target || model) of TRADES's inner attack (Zhang et al. 2019, equation 5).

    target_log_probabilities: [B, K]; no gradient flows through them.
    """
    target = target_log_probabilities.detach()
    return lambda logits: F.kl_div(logits.float().log_softmax(1), target, reduction="none", log_target=True).sum(1)


def squared_error(target_log_probabilities: Tensor) -> Objective:
    """Returns the objective |p - target|^2 of LSE's inner attack (Pang et al. 2022): the squared l2 distance.

    target_log_probabilities: [B, K]; no gradient flows through them.
    """
    target = target_log_probabilities.detach().exp()
    return lambda logits: ((logits.float().softmax(1) - target) ** 2).sum(1)


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the logit of the label minus the largest other logit, [B]: negative where the prediction is wrong.

    logits [B, K], labels [B].
    """
    label_logit = logits.gather(1, labels[:, None])[:, 0]
    largest_other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return label_logit - largest_other


def _perturb(images: Tensor, perturbation: Tensor, ball: Ball) -> Tensor:
    """Returns images + perturbation, projected into [0, 1] and into the ball. All [B, C, H, W].

    Each projection only shortens the perturbation of an image inside [0, 1], so the result is in both. For l2 clipping
    comes first, as in Wang et al.'s code: what clipping removes leaves more of the ball to the other pixels. For linf
    the order makes no difference.
    """
    if ball.norm == "l2":
        perturbation = (images + perturbation).clamp(0, 1) - images
    return (images + ball.project(perturbation)).clamp(0, 1).detach()


def _l2_norm(perturbation: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 1, 1, 1]
    return perturbation.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
