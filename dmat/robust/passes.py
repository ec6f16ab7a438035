"""Forward and backward passes of a frozen model, as the attacks of AutoAttack need them.

Shapes: B batch, C channels, H height, W width, K classes.
"""

import dataclasses

import torch
from torch import Tensor

from dmat.robust.attacks import Logits, cross_entropy, logit_ratio

# Forward passes that a forward and a backward pass are counted as: the weights are frozen, so that backward computes
# the gradients of the activations alone, about as many operations as forward.
GRADIENT = 2


@dataclasses.dataclass(frozen=True)
class Goal:
    """What an attack maximises, for each image: a function of the logits.

    kind: "ce", cross-entropy. "dlr", the difference of logits ratio (Croce and Hein 2020, equation 3). "dlr-targeted",
    its targeted version (equation 5), which needs four classes. "difference", the logit of the target minus that of
    the label. "nearest", that of any class, only for `fab`. labels int64 [B]. targets int64 [B], of the targeted kinds.
    """

    kind: str
    labels: Tensor
    targets: Tensor | None = None

    def rows(self, rows: Tensor) -> "Goal":
        """The goal of some of the images. rows: int64 [M]."""
        return Goal(self.kind, self.labels[rows], None if self.targets is None else self.targets[rows])

    def values(self, logits: Tensor) -> Tensor:
        """The value of each image, [B]. logits [B, K]."""
        if self.kind == "ce":
            return cross_entropy(self.labels)(logits)
        if self.kind == "dlr":
            return logit_ratio(self.labels)(logits)
        assert self.targets is not None
        difference = _column(logits, self.targets) - _column(logits, self.labels)
        if self.kind == "difference":
            return difference
        largest = logits.topk(4, dim=1).values  # [B, 4]
        return difference / (largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12)


class Passes:
    """The passes of one model. Images are contiguous; the model gets channels-last images, which convolve faster."""

    def __init__(self, logits_of: Logits):
        self._logits_of = logits_of

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]; no gradient flows."""
        with torch.no_grad():
            return self._logits_of(images.contiguous(memory_format=torch.channels_last))

    def gradient(self, images: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, K], values of the goal [B], and their gradient by the images [B, C, H, W], contiguous."""
        inputs = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.enable_grad():
            logits = self._logits_of(inputs)
            values = goal.values(logits)
            (gradient,) = torch.autograd.grad(values.sum(), inputs)
        return logits.detach(), values.detach(), gradient.contiguous()


def _column(logits: Tensor, classes: Tensor) -> Tensor:  # [B, K], [B] -> [B]
    return logits.gather(1, classes[:, None])[:, 0]
