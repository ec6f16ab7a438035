"""What is measured on one shard of images: flags of every attack, the worst image found, its margin and size.

A shard is the unit of everything: it has starts and a seed of its own, so its numbers do not depend on who computes it,
when, and after which other shard.
"""

import dataclasses
import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dmat import plugins, seeds
from dmat.data.pixels import iter_batches
from dmat.devices import Compute
from dmat.evaluation.checks import trivial_radius
from dmat.robust import attacks, auto_attack, prediction
from dmat.robust.attacks import OBJECTIVES, Ball
from dmat.robust.auto_attack import Suite
from dmat.robust.networks import Classifier

_FEWER = 4  # times fewer steps, in the comparison of few with many


class AttackSettings(Protocol):
    """What decides the flags (docs/parameters.md, `evaluate_robust`). Radii and steps in pixels of [0, 1]."""

    pgd_steps: int
    pgd_restarts: int
    pgd_seed: int
    auto_attack_seed: int
    sweep: tuple[float, ...]  # multiples of epsilon
    shard: int
    batch: int

    @property
    def pgd_loss(self) -> str:
        """A name in `OBJECTIVES`."""

    def pgd_step(self, norm: str, epsilon: float) -> float:
        """Length of a step of PGD in a ball of radius epsilon."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A classifier and what it is attacked on and by.

    model: on the device, float32, in evaluation mode, frozen. images float32 [N, C, H, W] in [0, 1], labels int64 [N],
    both on the CPU. thorough: all measures; else clean and PGD alone. suite: None for no AutoAttack.
    """

    name: str
    model: Classifier
    images: Tensor
    labels: Tensor
    ball: Ball
    suite: Suite | None = None
    full_suite: bool = False


def images_sha256(images: Tensor, labels: Tensor) -> str:
    """What two evaluations must have in common before their accuracies compare: pixels, labels, and their order."""
    digest = hashlib.sha256()
    for tensor in (images, labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def shard_of(number: int, size: int, count: int) -> slice:
    """Positions of the images of a shard."""
    return slice(number * size, min((number + 1) * size, count))


def of_shard(subject: Subject, settings: AttackSettings, number: int, compute: Compute) -> dict[str, np.ndarray]:
    """Columns [B] of the images of a shard.

    prediction int64; clean, pgd bool: right, and right also after the attack. adversarial float32 [B, C, H, W]: what
    AutoAttack broke the model with, else PGD's last attempt; attacked int64: the prediction on it; margin and
    perturbation float32: its logit margin (negative: broken) and its norm. Of a thorough subject also fgsm, pgd_few,
    grey bool; sweep bool [B, R]; and with a suite auto_attack bool and broken_by int64 (`auto_attack.attack`).
    """
    shard = _Shard(subject, settings, number, compute)
    logits = shard.logits(shard.images)
    clean = logits.argmax(1) == shard.labels
    adversarial = shard.pgd(subject.ball, settings.pgd_steps, "")
    robust = clean & shard.right(adversarial)
    found = {"prediction": logits.argmax(1), "clean": clean, "pgd": robust}
    if subject.full_suite:
        found |= shard.weaker_and_larger(clean)
    if subject.suite is not None:
        worst, broken_by = shard.auto_attack(subject.suite)
        # What counts is the image: flags are those of its logits, computed for the whole shard as they are re-scored.
        survived = (broken_by == auto_attack.ROBUST) | (clean & shard.right(worst))
        broken_by[survived] = auto_attack.ROBUST
        found |= {"auto_attack": survived, "broken_by": broken_by}
        adversarial = torch.where(survived[:, None, None, None], adversarial, worst)
    attacked = shard.logits(adversarial)
    found |= {
        "adversarial": adversarial.contiguous(),
        "attacked": attacked.argmax(1),
        "margin": attacks.logit_margin(attacked, shard.labels),
        "perturbation": subject.ball.size(adversarial - shard.images),
    }
    return {name: values.numpy() for name, values in found.items()}


class _Shard:
    """Attacks on the images of one shard, batch after batch; images and results are on the CPU."""

    def __init__(self, subject: Subject, settings: AttackSettings, number: int, compute: Compute):
        self.subject, self.settings, self.number, self.compute = subject, settings, number, compute
        where = shard_of(number, settings.shard, len(subject.labels))
        self.images, self.labels = subject.images[where], subject.labels[where]

    def logits(self, images: Tensor) -> Tensor:
        return prediction.logits(self.subject.model, images, self.compute, self.settings.batch)

    def right(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1) == self.labels

    def pgd(self, ball: Ball, steps: int, purpose: str) -> Tensor:
        """With as many restarts as set; the step keeps its share of the radius."""
        whole = self.subject.ball
        step = self.settings.pgd_step(whole.norm, whole.epsilon) * ball.epsilon / whole.epsilon
        starts = [
            ball.random_start(
                seeds.stream(self.settings.pgd_seed, f"evaluation/start{purpose}/{restart}", self.number),
                tuple(self.images.shape),
            )
            for restart in range(self.settings.pgd_restarts)
        ]
        made = [
            attacks.pgd_with_restarts(
                self.subject.model,
                self.compute.to_device(x),
                y.to(self.compute.device),
                plugins.find(OBJECTIVES, self.settings.pgd_loss),
                ball,
                [self.compute.to_device(start[where]) for start in starts],
                steps,
                step,
            ).cpu()
            for where, x, y in iter_batches(self.images, self.labels, self.settings.batch)
        ]
        return torch.cat(made)

    def fgsm(self) -> Tensor:
        made = [
            attacks.fgsm(
                self.subject.model,
                self.compute.to_device(x),
                attacks.cross_entropy(y.to(self.compute.device)),
                self.subject.ball,
            ).cpu()
            for _, x, y in iter_batches(self.images, self.labels, self.settings.batch)
        ]
        return torch.cat(made)

    def weaker_and_larger(self, clean: Tensor) -> dict[str, Tensor]:
        """Flags of one step, of fewer steps, of the radii of the sweep, and of one at which nothing can be robust."""
        ball, steps = self.subject.ball, self.settings.pgd_steps
        found = {
            "fgsm": clean & self.right(self.fgsm()),
            "pgd_few": clean & self.right(self.pgd(ball, few(steps), "")),
        }
        radii = [multiple * ball.epsilon for multiple in self.settings.sweep]
        sweep = [clean & self.right(self.pgd(Ball(ball.norm, radius), steps, "/sweep")) for radius in radii]
        grey = Ball(ball.norm, large(ball, tuple(self.images.shape[1:])))
        found["sweep"] = torch.stack(sweep, 1) if sweep else torch.zeros(len(clean), 0, dtype=torch.bool)
        found["grey"] = clean & self.right(self.pgd(grey, steps, "/grey"))
        return found

    def auto_attack(self, suite: Suite) -> tuple[Tensor, Tensor]:
        worst, broken_by = auto_attack.attack(
            self.subject.model,
            self.compute.to_device(self.images),
            self.labels.to(self.compute.device),
            self.subject.ball,
            suite,
            self.settings.auto_attack_seed + self.number,
            self.settings.batch,
        )
        return worst.cpu(), broken_by.cpu()


def large(ball: Ball, shape: tuple[int, ...]) -> float:
    """The radius at which nothing can be robust: all images [C, H, W] can be the same one, or epsilon if larger."""
    return max(float(ball.epsilon), trivial_radius(ball.norm, shape))


def few(steps: int) -> int:
    """Steps of the weaker attack that many steps are compared with."""
    return max(1, steps // _FEWER)
