"""What all classifiers share: description of their data, base class, normalisation, activations, initialisation.

Shapes: B batch, C channels, H height, W width, K classes, F features.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a network must know of its data: number of classes, channels, and each channel's mean and std in [0, 1]."""

    classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """Base class of all networks: `features`, then a last layer called `logits`. Normalisation is inside."""

    logits: nn.Linear

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        result: Tensor = self.logits(self.features(images))
        return result

    def features(self, images: Tensor) -> Tensor:
        """Computes the input of the last layer: images [B, C, H, W] in [0, 1] -> [B, F]."""
        raise NotImplementedError


class Normalise(nn.Module):
    """Computes (x - mean) / std per channel: [B, C, H, W] -> [B, C, H, W].

    The constants [C, 1, 1] are not part of the state dict, as in the published networks.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return (x - self.mean) / self.std


def initialise(layer: nn.Module) -> None:
    """Initialises one layer as the code of Gowal et al. 2020 and Wang et al. 2023 does.

    Convolutions: normal with std sqrt(2 / (k * k * out)), k the kernel size. Linear layers: bias 0.
    """
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.bias)
