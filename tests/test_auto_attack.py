"""AutoAttack through the authors' package: linear classifiers, the package's own results, suites per class count."""

import pytest
import torch
from pyautoattack import AutoAttack

from dmat.errors import DmatError
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball, logit_margin
from dmat.robust.auto_attack import ATTACKS, MISCLASSIFIED, ROBUST, STANDARD

CLASSES = 10


def _linear(classes, size=25):
    """Logits w_k . x of 1x5x5 images with fixed random weights."""
    weights = torch.randn(classes, size, generator=torch.Generator().manual_seed(0))
    return weights, lambda images: images.flatten(1) @ weights.T


def _images(count, shape=(1, 5, 5), seed=1):
    return 0.3 + 0.4 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


class _Curved(torch.nn.Module):
    """A nonlinear model on which the attacks differ."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = torch.nn.Linear(75, 40), torch.nn.Linear(40, classes)

    def forward(self, images):
        return self.second(torch.nn.functional.silu(4 * self.first(images.flatten(1))))


def _robust(weights, model, images, labels, epsilon, norm):
    """A linear classifier is robust if each logit gap exceeds epsilon times the dual norm of the weight difference."""
    gaps = model(images).gather(1, labels[:, None]) - model(images)  # [B, K]
    difference = weights[labels][:, None] - weights[None]
    reach = epsilon * (difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2))
    others = torch.arange(len(weights))[None] != labels[:, None]
    return ((gaps - reach > 0) | ~others).all(1)


@pytest.mark.parametrize(
    ("norm", "epsilon", "classes"),
    [*(("linf", 0.06, classes) for classes in (2, 3, 4, 7, CLASSES, 12)), ("l2", 0.3, 3), ("l2", 0.25, CLASSES)],
)
def test_robust_images_of_a_linear_classifier_match_the_closed_form(norm, epsilon, classes):
    weights, model = _linear(classes)
    images = _images(24)
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % classes  # wrong without any attack
    ball, attack_suite = Ball(norm, epsilon), auto_attack.suite("standard", classes)
    worst, broken_by = auto_attack.attack(model, images, labels, ball, attack_suite, seed=1, batch=13)
    robust = _robust(weights, model, images, labels, epsilon, norm)
    assert 0 < int(robust.sum()) < 21
    assert torch.equal(broken_by == ROBUST, robust)
    assert (broken_by[:3] == MISCLASSIFIED).all()
    assert torch.equal(worst[broken_by < 0], images[broken_by < 0])
    assert (logit_margin(model(worst), labels)[broken_by >= 0] <= 0).all()
    assert ball.size(worst - images).max() <= ball.epsilon + 1e-6


class _Convolving(torch.nn.Module):
    """A model whose gradients have the memory layout of its images."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(72, classes)

    def forward(self, images):
        return self.second(torch.nn.functional.silu(4 * self.first(images)).flatten(1))


CONVOLVING = _Convolving(10).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("model", "norm"), [(_Curved(10), "linf"), (CONVOLVING, "linf"), (CONVOLVING, "l2")])
def test_separate_attacks_equal_one_call_of_the_package(model, norm):
    """Same flags and same images, although each attack is called separately and images are channels-last; several
    batches, the last one short."""
    images = _images(22, (3, 5, 5))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % 10
    ball = Ball(norm, {"linf": 0.02, "l2": 0.12}[norm])
    worst, broken_by = auto_attack.attack(
        model,
        images.contiguous(memory_format=torch.channels_last),
        labels,
        ball,
        auto_attack.suite("standard", 10),
        seed=5,
        batch=13,
    )
    package = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=ball.epsilon, seed=5)
    package_worst, prediction = package.run_standard_evaluation(images, labels, batch_size=13)
    assert torch.equal(prediction == labels, broken_by == ROBUST)
    assert torch.equal(worst, package_worst.detach())
    assert 1 < int((broken_by == ROBUST).sum()) < 19
    assert len(set(broken_by.tolist())) >= 3, "more than one attack breaks images"


def test_broken_by_is_the_first_attack_that_succeeds():
    model, images = _Curved(10), _images(60, (3, 5, 5))
    with torch.no_grad():
        labels = model(images).argmax(1)
    ball = Ball("linf", 0.05)
    whole = auto_attack.suite("standard", 10)
    _, broken_by = auto_attack.attack(model, images, labels, ball, whole, seed=1, batch=60)
    first = auto_attack.suite(whole.attacks[:1], 10)
    _, by_first = auto_attack.attack(model, images, labels, ball, first, seed=1, batch=60)
    assert torch.equal(broken_by == 0, by_first == 0)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_alone_breaks_some_images(name):
    model, images = _Curved(10), _images(30, (3, 5, 5))
    with torch.no_grad():
        labels = model(images).argmax(1)
    worst, broken_by = auto_attack.attack(
        model, images, labels, Ball("linf", 0.08), auto_attack.suite([name], 10), seed=1, batch=30
    )
    assert (broken_by == 0).any()
    assert (model(worst).argmax(1) != labels)[broken_by == 0].all()


def test_misclassified_images_are_not_attacked():
    _, model = _linear(10)
    images = _images(5)
    labels = (model(images).argmax(1) + 1) % 10
    worst, broken_by = auto_attack.attack(
        model, images, labels, Ball("linf", 0.1), auto_attack.suite("standard", 10), seed=1, batch=5
    )
    assert (broken_by == MISCLASSIFIED).all()
    assert torch.equal(worst, images)


@pytest.mark.parametrize(
    ("requested", "classes", "attacks", "targets", "standard"),
    [
        ("standard", 100, STANDARD, 9, True),
        ("standard", 10, STANDARD, 9, True),
        ("standard", 9, STANDARD, 8, True),
        ("standard", 4, STANDARD, 3, True),
        ("standard", 3, ("apgd-ce", "fab-t", "square"), 2, False),
        ("standard", 2, ("apgd-ce", "fab-t", "square"), 1, False),
        (["apgd-ce", "square"], 10, ("apgd-ce", "square"), 9, False),
        (list(STANDARD), 10, STANDARD, 9, True),
        (["apgd-dlr"], 3, ("apgd-dlr",), 2, False),
    ],
)
def test_suites_by_number_of_classes(requested, classes, attacks, targets, standard):
    attack_suite = auto_attack.suite(requested, classes)
    assert (attack_suite.attacks, attack_suite.targets, attack_suite.standard) == (attacks, targets, standard)
    assert attack_suite.name.startswith("standard" if standard else "nonstandard (")


@pytest.mark.parametrize(
    ("requested", "classes", "message"),
    [
        ("standard", 1, "the model has 1 class; expected 2 or more"),
        (["apgd-t"], 3, "apgd-t needs 4 classes, the model has 3"),
        (["apgd-dlr"], 2, "apgd-dlr needs 3 classes, the model has 2"),
        (["pgd"], 10, "attack 'pgd' is not known; expected some of apgd-ce"),
    ],
)
def test_suites_that_do_not_exist_are_refused(requested, classes, message):
    with pytest.raises(DmatError, match=message):
        auto_attack.suite(requested, classes)


def test_images_too_small_for_square_are_refused():
    model, images = _linear(10, 9)[1], _images(4, (1, 3, 3))
    with pytest.raises(DmatError, match="images are 3 pixels high; expected 5 or more"):
        auto_attack.attack(
            model, images, model(images).argmax(1), Ball("l2", 0.1), auto_attack.suite("standard", 10), seed=1, batch=4
        )


def test_square_uses_no_gradient_and_stays_inside():
    model, images = _Curved(10), _images(40, (3, 5, 5))
    with torch.no_grad():
        labels = model(images).argmax(1)

    def without_gradient(x):
        assert not torch.is_grad_enabled() or not x.requires_grad
        return model(x.detach())

    ball = Ball("linf", 0.1)
    weak, strong = (auto_attack.square(without_gradient, images, labels, ball, queries, seed=1) for queries in (5, 400))
    assert ball.size(strong - images).max() <= 0.1 + 1e-6
    broken = [int((model(adversarial).argmax(1) != labels).sum()) for adversarial in (weak, strong)]
    assert broken[0] < broken[1]
