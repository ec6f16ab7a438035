"""Standard AutoAttack (Croce and Hein 2020) through the authors' package, which only this file imports."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust.attacks import Ball

_NORMS = {"linf": "Linf", "l2": "L2"}
MINIMUM_CLASSES = 10  # the standard suite attacks 9 target classes


def adversarial(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, ball: Ball, seed: int, batch: int
) -> Tensor:
    """The worst image the standard suite (APGD-CE, APGD-T, FAB-T, Square) finds for each image, [B, C, H, W].

    images in [0, 1]; the model in evaluation mode and float32. Robust accuracy is that of the result. An image that
    is misclassified already comes back as it was.
    """
    from pyautoattack import AutoAttack

    classes = logits_of(images[:1]).shape[1]
    if classes < MINIMUM_CLASSES:
        raise DmatError(
            f"the model has {classes} classes; expected at least {MINIMUM_CLASSES}, as standard AutoAttack aims at 9 "
            f"wrong ones; say evaluate_robust.auto_attack: none"
        )

    wrapped: Any = _Module(logits_of)  # the package looks for parameters of a module
    attack = AutoAttack(
        wrapped,
        norm=_NORMS[ball.norm],
        eps=float(ball.epsilon),
        version="standard",
        seed=seed,
        device=str(images.device),
    )
    result: Tensor
    result, _ = attack.run_standard_evaluation(images, labels, batch_size=batch)
    return result.detach()


class _Module(torch.nn.Module):
    def __init__(self, logits_of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_of(images)
