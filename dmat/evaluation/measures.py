"""What is measured on one shard of images: flags of every attack, the worst image, its margin and perturbation norm.

The shard is the unit of computation. It has its own random starts and seed, so its numbers do not depend on which
process computes it, when, or after which other shard.
Legend: B images of the shard, N images, C channels, H height, W width, R radii of the sweep.
"""

import dataclasses
import hashlib
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dmat import plugins, seeds
from dmat.data.pixels import iter_batches
from dmat.devices import Compute
from dmat.evaluation.checks import trivial_radius
from dmat.evaluation.progress import Meter, Report
from dmat.robust import attacks, auto_attack, prediction
from dmat.robust.attacks import OBJECTIVES, Ball
from dmat.robust.auto_attack import Suite
from dmat.robust.passes import GRADIENT

_AFTER_SUITE = 2  # passes of an image after the suite: does its adversarial image break it, and the saved logits
_FEWER_STEPS_DIVISOR = 4  # the weaker PGD of `checks.more_steps` makes a quarter of the steps


class AttackSettings(Protocol):
    """Settings that decide the flags (docs/parameters.md, `evaluate_robust`). Radii and steps: pixels of [0, 1]."""

    pgd_steps: int
    pgd_restarts: int
    pgd_seed: int
    auto_attack_seed: int
    auto_attack_code: Literal["dmat", "pyautoattack"]
    sweep: tuple[float, ...]  # multiples of epsilon
    shard: int
    batch: int

    @property
    def pgd_loss(self) -> str:
        """Name of the objective in `OBJECTIVES`."""

    def pgd_step(self, norm: str, epsilon: float) -> float:
        """Step size of PGD in a ball of radius epsilon."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A classifier, the images that it is attacked on, and the attacks.

    model: images [B, C, H, W] -> logits [B, K], on the device, float32, in evaluation mode, frozen. classes: K.
    images float32 [N, C, H, W] in [0, 1], labels int64 [N], both on the CPU. full_suite: all measures; else clean and
    PGD accuracy only. suite: None for no AutoAttack.
    """

    name: str
    model: nn.Module
    classes: int
    images: Tensor
    labels: Tensor
    ball: Ball
    suite: Suite | None = None
    full_suite: bool = False


def images_sha256(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of pixels, labels and their order: accuracies compare only between evaluations that have it in common.

    images [N, C, H, W], labels [N], both on the CPU.
    """
    digest = hashlib.sha256()
    for tensor in (images, labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def shard_slice(number: int, size: int, count: int) -> slice:
    """Positions of the images of shard `number`; the last shard may be short. size: images per shard. count: of all."""
    return slice(number * size, min((number + 1) * size, count))


def passes_per_image(subject: Subject, settings: AttackSettings) -> int:
    """Forward passes of `measure_shard` for an image that nothing breaks (see `GRADIENT`)."""
    pgd, few = (
        settings.pgd_restarts * (GRADIENT * steps + 1) + 1
        for steps in (settings.pgd_steps, fewer_steps(settings.pgd_steps))
    )
    passes = 1 + pgd + 1
    if subject.full_suite:
        passes += GRADIENT + 1 + few + (len(settings.sweep) + 1) * pgd
    if subject.suite is not None:
        passes += 1 + subject.suite.passes + _AFTER_SUITE - 1
    return passes


def measure_shard(
    subject: Subject, settings: AttackSettings, number: int, compute: Compute, report: Report = lambda progress: None
) -> dict[str, np.ndarray]:
    """Computes the columns [B] of one shard, and reports its progress.

    prediction int64. clean, pgd bool: the prediction is right, and right also under PGD. adversarial float32
    [B, C, H, W]: the image with which AutoAttack broke the model, else PGD's last attempt. attacked int64: the
    prediction on it. margin, perturbation float32: its logit margin (negative: broken) and the perturbation's norm.
    With `full_suite` also fgsm, pgd_few, grey bool and sweep bool [B, R]. With a suite also auto_attack bool and
    broken_by int64 (`auto_attack.attack`).
    """
    shard = _Shard(subject, settings, number, compute, report)
    logits = shard.logits(shard.images)
    clean = logits.argmax(1) == shard.labels
    adversarial = shard.pgd(subject.ball, settings.pgd_steps, "")
    robust = clean & shard.is_correct(adversarial)
    columns = {"prediction": logits.argmax(1), "clean": clean, "pgd": robust}
    if subject.full_suite:
        columns |= shard.check_flags(clean)
    if subject.suite is not None:
        worst, broken_by = shard.auto_attack(subject.suite)
        # The image decides: flags are those of its logits, computed for the whole shard in the batches of re-scoring.
        survived = (broken_by == auto_attack.ROBUST) | (clean & shard.is_correct(worst))
        broken_by[survived] = auto_attack.ROBUST
        columns |= {"auto_attack": survived, "broken_by": broken_by}
        adversarial = torch.where(survived[:, None, None, None], adversarial, worst)
    attacked_logits = shard.logits(adversarial)
    columns |= {
        "adversarial": adversarial.contiguous(),
        "attacked": attacked_logits.argmax(1),
        "margin": attacks.logit_margin(attacked_logits, shard.labels),
        "perturbation": subject.ball.size(adversarial - shard.images),
    }
    return {name: values.numpy() for name, values in columns.items()}


class _Shard:
    """Attacks on the images [B, C, H, W] of one shard, batch by batch. Images and results are on the CPU."""

    def __init__(self, subject: Subject, settings: AttackSettings, number: int, compute: Compute, report: Report):
        self.subject, self.settings, self.number, self.compute = subject, settings, number, compute
        positions = shard_slice(number, settings.shard, len(subject.labels))
        self.images, self.labels = subject.images[positions], subject.labels[positions]
        count = len(self.labels)
        self.model = Meter(subject.model, count * passes_per_image(subject, settings), count, report)

    def logits(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        return prediction.logits(self.model, images, self.compute, self.settings.batch)

    def is_correct(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> bool [B]
        return self.logits(images).argmax(1) == self.labels

    def pgd(self, ball: Ball, steps: int, purpose: str) -> Tensor:
        """Adversarial images [B, C, H, W] by PGD with `pgd_restarts`. The step size scales with the ball's radius."""
        threat_ball = self.subject.ball
        step_size = self.settings.pgd_step(threat_ball.norm, threat_ball.epsilon) * ball.epsilon / threat_ball.epsilon
        starts = [
            ball.random_start(
                seeds.stream(self.settings.pgd_seed, f"evaluation/start{purpose}/{restart}", self.number),
                tuple(self.images.shape),
            )
            for restart in range(self.settings.pgd_restarts)
        ]
        adversarial = [
            attacks.pgd_with_restarts(
                self.model,
                self.compute.to_device(x),
                y.to(self.compute.device),
                plugins.find(OBJECTIVES, self.settings.pgd_loss),
                ball,
                [self.compute.to_device(start[positions]) for start in starts],
                steps,
                step_size,
            ).cpu()
            for positions, x, y in iter_batches(self.images, self.labels, self.settings.batch)
        ]
        return torch.cat(adversarial)

    def fgsm(self) -> Tensor:  # [B, C, H, W]
        adversarial = [
            attacks.fgsm(
                self.model,
                self.compute.to_device(x),
                attacks.cross_entropy(y.to(self.compute.device)),
                self.subject.ball,
            ).cpu()
            for _, x, y in iter_batches(self.images, self.labels, self.settings.batch)
        ]
        return torch.cat(adversarial)

    def check_flags(self, clean: Tensor) -> dict[str, Tensor]:
        """Robust flags [B] under FGSM, PGD with fewer steps, and PGD at the large radius; [B, R] at the sweep's radii.

        clean: bool [B].
        """
        ball, steps = self.subject.ball, self.settings.pgd_steps
        flags = {
            "fgsm": clean & self.is_correct(self.fgsm()),
            "pgd_few": clean & self.is_correct(self.pgd(ball, fewer_steps(steps), "")),
        }
        radii = [multiple * ball.epsilon for multiple in self.settings.sweep]
        sweep = [clean & self.is_correct(self.pgd(Ball(ball.norm, radius), steps, "/sweep")) for radius in radii]
        trivial_ball = Ball(ball.norm, trivial_attack_radius(ball, tuple(self.images.shape[1:])))
        flags["sweep"] = torch.stack(sweep, 1) if sweep else torch.zeros(len(clean), 0, dtype=torch.bool)
        # "grey", twice: names of earlier versions: a new one would change every identity (column, random start).
        flags["grey"] = clean & self.is_correct(self.pgd(trivial_ball, steps, "/grey"))
        return flags

    def auto_attack(self, suite: Suite) -> tuple[Tensor, Tensor]:
        """Adversarial images [B, C, H, W] and `broken_by` int64 [B], as `auto_attack.attack`."""
        after = _AFTER_SUITE * len(self.labels)
        worst, broken_by = auto_attack.attack(
            self.model,
            self.compute.to_device(self.images),
            self.labels.to(self.compute.device),
            self.subject.ball,
            suite,
            self.settings.auto_attack_seed + self.number,
            self.settings.batch,
            self.settings.auto_attack_code,
            lambda name, left, unbroken: self.model.expect(name, left + after, unbroken),
        )
        return worst.cpu(), broken_by.cpu()


def trivial_attack_radius(ball: Ball, shape: tuple[int, ...]) -> float:
    """A radius at which nothing can be robust: all images [C, H, W] can become the same one, or epsilon if larger."""
    return max(float(ball.epsilon), trivial_radius(ball.norm, shape))


def fewer_steps(steps: int) -> int:
    """Steps of the weaker PGD that `steps` are compared with."""
    return max(1, steps // _FEWER_STEPS_DIVISOR)
