"""Square, a black-box attack by random search (Andriushchenko et al. 2020).

Random numbers and constants are those of the authors' package. Unlike it, only the square that changes is computed.

Shapes: B batch, C channels, H height, W width.
"""

import math

import torch
from torch import Tensor

from dmat.robust.attacks import Ball, logit_margin
from dmat.robust.passes import Passes

QUERIES = 5000
_FIRST_SHARE = 0.8  # p: share of the pixels in a square, at first
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries


def square(
    passes: Passes, images: Tensor, labels: Tensor, ball: Ball, generator: torch.Generator, queries: int = QUERIES,
    attacked: Tensor | None = None, at_once: int = 1, patience: int = QUERIES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs Square with up to `queries` queries after the first. Returns images [B, C, H, W] and which are broken [B].

    images [B, C, H, W] in [0, 1], labels int64 [B]. generator: the next numbers are those of the package. An image that
    is not broken is returned as it is.
    attacked: bool [B]; the others are returned as they are; None: all are attacked. at_once: queries of an image in one
    call of the model, the best of which counts. patience: an image is given up after so many queries without a smaller
    margin.
    """
    search = (_LinfSearch if ball.norm == "linf" else _L2Search)(images, ball.epsilon, generator)
    adversarial, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    candidates = search.first()
    rows = torch.arange(len(images), device=images.device)
    if attacked is not None:
        rows = rows[attacked]
        candidates = candidates[rows]
        search.keep(rows)
    margins = torch.full((len(rows),), torch.inf, device=images.device)
    improved = torch.zeros_like(rows)  # the query that gave the margin
    query = 0
    while query <= queries and len(rows):
        count = min(at_once, queries + 1 - query) if query else 1
        if query:
            candidates = torch.cat([search.candidates(query - 1 + k) for k in range(count)])  # [count * B, C, H, W]
        new = logit_margin(passes.logits(candidates), labels[rows].repeat(count))
        if count > 1:
            new, best = new.reshape(count, -1).min(0)
            candidates = candidates[best * len(rows) + torch.arange(len(rows), device=rows.device)]
        better = new < margins
        margins, improved = torch.where(better, new, margins), torch.where(better, query, improved)
        search.accept(better, candidates)
        query += count
        done = margins <= 0
        ended = done | (query - improved > patience)
        if ended.any():
            adversarial[rows[done]] = search.points[done]
            broken[rows[done]] = True
            kept = (~ended).nonzero()[:, 0]
            rows, margins, improved = rows[kept], margins[kept], improved[kept]
            search.keep(kept)
    return adversarial, broken


class _Search:
    """The images of a batch that are not broken yet, and the best point so far of each.

    points [B, C, H, W]: the best points.
    """

    def __init__(self, images: Tensor, epsilon: float, generator: torch.Generator):
        self.images, self.points, self.epsilon, self.generator = images, images, epsilon, generator
        self.channels, self.height, self.width = images.shape[1:]

    def keep(self, index: Tensor) -> None:
        """Forgets all images but those at `index`, int64 [M]."""
        self.images, self.points = self.images[index], self.points[index]

    def accept(self, better: Tensor, candidates: Tensor) -> None:
        """Takes candidates [B, C, H, W] as best points. better: bool [B]."""
        self.points = torch.where(better[:, None, None, None], candidates, self.points)

    def _side(self, query: int) -> float:
        """The side of a square with the share of the pixels that belongs to a query, counted from 0."""
        share = _FIRST_SHARE / 2 ** sum(query > limit for limit in _HALVED_AFTER)
        return math.sqrt(share * self.height * self.width)

    def _random(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), of any shape."""
        return torch.rand(*shape, generator=self.generator)

    def _signs(self, *shape: int) -> Tensor:
        """Random signs, of any shape."""
        return torch.sign(2 * self._random(*shape) - 1).to(self.images.device)

    def _corner(self, side: int) -> tuple[slice, slice]:
        """A square at a random place: its rows and columns."""
        top, left = (int(length * self._random(1)) for length in (self.height - side, self.width - side))
        return slice(top, top + side), slice(left, left + side)


class _LinfSearch(_Search):
    """Squares of one colour (algorithm 2)."""

    def first(self) -> Tensor:
        """Vertical stripes of plus or minus epsilon: [B, C, H, W]."""
        stripes = self._signs(len(self.images), self.channels, 1, self.width)
        self.low, self.high = self.images - self.epsilon, self.images + self.epsilon
        return (self.images + self.epsilon * stripes).clamp_(0, 1)

    def keep(self, index: Tensor) -> None:  # int64 [M]
        super().keep(index)
        self.low, self.high = self.low[index], self.high[index]

    def candidates(self, query: int) -> Tensor:
        """The best points with one changed square, the same for all images: [B, C, H, W]."""
        side = min(max(round(self._side(query)), 1), self.height, self.width)
        at = (slice(None), slice(None), *self._corner(side))
        colour = 2.0 * self.epsilon * self._signs(self.channels, 1, 1)
        candidates = self.points.clone()
        candidates[at] = torch.clamp(self.points[at] + colour, self.low[at], self.high[at]).clamp_(0, 1)
        return candidates


class _L2Search(_Search):
    """Bumps of two signs, which move the perturbation of one window into another one (algorithm 3)."""

    def first(self) -> Tensor:
        """Five by five bumps: [B, C, H, W]."""
        perturbation = torch.zeros_like(self.images)
        side = self.height // 5
        start = (self.height - 5 * side) // 2
        for row in range(self.height // side):
            for column in range(self.width // side):
                top, left = start + row * side, start + column * side
                bump = self._bump(side) * self._signs(len(self.images), self.channels, 1, 1)
                window = perturbation[:, :, top : top + side, left : left + side]
                window += bump[:, :, : window.shape[2], : window.shape[3]]
        return self._on_sphere(perturbation)

    def candidates(self, query: int) -> Tensor:
        """The best points, with a perturbation that is moved between two windows: [B, C, H, W]."""
        side = max(round(self._side(query)), 3)
        side = min(side + (side % 2 == 0), self.height, self.width)
        perturbation = self.points - self.images
        target, source = (
            (slice(None), slice(None), *self._corner(side)),
            (slice(None), slice(None), *self._corner(side)),
        )
        windows = torch.zeros(self.height, self.width, device=self.images.device)
        windows[target[2:]] = windows[source[2:]] = 1.0
        left = (self.epsilon**2 - _length(perturbation, (1, 2, 3)) ** 2).clamp(min=0)  # of the ball, [B, 1, 1, 1]
        in_windows = _length(perturbation * windows, (2, 3))  # [B, C, 1, 1]
        bump = self._bump(side) * self._signs(len(self.images), self.channels, 1, 1)
        direction = bump + perturbation[target] / (_length(perturbation[target], (2, 3)) + 1e-12)
        budget = (left / self.channels + in_windows**2).sqrt()
        perturbation[source] = 0.0
        perturbation[target] = direction / (_length(direction, (2, 3)) + 1e-12) * budget
        return self._on_sphere(perturbation)

    def _on_sphere(self, perturbation: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        length = _length(perturbation, (1, 2, 3)) + 1e-12
        return (self.images + perturbation / length * self.epsilon).clamp_(0, 1)

    def _bump(self, side: int) -> Tensor:
        """A positive and a negative hill beside each other, of length 1: [S, S]. One draw decides the axis."""
        half = side // 2
        bump = torch.cat([_hill(half, side), -_hill(side - half, side)])
        bump = bump / (bump**2).sum().sqrt()
        return (bump.T if float(self._random(1)) > 0.5 else bump).to(self.images.device)


def _hill(height: int, width: int) -> Tensor:
    """The sum of 1 / k^2 over all rectangles k that cover a pixel, which grow around the middle: [H, W].

    Scaled to length 1 (Andriushchenko et al. 2020, section 4.2).
    """
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    first = torch.maximum(rows[:, None], columns[None])  # the smallest rectangle that covers a pixel
    hill = torch.zeros(height, width)
    for k in range(max(height // 2, width // 2) + 1):
        hill += (first <= k) / (k + 1.0) ** 2
    return hill / (hill**2).sum().sqrt()


def _length(perturbation: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The Euclidean length over some dimensions, which stay with size 1. perturbation: [B, C, H, W]."""
    return (perturbation**2).sum(dims, keepdim=True).sqrt()
