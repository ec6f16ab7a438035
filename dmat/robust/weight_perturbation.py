"""Adversarial weight perturbation (AWP; Wu et al. 2020): training minimises the loss at the worst weights near its own.

In every step the loss, at fixed adversarial images, is first maximised over the weights with one step of gradient
ascent, and then its gradient is taken there:

    v = gamma * |w| * g / |g|,  g the gradient of the loss at w;  w <- w - rate * (gradient of the loss at w + v)

for each convolution and linear layer on its own, with the Frobenius norm. So |v| is gamma |w|, whatever the size of g,
and no proxy model and no state is needed.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def perturbed(model: nn.Module, gamma: float) -> Iterator[None]:
    """Adds v to the weights inside the block, from the gradients that they hold. After it they have their exact values.

    Biases and normalisation layers, all parameters of one dimension, keep their values, as in the authors' code. There
    the optimiser steps at w + v, and v is subtracted afterwards: its weight decay acts on w + v, here on w.
    gamma: |v| as a fraction of |w|; 0: nothing changes.
    """
    weights = [p for p in model.parameters() if gamma > 0 and p.ndim > 1 and p.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            assert weight.grad is not None
            length = weight.grad.norm().clamp(min=1e-30)  # scalar
            weight.add_(weight.grad * (gamma * weight.norm() / length))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)
