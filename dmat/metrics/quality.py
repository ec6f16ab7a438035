"""Quality of generated images from features and logits of any network, and distances between images.

The caller reports which network made the features and how many images there were, because values of different networks
or of different numbers of images cannot be compared.
Shapes: N and M images, D features, K classes, H height, W width, C channels.
"""

from typing import NamedTuple

import numpy as np

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # of Binkowski et al. 2018's published code
MANIFOLD_NEIGHBOUR = 3  # whose distance is the radius of a ball, for precision and recall (Kynkaanniemi et al. 2019)
DENSITY_NEIGHBOUR = 5  # and for density and coverage (Naeem et al. 2020)
FEWEST_IMAGES = DENSITY_NEIGHBOUR + 1  # of either side, so that each image has the neighbours

_BLOCK = 1000  # rows whose distances are in memory together


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Nearest(NamedTuple):
    """The nearest reference of each of N images: its distance, float64 [N], and its index, int64 [N]."""

    distances: np.ndarray
    indices: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Computes the sample mean and the unbiased covariance of features [N, D], N at least 2."""
    exact = features.astype(np.float64)
    return Moments(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes the squared Frechet distance of two Gaussians (Heusel et al. 2017; by Inception it is FID).

    a, b: of D features. The distance is |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances. The
    last trace comes from the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and so needs no complex square root.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Computes the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018; KID).

    a [N, D], b [M, D]. Returns mean and standard deviation over 100 random subsets of 1000 images of each side, or of
    all images of the smaller side if it has fewer. The subsets are the same in every call.
    """
    import torch
    from torch_fidelity import metric_kid

    values = metric_kid.kid_features_to_metric(
        *(torch.from_numpy(features.astype(np.float64)) for features in (a, b)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=min(KID_SUBSET_SIZE, len(a), len(b)),
        verbose=False,
    )
    return values[metric_kid.KEY_METRIC_KID_MEAN], values[metric_kid.KEY_METRIC_KID_STD]


def inception_score(logits: np.ndarray) -> float:
    """Computes the inception score (Salimans et al. 2016) of logits [N, K], over all images together.

    It is exp of the mean KL divergence from each image's class probabilities to their average. Published values are
    means over ten parts of the images, which are lower.
    """
    import torch
    from torch_fidelity import metric_isc

    values = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits=1, shuffle=False)
    score: float = values[metric_isc.KEY_METRIC_ISC_MEAN]
    return score


def neighbourhoods(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Computes precision, recall, density and coverage of generated features [N, D] against real ones [M, D].

    The ball of an image reaches to its k-th nearest neighbour of the same side. With k = 3 (Kynkaanniemi et al. 2019,
    eq. 1 and 2): precision, the fraction of generated images in the ball of a real one; recall, the fraction of real
    images in the ball of a generated one; the edge counts. With k = 5 (Naeem et al. 2020, eq. 3 and 4): density, the
    mean number of real balls around a generated image, divided by k; coverage, the fraction of real images with a
    generated one in their ball; the edge does not count. N and M are at least `FEWEST_IMAGES`.
    """
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    real_edges, generated_edges = _squared_radii(real), _squared_radii(generated)  # k -> [M], [N]
    precise, balls = 0, 0
    recalled, covered = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for start in range(0, len(generated), _BLOCK):
        squared = _squared_distances(generated[start : start + _BLOCK], real)  # [block, M]
        inside = squared < real_edges[DENSITY_NEIGHBOUR]
        balls += int(inside.sum())
        covered |= inside.any(0)
        precise += int((squared <= real_edges[MANIFOLD_NEIGHBOUR]).any(1).sum())
        recalled |= (squared <= generated_edges[MANIFOLD_NEIGHBOUR][start : start + _BLOCK, None]).any(0)
    return {
        "precision": precise / len(generated),
        "recall": float(recalled.mean()),
        "density": balls / (DENSITY_NEIGHBOUR * len(generated)),
        "coverage": float(covered.mean()),
    }


def _squared_radii(features: np.ndarray) -> dict[int, np.ndarray]:
    """k -> squared distance of each of the features [N, D] to its k-th nearest neighbour, float64 [N]."""
    ranks = (MANIFOLD_NEIGHBOUR, DENSITY_NEIGHBOUR)
    radii = []
    for start in range(0, len(features), _BLOCK):
        squared = _squared_distances(features[start : start + _BLOCK], features)  # [block, N], each with itself
        radii.append(np.partition(squared, ranks, axis=1)[:, list(ranks)])
    return dict(zip(ranks, np.concatenate(radii).T, strict=True))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, float64 [N, M], of a [N, D] and b [M, D], float64."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return squared.clip(0, out=squared)


def nearest(images: np.ndarray, references: np.ndarray, block: int = 2000) -> Nearest:
    """Finds the nearest reference of each image, by Euclidean distance in pixels of [0, 1].

    images uint8 [N, H, W, C], references uint8 [M, H, W, C], M at least 1. block: images, and references, that are
    compared together, to limit memory. Exact: squared distances of bytes are whole numbers below 2^53. Of equally near
    references the first is returned.
    """
    best, indices = np.full(len(images), np.inf), np.zeros(len(images), dtype=np.int64)
    for first in range(0, len(references), block):
        against = _flat(references[first : first + block])
        for start in range(0, len(images), block):
            squared = _squared_distances(_flat(images[start : start + block]), against)
            columns = squared.argmin(1)
            values = np.take_along_axis(squared, columns[:, None], 1)[:, 0]
            rows = start + np.flatnonzero(values < best[start : start + block])
            best[rows], indices[rows] = values[rows - start], first + columns[rows - start]
    return Nearest(np.sqrt(best) / 255, indices)


def _flat(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, C] as float64 [N, H W C]."""
    return images.reshape(len(images), -1).astype(np.float64)
