"""What state a model is in while something is computed, always as a block that restores it.

Nothing else in dmat calls `.train()` or `.eval()`, or touches `requires_grad`, of a model it was given.
"""

import contextlib
from collections.abc import Iterator

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
    """No gradients for parameters inside the block: an attack needs those of its input only."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


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
