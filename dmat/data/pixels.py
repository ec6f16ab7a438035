"""Between bytes on disk and floats in a batch. Networks see [0, 1] (classifiers) or [-1, 1] (denoisers)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dmat.data.shards import Shards


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [0, 1], channels-last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div_(255)


def to_bytes(images: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C], rounded to the nearest and clipped."""
    scaled = (images.double() * 127.5 + 127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def load_all(shards: Shards) -> tuple[Tensor, Tensor]:
    """All images, float32 [N, C, H, W] in [0, 1], and labels of a set that fits into memory."""
    images, labels = shards.all()
    return to_float(images), torch.from_numpy(labels)


def iter_batches(images: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Consecutive batches with the slice of positions they cover; the last one may be short."""
    for start in range(0, len(labels), batch):
        where = slice(start, min(start + batch, len(labels)))
        yield where, images[where], labels[where]
