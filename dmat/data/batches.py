"""Batches of a training run: the images that a `Mix` asks for, read from shards."""

import numpy as np
import torch
from torch import Tensor

from dmat.data.mixing import BatchOrder, Mix
from dmat.data.pixels import to_float
from dmat.data.selections import SelectedImages
from dmat.data.shards import Shards


class MixedBatches:
    """The images and labels of every training step: real images first, then generated ones, float32 in [0, 1].

    generated: the images that may be used; None without generated images. Several threads may read at the same time.
    """

    def __init__(self, mix: Mix, seed: int, real: Shards, generated: SelectedImages | None):
        self.order = BatchOrder(mix, seed)
        self.real, self.generated = real, generated

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W] and labels int64 [B] of a step. B is `mix.drawn`: the batch divided by copies."""
        real, generated = self.order.at(step)
        images, labels = self.real.take(real)
        if len(generated) and self.generated is not None:
            more_images, more_labels = self.generated.take(generated)
            images, labels = np.concatenate([images, more_images]), np.concatenate([labels, more_labels])
        return to_float(images), torch.from_numpy(labels)

    def names(self, step: int) -> dict[str, list[int]]:
        """Indices of the images of a step: `real` in the training split, `generated` in the whole image set."""
        real, generated = self.order.at(step)
        indices = generated if self.generated is None else self.generated.indices[generated]
        return {"real": real.tolist(), "generated": indices.tolist()}
