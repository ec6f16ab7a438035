"""AutoAttack (Croce and Hein 2020): which images a suite of attacks breaks.

The attacks are dmat's own. They draw the random numbers of the authors' package, in its order, and break the same
images (`tests/test_auto_attack.py` compares the two image by image).

Shapes: B images, C channels, H height, W width, K classes.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust import square as square_search
from dmat.robust.apgd import apgd
from dmat.robust.attacks import Ball, Logits
from dmat.robust.authors_package import package_attacks
from dmat.robust.fab import fab
from dmat.robust.passes import Goal, Passes

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
    logits_of: Logits,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    attack_suite: Suite,
    seed: int,
    batch: int,
    code: str = "dmat",
) -> tuple[Tensor, Tensor]:
    """Runs the attacks of a suite. Returns adversarial images [B, C, H, W] and `broken_by`, int64 [B].

    images [B, C, H, W] in [0, 1], labels int64 [B], on the device of the model, which is in evaluation mode and
    float32. Each attack runs on the images that are still classified correctly, in batches of `batch`, each with
    `seed`, as in one call of the authors' package. code: "dmat", or "pyautoattack" for that package itself.
    The adversarial image of an image that no attack broke is the image itself. broken_by: position in
    `attack_suite.attacks`, MISCLASSIFIED (wrong without any attack) or ROBUST.
    Raises DmatError if images are too small for Square in l2.
    """
    if ball.norm == "l2" and "square" in attack_suite.attacks and images.shape[2] < _MIN_HEIGHT_L2_SQUARE:
        raise DmatError(
            f"images are {images.shape[2]} pixels high; expected {_MIN_HEIGHT_L2_SQUARE} or more, because the l2 "
            f"version of Square stacks {_MIN_HEIGHT_L2_SQUARE} squares vertically; choose the other attacks"
        )
    passes = Passes(logits_of)
    if code == "pyautoattack":
        run = package_attacks(logits_of, ball, attack_suite.targets, seed, images.device)
    else:
        run = functools.partial(_run, passes, ball, attack_suite.targets, seed)
    images = images.contiguous()
    adversarial = images.clone()
    broken_by = torch.full_like(labels, ROBUST)
    correct = torch.cat([passes.logits(x).argmax(1) for x in images.split(batch)]) == labels  # [B]
    broken_by[~correct] = MISCLASSIFIED
    for number, name in enumerate(attack_suite.attacks):
        for rows in torch.nonzero(broken_by == ROBUST)[:, 0].split(batch):
            if not len(rows):
                continue
            x, y = images[rows], labels[rows]
            attacked = run(name, x, y)
            broken = passes.logits(attacked).argmax(1) != y  # the same batch as the package's decides
            adversarial[rows[broken]] = attacked[broken]
            broken_by[rows[broken]] = number
    return adversarial, broken_by


def _run(passes: Passes, ball: Ball, targets: int, seed: int, name: str, images: Tensor, labels: Tensor) -> Tensor:
    """Runs one attack. Returns an adversarial image where it found one, else the image: [B, C, H, W].

    images [B, C, H, W], labels int64 [B]. targets: number of wrong classes that a targeted attack tries, those with the
    highest logits first.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in ("apgd-ce", "apgd-dlr"):
        return apgd(passes, images, Goal(name.removeprefix("apgd-"), labels), ball, generator)[0]
    if name == "square":
        return square_search.square(passes, images, labels, ball, generator)[0]
    if name == "fab":
        return fab(passes, images, Goal("nearest", labels), ball)[0]
    ranking = passes.logits(images).sort(1, descending=True).indices  # [B, K]
    adversarial, robust = images.clone(), torch.arange(len(images), device=images.device)
    for rank in range(1, targets + 1):
        if not len(robust):
            break
        x, y, target = images[robust], labels[robust], ranking[robust, rank]
        if name == "apgd-t":
            attacked, broken = apgd(passes, x, Goal("dlr-targeted", y, target), ball, generator)
        else:
            attacked, broken = fab(passes, x, Goal("difference", y, target), ball)
        adversarial[robust[broken]] = attacked[broken]
        robust = robust[~broken]
    return adversarial


def square(logits_of: Logits, images: Tensor, labels: Tensor, ball: Ball, queries: int, seed: int) -> Tensor:
    """Runs the black-box attack Square (Andriushchenko et al. 2020) with `queries` queries per image.

    images [B, C, H, W] in [0, 1], labels int64 [B] -> adversarial images [B, C, H, W], where an image is broken.
    """
    passes, images = Passes(logits_of), images.contiguous()
    generator = torch.Generator().manual_seed(seed)
    adversarial, correct = images.clone(), torch.nonzero(passes.logits(images).argmax(1) == labels)[:, 0]
    if len(correct):
        adversarial[correct], _ = square_search.square(
            passes, images[correct], labels[correct], ball, generator, queries
        )
    return adversarial
