"""Augmentation of whole batches on their device: (images [B, C, H, W], generator) -> images, all of one signature."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Augmentation = Callable[[Tensor, np.random.Generator], Tensor]


def none(images: Tensor, generator: np.random.Generator) -> Tensor:
    return images


def crop(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """Each image shifted by -pad..pad pixels along both axes over a border of zeros (random crop of a padded image)."""
    size, _, height, width = images.shape
    shifts = torch.from_numpy(generator.integers(0, 2 * pad + 1, (2, size))).to(images.device)
    rows = shifts[0][:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = shifts[1][:, None] + torch.arange(width, device=images.device)  # [B, W]
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # [B, H + 2 pad, W + 2 pad, C]
    batch = torch.arange(size, device=images.device)
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = torch.from_numpy(generator.random(len(images)) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop_flip(images: Tensor, generator: np.random.Generator, pad: int) -> Tensor:
    """The base augmentation of CIFAR training: random crop, then flip."""
    return flip(crop(images, generator, pad), generator)


# pad 1 is the same share of an 8-pixel digit as the usual 4 pixels of a 32-pixel image.
AUGMENTATIONS: dict[str, Augmentation] = {
    "none": none,
    "crop1": partial(crop, pad=1),
    "crop4": partial(crop, pad=4),
    "crop4_flip": partial(crop_flip, pad=4),
}


def cutmix(
    images: Tensor, targets: Tensor, generator: np.random.Generator, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
