"""AutoAttack (Croce and Hein 2020): which images a suite of attacks breaks.

The attacks are dmat's own. They draw the random numbers of the authors' package, in its order, and break the same
images (`tests/test_auto_attack.py` compares the two image by image).

Shapes: B images, C channels, H height, W width, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust import apgd as gradient_ascent
from dmat.robust import fab as boundary_search
from dmat.robust import quick_tier
from dmat.robust import square as square_search
from dmat.robust.apgd import apgd, random_start
from dmat.robust.attacks import Ball, Logits
from dmat.robust.authors_package import package_attacks
from dmat.robust.fab import fab
from dmat.robust.passes import GRADIENT, Goal, Passes
from dmat.robust.quick_tier import QuickTier

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_CLASSES_NEEDED = {"apgd-dlr": 3, "apgd-t": 4}  # the loss compares with the third and the fourth logit
_MIN_HEIGHT_L2_SQUARE = 5  # pixels
_STANDARD_TARGETS = 9  # wrong classes that the targeted attacks of the standard suite try

ROBUST, MISCLASSIFIED = -1, -2  # values of `broken_by` for images that no attack broke


# Called when a part of an attack begins or has ended, with a name such as "apgd-t 3/9" (three of nine parts are
# finished), the passes left if no other image is broken, and the number of images that are not broken.
Watch = Callable[[str, int, int], None]


def _ignore(attack_name: str, passes_left: int, unbroken: int) -> None:
    """The watch of nobody."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks in their order; each runs on the images that are still robust to the earlier ones."""

    attacks: tuple[str, ...]
    classes: int
    targets: int  # wrong classes that a targeted attack tries
    standard: bool  # whether a result may be called a result of standard AutoAttack
    quick: bool = False  # the quick tier (`quick_tier`)

    @property
    def name(self) -> str:
        """The name to report beside a result: "standard", "quick", or "nonstandard" with the attacks."""
        if self.quick:
            return "quick"
        return "standard" if self.standard else f"nonstandard ({', '.join(self.attacks)})"

    def parts(self, name: str) -> list[int]:
        """Forward passes that each part of an attack makes for an image that it does not break (see `GRADIENT`).

        A targeted attack has one part for each target, the others one. The few passes between the parts are left out.
        """
        if self.quick:
            return quick_tier.parts(name, self.targets)
        ascent = GRADIENT * (gradient_ascent.STEPS + 1)
        passes = {
            "apgd-t": ascent,
            "fab": boundary_search.STEPS * (GRADIENT * self.classes + 1),
            "fab-t": boundary_search.STEPS * (GRADIENT + 1),
            "square": square_search.QUERIES + 1,
        }.get(name, ascent)
        return [passes] * (self.targets if name in ("apgd-t", "fab-t") else 1)

    @property
    def passes(self) -> int:
        """Forward passes of the whole suite for an image that nothing breaks."""
        return sum(sum(self.parts(name)) for name in self.attacks)


def suite(attacks: str | Sequence[str], classes: int) -> Suite:
    """Returns the suite of `attacks`, "standard", "quick" or names of `ATTACKS`, for a model with `classes` classes.

    With fewer than ten classes the targeted attacks try all wrong classes. With fewer than four the standard suite
    leaves out APGD-T, whose loss is not defined, and is no longer standard. Raises DmatError for an unknown attack, or
    one that needs more classes.
    """
    if classes < 2:
        raise DmatError(f"the model has {classes} class; expected 2 or more; there is nothing to attack")
    targets = min(_STANDARD_TARGETS, classes - 1)
    if attacks == "standard":
        possible = tuple(name for name in STANDARD if classes >= _CLASSES_NEEDED.get(name, 2))
        return Suite(possible, classes, targets, standard=possible == STANDARD)
    if attacks == "quick":
        if classes < _CLASSES_NEEDED["apgd-t"]:
            raise DmatError(
                f"auto_attack is quick, which needs {_CLASSES_NEEDED['apgd-t']} classes, and the model has {classes}; "
                f"expected another suite; write standard, which has few targets here"
            )
        return Suite(quick_tier.ATTACKS, classes, targets, standard=False, quick=True)
    names = tuple(attacks)
    for name in names:
        if name not in ATTACKS:
            raise DmatError(f"attack {name!r} is not known; expected some of {', '.join(ATTACKS)}, standard or quick")
        if classes < _CLASSES_NEEDED.get(name, 2):
            raise DmatError(
                f"{name} needs {_CLASSES_NEEDED[name]} classes, the model has {classes}; expected attacks without the "
                f"DLR loss; leave it out, or write standard"
            )
    return Suite(names, classes, targets, standard=names == STANDARD)


def attack(
    logits_of: Logits,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    attack_suite: Suite,
    seed: int,
    batch: int,
    code: str = "dmat",
    watch: Watch = _ignore,
) -> tuple[Tensor, Tensor]:
    """Runs the attacks of a suite. Returns adversarial images [B, C, H, W] and `broken_by`, int64 [B].

    images [B, C, H, W] in [0, 1], labels int64 [B], on the device of the model, which is in evaluation mode and
    float32. Each attack runs on the images that are still classified correctly, in batches of `batch`, each with
    `seed`, as in one call of the authors' package. code: "dmat", or "pyautoattack" for that package itself, which is
    watched at the end of its attacks alone, and has no quick tier.
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
        run_package = package_attacks(logits_of, ball, attack_suite.targets, seed, images.device)
        run: _Run = lambda name, x, y, *_: run_package(name, x, y)  # noqa: E731
    elif attack_suite.quick:
        run = QuickTier(
            passes, ball, attack_suite.classes, attack_suite.targets, seed, batch, len(images), images.device
        ).run
    else:
        run_ours = functools.partial(_run, passes, ball, attack_suite.targets, seed)
        run = lambda name, x, y, _, end_part: run_ours(name, x, y, end_part)  # noqa: E731
    images = images.contiguous()
    adversarial = images.clone()
    broken_by = torch.full_like(labels, ROBUST)
    correct = torch.cat([passes.logits(x).argmax(1) for x in images.split(batch)]) == labels  # [B]
    broken_by[~correct] = MISCLASSIFIED
    course = _Course(attack_suite, watch)
    for number, name in enumerate(attack_suite.attacks):
        standing = torch.nonzero(broken_by == ROBUST)[:, 0]
        course.begin(number, len(standing))
        for rows in standing.split(batch) if len(standing) else ():
            course.begin_batch(len(rows))
            x, y = images[rows], labels[rows]
            attacked = run(name, x, y, rows, course.end_part)
            broken = passes.logits(attacked).argmax(1) != y  # the same batch as the package's decides
            adversarial[rows[broken]] = attacked[broken]
            broken_by[rows[broken]] = number
            course.end_batch(int((~broken).sum()))
    return adversarial, broken_by


# Name of an attack, images [B, C, H, W], labels [B], rows [B] and `end_part`, as for `QuickTier.run`.
_Run = Callable[[str, Tensor, Tensor, Tensor, Callable[[int], None]], Tensor]


class _Course:
    """Counts the passes that a suite still makes if no other image is broken, and says so at the end of every part."""

    def __init__(self, attack_suite: Suite, watch: Watch):
        self._suite, self._watch = attack_suite, watch

    def begin(self, number: int, standing: int) -> None:
        """An attack of the suite begins. standing: images that are not broken."""
        self._name, *later = self._suite.attacks[number:]
        self._parts = self._suite.parts(self._name)
        self._later = sum(sum(self._suite.parts(name)) for name in later)
        self._waiting, self._survivors = standing, 0

    def begin_batch(self, count: int) -> None:
        """The attack begins with the next `count` images."""
        self._waiting -= count
        self._ended = 0
        self._say(count)

    def end_part(self, robust: int) -> None:
        """A part has ended. robust: images of the batch that are not broken."""
        self._ended += 1
        self._say(robust)

    def end_batch(self, robust: int) -> None:
        """The attack has ended for the batch, `robust` images of which are not broken."""
        self._survivors += robust
        self._ended = len(self._parts)
        self._say(0)

    def _say(self, robust: int) -> None:
        standing = self._waiting + self._survivors + robust
        left = self._waiting * sum(self._parts) + robust * sum(self._parts[self._ended :]) + standing * self._later
        part = f" {self._ended}/{len(self._parts)}" if len(self._parts) > 1 else ""
        self._watch(f"{self._name}{part}", left, standing)


def _run(
    passes: Passes, ball: Ball, targets: int, seed: int, name: str, images: Tensor, labels: Tensor,
    end_part: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """Runs one attack. Returns an adversarial image where it found one, else the image: [B, C, H, W].

    images [B, C, H, W], labels int64 [B]. targets: number of wrong classes that a targeted attack tries, those with the
    highest logits first. end_part: called after each target with the number of images that are not broken.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in ("apgd-ce", "apgd-dlr"):
        start = random_start(images, ball, generator)
        return apgd(passes, images, Goal(name.removeprefix("apgd-"), labels), ball, start)[0]
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
            start = random_start(x, ball, generator)
            attacked, broken, _ = apgd(passes, x, Goal("dlr-targeted", y, target), ball, start)
        else:
            attacked, broken = fab(passes, x, Goal("difference", y, target), ball)
        adversarial[robust[broken]] = attacked[broken]
        robust = robust[~broken]
        end_part(len(robust))
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
