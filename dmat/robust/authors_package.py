"""The attacks of AutoAttack as their authors' package computes them, which only this file imports.

`evaluate_robust.auto_attack_code: pyautoattack` chooses it, for whoever wants the original to decide. It is slower, and
breaks the same images.

Shapes: B images, C channels, H height, W width, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from dmat.robust.attacks import Ball, Logits

_NORMS = {"linf": "Linf", "l2": "L2"}


def package_attacks(
    logits_of: Logits, ball: Ball, targets: int, seed: int, device: torch.device
) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A function of the name of an attack, images [B, C, H, W] and labels [B]: adversarial images [B, C, H, W].

    targets: number of wrong classes that a targeted attack tries. seed: of every call.
    """
    from pyautoattack import AutoAttack

    wrapped = _PackageModel(logits_of)  # the package looks for parameters of a module
    package = AutoAttack(
        wrapped, norm=_NORMS[ball.norm], eps=float(ball.epsilon), version="standard", seed=seed, device=str(device)
    )
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = targets

    def run(name: str, images: Tensor, labels: Tensor) -> Tensor:  # [B, C, H, W], [B] -> [B, C, H, W]
        package.attacks_to_run = [name]
        adversarial: Tensor = package.run_standard_evaluation(images, labels, batch_size=len(images))[0]
        return adversarial.detach()

    return run


class _PackageModel(torch.nn.Module):
    """Wraps the model for the package: [B, C, H, W] -> [B, K].

    The package gets contiguous images and gradients, which its `view`s need. The model gets channels-last images,
    which make convolutions faster.
    """

    def __init__(self, logits_of: Logits):
        super().__init__()
        self.logits_of = logits_of

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        result: Tensor = self.logits_of(_ChannelsLast.apply(images))
        return result


class _ChannelsLast(Function):
    """Converts images to channels-last memory, and their gradients back to contiguous memory."""

    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:  # one [B, C, H, W] -> [B, C, H, W]
        return gradients[0].contiguous()
