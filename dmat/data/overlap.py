"""Images that are there twice: in one set, or in two that should have none in common.

Exact copies only, of the same pixels: an image that was saved again as JPEG is another one here. Sets that are compared
have images of one shape.
"""

import hashlib

import numpy as np

from dmat.data.shards import Shards

BATCH = 10_000  # images read at a time


def digests(images: np.ndarray) -> np.ndarray:
    """A number for each image, uint64 [N]; equal for equal images. images: uint8 [N, H, W, C].

    Of 64 bits: that any of 10,000 test images meets another one of 50 million by accident has a chance of 3e-8.
    """
    found = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(found), dtype="<u8")


def digests_of(opened: Shards, indices: np.ndarray | None = None) -> np.ndarray:
    """`digests` of a set, or of the images at `indices`, read piece by piece: sets may be larger than memory."""
    wanted = np.arange(len(opened)) if indices is None else indices
    pieces = [digests(opened.take(wanted[k : k + BATCH])[0]) for k in range(0, len(wanted), BATCH)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype="<u8")


def repeated(found: np.ndarray) -> np.ndarray:
    """bool [N]: where an image is a copy of an earlier one of the same set. found: `digests` [N]."""
    _, first = np.unique(found, return_index=True)
    again = np.ones(len(found), dtype=bool)
    again[first] = False
    return again


def shared(found: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [N]: where an image is also in another set. found, others: `digests` [N], [M]."""
    return np.isin(found, others)
