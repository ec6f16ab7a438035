"""What an image costs in a network: parameters, operations and activations, counted on torch's device meta."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dmat.diffusion.networks import DenoiserSpec


class NetworkCost(NamedTuple):
    """What one image costs in a network: parameters, operations and stored activations of a forward pass."""

    parameters: int
    forward: int  # a multiplication and an addition are two
    activations: int  # numbers that a backward pass needs


def network_cost(model: nn.Module, shape: tuple[int, int, int]) -> NetworkCost:
    """What one image of `shape` (C, H, W) costs. model: on the device meta."""
    activations = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # inputs: [1, C, H, W]
        nonlocal activations
        activations += inputs[0].numel()

    hooks = [layer.register_forward_pre_hook(count) for layer in model.modules() if not [*layer.children()]]
    counter = FlopCounterMode(display=False)  # unlike `robust.flops`, it counts layers of any class
    with torch.no_grad(), counter:
        model.eval()(torch.empty(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return NetworkCost(parameters, counter.get_total_flops(), activations)


def denoiser_cost(network: nn.Module, spec: DenoiserSpec) -> NetworkCost:
    """What one image costs in the raw network of a denoiser. network: on the device meta."""
    return network_cost(_OfImages(network, spec), (spec.channels, spec.height, spec.width))


class _OfImages(nn.Module):
    """The network of a denoiser as a function of images alone."""

    def __init__(self, network: nn.Module, spec: DenoiserSpec):
        super().__init__()
        self.network, self.conditional = network, spec.label_dim > 0

    def forward(self, x: Tensor) -> Tensor:  # [1, C, H, W] -> [1, C, H, W]
        noise = torch.zeros(1, device=x.device)
        labels = torch.zeros(1, dtype=torch.int64, device=x.device) if self.conditional else None
        result: Tensor = self.network(x, noise, labels, None)
        return result
