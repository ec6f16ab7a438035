"""Attacks stay inside the ball and inside [0, 1], and find the known worst case.

Oracles: linear classifiers, whose worst perturbation has a closed form; loops in float64 for the objectives; brute
force and a statistical test for projections and random starts. Run alone: pytest tests/test_attacks.py
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dmat import modes, seeds
from dmat.robust import attacks
from dmat.robust.attacks import NORMS, Ball

SHAPES = [(1, 8, 8), (3, 5, 4), (1, 1, 1)]
OBJECTIVES = {
    "cross_entropy": lambda labels, logits: attacks.cross_entropy(labels),
    "margin": lambda labels, logits: attacks.margin(labels),
    "divergence": lambda labels, logits: attacks.divergence(logits.log_softmax(1)),
}


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def network(shape, classes=4):
    """A smooth nonlinear classifier."""
    torch.manual_seed(0)
    wide = torch.nn.Linear(math.prod(shape), 16)
    return torch.nn.Sequential(torch.nn.Flatten(), wide, torch.nn.Tanh(), torch.nn.Linear(16, classes)).requires_grad_(
        False
    )


def lengths(perturbation, norm):
    """Norms in plain Python."""
    rows = perturbation.flatten(1).double().tolist()
    if norm == "linf":
        return [max(map(abs, row)) for row in rows]
    return [math.sqrt(sum(v * v for v in row)) for row in rows]


# --- the contract of every attack


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_result_is_in_the_ball_and_in_the_pixel_range(norm, shape, batch, kind):
    ball = Ball(norm, 0.3)
    images, labels = unit(batch, *shape), torch.arange(batch) % 4
    images.flatten(1)[:, 0] = 0.0  # pixels on either border
    images.flatten(1)[:, -1] = 1.0
    model = network(shape)
    start = ball.random_start(seeds.stream(1, "start"), images.shape) * 3  # outside the ball on purpose
    for steps in (0, 1, 5):
        objective = OBJECTIVES[kind](labels, model(images))
        adversarial = attacks.pgd(model, images, objective, ball, start, steps, 0.1)
        assert adversarial.dtype == torch.float32
        assert adversarial.shape == images.shape
        assert not adversarial.requires_grad
        assert 0 <= adversarial.min() <= adversarial.max() <= 1
        assert max(lengths(adversarial - images, norm)) <= 0.3 + 1e-6


def test_start_leaves_pixel_range_and_ball_without_clipping():
    """Checks the test above: without clipping some pixels would leave [0, 1], without projection the ball."""
    images = unit(7, 1, 8, 8)
    start = 3 * Ball("linf", 0.3).random_start(seeds.stream(1, "start"), images.shape)
    assert (images + start.clamp(-0.3, 0.3)).min() < 0
    assert start.abs().max() > 0.3


# --- linear classifiers


def linear(classes, shape, seed=0):
    weight, bias = gaussian(classes, math.prod(shape), seed=seed), 0.1 * gaussian(classes, seed=seed + 1)
    return weight, bias, lambda images: images.flatten(1) @ weight.T + bias


def dual(difference, norm):
    """Dual norm: the largest change of the product with `difference` by a perturbation of size 1."""
    return difference.abs().sum().item() if norm == "linf" else difference.norm().item()


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 2)])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_finds_the_worst_perturbation_of_a_linear_classifier(norm, shape, kind):
    """Two classes: the margin falls by epsilon times the dual norm of the weight difference, and no further."""
    weight, _, model = linear(2, shape)
    images, labels = 0.35 + 0.3 * unit(9, *shape), torch.arange(9) % 2  # 0.35 from either border
    ball = Ball(norm, 0.1)
    start = ball.random_start(seeds.stream(2, "start"), images.shape)
    objective = OBJECTIVES[kind](labels, model(images))
    adversarial = attacks.pgd(model, images, objective, ball, start, steps=40, step_size=0.02)
    change = attacks.logit_margin(model(adversarial), labels) - attacks.logit_margin(model(images), labels)
    worst = 0.1 * dual(weight[0] - weight[1], norm)
    if kind == "divergence":  # rises in both directions: only the size of the change is known
        change = -change.abs()
    torch.testing.assert_close(change, torch.full((9,), -worst), rtol=2e-3, atol=0)
    direction = (weight[0] - weight[1]) * (1 - 2 * (labels == 0).float()[:, None])  # away from the label
    exact = 0.1 * (direction.sign() if norm == "linf" else direction / direction.norm(dim=1, keepdim=True))
    actual = (adversarial - images).flatten(1)
    if kind == "divergence":
        exact = exact * (actual * exact).sum(1, keepdim=True).sign()
    torch.testing.assert_close(actual, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_on_five_classes_is_close_to_the_optimum_and_never_beyond(norm):
    """The worst margin of a linear classifier is the least, over the other classes, of margin - epsilon * dual norm."""
    weight, _, model = linear(5, (1, 6, 6), seed=3)
    images, labels = 0.35 + 0.3 * unit(40, 1, 6, 6), torch.arange(40) % 5
    ball, logits = Ball(norm, 0.1), model(images)
    start = ball.random_start(seeds.stream(2, "start"), images.shape)
    margins = attacks.logit_margin(
        model(attacks.pgd(model, images, attacks.margin(labels), ball, start, 40, 0.02)), labels
    )
    gaps = []
    for k, y in enumerate(labels.tolist()):
        optimum = min(
            logits[k, y].item() - logits[k, j].item() - 0.1 * dual(weight[y] - weight[j], norm)
            for j in range(5)
            if j != y
        )
        gaps.append(margins[k].item() - optimum)
    assert min(gaps) > -1e-4
    assert sum(gap < 0.01 for gap in gaps) >= 30  # the others reach a local maximum: one start, no restarts


@pytest.mark.parametrize("norm", NORMS)
def test_steps_have_the_requested_size(norm):
    """Far from the borders of ball and pixel range, k steps on a linear objective move k * step_size."""
    _, _, model = linear(2, (1, 4, 4))
    images = torch.full((3, 1, 4, 4), 0.5)
    adversarial = attacks.pgd(
        model, images, attacks.margin(torch.tensor([0, 1, 0])), Ball(norm, 0.4), torch.zeros_like(images), 3, 0.02
    )
    assert lengths(adversarial - images, norm) == pytest.approx([0.06] * 3, rel=1e-3)


def test_zero_steps_return_the_projected_start():
    images, start = torch.full((2, 1, 2, 2), 0.9), torch.full((2, 1, 2, 2), 0.5)
    adversarial = attacks.pgd(None, images, None, Ball("linf", 0.2), start, 0, 0.1)
    assert torch.equal(adversarial, torch.ones(2, 1, 2, 2))
    assert torch.equal(start, torch.full((2, 1, 2, 2), 0.5))


# --- what an attack must not change


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_may_be_left_unclipped(norm):
    """Then the first gradient is taken at images + start; all later iterates are inside."""
    images, ball, inputs = unit(5, 1, 4, 4), Ball(norm, 0.1), []
    start, model = gaussian(5, 1, 4, 4, seed=3), network((1, 4, 4))

    def logits_of(x):
        inputs.append(x.detach().clone())
        return model(x)

    adversarial = attacks.pgd(
        logits_of,
        images,
        attacks.cross_entropy(torch.zeros(5, dtype=torch.long)),
        ball,
        start,
        2,
        0.05,
        clip_start=False,
    )
    assert torch.equal(inputs[0], images + start)
    for x in (inputs[1], adversarial):
        assert max(lengths(x - images, norm)) <= 0.1 * (1 + 1e-5)
        assert 0 <= x.min() <= x.max() <= 1


def test_pgd_does_not_change_gradients_inputs_or_grad_mode():
    model = network((1, 4, 4)).requires_grad_(True)
    mark = torch.full_like(model[1].weight, 7.0)
    model[1].weight.grad = mark
    images, labels = unit(3, 1, 4, 4), torch.tensor([0, 1, 2])
    before, start = images.clone(), torch.zeros_like(images)
    with torch.no_grad(), modes.frozen(model):  # works where gradients are switched off
        attacks.pgd(model, images, attacks.cross_entropy(labels), Ball("linf", 0.1), start, 3, 0.05)
        assert not torch.is_grad_enabled()
    adversarial = attacks.pgd(model, images, attacks.cross_entropy(labels), Ball("linf", 0.1), start, 3, 0.05)
    assert model[1].weight.grad is mark
    assert torch.equal(mark, torch.full_like(mark, 7.0))
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert not start.any()
    assert adversarial.grad_fn is None
    assert not adversarial.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_attack_of_an_image_does_not_depend_on_its_batch(norm):
    model, images, labels, ball = network((1, 5, 5)), unit(4, 1, 5, 5), torch.arange(4), Ball(norm, 0.2)
    start = ball.random_start(seeds.stream(1, "start"), images.shape)
    together = attacks.pgd(model, images, attacks.cross_entropy(labels), ball, start, 5, 0.05)
    for k in range(4):
        index = slice(k, k + 1)
        alone = attacks.pgd(model, images[index], attacks.cross_entropy(labels[index]), ball, start[index], 5, 0.05)
        torch.testing.assert_close(alone, together[index])


# --- the ball


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_size_is_the_norm_of_each_perturbation(norm, shape):
    perturbation = gaussian(6, *shape)
    assert Ball(norm, 0.1).size(perturbation).tolist() == pytest.approx(lengths(perturbation, norm), rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.floats(0, 5), epsilon=st.floats(0.01, 2))
def test_projection_is_the_nearest_point_of_the_ball(norm, seed, scale, epsilon):
    """A point of a convex set is the nearest one iff every other point of the set lies on its far side."""
    ball = Ball(norm, epsilon)
    perturbation = scale * gaussian(4, 1, 3, 3, seed=seed, dtype=torch.float64)
    projected = ball.project(perturbation)
    assert max(lengths(projected, norm)) <= epsilon * (1 + 1e-9)
    others = ball.random_start(seeds.stream(seed, "others"), (40, 1, 3, 3)).double()
    others = torch.cat([others, epsilon * others / torch.tensor(lengths(others, norm))[:, None, None, None]])  # border
    across = torch.einsum("nchw,mnchw->mn", perturbation - projected, others[:, None] - projected[None])
    assert across.max() <= 1e-6 * (1 + scale) * epsilon
    inside = torch.tensor(lengths(perturbation, norm)) <= epsilon
    assert torch.equal(projected[inside], perturbation[inside])


def test_projection_and_direction_of_zero_are_zero():
    for norm in NORMS:
        assert not Ball(norm, 0.1).project(torch.zeros(2, 1, 2, 2)).any()
        assert not Ball(norm, 0.1).direction(torch.zeros(2, 1, 2, 2)).any()


@pytest.mark.parametrize("norm", NORMS)
def test_direction_is_the_steepest_of_unit_norm(norm):
    gradient = gaussian(5, 1, 4, 4)
    direction = Ball(norm, 0.1).direction(gradient)
    assert lengths(direction, norm) == pytest.approx([1.0] * 5)
    # the product with the gradient is its dual norm: no direction of size 1 is steeper
    assert (direction * gradient).flatten(1).sum(1).tolist() == pytest.approx([dual(g, norm) for g in gradient])


# --- starts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_inside_the_ball_and_reproducible(norm, shape):
    ball = Ball(norm, 0.25)
    start = ball.random_start(seeds.stream(1, "start", 5), (200, *shape))
    assert start.dtype == torch.float32
    assert max(lengths(start, norm)) <= 0.25 * (1 + 1e-6)
    assert torch.equal(start, ball.random_start(seeds.stream(1, "start", 5), (200, *shape)))
    assert not torch.equal(start, ball.random_start(seeds.stream(1, "start", 6), (200, *shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_start_of_l2_is_uniform_in_the_ball(shape):
    """(radius / epsilon)^dimension is uniform in [0, 1], and directions have no preference."""
    start = Ball("l2", 0.25).random_start(seeds.stream(1, "start"), (4000, *shape)).double()
    volume_fraction = (start.flatten(1).norm(dim=1) / 0.25) ** math.prod(shape)
    assert stats.kstest(volume_fraction.numpy(), "uniform").pvalue > 0.001
    pixels = start.flatten(1).mean(0) / start.flatten(1).std(0)
    assert pixels.abs().max() < 4.5 / math.sqrt(4000)


@pytest.mark.parametrize("start", ["random_start", "training_start"])
def test_starts_of_linf_are_uniform_in_the_cube(start):
    drawn = getattr(Ball("linf", 0.25), start)(seeds.stream(1, "start"), (500, 1, 4, 4))
    assert stats.kstest(drawn.flatten().double().numpy(), "uniform", args=(-0.25, 0.5)).pvalue > 0.001


def test_training_start_of_l2_is_a_tiny_gaussian():
    """0.001 * N(0, 1), whatever the radius: the published code's start, not a point of the ball."""
    drawn = Ball("l2", 0.25).training_start(seeds.stream(1, "start"), (500, 1, 4, 4))
    assert stats.kstest(drawn.flatten().double().numpy(), "norm", args=(0, 0.001)).pvalue > 0.001


# --- objectives


LOGITS = 3 * gaussian(9, 5, seed=7)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])


def log_softmax(row):
    top = max(row)
    total = math.log(sum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    expected = [-log_softmax(row)[y] for row, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)]
    assert attacks.cross_entropy(LABELS)(LOGITS).tolist() == pytest.approx(expected, rel=1e-5)


def test_margin_is_the_best_wrong_logit_less_the_right_one():
    expected = []
    for row, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        expected.append(max(v for j, v in enumerate(row) if j != y) - row[y])
    assert attacks.margin(LABELS)(LOGITS).tolist() == pytest.approx(expected, rel=1e-5)
    assert attacks.logit_margin(LOGITS, LABELS).tolist() == pytest.approx([-v for v in expected], rel=1e-5)


def test_divergence_is_kl_from_the_target_to_the_model():
    target = 2 * gaussian(9, 5, seed=8)
    expected = []
    for row, other in zip(LOGITS.tolist(), target.tolist(), strict=True):
        p, q = log_softmax(other), log_softmax(row)
        expected.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    actual = attacks.divergence(target.log_softmax(1))(LOGITS)
    assert actual.tolist() == pytest.approx(expected, rel=1e-4)
    assert attacks.divergence(LOGITS.log_softmax(1))(LOGITS).abs().max() < 1e-6


def test_divergence_sends_no_gradient_to_its_target():
    target, logits = LOGITS.clone().requires_grad_(True), (LOGITS + 1).requires_grad_(True)
    attacks.divergence(target.log_softmax(1))(logits * 2).sum().backward()
    assert target.grad is None
    assert logits.grad.any()


def test_divergence_is_finite_for_certain_targets():
    """Probabilities that are 0 in float32 count as 0 * log 0 = 0, in the value and in the gradient."""
    logits = torch.zeros(1, 3, requires_grad=True)
    value = attacks.divergence(torch.tensor([[300.0, 0.0, 0.0]]).log_softmax(1))(logits)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(3))
    assert logits.grad[0].tolist() == pytest.approx([1 / 3 - 1, 1 / 3, 1 / 3])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objectives_compute_in_float32(kind):
    half = LOGITS.to(torch.bfloat16)
    value = OBJECTIVES[kind](LABELS, gaussian(9, 5, seed=8))(half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, OBJECTIVES[kind](LABELS, gaussian(9, 5, seed=8))(half.float()))


def test_logit_margin_is_positive_exactly_where_the_prediction_is_right():
    logits = gaussian(500, 6, seed=9)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 6, 500))
    right = logits.argmax(1) == labels
    assert 40 < right.sum() < 140
    assert torch.equal(attacks.logit_margin(logits, labels) > 0, right)
    assert torch.equal(attacks.margin(labels)(logits) > 0, ~right)


# --- one step, restarts, the ratio of logits


def test_logit_ratio_matches_the_equation():
    """Croce and Hein 2020, equation 3, in plain Python."""
    logits, labels = gaussian(50, 6, seed=3), torch.arange(50) % 6
    ratios = attacks.logit_ratio(labels)(logits)
    for row, label, value in zip(logits.double().tolist(), labels.tolist(), ratios.tolist(), strict=True):
        ordered = sorted(row, reverse=True)
        best_other = max(z for k, z in enumerate(row) if k != label)
        assert value == pytest.approx(-(row[label] - best_other) / (ordered[0] - ordered[2]), rel=1e-5)


def test_logit_ratio_does_not_depend_on_the_scale_of_the_logits():
    logits, labels = gaussian(50, 6, seed=4), torch.arange(50) % 6
    objective = attacks.logit_ratio(labels)
    torch.testing.assert_close(objective(1000 * logits), objective(logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step_of_the_whole_radius(norm):
    model, images, labels = network((3, 5, 4)), 0.4 + 0.2 * unit(9, 3, 5, 4), torch.arange(9) % 4
    ball = Ball(norm, 0.1)
    adversarial = attacks.fgsm(model, images, attacks.cross_entropy(labels), ball)
    x = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)
    step = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(adversarial, images + 0.1 * step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_break_every_image_that_one_start_breaks(norm):
    """Each restart attacks the images still robust; an image breaks if and only if a single attack breaks it."""
    model, images = network((3, 5, 4), classes=5), unit(60, 3, 5, 4, seed=2)
    labels, ball = model(images).argmax(1), Ball(norm, {"linf": 0.04, "l2": 0.18}[norm])
    starts = [ball.random_start(seeds.stream(1, "start", k), tuple(images.shape)) for k in range(6)]

    def attack(starts_used):
        return attacks.pgd_with_restarts(model, images, labels, attacks.margin, ball, starts_used, 1, ball.epsilon / 2)

    single = torch.stack([model(attack([start])).argmax(1) != labels for start in starts])
    together = attack(starts)
    assert torch.equal(model(together).argmax(1) != labels, single.any(0))
    assert 0 < int(single[0].sum()) < int(single.any(0).sum()) < 60
    assert torch.equal(together[single[0]], attack(starts[:1])[single[0]])
    assert ball.size(together - images).max() <= ball.epsilon + 1e-6


def test_restarts_stop_when_no_image_is_left():
    model, images = network((3, 5, 4)), unit(4, 3, 5, 4)
    wrong = (model(images).argmax(1) + 1) % 4
    passes = []

    def counting_model(x):
        passes.append(len(x))
        return model(x)

    start = torch.zeros_like(images)
    attacks.pgd_with_restarts(counting_model, images, wrong, attacks.margin, Ball("linf", 0.01), [start] * 5, 2, 0.01)
    assert passes == [4, 4, 4], "two steps and one check"
