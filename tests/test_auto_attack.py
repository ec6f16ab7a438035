"""AutoAttack: linear classifiers, the results of the authors' package, suites per class count."""

import pytest
import torch
from pyautoattack import AutoAttack

from dmat.errors import DmatError
from dmat.evaluation.progress import Meter
from dmat.robust import auto_attack
from dmat.robust.apgd import apgd, random_start
from dmat.robust.attacks import Ball, logit_margin
from dmat.robust.auto_attack import ATTACKS, MISCLASSIFIED, ROBUST, STANDARD
from dmat.robust.fab import fab, to_hyperplane
from dmat.robust.passes import Goal, Passes
from dmat.robust.square import square

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
    [*(("linf", 0.06, classes) for classes in (2, 3, 4, CLASSES, 12)), ("l2", 0.3, 3), ("l2", 0.25, CLASSES)],
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


@pytest.mark.parametrize(("norm", "epsilon", "classes"), [("linf", 0.06, 10), ("linf", 0.06, 4), ("l2", 0.25, 10)])
def test_the_quick_tier_breaks_what_can_be_broken_of_a_linear_classifier(norm, epsilon, classes):
    weights, model = _linear(classes)
    images = _images(24)
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % classes
    ball, attack_suite = Ball(norm, epsilon), auto_attack.suite("quick", classes)
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
def test_flags_equal_those_of_one_call_of_the_package(model, norm):
    """Same flags, with images in channels-last memory; several batches, the last one short."""
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
    _, prediction = package.run_standard_evaluation(images, labels, batch_size=13)
    assert torch.equal(prediction == labels, broken_by == ROBUST)
    assert ball.size(worst - images).max() <= ball.epsilon * (1 + 1e-5)
    assert 0 <= worst.min() <= worst.max() <= 1
    assert torch.equal(worst[broken_by < 0], images[broken_by < 0])
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
        ("quick", 10, STANDARD, 9, False),
        ("quick", 4, STANDARD, 3, False),
    ],
)
def test_suites_by_number_of_classes(requested, classes, attacks, targets, standard):
    attack_suite = auto_attack.suite(requested, classes)
    assert (attack_suite.attacks, attack_suite.targets, attack_suite.standard) == (attacks, targets, standard)
    expected_name = "quick" if requested == "quick" else "standard" if standard else "nonstandard ("
    assert attack_suite.name.startswith(expected_name)


@pytest.mark.parametrize(
    ("requested", "classes", "message"),
    [
        ("standard", 1, "the model has 1 class; expected 2 or more"),
        (["apgd-t"], 3, "apgd-t needs 4 classes, the model has 3"),
        (["apgd-dlr"], 2, "apgd-dlr needs 3 classes, the model has 2"),
        (["pgd"], 10, "attack 'pgd' is not known; expected some of apgd-ce"),
        ("quick", 3, "auto_attack is quick, which needs 4 classes, and the model has 3; .* write standard"),
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


PACKAGE_NORMS = {"linf": "Linf", "l2": "L2"}
MODELS = {"curved": _Curved(10), "convolving": CONVOLVING}


def package_of(model, ball, seed=5):
    package = AutoAttack(model, norm=PACKAGE_NORMS[ball.norm], eps=ball.epsilon, seed=seed)
    package.logger.setLevel("ERROR")
    return package


@pytest.fixture(scope="module")
def attacked_images():
    images = _images(40, (3, 5, 5))
    return images, {name: model(images).argmax(1) for name, model in MODELS.items()}


@pytest.mark.parametrize(("name", "norm", "epsilon"), [("convolving", "linf", 0.02), ("curved", "l2", 0.25)])
def test_the_quick_tier_has_the_flags_of_the_standard_suite_with_fewer_passes(attacked_images, name, norm, epsilon):
    images, labels = attacked_images[0], attacked_images[1][name]
    flags, passes = {}, {}
    for tier in ("standard", "quick"):
        states = []
        meter = Meter(MODELS[name], 0, len(labels), states.append)
        attack_suite = auto_attack.suite(tier, 10)
        _, broken_by = auto_attack.attack(meter, images, labels, Ball(norm, epsilon), attack_suite, 5, batch=29)
        flags[tier], passes[tier] = broken_by == ROBUST, states[-1].passes_done
    assert 5 < int(flags["standard"].sum()) < 35
    assert torch.equal(flags["quick"], flags["standard"])
    assert passes["quick"] < 0.35 * passes["standard"]


def test_hopeless_images_get_the_first_steps_alone():
    """No class comes near the first one: neither whole attacks nor FAB-T nor Square."""
    linear, first, states = _linear(10)[1], 10 * torch.eye(10)[0], []
    images, labels = _images(6), torch.zeros(6, dtype=torch.int64)
    meter = Meter(lambda images: first + 0.01 * linear(images), 0, 6, states.append)
    attack_suite = auto_attack.suite("quick", 10)
    _, broken_by = auto_attack.attack(meter, images, labels, Ball("linf", 0.1), attack_suite, seed=1, batch=6)
    assert (broken_by == ROBUST).all()
    # the first prediction, 23 gradients of APGD-CE and of 9 targets, the ranking, four predictions after attacks
    assert states[-1].passes_done == len(labels) * (1 + 2 * 23 * (1 + 9) + 1 + 4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_several_queries_of_square_at_once_are_as_many_queries(norm):
    images, ball = _images(5, (3, 5, 5)), Ball(norm, 1e-3)
    labels, counts = CONVOLVING(images).argmax(1), {}
    for at_once in (1, 8):
        states = []
        passes = Passes(Meter(CONVOLVING, 0, 5, states.append))
        generator = torch.Generator().manual_seed(1)
        worst, broken = square(passes, images, labels, ball, generator, queries=50, at_once=at_once)
        assert not broken.any()
        assert torch.equal(worst, images)
        counts[at_once] = (len(states), states[-1].passes_done)
    assert counts == {1: (51, 5 * 51), 8: (1 + 7, 5 * 51)}


def test_square_gives_up_images_whose_margin_stays():
    """A constant model: the first query is the last that lowers the margin."""
    states = []
    model = Meter(lambda images: torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)], 0, 4, states.append)
    labels, attacked = torch.zeros(4, dtype=torch.int64), torch.tensor([True, False, True, True])
    _, broken = square(
        Passes(model), _images(4), labels, Ball("linf", 0.1), torch.Generator().manual_seed(1), attacked=attacked,
        at_once=8, patience=20,
    )  # fmt: skip
    assert not broken.any()
    assert states[-1].passes_done == 3 * (1 + 24)  # the first one, and whole calls of eight until more than 20


@pytest.mark.parametrize(("name", "norm", "epsilon"), [
    ("convolving", "linf", 0.02), ("convolving", "l2", 0.12), ("curved", "linf", 0.03), ("curved", "l2", 0.25),
])  # fmt: skip
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_every_attack_breaks_the_images_that_the_package_breaks(attacked_images, name, norm, epsilon, attack):
    images, labels = attacked_images[0], attacked_images[1][name]
    model, ball = MODELS[name], Ball(norm, epsilon)
    _, broken_by = auto_attack.attack(model, images, labels, ball, auto_attack.suite([attack], 10), seed=5, batch=29)
    package = package_of(model, ball)
    package.attacks_to_run = [attack]
    _, prediction = package.run_standard_evaluation(images, labels, batch_size=29)
    assert torch.equal(prediction != labels, broken_by == 0)


def test_square_makes_the_queries_of_the_package(attacked_images):
    images, labels = attacked_images[0], attacked_images[1]["convolving"]
    for norm, epsilon in (("linf", 0.02), ("l2", 0.12)):
        package = package_of(CONVOLVING, Ball(norm, epsilon))
        package.square.n_queries = 120
        package.square.seed = 5
        expected = package.square.perturb(images, labels)
        worst = auto_attack.square(CONVOLVING, images, labels, Ball(norm, epsilon), 120, 5)
        broken = (expected != images).flatten(1).any(1)
        assert 0 < int(broken.sum()) < 40
        assert torch.equal((worst != images).flatten(1).any(1), broken)
        assert (worst - expected).abs().max() < 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_move_to_a_hyperplane_is_the_shortest_inside_the_box(norm):
    """Against a search by bisection over the length of the move, in float64."""
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(60, 12, generator=generator, dtype=torch.float64)
    points[:, 3] = 0.0  # without room to one side
    w = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    w[:, 5] = 0.0
    b = (w * points).sum(1) + torch.linspace(-3, 3, 60, dtype=torch.float64)
    moves = to_hyperplane(points, w, b, norm)
    assert ((points + moves >= -1e-12) & (points + moves <= 1 + 1e-12)).all()
    side = torch.where((w * points).sum(1) >= b, 1.0, -1.0)[:, None]
    room = torch.where(w * side > 0, points, 1 - points)
    rate = torch.ones_like(w) if norm == "linf" else w.abs()
    low, high = torch.zeros(60, 1, dtype=torch.float64), torch.full((60, 1), 1e6, dtype=torch.float64)
    for _ in range(200):
        t = (low + high) / 2
        covered = (w.abs() * torch.minimum(t * rate, room)).sum(1, keepdim=True)
        reached = covered >= ((w * points).sum(1) - b).abs()[:, None]
        low, high = torch.where(reached, low, t), torch.where(reached, t, high)
    expected = -side * w.sign() * torch.minimum(high * rate, room)
    reachable = (w * (points + moves)).sum(1).sub(b).abs() < 1e-9
    assert 20 < int(reachable.sum()) < 60
    assert moves == pytest.approx(expected, abs=1e-9)


def test_the_package_itself_can_decide(attacked_images):
    images, labels = attacked_images[0], attacked_images[1]["curved"]
    arguments = (MODELS["curved"], images, labels, Ball("linf", 0.03), auto_attack.suite("standard", 10), 5, 29)
    _, ours = auto_attack.attack(*arguments)
    worst, by_package = auto_attack.attack(*arguments, code="pyautoattack")
    assert torch.equal(ours, by_package)
    package = package_of(MODELS["curved"], arguments[3])
    expected, _ = package.run_standard_evaluation(images, labels, batch_size=29)
    assert torch.equal(worst, expected.detach())  # the images are the package's too


class _Recording(torch.nn.Module):
    """A model that keeps the images of every pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, []

    def forward(self, images):
        self.passes.append(images.detach().clone().contiguous())
        return self.model(images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t"])
def test_every_pass_is_of_the_images_of_the_package(norm, attack):
    """On images that are not broken, so that all stay in the batch: flags alone would hide other steps."""
    images, ball = _images(6, (3, 5, 5)), Ball(norm, 1e-3)
    model, recorded = MODELS["curved"], {name: _Recording(MODELS["curved"]) for name in ("package", "ours")}
    with torch.no_grad():
        labels, ranking = model(images).argmax(1), model(images).sort(1, descending=True).indices
    package, passes = package_of(recorded["package"], ball), Passes(recorded["ours"])
    torch.manual_seed(5)
    if attack == "fab-t":
        package.fab.target_class = 2
        package.fab.attack_single_run(images, labels, is_targeted=True)
        _, broken = fab(passes, images, Goal("difference", labels, ranking[:, 1]), ball)
    else:
        code, loss = (package.apgd_targeted, "dlr-targeted") if attack == "apgd-t" else (package.apgd, attack[5:])
        code.loss, package.apgd_targeted.y_target = loss, ranking[:, 1]
        code.init_hyperparam(images)
        code.attack_single_run(images, labels)
        goal = Goal(loss, labels, ranking[:, 1] if attack == "apgd-t" else None)
        start = random_start(images, ball, torch.Generator().manual_seed(5))
        _, broken, _ = apgd(passes, images, goal, ball, start)
    assert not broken.any()
    ours = recorded["ours"].passes
    assert len(ours) == (200 if attack == "fab-t" else 101)
    for step, (expected, image) in enumerate(zip(recorded["package"].passes[-len(ours) :], ours, strict=True)):
        assert (expected - image).abs().max() < 1e-5, step
