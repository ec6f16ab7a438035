"""FAB, the fast adaptive boundary attack, towards one class or the nearest one.

Croce and Hein 2020, Minimally Distorted Adversarial Examples, algorithm 1. It looks for the nearest image that is
classified differently.

Constants and order of operations are those of the authors' package. Unlike it, an image for which an adversarial image
inside the ball was found is not attacked any further.

Shapes: B batch, C channels, H height, W width, D = C * H * W.
"""

import torch
from torch import Tensor

from dmat.robust.attacks import Ball
from dmat.robust.passes import Goal, Passes

STEPS = 100
_MAX_BIAS = 0.1  # alpha_max: towards the original image
_OVERSHOOT, _BACKWARD = 1.05, 0.9  # eta, beta
_TINY = 1e-8


def fab(passes: Passes, images: Tensor, goal: Goal, ball: Ball) -> tuple[Tensor, Tensor]:
    """Runs 100 steps of FAB. Returns images [B, C, H, W] and which of them are broken inside the ball, bool [B].

    images [B, C, H, W] in [0, 1]. goal: of the kind "difference", or "nearest" without targets. An
    image that is not broken is returned as it is.
    """
    adversarial, broken = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    originals = points = images
    for _ in range(STEPS):
        differences, gradients = _nearest(passes, points, goal, ball.norm)
        points = _step(points, originals, differences, gradients, ball.norm)
        wrong = passes.logits(points).argmax(1) != goal.labels
        inside = wrong & (ball.size(points - originals) <= ball.epsilon)
        adversarial[rows[inside]] = points[inside]
        broken[rows[inside]] = True
        back = originals + (points - originals) * _BACKWARD
        points = torch.where(wrong[:, None, None, None], back, points)
        if inside.any():
            kept = (~inside).nonzero()[:, 0]
            rows, originals, points, goal = rows[kept], originals[kept], points[kept], goal.rows(kept)
            if not len(rows):
                break
    return adversarial, broken


def _nearest(passes: Passes, points: Tensor, goal: Goal, norm: str) -> tuple[Tensor, Tensor]:
    """The difference of logits [B] towards the target, and its gradient [B, C, H, W] at points [B, C, H, W].

    Of the kind "nearest": towards the class whose linearised plane is nearest.
    """
    if goal.kind != "nearest":
        _, differences, gradients = passes.gradient(points, goal)
        return differences, gradients
    differences = torch.empty(len(points), device=points.device)
    distances, gradients = torch.full_like(differences, torch.inf), torch.empty_like(points)
    for k in range(passes.logits(points[:1]).shape[1]):
        towards = Goal("difference", goal.labels, torch.full_like(goal.labels, k))
        _, new, new_gradients = passes.gradient(points, towards)
        dual = new_gradients.flatten(1).abs().sum(1) if norm == "linf" else new_gradients.flatten(1).norm(dim=1)
        new_distances = torch.where(goal.labels == k, torch.inf, new.abs() / (dual + 1e-12))
        nearer = new_distances < distances
        distances, differences = torch.where(nearer, new_distances, distances), torch.where(nearer, new, differences)
        gradients = torch.where(nearer[:, None, None, None], new_gradients, gradients)
    return differences, gradients


def _step(points: Tensor, originals: Tensor, differences: Tensor, gradients: Tensor, norm: str) -> Tensor:
    """Moves points [B, C, H, W] just beyond the plane on which the linearised difference of logits is 0.

    differences [B]; gradients [B, C, H, W]: of the differences.
    """
    x, original, w = points.flatten(1), originals.flatten(1), gradients.flatten(1)  # [B, D]
    b = (w * x).sum(1) - differences
    to_plane, original_to_plane = (to_hyperplane(start, w, b, norm) for start in (x, original))
    length, original_length = (_size(move, norm).clamp(min=_TINY) for move in (to_plane, original_to_plane))
    bias = (length / (length + original_length)).clamp(0, _MAX_BIAS)[:, None]
    moved = (x + _OVERSHOOT * to_plane) * (1 - bias) + (original + original_to_plane * _OVERSHOOT) * bias
    return moved.clamp_(0, 1).reshape(points.shape)


def to_hyperplane(points: Tensor, w: Tensor, b: Tensor, norm: str) -> Tensor:
    """The shortest moves [B, D] from points to the hyperplane {z: w z = b} inside of [0, 1].

    Where the box does not reach the plane, the moves end at its nearest corner. points, w [B, D]; b [B]. Coordinate i
    moves by min(t r_i, room_i) towards the plane, with r_i = 1 (linf) or |w_i| (l2), and room_i to the side of the box.
    The distance that remains falls with t along a polygonal line, whose corners are sorted (appendix of the paper).
    """
    excess = (w * points).sum(1) - b
    side = torch.where(excess >= 0, 1.0, -1.0)
    w, excess = w * side[:, None], excess.abs()[:, None]
    slope = w.abs()
    room = torch.where(w > 0, points, 1 - points)
    rate = torch.ones_like(slope) if norm == "linf" else slope
    moves = slope > (0 if norm == "linf" else _TINY)
    corner = torch.where(moves, room / rate, torch.inf)  # t at which a coordinate has no more room
    corner, order = corner.sort(1)
    filled = torch.where(moves, slope * room, 0).gather(1, order).cumsum(1)  # by coordinates without room, so far
    rates = torch.where(moves, slope * rate, 0).gather(1, order)
    rest = rates.sum(1, keepdim=True) - rates.cumsum(1)  # by coordinates with room, for each unit of t
    reached = filled + torch.where(rest > 0, corner * rest, 0)  # distance covered at each corner
    index = torch.searchsorted(reached, excess)  # corners before the plane, [B, 1]
    before = (index - 1).clamp(min=0)
    started = index > 0
    covered = torch.where(started, filled.gather(1, before), 0)
    speed = torch.where(started, rest.gather(1, before), rates.sum(1, keepdim=True))
    t = torch.where((index < w.shape[1]) & (speed > 0), (excess - covered) / speed, torch.inf).clamp(min=0)
    move = torch.minimum(torch.where(moves, t * rate, 0), room)
    return -w.sign() * move


def _size(moves: Tensor, norm: str) -> Tensor:  # [B, D] -> [B]
    return moves.abs().amax(1) if norm == "linf" else (moves**2).sum(1).sqrt()
