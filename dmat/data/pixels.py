"""Converts between bytes on disk and floats in a batch.

Classifiers take images in [0, 1], denoisers in [-1, 1]. Shapes: B batch, N images, C channels, H height, W width.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dmat.data.shards import Shards


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """Converts images uint8 [B, H, W, C] to float32 [B, C, H, W] in [0, 1], channels-last in memory.

    A tensor stays on its device.
    """
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    return tensor.permute(0, 3, 1, 2).to(torch.float32).div_(255)


def to_bytes(images: Tensor) -> np.ndarray:
    """Converts images [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C], rounded to the nearest and clipped."""
    scaled = (images.double() * 127.5 + 127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def load_all(shards: Shards) -> tuple[Tensor, Tensor]:
    """Loads a set that fits into memory: images float32 [N, C, H, W] in [0, 1] and labels int64 [N]."""
    images, labels = shards.all()
    return to_float(images), torch.from_numpy(labels)


def iter_batches(images: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields consecutive batches: (slice of their positions, images [B, C, H, W], labels [B]).

    images: [N, C, H, W]. labels: [N]. B is `batch`, or less in the last batch.
    """
    for start in range(0, len(labels), batch):
        positions = slice(start, min(start + batch, len(labels)))
        yield positions, images[positions], labels[positions]
