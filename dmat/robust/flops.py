"""Floating-point operations of a training step, counted from the layers: a multiplication and an addition are two.

Only convolutions, linear layers and the two matrix products of attention count, as in Bartoldson et al. 2024. Their
formula for TRADES with 10 steps is 27 forward passes per image: 1 for the targets, 2 for each attack step (input
gradients), 3 for each of the two trained passes.
"""

import copy

import torch
from torch import nn

from dmat.robust.vision_transformer import SelfAttention


def forward(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Counts the operations of one forward pass of one image of `shape` (C, H, W)."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # [1, ...] each
        nonlocal total
        if isinstance(layer, SelfAttention):
            total += 4 * output.shape[1] * output.numel()  # [T, F] x [F, T] and [T, T] x [T, F]
            return
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        inputs_per_output = layer.weight[0].numel()  # input channels x kernel, or features
        total += 2 * inputs_per_output * output[0].numel()

    meta_model = copy.deepcopy(model).to("meta").eval()
    for layer in meta_model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, SelfAttention)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        meta_model(torch.empty(1, *shape, device="meta"))
    return total


def forward_passes_per_step(loss: str, attack_steps: int, perturbs_weights: bool = False) -> int:
    """Returns the cost of one training step in forward passes per image, as the literature counts.

    loss: a name in `losses.LOSSES`; other names count as TRADES. perturbs_weights: with `weight_perturbation`, which
    repeats the trained passes.
    """
    target = {"standard": 0, "pgd_at": 0, "mart": 0}.get(loss, 1)
    attack = 0 if loss == "standard" else 2 * attack_steps
    trained = {"standard": 3, "pgd_at": 3}.get(loss, 6)
    return target + attack + trained * (2 if perturbs_weights else 1)
