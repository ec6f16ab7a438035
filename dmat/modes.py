"""What state a model is in while something is computed, always as a block that restores it.

Nothing else in dmat calls `.train()` or `.eval()`, or touches `requires_grad`, of a model it was given.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; every submodule's own mode comes back after it."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters inside the block: an attack needs those of its input only.

    Under autocast the weights of convolutions and linear layers are also cast once, for all passes of the block:
    autocast itself remembers only casts of what requires gradients. The numbers are the same.
    """
    before = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for parameter in _cast_by_autocast(model):
            parameter.data = parameter.data.to(torch.get_autocast_dtype(parameter.device.type))
        yield
    finally:
        for parameter, required, values in before:
            parameter.data = values
            parameter.requires_grad_(required)


def _cast_by_autocast(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that autocast, where it is on, would cast in every pass."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    found = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return [parameter for parameter in found if torch.is_autocast_enabled(parameter.device.type)]


@contextlib.contextmanager
def untracked_batch_norm(model: nn.Module) -> Iterator[None]:
    """Batch statistics are used as in training, running statistics stay as they are."""
    layers = [(layer, layer.track_running_stats) for layer in model.modules() if isinstance(layer, BATCH_NORMS)]
    for layer, _ in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Share of the newest batch in the running statistics (torch's convention: 1.0 forgets everything older)."""
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            layer.momentum = momentum
