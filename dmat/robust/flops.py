"""Floating-point operations of a training step, counted from the layers: a multiplication and an addition are two.

Convolutions and linear layers only, as in Bartoldson et al. 2024, whose formula for TRADES with 10 steps is 27 forward
passes an image: 1 for the targets, 2 for each attack step (input gradients), 3 for each of the two trained passes.
"""

import copy

import torch
from torch import nn


def forward(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of one forward pass of one image of `shape` (C, H, W)."""
    total = 0

    def count(layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        inputs = layer.weight[0].numel()  # of each output: channels x kernel, or features
        total += 2 * inputs * result[0].numel()

    twin = copy.deepcopy(model).to("meta").eval()
    for layer in twin.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(1, *shape, device="meta"))
    return total


def forwards_of_a_step(loss: str, attack_steps: int) -> int:
    """Forward passes that one training step of an image costs, as the literature counts."""
    return {"standard": 3, "pgd_at": 2 * attack_steps + 3}.get(loss, 1 + 2 * attack_steps + 6)
