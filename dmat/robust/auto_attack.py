"""AutoAttack (Croce and Hein 2020) through the authors' package, which only this file imports."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dmat.errors import DmatError
from dmat.robust.attacks import Ball

_NORMS = {"linf": "Linf", "l2": "L2"}
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}  # the loss compares with the third and the fourth logit
_SQUARES = 5
_TARGETS = 9  # of the targeted attacks, in the standard suite

ROBUST, MISCLASSIFIED = -1, -2  # in `broken_by`, where no attack has a number


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks in their order, each on the images that those before it left; what a result of them may be called."""

    attacks: tuple[str, ...]
    targets: int  # wrong classes that a targeted attack tries
    standard: bool

    @property
    def name(self) -> str:
        return "standard" if self.standard else f"nonstandard ({', '.join(self.attacks)})"


def suite(wanted: str | Sequence[str], classes: int) -> Suite:
    """ "standard" or names of `ATTACKS`, for a model with so many classes.

    Below ten classes the targeted attacks try all wrong ones. Below four the standard suite has no APGD-T, whose loss
    is not defined, and is not standard any more.
    """
    if classes < 2:
        raise DmatError(f"the model has {classes} class; expected 2 or more; there is nothing to attack")
    targets = min(_TARGETS, classes - 1)
    if wanted == "standard":
        possible = tuple(name for name in STANDARD if classes >= _CLASSES_NEEDED.get(name, 2))
        return Suite(possible, targets, standard=possible == STANDARD)
    chosen = tuple(wanted)
    for name in chosen:
        if name not in ATTACKS:
            raise DmatError(f"attack {name!r} is not known; expected some of {', '.join(ATTACKS)}, or standard")
        if classes < _CLASSES_NEEDED.get(name, 2):
            raise DmatError(
                f"{name} needs {_CLASSES_NEEDED[name]} classes, the model has {classes}; expected attacks without the "
                f"DLR loss; leave it out, or say standard"
            )
    return Suite(chosen, targets, standard=chosen == STANDARD)


def attack(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    chosen: Suite,
    seed: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """The image that broke the model, or the image itself, [B, C, H, W]; and who did, int64 [B].

    broken_by: position in `chosen.attacks`, MISCLASSIFIED (without any attack) or ROBUST. The model in evaluation mode
    and float32, images in [0, 1] on its device. One attack of the package after the other on what is still right,
    in batches of `batch`, each with `seed`: as one call of the package does.
    """
    if ball.norm == "l2" and "square" in chosen.attacks and images.shape[2] < _SQUARES:
        raise DmatError(
            f"images are {images.shape[2]} pixels high; expected {_SQUARES} or more, as the l2 version of Square puts "
            f"{_SQUARES} squares above each other; name the other attacks"
        )
    package = _package(logits_of, ball, chosen, seed, images.device)
    images = images.contiguous()
    found = images.detach().clone()
    broken_by = torch.full_like(labels, ROBUST)
    with torch.no_grad():
        right = torch.cat([logits_of(part).argmax(1) for part in images.split(batch)]) == labels
    broken_by[~right] = MISCLASSIFIED
    for number, name in enumerate(chosen.attacks):
        left = torch.nonzero(broken_by == ROBUST)[:, 0]
        if not len(left):
            break
        package.attacks_to_run = [name]
        worst, prediction = package.run_standard_evaluation(images[left], labels[left], batch_size=batch)
        broken = prediction != labels[left]
        found[left[broken]] = worst[broken].detach()
        broken_by[left[broken]] = number
    return found, broken_by


def _package(logits_of: Callable[[Tensor], Tensor], ball: Ball, chosen: Suite, seed: int, device: torch.device) -> Any:
    """The package's standard version, told how many wrong classes there are and, later, which attack to run."""
    from pyautoattack import AutoAttack

    wrapped: Any = _PackageModel(logits_of)  # the package looks for parameters of a module
    package: Any = AutoAttack(
        wrapped, norm=_NORMS[ball.norm], eps=float(ball.epsilon), version="standard", seed=seed, device=str(device)
    )
    package.apgd_targeted.n_target_classes = chosen.targets
    package.fab.n_target_classes = chosen.targets
    return package


class _PackageModel(torch.nn.Module):
    """The model as the package sees it: images and gradients contiguous, as its `view`s need them, and the model itself
    with channels-last images, in which convolutions are faster."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.logits_of(_ChannelsLast.apply(images))
        return result


class _ChannelsLast(Function):
    """The same numbers in another order in memory, and their gradients in the first one."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].contiguous()


def square(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, ball: Ball, queries: int, seed: int
) -> Tensor:
    """Images of Square (Andriushchenko et al. 2020), a black-box attack, with so many queries: [B, C, H, W]."""
    package = _package(logits_of, ball, Suite(("square",), 1, standard=False), seed, images.device)
    package.square.n_queries = queries
    package.square.seed = seed
    result: Tensor = package.square.perturb(images.contiguous(), labels)
    return result.detach()
