"""Quality of generated images from features and class probabilities of any network, and from pixels.

The caller reports which network made the features, because values of different networks cannot be compared.
Shapes: N and M images, D features, K classes, H height, W width, C channels.
"""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the squared Frechet distance of Gaussians fitted to features (Heusel et al. 2017; FID's formula).

    a [N, D], b [M, D]. The distance is |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances. The
    last trace comes from the eigenvalues of A^(1/2) B A^(1/2), which is symmetric and so needs no complex square root.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018: KID on all features).

    a [N, D], b [M, D].
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def inception_score(probabilities: np.ndarray) -> float:
    """Computes the inception score (Salimans et al. 2016) of class probabilities [N, K].

    It is exp of the mean KL divergence from each image's probabilities to their average.
    """
    p = probabilities.astype(np.float64).clip(1e-12, 1)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def nearest_distances(images: np.ndarray, references: np.ndarray, block: int = 1000) -> np.ndarray:
    """Computes the Euclidean distance of each image to its nearest reference, float64 [N], in pixels of [0, 1].

    images uint8 [N, H, W, C], references uint8 [M, H, W, C]. block: images that are compared together. Exact: squared
    distances of bytes are whole numbers below 2^53.
    """
    flat = references.reshape(len(references), -1).astype(np.float64)  # [M, H W C]
    squares = (flat**2).sum(1)  # [M]
    nearest = []
    for start in range(0, len(images), block):
        rows = images[start : start + block].reshape(len(images[start : start + block]), -1).astype(np.float64)
        squared_distances = (rows**2).sum(1)[:, None] + squares - 2 * rows @ flat.T  # [block, M]
        nearest.append(squared_distances.min(1).clip(0))
    return np.sqrt(np.concatenate(nearest)) / 255


def duplicates(images: np.ndarray) -> int:
    """Counts images [N, H, W, C] that equal an earlier one byte for byte."""
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    return len(flat) - len(np.unique(flat.view(np.dtype((np.void, flat.shape[1])))))
