"""AutoAttack (Croce and Hein 2020) through the authors' package, which only this file imports.

Shapes: B images, C channels, H height, W width, K classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function

from dmat.errors import DmatError
from dmat.robust.attacks import Ball

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

_NORMS = {"linf": "Linf", "l2": "L2"}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}  # the loss compares with the third and the fourth logit
_MIN_HEIGHT_L2_SQUARE = 5  # pixels
_STANDARD_TARGETS = 9  # wrong classes that the targeted attacks of the standard suite try

ROBUST, MISCLASSIFIED = -1, -2  # values of `broken_by` for images that no attack broke


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks in their order; each runs on the images that are still robust to the earlier ones."""

    attacks: tuple[str, ...]
    targets: int  # wrong classes that a targeted attack tries
    standard: bool  # whether a result may be called a result of standard AutoAttack

    @property
    def name(self) -> str:
        """The name to report beside a result: "standard", or "nonstandard" with the attacks."""
        return "standard" if self.standard else f"nonstandard ({', '.join(self.attacks)})"


def suite(attacks: str | Sequence[str], classes: int) -> Suite:
    """Returns the suite of `attacks`, "standard" or names of `ATTACKS`, for a model with `classes` classes.

    With fewer than ten classes the targeted attacks try all wrong classes. With fewer than four the standard suite
    leaves out APGD-T, whose loss is not defined, and is no longer standard. Raises DmatError for an unknown attack, or
    one that needs more classes.
    """
    if classes < 2:
        raise DmatError(f"the model has {classes} class; expected 2 or more; there is nothing to attack")
    targets = min(_STANDARD_TARGETS, classes - 1)
    if attacks == "standard":
        possible = tuple(name for name in STANDARD if classes >= _CLASSES_NEEDED.get(name, 2))
        return Suite(possible, targets, standard=possible == STANDARD)
    names = tuple(attacks)
    for name in names:
        if name not in ATTACKS:
            raise DmatError(f"attack {name!r} is not known; expected some of {', '.join(ATTACKS)}, or standard")
        if classes < _CLASSES_NEEDED.get(name, 2):
            raise DmatError(
                f"{name} needs {_CLASSES_NEEDED[name]} classes, the model has {classes}; expected attacks without the "
                f"DLR loss; leave it out, or write standard"
            )
    return Suite(names, targets, standard=names == STANDARD)


def attack(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    attack_suite: Suite,
    seed: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Runs the attacks of a suite. Returns adversarial images [B, C, H, W] and `broken_by`, int64 [B].

    images [B, C, H, W] in [0, 1], labels int64 [B], on the device of the model, which is in evaluation mode and
    float32. Each attack of the package runs on the images that are still classified correctly, in batches of `batch`,
    each with `seed`, as one call of the package does.
    The adversarial image of an image that no attack broke is the image itself. broken_by: position in
    `attack_suite.attacks`, MISCLASSIFIED (wrong without any attack) or ROBUST.
    Raises DmatError if images are too small for Square in l2.
    """
    if ball.norm == "l2" and "square" in attack_suite.attacks and images.shape[2] < _MIN_HEIGHT_L2_SQUARE:
        raise DmatError(
            f"images are {images.shape[2]} pixels high; expected {_MIN_HEIGHT_L2_SQUARE} or more, because the l2 "
            f"version of Square stacks {_MIN_HEIGHT_L2_SQUARE} squares vertically; choose the other attacks"
        )
    package = _package(logits_of, ball, attack_suite, seed, images.device)
    images = images.contiguous()
    adversarial = images.detach().clone()
    broken_by = torch.full_like(labels, ROBUST)
    with torch.no_grad():
        correct = torch.cat([logits_of(x).argmax(1) for x in images.split(batch)]) == labels  # [B]
    broken_by[~correct] = MISCLASSIFIED
    for number, name in enumerate(attack_suite.attacks):
        robust = torch.nonzero(broken_by == ROBUST)[:, 0]  # indices
        if not len(robust):
            break
        package.attacks_to_run = [name]
        attacked, prediction = package.run_standard_evaluation(images[robust], labels[robust], batch_size=batch)
        broken = prediction != labels[robust]
        adversarial[robust[broken]] = attacked[broken].detach()
        broken_by[robust[broken]] = number
    return adversarial, broken_by


def _package(
    logits_of: Callable[[Tensor], Tensor],  # [B, C, H, W] -> [B, K]
    ball: Ball,
    attack_suite: Suite,
    seed: int,
    device: torch.device,
) -> "AutoAttack":
    """Builds the package's standard version with the suite's number of targets. `attack` sets the attacks to run."""
    from pyautoattack import AutoAttack

    wrapped = _PackageModel(logits_of)  # the package looks for parameters of a module
    package = AutoAttack(
        wrapped, norm=_NORMS[ball.norm], eps=float(ball.epsilon), version="standard", seed=seed, device=str(device)
    )
    package.apgd_targeted.n_target_classes = attack_suite.targets
    package.fab.n_target_classes = attack_suite.targets
    return package


class _PackageModel(torch.nn.Module):
    """Wraps the model for the package: [B, C, H, W] -> [B, K].

    The package gets contiguous images and gradients, which its `view`s need. The model gets channels-last images,
    which make convolutions faster.
    """

    def __init__(self, logits_of: Callable[[Tensor], Tensor]):  # [B, C, H, W] -> [B, K]
        super().__init__()
        self.logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        result: Tensor = self.logits_of(_ChannelsLast.apply(images))
        return result


class _ChannelsLast(Function):
    """Converts images to channels-last memory, and their gradients back to contiguous memory."""

    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # one [B, C, H, W] -> [B, C, H, W]
        return gradients[0].contiguous()


def square(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, ball: Ball, queries: int, seed: int
) -> Tensor:
    """Runs the black-box attack Square (Andriushchenko et al. 2020) with `queries` queries per image.

    images [B, C, H, W] in [0, 1], labels int64 [B] -> adversarial images [B, C, H, W].
    """
    package = _package(logits_of, ball, Suite(("square",), 1, standard=False), seed, images.device)
    package.square.n_queries = queries
    package.square.seed = seed
    result: Tensor = package.square.perturb(images.contiguous(), labels)
    return result.detach()
