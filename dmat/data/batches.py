"""Batches of a training run: what a `Mix` asks for, read from shards."""

import numpy as np
import torch
from torch import Tensor

from dmat.data.mixing import BatchOrder, Mix
from dmat.data.pixels import to_float
from dmat.data.shards import Shards


class MixedBatches:
    """What every training step draws: real images first, then generated ones, float32 in [0, 1] with labels.

    `kept` are the global indices of the generated images that may be used. Several threads may read.
    """

    def __init__(self, mix: Mix, seed: int, real: Shards, generated: Shards | None, kept: np.ndarray | None):
        self.order = BatchOrder(mix, seed)
        self.real, self.generated, self.kept = real, generated, kept

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """images [drawn, C, H, W] and labels int64 [drawn] of a step; drawn is batch but for several copies."""
        real, generated = self.order.at(step)
        images, labels = self.real.take(real)
        if len(generated) and self.generated is not None and self.kept is not None:
            more_images, more_labels = self.generated.take(self.kept[generated])
            images, labels = np.concatenate([images, more_images]), np.concatenate([labels, more_labels])
        return to_float(images), torch.from_numpy(labels)

    def names(self, step: int) -> dict[str, list[int]]:
        """Which images those are: indices of the training split, and global ones of the image set."""
        real, generated = self.order.at(step)
        chosen = generated if self.kept is None else self.kept[generated]
        return {"real": real.tolist(), "generated": chosen.tolist()}
