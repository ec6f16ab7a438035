"""The optimal denoiser of a finite data set (Karras et al. 2022, equation 57): an oracle that needs no training."""

import torch
from torch import Tensor


class ExactDenoiser:
    """D(x; sigma): the average of the data set, each image weighted by the likelihood that x is a noisy version of it.

    data: N images [N, C, H, W] in [-1, 1]. data_labels: int64 [N]; they restrict the average to the requested class.
    Computes in float64. Memory grows with B * N * C * H * W, B the batch.
    """

    def __init__(self, data: Tensor, data_labels: Tensor | None = None):  # [N, C, H, W], [N]
        self.data = data.double()
        self.data_labels = data_labels

    def __call__(self, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """noisy [B, C, H, W], sigma [B], labels int64 [B] or None -> [B, C, H, W], float64."""
        distance = (noisy.double()[:, None] - self.data[None]).flatten(2).square().sum(2)  # [B, N]
        exponent = -distance / (2 * sigma.double()[:, None] ** 2)  # [B, N]
        if labels is not None and self.data_labels is not None:
            exponent = exponent.masked_fill(labels[:, None] != self.data_labels[None], -torch.inf)
        return torch.einsum("bn,nchw->bchw", exponent.softmax(1), self.data)
