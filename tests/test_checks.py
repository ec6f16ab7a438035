"""Each check fails for a real way to measure a wrong robust accuracy, and passes for a sound measurement.

A small network is trained adversarially on digits and then spoiled: the ways are those that people report. Numbers on
either side of each threshold hold it in place. Run alone: pytest tests/test_checks.py
"""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import nn
from torch.nn import functional as F

from dmat import modes, seeds
from dmat.data import overlap, sources
from dmat.data.pixels import to_bytes, to_float
from dmat.evaluation import checks
from dmat.evaluation.checks import Check
from dmat.robust import attacks
from dmat.robust.attacks import Ball
from dmat.robust.networks import DataSpec, wide_resnet

BALL = Ball("linf", 0.1)
TRAINING, HELDOUT = slice(0, 1300), slice(1300, 1500)  # images of training and of evaluation


@pytest.fixture(scope="module")
def digits():
    """Shuffled digits: float32 [1797, 1, 8, 8] in [0, 1] and labels."""
    source = sources.digits()
    order = seeds.stream(1, "digits").permutation(len(source.labels))
    return to_float(source.images[order]).contiguous(), torch.from_numpy(source.labels[order])


def train_robustly(digits, ball, steps, rate, batch, attack_steps, step_size, random):
    """WRN-10-1 after PGD adversarial training (Madry et al. 2018), frozen, in evaluation mode."""
    images, labels = (part[TRAINING] for part in digits)
    seeds.reseed_torch(1, "weights", 0)
    model = wide_resnet(DataSpec(10, 1, (0.3,), (0.38,)), 10, 1, "relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        indices = torch.from_numpy(seeds.stream(1, "batch", step).integers(0, len(labels), batch))
        x, y = images[indices], labels[indices]
        start = random * ball.random_start(seeds.stream(1, "start", step), tuple(x.shape))
        with modes.frozen(model):
            x = attacks.pgd(model, x, attacks.cross_entropy(y), ball, start, attack_steps, step_size)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sound(digits):
    return train_robustly(digits, BALL, steps=60, rate=0.1, batch=128, attack_steps=2, step_size=0.07, random=1)


@pytest.fixture
def spoiled(sound):
    """A copy of the model for tests to break."""
    return copy.deepcopy(sound)


@pytest.fixture(scope="module")
def heldout(digits):
    images, labels = digits
    return images[HELDOUT], labels[HELDOUT]


def start_in(ball, images):
    return ball.random_start(seeds.stream(2, "start"), tuple(images.shape))


def pgd_images(model, heldout, ball, steps, step_size):
    """PGD with the CW margin; one step is FGSM (Goodfellow et al. 2015): from the image, with the cross-entropy."""
    images, labels = heldout
    if steps == 1:
        start, objective = torch.zeros_like(images), attacks.cross_entropy(labels)
    else:
        start, objective = start_in(ball, images), attacks.margin(labels)
    return attacks.pgd(model, images, objective, ball, start, steps, step_size)


def correct(model, adversarial, labels):
    return (model(adversarial).argmax(1) == labels).numpy()


def robust(model, heldout, ball, steps, step_size):
    return correct(model, heldout[0], heldout[1]) & correct(
        model, pgd_images(model, heldout, ball, steps, step_size), heldout[1]
    )


def robust_to_square(model, heldout, ball):
    """Square (Andriushchenko et al. 2020) with 100 queries."""
    attack = SquareAttack(model, norm="Linf", eps=ball.epsilon, n_queries=100, seed=0, device="cpu")
    return correct(model, heldout[0], heldout[1]) & correct(model, attack.perturb(*heldout), heldout[1])


def quantised(model):
    """The model on images of five grey levels: rounding has no gradient."""
    return lambda images: model((images * 4).round() / 4)


def fires(check: Check, name: str, *fragments: str) -> None:
    assert not check.passed, check.sentence
    assert check.name == name
    assert "expected" in check.sentence
    assert ";" in check.sentence.partition("expected")[2], "says what to do"
    for fragment in fragments:
        assert fragment in check.sentence, check.sentence
    json.dumps(check.plain(), allow_nan=False)


def passes(check: Check, name: str, *fragments: str) -> None:
    assert check.passed, check.sentence
    assert check.name == name
    assert "expected" not in check.sentence
    for fragment in fragments:
        assert fragment in check.sentence, check.sentence
    json.dumps(check.plain(), allow_nan=False)


def flags(count, n):
    """Flags of n images, of which `count` are robust."""
    return np.arange(n) < count


def test_a_sound_measurement_passes_every_check(sound, heldout):
    images, labels = heldout
    few_steps, many_steps = robust(sound, heldout, BALL, 3, 0.05), robust(sound, heldout, BALL, 20, 0.025)
    adversarial = pgd_images(sound, heldout, BALL, 20, 0.025)
    margins = attacks.logit_margin(sound(adversarial), labels).numpy()
    margins_in_sevens = attacks.logit_margin(torch.cat([sound(part) for part in adversarial.split(7)]), labels).numpy()
    grey_radius = checks.trivial_radius("linf", tuple(images.shape[1:]))
    results = [
        checks.in_range(images),
        checks.logits(sound(images)),
        checks.evaluation_mode(sound),
        checks.same_alone(sound, images[:32]),
        checks.finite(sound(images)),
        checks.deterministic(sound, images),
        checks.inside_ball(images, adversarial, BALL),
        checks.rescored(many_steps, margins, margins_in_sevens),
        checks.zero_gradients(sound, images, labels, BALL, start_in(BALL, images)),
        checks.more_steps(few_steps, many_steps, 3, 20),
        checks.black_box(robust_to_square(sound, heldout, BALL), many_steps),
        checks.large_radius(robust(sound, heldout, Ball("linf", grey_radius), 20, 0.125), grey_radius),
        checks.fgsm_and_pgd(robust(sound, heldout, BALL, 1, 0.1), many_steps),
        checks.unseen({"earlier test images": overlap.repeated(overlap.digests(to_bytes(images * 2 - 1)))}),
    ]
    assert 0.6 < many_steps.mean() < few_steps.mean() < 0.9  # otherwise the last checks would compare nothing
    assert checks.verdict(results) == []
    for check in results:
        passes(check, check.name)
    public = [name for name, f in inspect.getmembers(checks, inspect.isfunction) if _gives_check(name, f)]
    assert sorted(check.name for check in results) == sorted(public)
    assert len(public) == 14


def _gives_check(name, function):
    return not name.startswith("_") and inspect.signature(function).return_annotation is Check


# --- range


@pytest.mark.parametrize(
    ("change", "fragments", "value"),
    [
        (lambda x: x * 255, ("to 255;", "divide by 255"), 255),
        (lambda x: x * 16, ("to 16;", "divide by 255"), 16),
        (lambda x: (x * 255).to(torch.uint8), ("uint8 from 0 to 255", "divide by 255"), 255),
        (lambda x: x.to(torch.uint8), ("uint8 from 0 to 1;", "divide by 255"), 1),
        (lambda x: (x - 0.3) / 0.38, ("from -0.7895 to 1.842", "normalised outside the model"), -0.3 / 0.38),
        (lambda x: x * 2 - 1, ("from -1 to 1", "normalised outside the model"), -1),
        (lambda x: x / 255, ("divided by 255 twice",), 1 / 255),
        (lambda x: F.interpolate(x, scale_factor=3, mode="bicubic"), ("resized", "clip them"), None),
        (lambda x: x * 1.001, ("to 1.001", "clip them"), 1.001),
        (lambda x: x.where(x > 0, torch.nan), ("NaN or infinite", "fix the data"), None),
    ],
)
def test_images_out_of_range_are_reported_with_the_cause(heldout, change, fragments, value):
    check = checks.in_range(change(heldout[0]))
    fires(check, "in_range", *fragments)
    assert value is None or check.found == pytest.approx(value)


def test_both_borders_and_dark_images_are_in_range(heldout):
    assert (heldout[0].min(), heldout[0].max()) == (0, 1)
    passes(checks.in_range(heldout[0]), "in_range", "from 0 to 1")
    passes(checks.in_range(heldout[0] * 2 / 255), "in_range")


# --- outputs


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_softmax_in_the_model_is_found(sound, heldout, precision):
    check = checks.logits(nn.Sequential(sound, nn.Softmax(1))(heldout[0]).to(precision))
    fires(check, "logits", "100% of the rows", "vanish")
    assert check.found == 1


def test_logits_that_resemble_probabilities_pass(sound, heldout):
    outputs = sound(heldout[0])
    passes(checks.logits(outputs.log_softmax(1)), "logits")
    passes(checks.logits(outputs - outputs.mean(1, keepdim=True) + 0.1), "logits")  # sums to 1, below 0 in places
    passes(checks.logits(outputs.softmax(1) * 1.02), "logits")  # at least 0, another sum
    passes(checks.logits(torch.cat([outputs, outputs[:1].softmax(1)])), "logits", "0% of the rows")
    passes(checks.logits(torch.cat([outputs, outputs.softmax(1)])), "logits", "50% of the rows")


def test_nan_outputs_are_found(spoiled, heldout):
    spoiled.logits.weight[3, 0] = torch.nan
    check = checks.finite(spoiled(heldout[0]))
    fires(check, "finite", "200 of 200 images", "diverged")
    assert check.found == 200


def test_a_single_infinity_is_found(sound, heldout):
    outputs = sound(heldout[0])
    passes(checks.finite(outputs), "finite", "all 200")
    outputs[7, 2] = torch.inf
    fires(checks.finite(outputs), "finite", "1 of 200 images")


# --- the model's state


def test_training_mode_is_found_and_named(spoiled):
    passes(checks.evaluation_mode(spoiled), "evaluation_mode")
    spoiled.layer[1].block[0].batchnorm_1.train()
    fires(checks.evaluation_mode(spoiled), "evaluation_mode", "1 of ", "the first is layer.1.block.0.batchnorm_1;")
    spoiled.train()
    check = checks.evaluation_mode(spoiled)
    fires(check, "evaluation_mode", "the first is WideResNet;")
    assert check.found == len(list(spoiled.modules()))


def normalised_by_batch(model):
    def logits_of(images):
        return model(0.3 + 0.38 * (images - images.mean()) / images.std())

    return logits_of


def without_statistics(model):
    """A batch norm that tracks nothing normalises by the batch in evaluation mode too."""
    model.batchnorm = nn.BatchNorm2d(64, track_running_stats=False)
    return model.eval()


def left_in_training_mode(model):
    model.batchnorm.train()
    return model


@pytest.mark.parametrize("wrong", [left_in_training_mode, normalised_by_batch, without_statistics])
def test_predictions_that_depend_on_the_batch_are_found(spoiled, heldout, wrong):
    check = checks.same_alone(wrong(spoiled), heldout[0][:32])
    fires(check, "same_alone", " of 32 predictions differ", "depends on its batch")
    assert check.found > 0


def test_a_model_that_refuses_single_images_is_found(heldout):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    fires(checks.same_alone(model, heldout[0][:8]), "same_alone", "refuses one of the batches", "more than 1 value")


@pytest.mark.parametrize(
    ("wrong", "batch_description"),
    [
        (lambda images: len(images) == 1, ", alone;"),
        (lambda images: len(images) == 8 and images[0, 0, 0, 0] > 0, ", in the reversed batch;"),
        (lambda images: len(images) == 4, ", in half of the batch;"),
    ],
)
def test_single_reversed_and_half_batches_are_compared(wrong, batch_description):
    """Each of the three batches detects the dependence in some model."""
    images = torch.arange(8)[:, None, None, None] / 8
    logits_of = lambda x: (torch.tensor([0.0, 1.0]) if wrong(x) else torch.tensor([1.0, 0.0])).repeat(len(x), 1)  # noqa: E731
    check = checks.same_alone(logits_of, images)
    fires(check, "same_alone", "8 of 8 predictions differ", batch_description)
    assert check.found == 8


def of_two(together, alone):
    """The check on a model whose logits are `together` in a batch and `alone` for a single image."""
    return checks.same_alone(
        lambda x: torch.tensor([alone if len(x) == 1 else together]).repeat(len(x), 1), torch.rand(6, 1, 2, 2)
    )


def test_predictions_may_differ_only_in_ties():
    passes(of_two([1.0, 1.00009], [1.00009, 1.0]), "same_alone", "0 of 6", "ties left out: 6")
    fires(of_two([1.0, 1.00011], [1.00009, 1.0]), "same_alone", "6 of 6", "ties left out: 0")
    fires(of_two([1.0, 1.00009], [1.00011, 1.0]), "same_alone", "6 of 6")


def test_logits_must_agree_even_where_predictions_do():
    passes(of_two([-10.0, 5.0], [-10.0, 5.09]), "same_alone")
    fires(of_two([-10.0, 5.0], [-10.0, 5.11]), "same_alone", "0 of 6", "up to 0.11", "at most 0.1;")
    passes(of_two([0.0, 0.0], [0.0, 0.0]), "same_alone")
    passes(of_two([torch.nan, 5.0], [torch.nan, 5.0]), "same_alone")  # `finite` says what is wrong here
    fires(of_two([torch.nan, 5.0], [torch.nan, 6.0]), "same_alone")
    fires(of_two([0.0, 5.0], [torch.nan, 5.0]), "same_alone")


def noisy(model):
    return lambda images: model(images + 1e-3 * torch.randn_like(images))


def with_dropout(model):
    model.activation = nn.Sequential(model.activation, nn.Dropout(0.1))  # a new module is in training mode
    return model


@pytest.mark.parametrize("wrong", [noisy, with_dropout])
def test_randomness_in_the_model_is_found(spoiled, heldout, wrong):
    torch.manual_seed(0)
    check = checks.deterministic(wrong(spoiled), heldout[0])
    fires(check, "deterministic", "draws random numbers", "at most 0:")
    assert check.found > 0


class Remote:
    """Images on a GPU, as far as the check can see."""

    device = torch.device("cuda")

    def __len__(self):
        return 2


def twice(first, second, images):
    passes_of_the_model = iter([first, second])
    return checks.deterministic(lambda _: torch.tensor([next(passes_of_the_model)] * 2), images)


def test_two_passes_are_equal_on_a_cpu_and_nearly_so_on_a_gpu():
    cpu_images = torch.zeros(2, 1, 2, 2)
    passes(twice([-10.0, 1.0], [-10.0, 1.0], cpu_images), "deterministic")
    fires(twice([-10.0, 1.0], [-10.0, 1.000001], cpu_images), "deterministic")
    passes(twice([-10.0, 1.0], [-10.0, 1.009], Remote()), "deterministic")
    fires(twice([-10.0, 1.0], [-10.0, 1.011], Remote()), "deterministic", "at most 0.01:")
    passes(twice([torch.nan, torch.inf], [torch.nan, torch.inf], cpu_images), "deterministic")
    check = twice([torch.nan, 1.0], [0.0, 1.0], cpu_images)
    fires(check, "deterministic")
    assert check.found is None


# --- adversarial images


def test_an_attack_that_leaves_the_ball_is_found(sound, heldout):
    """Steps without projection."""
    images, labels = heldout
    wide = attacks.pgd(sound, images, attacks.margin(labels), Ball("linf", 1), torch.zeros_like(images), 3, 0.05)
    check = checks.inside_ball(images, wide, BALL)
    fires(check, "inside_ball", "of image ", " are above 0.1;", "another threat model")
    assert check.found == pytest.approx(0.15, abs=1e-5)


def test_the_wrong_epsilon_is_found(sound, heldout):
    adversarial = pgd_images(sound, heldout, Ball("linf", 8 / 255), 5, 0.01)
    passes(checks.inside_ball(heldout[0], adversarial, Ball("linf", 8 / 255)), "inside_ball")
    fires(checks.inside_ball(heldout[0], adversarial, Ball("linf", 0.031)), "inside_ball", "0.0313725", "above 0.031;")


@pytest.mark.parametrize(("pixel", "value"), [(0, -1e-7), (1, 1 + 1e-6), (1, torch.nan)])
def test_pixels_out_of_range_are_found_and_named(pixel, value):
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).repeat(4, 1, 2, 2)
    adversarial = images.clone()
    passes(checks.inside_ball(images, adversarial, BALL), "inside_ball")
    adversarial[4 + pixel, 0, 1, 1] = value
    fires(checks.inside_ball(images, adversarial, BALL), "inside_ball", f"image {4 + pixel}", "1 of 8")


def test_the_worst_image_is_named():
    images, adversarial = torch.full((5, 1, 2, 2), 0.5), torch.full((5, 1, 2, 2), 0.5)
    adversarial[1], adversarial[3], adversarial[4] = 0.65, 0.7, 0.6
    fires(checks.inside_ball(images, adversarial, BALL), "inside_ball", "is 0.2 (linf), of image 3; 2 of 5")


@pytest.mark.parametrize(
    ("norm", "shape", "within", "beyond"),
    [
        ("linf", (3, 32, 32), 0.9e-6, 1.1e-6),
        ("l2", (1, 1, 1), 0.9e-6, 1.1e-6),
        ("l2", (3, 32, 32), 3.2e-6, 3.4e-6),
        ("l2", (3, 224, 224), 2.2e-5, 2.4e-5),
    ],
)
def test_rounding_is_tolerated_and_no_more(norm, shape, within, beyond):
    images = torch.full((2, *shape), 0.5, dtype=torch.float64)
    part = 1 if norm == "linf" else images[0].numel() ** -0.5  # of each pixel in a perturbation of size 1
    ball = Ball(norm, 0.25)
    passes(checks.inside_ball(images, images - part * (0.25 + within), ball), "inside_ball")
    fires(checks.inside_ball(images, images - part * (0.25 + beyond), ball), "inside_ball")


def test_sizes_are_exact_whatever_the_precision_of_the_images():
    """0.9 - 0.1 in float16 is 1.2e-4 off."""
    images, adversarial = (torch.full((2, 1, 2, 2), value, dtype=torch.float16) for value in (0.1, 0.9))
    exact = adversarial[0, 0, 0, 0].item() - images[0, 0, 0, 0].item()
    assert abs((adversarial - images).max().item() - exact) > 1e-4
    check = checks.inside_ball(images, adversarial, Ball("linf", exact))
    passes(check, "inside_ball")
    assert check.found == exact


def test_an_image_with_nan_is_outside_the_ball():
    images, adversarial = torch.full((3, 1, 2, 2), 0.5), torch.full((3, 1, 2, 2), 0.5)
    images[1, 0, 0, 0] = torch.nan
    check = checks.inside_ball(images, adversarial, BALL)
    fires(check, "inside_ball", "of image 1; 1 of 3")
    assert check.found is None


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_float32_attacks_on_large_images_stay_within_the_tolerance(norm):
    """On the border of the ball: what the tolerance is for."""
    images = seeds.uniform(seeds.stream(1, "images"), (2, 3, 224, 224))
    ball = Ball(norm, 0.5)
    start = 1e3 * seeds.normal(seeds.stream(1, "start"), tuple(images.shape))
    passes(checks.inside_ball(images, attacks.pgd(None, images, None, ball, start, 0, 0), ball), "inside_ball")


def barely_across(model, heldout):
    """The attack's images moved back until they are just misclassified, as minimal attacks (FAB) leave them."""
    images, labels = heldout
    far = pgd_images(model, heldout, BALL, 20, 0.025)
    low, high = torch.zeros(len(images), 1, 1, 1), torch.ones(len(images), 1, 1, 1)
    for _ in range(20):
        middle = (low + high) / 2
        wrong = (model(images + middle * (far - images)).argmax(1) != labels)[:, None, None, None]
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return images + high * (far - images)


def margins_in(model, images, labels, batch):
    return attacks.logit_margin(torch.cat([model(part) for part in images.split(batch)]), labels).numpy()


def test_images_saved_as_bytes_lose_the_attack(sound, heldout):
    labels, adversarial = heldout[1], barely_across(sound, heldout)
    robust_flags = margins_in(sound, adversarial, labels, 200) > 0
    saved = to_float(to_bytes(adversarial * 2 - 1))
    check = checks.rescored(robust_flags, margins_in(sound, saved, labels, 200), margins_in(sound, saved, labels, 7))
    fires(check, "rescored", "not those that were scored", "save float32")
    assert check.found > 3
    unchanged = checks.rescored(
        robust_flags, margins_in(sound, adversarial, labels, 200), margins_in(sound, adversarial, labels, 7)
    )
    passes(unchanged, "rescored", "all 200 flags")


def test_a_model_that_scores_by_the_batch_is_found_by_rescoring(spoiled, heldout):
    labels, model = heldout[1], left_in_training_mode(spoiled)
    with modes.untracked_batch_norm(model):
        adversarial = pgd_images(model, heldout, BALL, 5, 0.05)
        same, other = (margins_in(model, adversarial, labels, batch) for batch in (200, 7))
    fires(checks.rescored(same > 0, same, other), "rescored", "0 of 200 flags differ in the same batches")


def rescored_one(flag, same, other):
    correct = np.ones(9)
    return checks.rescored(np.append(correct > 0, flag), np.append(correct, same), np.append(correct, other))


def test_flags_may_differ_only_in_ties_and_only_in_other_batches():
    passes(rescored_one(True, 0.5, 0.5), "rescored", "ties in other batches: 0")
    passes(rescored_one(True, 9e-5, -9e-5), "rescored", "ties in other batches: 1")
    passes(rescored_one(False, -9e-5, 9e-5), "rescored", "ties in other batches: 1")
    fires(rescored_one(True, 9e-5, -1.1e-4), "rescored", "0 of 10", "1 in others")
    fires(rescored_one(True, 1.1e-4, -9e-5), "rescored", "0 of 10", "1 in others")
    fires(rescored_one(True, -9e-5, 9e-5), "rescored", "1 of 10 flags differ in the same batches and 0 in others")
    fires(rescored_one(False, 0.5, 0.5), "rescored", "1 of 10 flags differ in the same batches and 1 in others")
    fires(rescored_one(True, 0.0, 9e-5), "rescored", "1 of 10")  # a margin of 0 is not right
    fires(rescored_one(True, 1.0, torch.nan), "rescored", "1 in others")


# --- gradients


def huge(model):
    return lambda images: 1e4 * model(images)


def detached(model):
    return lambda images: model(images.detach())


@pytest.mark.parametrize("wrong", [huge, quantised, detached])
def test_gradients_that_vanish_are_found(sound, heldout, wrong):
    """Huge logits: the cross-entropy of float32 is exactly 0 there."""
    images, labels = heldout
    check = checks.zero_gradients(wrong(sound), images, labels, BALL, start_in(BALL, images))
    fires(check, "zero_gradients", " of 200 images", "without being so")
    assert check.found > 0.8


def test_gradients_of_parameters_do_not_count(heldout):
    images, labels = heldout
    bias = torch.zeros(10, requires_grad=True)
    check = checks.zero_gradients(lambda x: bias.repeat(len(x), 1), images, labels, BALL, start_in(BALL, images))
    assert (check.passed, check.found) == (False, 1)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize(("count", "fine"), [(5, True), (6, False)])
def test_one_image_in_twenty_may_have_no_gradient(count, fine, value):
    """Logits of a linear model, whose gradient is replaced for the first images."""
    images, labels = torch.full((100, 1, 2, 2), 0.5), torch.zeros(100, dtype=torch.int64)

    def logits_of(x):
        silent = (torch.arange(len(x)) < count)[:, None, None, None]
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.masked_fill(silent, value))
        return x.flatten(1)

    check = checks.zero_gradients(logits_of, images, labels, BALL, torch.zeros_like(images))
    assert (check.passed, check.found) == (fine, count / 100)


def test_gradients_are_taken_at_the_projected_start():
    images, labels = torch.full((4, 1, 2, 2), 0.4), torch.arange(4)
    dead_below_half = lambda x: F.relu(x - 0.5).flatten(1)  # noqa: E731
    start = torch.full_like(images, 0.2)
    at = lambda epsilon: checks.zero_gradients(dead_below_half, images, labels, Ball("linf", epsilon), start)  # noqa: E731
    assert (at(0.2).passed, at(0.05).passed) == (True, False)


def test_gradients_are_computed_under_no_grad(sound, heldout):
    with torch.no_grad():
        passes(checks.zero_gradients(sound, *heldout, BALL, start_in(BALL, heldout[0])), "zero_gradients")


# --- attacks side by side


def test_steps_without_effect_are_found(sound, heldout):
    """The step shrinks with the square of the number of steps; the sign of the step is wrong."""
    few_steps, many_steps = (robust(sound, heldout, BALL, steps, 0.3 / steps**2) for steps in (2, 20))
    check = checks.more_steps(few_steps, many_steps, 2, 20)
    fires(check, "more_steps", "to PGD-2,", "to PGD-20;", "do not climb")
    assert check.found == pytest.approx(many_steps.mean() - few_steps.mean())
    fgsm = robust(sound, heldout, BALL, 1, 0.1)
    fires(checks.fgsm_and_pgd(fgsm, robust(sound, heldout, BALL, 20, -0.025)), "fgsm_and_pgd", "broken")


def test_masked_gradients_are_found_by_a_black_box_attack(sound, heldout):
    model = quantised(sound)
    black, white = robust_to_square(model, heldout, BALL), robust(model, heldout, BALL, 20, 0.025)
    fires(checks.black_box(black, white), "black_box", "gradients are masked")
    radius = checks.trivial_radius("linf", (1, 8, 8))
    survived = robust(model, heldout, Ball("linf", radius), 20, 0.125)
    fires(checks.large_radius(survived, radius), "large_radius", "at radius 0.5,", "the same grey")


def test_catastrophic_overfitting_is_found(digits):
    """Training with FGSM from the image itself, large steps and a large radius: catastrophic overfitting."""
    ball = Ball("linf", 0.3)
    model = train_robustly(digits, ball, steps=200, rate=0.3, batch=64, attack_steps=1, step_size=0.3, random=0)
    heldout = tuple(part[:200] for part in digits)
    check = checks.fgsm_and_pgd(robust(model, heldout, ball, 1, 0.3), robust(model, heldout, ball, 20, 0.075))
    fires(check, "fgsm_and_pgd", "catastrophic overfitting")
    assert check.found > 0.33  # far enough from the limit to hold on another machine


@pytest.mark.parametrize(("n", "stray"), [(1000, 5), (600, 3), (200, 1), (50, 1)])
def test_half_a_point_or_one_image_is_tolerated(n, stray):
    """The tolerance of all three checks that compare attacks; a smaller number of flags always passes."""
    base, allowed, above = flags(20, n), flags(20 + stray, n), flags(21 + stray, n)
    for name, compare in {
        "more_steps": lambda strong, weak: checks.more_steps(weak, strong, 10, 40),
        "black_box": lambda strong, weak: checks.black_box(weak, strong),
        "fgsm_and_pgd": lambda strong, weak: checks.fgsm_and_pgd(weak, strong),
    }.items():
        passes(compare(allowed, base), name)
        passes(compare(base, above), name)
        fires(compare(above, base), name, f"at most {stray} of {n}" if name != "more_steps" else f"than {stray} of {n}")
    assert checks.black_box(base, above).found == (1 + stray) / n
    assert checks.fgsm_and_pgd(base, above).found == -(1 + stray) / n


@pytest.mark.parametrize("n", [1000, 10])
def test_fgsm_and_pgd_may_differ_by_thirty_points(n):
    half = flags(n // 2, n)
    passes(checks.fgsm_and_pgd(half, flags(n // 5, n)), "fgsm_and_pgd")
    fires(checks.fgsm_and_pgd(half, flags(n // 5 - 1, n)), "fgsm_and_pgd", "resists one step only")
    passes(checks.fgsm_and_pgd(flags(9 * n // 10, n), flags(n // 2, n)), "fgsm_and_pgd")  # more than half is left
    passes(checks.fgsm_and_pgd(half, flags(n // 5 - 1, n), "l2"), "fgsm_and_pgd")
    fires(checks.fgsm_and_pgd(flags(n // 5, n), half, "l2"), "fgsm_and_pgd", "broken")


def test_one_image_in_twenty_may_survive_the_large_radius():
    passes(checks.large_radius(flags(50, 1000), 0.5), "large_radius")
    fires(checks.large_radius(flags(51, 1000), 0.5), "large_radius", "5.1 % of 1000")


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_every_image_can_become_grey_at_the_trivial_radius_and_not_below(norm):
    """Black is farthest from grey."""
    shape = (3, 5, 4)
    radius = checks.trivial_radius(norm, shape)
    black, grey = torch.zeros(1, *shape), torch.full((1, *shape), 0.5)
    for factor, reached in ((1.0001, True), (0.999, False)):
        projected = attacks.pgd(None, black, None, Ball(norm, factor * radius), grey, 0, 0)
        assert torch.allclose(projected, grey, rtol=1e-6) == reached


def test_trivial_radius_of_another_norm_is_refused():
    with pytest.raises(ValueError, match="norm is 'l1'; expected one of linf, l2"):
        checks.trivial_radius("l1", (1, 2, 2))


# --- results of checks


@pytest.mark.parametrize(("n", "allowed"), [(1000, 10), (199, 1), (99, 0)])
def test_one_test_image_in_a_hundred_may_be_a_copy(n, allowed):
    """Copies of any set; an image in two sets counts once."""
    for count in (allowed, allowed + 1):
        copies = {"earlier test images": flags(count // 2, n), "generated training images": flags(count, n)}
        check = checks.unseen(copies)
        fragments = (f"of {n:,} test images these are exact copies", f"{count} of generated training images")
        (passes if count == allowed else fires)(check, "unseen", *fragments)
        assert check.found == pytest.approx(count / n)


def test_the_verdict_lists_failed_checks(heldout):
    fine, wrong = checks.in_range(heldout[0]), checks.in_range(heldout[0] * 255)
    assert checks.verdict([fine]) == []
    (sentence,) = checks.verdict([fine, wrong])
    assert sentence == f"in_range: {wrong.sentence}"
    (sentence,) = checks.verdict([])
    assert sentence.startswith("nothing was checked")


def test_plain_check_holds_every_field():
    assert checks.large_radius(flags(1, 10), 0.5).plain() == {
        "name": "large_radius",
        "passed": False,
        "sentence": checks.large_radius(flags(1, 10), 0.5).sentence,
        "found": 0.1,
    }


def test_empty_or_mismatched_inputs_raise():
    none = torch.zeros(0, 1, 2, 2)
    for check in (checks.in_range, checks.logits, checks.finite):
        with pytest.raises(ValueError, match="a check of no images"):
            check(none)
    for check in (checks.same_alone, checks.deterministic):
        with pytest.raises(ValueError, match="a check of no images"):
            check(lambda x: x.flatten(1), none)
    with pytest.raises(ValueError, match="at least 2"):
        checks.same_alone(lambda x: x.flatten(1), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="a check of no images"):
        checks.zero_gradients(lambda x: x.flatten(1), none, torch.zeros(0, dtype=torch.int64), BALL, none)
    with pytest.raises(ValueError, match="a check of no images"):
        checks.inside_ball(none, none, BALL)
    with pytest.raises(ValueError, match=r"images \(2, 1, 2, 2\) and adversarial \(1, 1, 2, 2\)"):
        checks.inside_ball(torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 2, 2), BALL)
    with pytest.raises(ValueError, match=r"found bool \(0,\); expected bool \[N\]"):
        checks.large_radius(flags(0, 0), 0.5)
    with pytest.raises(ValueError, match=r"found int64 \(3,\), bool \(3,\)"):
        checks.black_box(flags(1, 3), np.array([1, 0, 1]))
    with pytest.raises(ValueError, match=r"found bool \(4,\), bool \(3,\)"):
        checks.fgsm_and_pgd(flags(1, 3), flags(1, 4))
    with pytest.raises(ValueError, match=r"found bool \(3,\), bool \(2,\), bool \(3,\)"):
        checks.rescored(flags(1, 3), np.ones(2), np.ones(3))
