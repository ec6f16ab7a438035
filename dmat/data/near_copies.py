"""Finds near copies within a set of images: pixels nearer than a limit, as generators make them of one training image.

Shapes: N images, M others, H height, W width, C channels, S sums of blocks.
"""

import numpy as np

from dmat.data import overlap

_ROWS = 250  # images that are compared with all earlier ones at a time, to limit memory
_CANDIDATES = 64  # pairs whose pixels are compared at a time
_GRID = 8  # blocks per side of an image, whose sums are compared first
_ROUNDING = 1e-12  # of squared norms: far above what float64 rounds, far below a grey level of a pixel


def near_copies(images: np.ndarray, distance: float) -> np.ndarray:
    """Whether each image is a copy of an earlier image of the same set, or nearer to one than `distance`: bool [N].

    images: uint8 [N, H, W, C]. distance: Euclidean, in pixels of [0, 1]. Exact: sums of blocks of pixels, divided by
    the root of the block's size, are an orthogonal projection, so they are never farther apart than the images, and
    only the pixels of pairs with near sums are compared. The time grows with the square of N, the memory with N.
    """
    limit = (255 * distance) ** 2
    sums = _block_sums(images)
    squares = (sums**2).sum(1)  # [N]
    loose_limit = limit + _ROUNDING * squares.max(initial=0)
    is_copy = overlap.repeated(overlap.digests(images))
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        squared = squares[rows, None] + squares[: rows.stop] - 2 * sums[rows] @ sums[: rows.stop].T  # [rows, earlier]
        is_candidate = np.tril(squared < loose_limit, start - 1)  # earlier images alone
        for row in np.flatnonzero(is_candidate.any(1) & ~is_copy[rows]):
            earlier = np.flatnonzero(is_candidate[row])
            earlier = earlier[np.argsort(squared[row, earlier])]
            is_copy[start + row] = any(
                (_squared_distances(images[start + row], images[earlier[k : k + _CANDIDATES]]) < limit).any()
                for k in range(0, len(earlier), _CANDIDATES)
            )
    return is_copy


def _block_sums(images: np.ndarray) -> np.ndarray:
    """Sums over blocks of images uint8 [N, H, W, C], divided by the root of the block's size: float64 [N, S]."""
    edges = [np.linspace(0, size, min(size, _GRID) + 1, dtype=int) for size in images.shape[1:3]]
    heights, widths = map(np.diff, edges)
    rows = np.add.reduceat(images, edges[0][:-1], axis=1, dtype=np.int64)
    sums = np.add.reduceat(rows, edges[1][:-1], axis=2)
    return (sums / np.sqrt(np.outer(heights, widths))[..., None]).reshape(len(images), -1)


def _squared_distances(image: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances of an image uint8 [H, W, C] to others uint8 [M, H, W, C]: int64 [M]."""
    differences = others.reshape(len(others), -1).astype(np.int64) - image.reshape(-1)
    return np.einsum("md,md->m", differences, differences)
