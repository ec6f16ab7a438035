"""The quick tier of AutoAttack: the standard attacks, where they have a chance. Never for a headline.

Most passes of the standard suite go into images and targets that no attack comes near. The quick tier looks at their
margins early, and gives them up:

- APGD-CE, and APGD-T towards every target, stop at their first check of the step size. From the same start, the images
  and targets that are near then get the whole attack, those of all targets together in batches. The near targets also
  get the first steps from other starts, because the standard suite finds some of them by FAB-T and Square.
- FAB-T tries the near targets alone, together in batches.
- Square attacks the images that have a near target, with several queries at once, until their margin has not become
  smaller for a while.

Random starts are those of the standard suite while the images broken are the same, so that few flags differ.
`benchmarks/auto_attack_quick.py` counts them, and the time.

Shapes: B images, C channels, H height, W width, K classes, M pairs of an image and a target.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmat.robust import apgd as gradient_ascent
from dmat.robust import fab as boundary_search
from dmat.robust import square as square_search
from dmat.robust.apgd import apgd, random_start
from dmat.robust.attacks import Ball
from dmat.robust.fab import fab
from dmat.robust.passes import GRADIENT, Goal, Passes

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")

# What an attack must reach at the first check to continue, chosen with digits (docs/evaluation.md says how):
_NEAR_CE = 0.5  # cross-entropy; ln 2 = 0.69 where two classes are equal
_NEAR_TARGET = -0.4  # targeted DLR loss; 0 where the target is reached
_OTHER_STARTS = 3  # of APGD-T towards a near target
_AT_ONCE, _PATIENCE = 8, 500  # queries of Square
# Shares of unbroken images, and of their pairs with a target, that were near there: for the estimate of passes alone.
_IMAGES_NEAR_CE, _IMAGES_NEAR_TARGET, _PAIRS_NEAR_TARGET = 0.19, 0.2, 0.025


def parts(name: str, targets: int) -> list[int]:
    """Forward passes that each part of an attack is expected to make for an image that nothing breaks.

    APGD-T has a part for each target, and the last one for the near ones; the others have one part.
    """
    first_steps, ascent = (GRADIENT * (steps + 1) for steps in (gradient_ascent.FIRST_CHECK, gradient_ascent.STEPS))
    search = boundary_search.STEPS * (GRADIENT + 1)
    return {
        "apgd-ce": [first_steps + round(ascent * _IMAGES_NEAR_CE)],
        "apgd-t": [first_steps] * targets
        + [round((ascent + _OTHER_STARTS * first_steps) * targets * _PAIRS_NEAR_TARGET)],
        "fab-t": [round(search * targets * _PAIRS_NEAR_TARGET)],
        "square": [round(square_search.QUERIES * _IMAGES_NEAR_TARGET)],
    }[name]


class QuickTier:
    """Runs the attacks on `count` images, in the order of `ATTACKS`, and remembers which of K targets are near.

    targets: number of wrong classes tried, those with the highest logits first. batch: images in a call of the model.
    """

    def __init__(
        self, passes: Passes, ball: Ball, classes: int, targets: int, seed: int, batch: int, count: int,
        device: torch.device,
    ):  # fmt: skip
        self._passes, self._ball, self._targets, self._seed, self._batch = passes, ball, targets, seed, batch
        self._near = torch.zeros(count, classes, dtype=torch.bool, device=device)

    def run(self, name: str, images: Tensor, labels: Tensor, rows: Tensor, end_part: Callable[[int], None]) -> Tensor:
        """Runs one attack. Returns the adversarial images, and unchanged those that it does not break: [B, C, H, W].

        images [B, C, H, W], B at most `batch`; labels int64 [B]. rows int64 [B]: which of the `count` images these are.
        end_part: called after each target of APGD-T with the number of images that are not broken.
        """
        generator = torch.Generator().manual_seed(self._seed)
        if name == "apgd-ce":
            return self._ascend(images, labels, generator)
        if name == "apgd-t":
            return self._ascend_towards_targets(images, labels, rows, generator, end_part)
        near = self._near[rows]
        if name == "square":
            attacked = near.any(1)
            return square_search.square(
                self._passes, images, labels, self._ball, generator, attacked=attacked, patience=_PATIENCE,
                at_once=min(_AT_ONCE, max(1, self._batch // max(1, int(attacked.sum())))),
            )[0]  # fmt: skip
        adversarial = images.clone()
        positions, targets = near.nonzero(as_tuple=True)
        self._attack_pairs(adversarial, images, positions, Goal("difference", labels[positions], targets))
        return adversarial

    def _ascend(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """APGD-CE: images [B, C, H, W], labels int64 [B] -> adversarial images [B, C, H, W], as for `run`."""
        goal, starts = Goal("ce", labels), random_start(images, self._ball, generator)
        adversarial, broken, highest = apgd(self._passes, images, goal, self._ball, starts, gradient_ascent.FIRST_CHECK)
        near = (~broken & (highest > _NEAR_CE)).nonzero()[:, 0]
        self._attack_pairs(adversarial, images, near, goal.rows(near), starts[near])
        return adversarial

    def _ascend_towards_targets(
        self, images: Tensor, labels: Tensor, rows: Tensor, generator: torch.Generator, end_part: Callable[[int], None]
    ) -> Tensor:
        """APGD-T: images [B, C, H, W], labels and rows int64 [B] -> adversarial images [B, C, H, W], as for `run`."""
        ranking = self._passes.logits(images).sort(1, descending=True).indices  # [B, K]
        adversarial, unbroken = images.clone(), torch.arange(len(images), device=images.device)
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # positions [M], targets [M], starts [M, C, H, W]
        for rank in range(1, self._targets + 1):
            if not len(unbroken):
                return adversarial
            x, targets = images[unbroken], ranking[unbroken, rank]
            goal, starts = Goal("dlr-targeted", labels[unbroken], targets), random_start(x, self._ball, generator)
            attacked, broken, highest = apgd(self._passes, x, goal, self._ball, starts, gradient_ascent.FIRST_CHECK)
            adversarial[unbroken[broken]] = attacked[broken]
            near = ~broken & (highest > _NEAR_TARGET)
            pairs.append((unbroken[near], targets[near], starts[near]))
            unbroken = unbroken[~broken]
            end_part(len(unbroken))
        positions, targets, starts = (torch.cat(columns) for columns in zip(*pairs, strict=True))
        open_pairs = torch.isin(positions, unbroken)
        positions, targets = positions[open_pairs], targets[open_pairs]
        self._near[rows[positions], targets] = True
        goal = Goal("dlr-targeted", labels[positions], targets)
        self._attack_pairs(adversarial, images, positions, goal, starts[open_pairs])
        again = torch.arange(len(positions), device=images.device).repeat(_OTHER_STARTS)
        positions, goal = positions[again], goal.rows(again)
        starts = random_start(images[positions], self._ball, generator)
        self._attack_pairs(adversarial, images, positions, goal, starts, gradient_ascent.FIRST_CHECK)
        return adversarial

    def _attack_pairs(
        self, adversarial: Tensor, images: Tensor, positions: Tensor, goal: Goal, starts: Tensor | None = None,
        steps: int = gradient_ascent.STEPS,
    ) -> None:  # fmt: skip
        """Runs `steps` of APGD from `starts` [M, C, H, W], or FAB without, and writes the images that it breaks.

        adversarial, images [B, C, H, W]. positions int64 [M]: of the images that are attacked. goal: of each of these.
        """
        for first in range(0, len(positions), self._batch):
            part = torch.arange(first, min(first + self._batch, len(positions)), device=images.device)
            x, part_goal = images[positions[part]], goal.rows(part)
            if starts is None:
                attacked, broken = fab(self._passes, x, part_goal, self._ball)
            else:
                attacked, broken, _ = apgd(self._passes, x, part_goal, self._ball, starts[part], steps)
            adversarial[positions[part][broken]] = attacked[broken]
