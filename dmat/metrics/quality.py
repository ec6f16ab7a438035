"""Quality of generated images from features and class probabilities of any network, and from pixels.

Which network made the features is the caller's to say beside the number: values of different networks do not compare.
"""

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to features [n, d] and [m, d] (Heusel et al. 2017; FID's formula).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)); the last trace from the eigenvalues of A^(1/2) B A^(1/2), which is
    symmetric and so needs no complex square root.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018: KID on all of the features)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    within_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within_a + within_b - 2 * ab.mean())


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean KL from each image's class probabilities [n, K] to their average (Salimans et al. 2016)."""
    p = probabilities.astype(np.float64).clip(1e-12, 1)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def nearest_distances(images: np.ndarray, references: np.ndarray, block: int = 1000) -> np.ndarray:
    """Euclidean distance of each image to its nearest reference, float64 [n], in pixels of [0, 1].

    images, references: uint8 [n, H, W, C]. Exact: squared distances of bytes are whole numbers below 2^53.
    """
    flat = references.reshape(len(references), -1).astype(np.float64)
    squares = (flat**2).sum(1)
    nearest = []
    for start in range(0, len(images), block):
        mine = images[start : start + block].reshape(len(images[start : start + block]), -1).astype(np.float64)
        distance = (mine**2).sum(1)[:, None] + squares - 2 * mine @ flat.T
        nearest.append(distance.min(1).clip(0))
    return np.sqrt(np.concatenate(nearest)) / 255


def duplicates(images: np.ndarray) -> int:
    """How many images equal an earlier one byte for byte."""
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    return len(flat) - len(np.unique(flat.view(np.dtype((np.void, flat.shape[1])))))
