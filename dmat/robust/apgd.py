"""APGD, projected gradient ascent whose step size adapts itself (Croce and Hein 2020, algorithm 1).

Random numbers, order of operations and constants are those of the authors' package, so that the same images are broken
(`tests/test_auto_attack.py`). Unlike it, an image that is broken is not attacked any further.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import torch
from torch import Tensor

from dmat.robust.attacks import Ball
from dmat.robust.passes import Goal, Passes

STEPS = 100
_MOMENTUM = 0.75  # alpha: share of the new step; the rest continues the last one
FIRST_CHECK, _SHORTER, _SHORTEST = 22, 3, 6  # steps between two checks of the step size: at first, less by, at least
_RISING = 0.75  # rho: with fewer rising steps than this share, the step size is halved
_TINY = 1e-12


def apgd(
    passes: Passes, images: Tensor, goal: Goal, ball: Ball, start: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs APGD from one start. Returns images [B, C, H, W], which of them are broken, bool [B], and the highest value
    of the goal [B], infinity where an image is broken.

    images [B, C, H, W] in [0, 1]. start [B, C, H, W]: see `random_start`. steps: the first ones of the attack with
    `STEPS`. An image that is not broken is returned as it is.
    """
    adversarial, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    highest = torch.full((len(images),), torch.inf, device=images.device)
    state = _State(passes, images, goal, ball, start)
    interval, since_check = FIRST_CHECK, 0
    for step in range(steps + 1):
        if step:
            state.move(first=step == 1)
        wrong = state.evaluate(first=step == 0)
        if step and (since_check := since_check + 1) == interval:
            state.check(interval)
            interval, since_check = max(interval - _SHORTER, _SHORTEST), 0
        if wrong.any():
            adversarial[state.rows[wrong]] = state.evaluated[wrong]
            broken[state.rows[wrong]] = True
            if not state.keep(~wrong):
                break
    highest[state.rows] = state.best_values
    return adversarial, broken, highest


class _State:
    """The images of a batch that are not broken yet, and what APGD remembers of them.

    rows int64 [B]: their positions in the batch. evaluated [B, C, H, W]: where the model was evaluated last.
    """

    def __init__(self, passes: Passes, images: Tensor, goal: Goal, ball: Ball, start: Tensor):
        self.passes, self.ball, self.goal = passes, ball, goal
        self.rows = torch.arange(len(images), device=images.device)
        self.images = images
        self.points = self.previous = self.evaluated = start
        self.step_sizes = torch.full((len(images), 1, 1, 1), 2.0 * ball.epsilon, device=images.device)
        self.values = [torch.empty(0)]  # of the goal [B], at each step since the last check and the one before
        self.reduced = torch.ones(len(images), dtype=torch.bool, device=images.device)  # at the last check

    def move(self, first: bool) -> None:
        """One step, with momentum, inside the ball and [0, 1]."""
        momentum = 1.0 if first else _MOMENTUM
        last_step, self.previous = self.points - self.previous, self.points
        target = self._inside(self.points + self.step_sizes * self._direction(self.gradients))
        moved = self.points + (target - self.points) * momentum + last_step * (1 - momentum)
        self.points = self.evaluated = self._inside(moved)

    def evaluate(self, first: bool) -> Tensor:
        """Evaluates the goal and its gradient where the images are. Returns which predictions are wrong, bool [B]."""
        logits, values, self.gradients = self.passes.gradient(self.points, self.goal)
        if first:
            self.best, self.best_values, self.best_gradients = self.points, values, self.gradients
            self.best_at_check = values
            self.values = []
        else:
            better = values > self.best_values
            self.best = _where(better, self.points, self.best)
            self.best_gradients = _where(better, self.gradients, self.best_gradients)
            self.best_values = torch.where(better, values, self.best_values)
            self.values.append(values)
        return logits.argmax(1) != self.goal.labels

    def check(self, interval: int) -> None:
        """Halves the step sizes of images whose goal rises too seldom or has no new maximum, and moves these back to
        their best point (Croce and Hein 2020, conditions 1 and 2)."""
        values = torch.stack(self.values[-(interval + 1) :])  # [interval + 1, B]; one less at the first check
        rising = (values[1:] > values[:-1]).sum(0)
        if len(values) <= interval:  # the package compares the first step with zero
            rising = rising + (values[0] > 0)
        halved = (rising <= interval * _RISING) | (~self.reduced & (self.best_at_check >= self.best_values))
        self.reduced, self.best_at_check = halved, self.best_values
        self.step_sizes = torch.where(halved[:, None, None, None], self.step_sizes / 2, self.step_sizes)
        self.points = _where(halved, self.best, self.points)
        self.gradients = _where(halved, self.best_gradients, self.gradients)
        self.values = self.values[-1:]

    def keep(self, kept: Tensor) -> bool:
        """Forgets all images but some. kept: bool [B]. Returns whether any are left."""
        index = kept.nonzero()[:, 0]
        self.goal = self.goal.rows(index)
        for name in ("rows", "images", "points", "previous", "step_sizes", "reduced", "gradients", "best",
                     "best_values", "best_gradients", "best_at_check"):  # fmt: skip
            setattr(self, name, getattr(self, name)[index])
        self.values = [values[index] for values in self.values]
        return len(index) > 0

    def _direction(self, gradients: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return gradients.sign() if self.ball.norm == "linf" else _normalised(gradients)

    def _inside(self, points: Tensor) -> Tensor:
        """The points [B, C, H, W], moved into the ball and into [0, 1]."""
        epsilon = self.ball.epsilon
        if self.ball.norm == "linf":
            return torch.clamp(points, self.images - epsilon, self.images + epsilon).clamp_(0, 1)
        perturbation = points - self.images
        length = _length(perturbation).clamp(max=epsilon)
        return (self.images + _normalised(perturbation) * length).clamp_(0, 1)


def random_start(images: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Points on the surface of the balls around images, in [0, 1]; both [B, C, H, W].

    generator: the next numbers are those of the package.
    """
    if ball.norm == "linf":
        noise = 2 * torch.rand(images.shape, generator=generator) - 1
        noise = noise / (noise.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) + _TINY)
    else:
        noise = _normalised(torch.randn(images.shape, generator=generator))
    return (images + ball.epsilon * noise.to(images.device)).clamp_(0, 1)


def _normalised(perturbation: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
    return perturbation / (_length(perturbation) + _TINY)


def _length(perturbation: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 1, 1, 1]
    return (perturbation**2).flatten(1).sum(1).sqrt().reshape(-1, 1, 1, 1)


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Some rows of `new`, the others of `old`: [B, C, H, W]. rows: bool [B]."""
    return torch.where(rows[:, None, None, None], new, old)
