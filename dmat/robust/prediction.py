"""Logits of many images, batch after batch."""

import torch
from torch import Tensor, nn

from dmat.devices import Compute


def logits(model: nn.Module, images: Tensor, compute: Compute, batch: int = 1000) -> Tensor:
    """Logits [N, K] of images in [0, 1], float32 on the CPU, in the precision of `compute`."""
    with torch.no_grad(), compute.autocast():
        return torch.cat(
            [model(compute.to_device(images[k : k + batch])).float().cpu() for k in range(0, len(images), batch)]
        )
