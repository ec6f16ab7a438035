"""Context managers that set the state of a model (mode, gradients, batch norm) and restore it afterwards.

Nothing else in dmat calls `.train()` or `.eval()`, or changes `requires_grad`, of a model that it receives.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets training or evaluation mode inside the block. After it every submodule has its previous mode."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients of parameters inside the block, because an attack needs only those of its input.

    Under autocast it also casts the weights of convolutions and linear layers once for all passes of the block, because
    autocast caches only casts of tensors that require gradients. The results are the same.
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
    """Returns the parameters that autocast would cast in every pass; none where it is off."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    candidates = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return [parameter for parameter in candidates if torch.is_autocast_enabled(parameter.device.type)]


@contextlib.contextmanager
def untracked_batch_norm(model: nn.Module) -> Iterator[None]:
    """Uses batch statistics, as in training, inside the block. Running statistics do not change."""
    layers = [(layer, layer.track_running_stats) for layer in model.modules() if isinstance(layer, BATCH_NORMS)]
    for layer, _ in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked


def set_batch_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Sets the weight of the newest batch in the running statistics, in [0, 1].

    This is torch's convention: 1.0 forgets all older batches.
    """
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            layer.momentum = momentum
