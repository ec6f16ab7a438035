"""Batches of a training run: the images that a `Mix` asks for, read from shards as bytes.

Shapes: D images drawn for a batch, N of them read, H height, W width, C channels.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dmat.data.mixing import BatchOrder, Mix
from dmat.data.mixtures import GeneratedImages
from dmat.data.shards import Shards
from dmat.devices import send

_RESIDENT_SHARE = 0.5  # of the free memory of a GPU that images may take (assumed)
_CHUNK = 50_000  # images read at a time


class MixedBatches:
    """The images and labels of every training step. Several threads may read at the same time.

    generated: the images that may be used; None without generated images.
    """

    def __init__(self, mix: Mix, seed: int, real: Shards, generated: GeneratedImages | None):
        self.mix, self.order = mix, BatchOrder(mix, seed)
        self.real, self.generated = real, generated
        self._sources: tuple[_Images, _Images | None] = real, generated

    def at(self, step: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, H, W, C] and labels int64 [N] of a step, those at `rows` of the D = `mix.drawn` rows.

        Only these rows are read. None: all rows.
        """
        rows = rows or slice(0, self.mix.drawn)
        images = np.empty((rows.stop - rows.start, *self.real.shape), dtype=np.uint8)
        labels = np.empty(rows.stop - rows.start, dtype=np.int64)
        for number, positions, indices in self._plan(step, rows):
            if (source := self._sources[number]) is not None:
                source.gather(indices, images, labels, positions)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _plan(self, step: int, rows: slice) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For the real images, 0, and the generated ones, 1: their positions [M] among `rows`, their indices [M]."""
        plan = []
        for number, indices in enumerate(self.order.at(step)):
            of_source = self.mix.is_generated == bool(number)  # [D]
            first, positions = int(of_source[: rows.start].sum()), np.flatnonzero(of_source[rows])
            if len(positions):
                plan.append((number, positions, indices[first : first + len(positions)]))
        return plan

    def names(self, step: int) -> dict[str, list[int]]:
        """Indices of the images of a step: `real` in the training split, generated ones in their whole image sets."""
        real, generated = self.order.at(step)
        return {
            "real": real.tolist(),
            **({"generated": []} if self.generated is None else self.generated.names(generated)),
        }


class ResidentBatches(MixedBatches):
    """The same batches, gathered on a device that holds all images as bytes: nothing is read or sent in a step."""

    def __init__(self, mix: Mix, seed: int, real: Shards, generated: GeneratedImages | None, device: torch.device):
        super().__init__(mix, seed, real, generated)
        self.device = device
        self._resident = [None if source is None else _load(source, device) for source in (real, generated)]

    def at(self, step: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """As `MixedBatches.at`, on the device: images uint8 [N, H, W, C] and labels int64 [N]."""
        rows = rows or slice(0, self.mix.drawn)
        count = rows.stop - rows.start
        images = torch.empty((count, *self.real.shape), dtype=torch.uint8, device=self.device)
        labels = torch.empty(count, dtype=torch.int64, device=self.device)
        for number, positions, indices in self._plan(step, rows):
            if (source := self._resident[number]) is not None:
                at, taken = send(positions, self.device), send(indices, self.device)
                images[at], labels[at] = source[0][taken], source[1][taken]
        return images, labels


def open_batches(
    mix: Mix, seed: int, real: Shards, generated: GeneratedImages | None, device: torch.device
) -> MixedBatches:
    """The batches of a training. Images that fit into half of a GPU's free memory stay there."""
    if device.type == "cuda":
        bytes_of_images = (len(real) + len(generated or ())) * (math.prod(real.shape) + 8)
        if bytes_of_images < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return ResidentBatches(mix, seed, real, generated, device)
    return MixedBatches(mix, seed, real, generated)


def _load(source: Shards | GeneratedImages, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of a source, uint8 [N, H, W, C], and their labels, int64 [N], on a device."""
    pieces = [source.take(np.arange(k, min(k + _CHUNK, len(source)))) for k in range(0, len(source), _CHUNK)]
    images, labels = (
        torch.cat([torch.from_numpy(array).to(device) for array in arrays]) for arrays in zip(*pieces, strict=True)
    )
    return images, labels


class _Images(Protocol):
    """A source of images, such as `Shards` and `GeneratedImages`."""

    def gather(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        """Copies the images at `indices` [N], and their labels, to `rows` [N] of the arrays."""
