"""AutoAttack through the authors' package: the worst case of a linear classifier, its seed, and what it refuses."""

import pytest
import torch

from dmat.errors import DmatError
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball, logit_margin

CLASSES = 10


def _linear(classes):
    """Logits w_k . x of 1x3x3 images with fixed random weights."""
    weights = torch.randn(classes, 9, generator=torch.Generator().manual_seed(0))
    return weights, lambda images: images.flatten(1) @ weights.T


def test_robust_exactly_where_a_linear_classifier_is():
    """linf: an image is robust if own - other logit exceeds epsilon * |w_own - w_other|_1 for every other class."""
    weights, model = _linear(CLASSES)
    images = 0.3 + 0.4 * torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    ball = Ball("linf", 0.05)
    worst = auto_attack.adversarial(model, images, labels, ball, seed=1, batch=20)
    gaps = model(images).gather(1, labels[:, None]) - model(images)  # [40, 10]
    reach = ball.epsilon * (weights[labels][:, None] - weights[None]).abs().sum(2)
    others = torch.arange(CLASSES)[None] != labels[:, None]
    robust = ((gaps - reach > 0) | ~others).all(1)
    assert 5 < int(robust.sum()) < 35
    assert torch.equal(logit_margin(model(worst), labels) > 0, robust)
    assert ball.size(worst - images).max() <= ball.epsilon + 1e-6
    again = auto_attack.adversarial(model, images, labels, ball, seed=1, batch=20)
    assert torch.equal(worst, again)


def test_too_few_classes_are_refused():
    _, model = _linear(4)
    images = torch.rand(2, 1, 3, 3)
    with pytest.raises(DmatError, match=r"the model has 4 classes; expected at least 10.*auto_attack: none"):
        auto_attack.adversarial(model, images, model(images).argmax(1), Ball("linf", 0.1), seed=1, batch=2)
