"""Predictions for many images, batch by batch."""

import torch
from torch import Tensor, nn

from dmat.devices import Compute


def logits(model: nn.Module, images: Tensor, compute: Compute, batch: int = 1000) -> Tensor:
    """Computes logits [N, K], float32 on the CPU, in the precision of `compute`.

    images: [N, C, H, W] in [0, 1], sent to the device in batches of `batch`.
    """
    with torch.no_grad(), compute.autocast():
        return torch.cat(
            [model(compute.to_device(images[k : k + batch])).float().cpu() for k in range(0, len(images), batch)]
        )
