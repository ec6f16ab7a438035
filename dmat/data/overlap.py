"""Finds duplicate images: within one set, or between two sets that should be disjoint.

Duplicates have exactly the same pixels; an image that was saved again as JPEG counts as a different one. Sets that are
compared must have images of the same shape. Shapes: N images of one set, M of another.
"""

import hashlib

import numpy as np

from dmat.data.shards import Shards

BATCH = 10_000  # images read at a time, to limit memory


def digests(images: np.ndarray) -> np.ndarray:
    """A hash of each image, uint64 [N]; equal images have equal hashes. images: uint8 [N, H, W, C].

    A hash has 64 bits. The probability that any of 10,000 test images collides by accident with one of 50 million
    images is 3e-8.
    """
    hashes = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def digests_of(opened: Shards, indices: np.ndarray | None = None) -> np.ndarray:
    """`digests` of a set, or of its images at `indices`: uint64 [N]. Reads in batches: sets may be larger than memory.

    indices: int64 [N], global indices in the set; None: all images.
    """
    positions = np.arange(len(opened)) if indices is None else indices
    pieces = [digests(opened.take(positions[k : k + BATCH])[0]) for k in range(0, len(positions), BATCH)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype="<u8")


def repeated(image_digests: np.ndarray) -> np.ndarray:
    """Whether each image is a copy of an earlier image of the same set: bool [N]. image_digests: `digests`, [N]."""
    _, first = np.unique(image_digests, return_index=True)
    is_repeated = np.ones(len(image_digests), dtype=bool)
    is_repeated[first] = False
    return is_repeated


def shared(image_digests: np.ndarray, other_digests: np.ndarray) -> np.ndarray:
    """Whether each image is also in another set: bool [N].

    image_digests, other_digests: `digests` of the two sets, [N] and [M].
    """
    return np.isin(image_digests, other_digests)
