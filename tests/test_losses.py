"""A step of TRADES equals the definition in Zhang et al. 2019 and Wang et al. 2023, gradients and batch norm included.

Oracle: the whole step in float64 with batch norm, attack and divergence written out. Run alone:
pytest tests/test_losses.py
"""

import copy
import dataclasses

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from dmat import modes, seeds
from dmat.robust import losses
from dmat.robust.attacks import Ball
from dmat.robust.losses import LossSettings

CLASSES = 4
SETTINGS = {
    "linf": LossSettings(Ball("linf", 0.1), steps=4, step_size=0.03, beta=5.0, label_smoothing=0.1),
    "l2": LossSettings(Ball("l2", 0.5), steps=4, step_size=0.2, beta=6.0, label_smoothing=0.0),
}


MEANS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25] * 4, [0.05, 0.05, 0.1, 0.8]]).double()


class Net(nn.Module):
    """Convolution, batch norm, SiLU, average, linear: the smallest network with all that a step can get wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5, momentum=0.3)
        self.logits = nn.Linear(5 * 4, CLASSES)

    def forward(self, images):
        h = F.silu(self.norm(self.conv(images)))
        return self.logits(F.adaptive_avg_pool2d(h, 2).flatten(1))


def example_batch(norm):
    torch.manual_seed(3)
    model = Net().double()
    with torch.no_grad():
        model.logits.weight.mul_(4)
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.normal_(std=0.3)
        model.norm.running_mean.normal_()
    images, labels = torch.rand(6, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    images[:, 0, 0], images[:, 0, -1] = 0, 1  # pixels at both ends of the range, which clipping moves
    start = SETTINGS[norm].ball.random_start(seeds.stream(1, "start"), images.shape).double()
    return model.train(), images, labels, start


@dataclasses.dataclass
class Slow:
    """The reference. parameters and statistics are plain tensors by name; every forward returns its statistics."""

    parameters: dict
    detach_clean: bool = False
    detach_adversarial: bool = False

    def forward(self, images):
        """Logits, and the mean and unbiased variance of the batch that batch norm would remember."""
        p = self.parameters
        h = F.conv2d(images, p["conv.weight"], padding=1)
        mean, count = h.mean((0, 2, 3)), h.numel() / h.shape[1]
        variance = ((h - mean[:, None, None]) ** 2).mean((0, 2, 3))
        h = (h - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        h = h * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]
        h = h * torch.sigmoid(h)
        n = len(h)
        h = h.reshape(n, 5, 2, 3, 2, 3).mean((3, 5)).flatten(1)
        logits = h @ p["logits.weight"].T + p["logits.bias"]
        return logits, (mean.detach(), (variance * count / (count - 1)).detach())

    @staticmethod
    def log_softmax(logits):
        return logits - logits.exp().sum(1, keepdim=True).log()

    def divergence(self, clean_logits, adversarial_logits):
        """sum p_clean (log p_clean - log p_adversarial), [B]."""
        clean, adversarial = self.log_softmax(clean_logits), self.log_softmax(adversarial_logits)
        return (clean.exp() * (clean - adversarial)).sum(1)

    def attack(self, images, start, settings):
        target = self.forward(images)[0].detach()
        # published: the linf start is clipped, the l2 start is not
        x = self.pull_back(images, start, settings.ball) if settings.ball.norm == "linf" else images + start
        for _ in range(settings.steps):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.divergence(target, self.forward(x)[0]).sum(), x)
            moved = []
            for k in range(len(x)):
                g = gradient[k]
                unit = g.sign() if settings.ball.norm == "linf" else g / (g**2).sum().sqrt()
                moved.append(x[k] + settings.step_size * unit - images[k])
            x = self.pull_back(images, torch.stack(moved), settings.ball)
        return x.detach()

    def ascend(self, images, x, objective, settings):
        """PGD from x on any objective of the logits."""
        for _ in range(settings.steps):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(self.forward(x)[0]).sum(), x)
            length = (gradient**2).flatten(1).sum(1).sqrt()[:, None, None, None]
            unit = gradient.sign() if settings.ball.norm == "linf" else gradient / length
            x = self.pull_back(images, x.detach() + settings.step_size * unit - images, settings.ball)
        return x.detach()

    @staticmethod
    def pull_back(images, perturbation, ball):
        rows = []
        for image, d in zip(images, perturbation, strict=True):
            if ball.norm == "l2":  # the published order: first the pixel range, then the ball
                d = torch.clamp(image + d, 0, 1) - image
            if ball.norm == "linf":
                d = torch.minimum(torch.maximum(d, torch.tensor(-ball.epsilon)), torch.tensor(ball.epsilon))
            elif (d**2).sum().sqrt() > ball.epsilon:
                d = d * ball.epsilon / (d**2).sum().sqrt()
            rows.append(torch.clamp(image + d, 0, 1))
        return torch.stack(rows)

    def trades(self, images, labels, start, settings):
        """Loss averaged over the batch, its terms per image, and the statistics of the two tracked passes in order."""
        adversarial = self.attack(images, start, settings)
        clean_logits, clean_statistics = self.forward(images)
        adversarial_logits, adversarial_statistics = self.forward(adversarial)
        cross_entropy = smoothed_cross_entropy(self.log_softmax(clean_logits), labels, settings.label_smoothing)
        robust = self.divergence(
            clean_logits.detach() if self.detach_clean else clean_logits,
            adversarial_logits.detach() if self.detach_adversarial else adversarial_logits,
        )
        return (
            (cross_entropy + settings.beta * robust).mean(),
            cross_entropy,
            robust,
            (clean_statistics, adversarial_statistics),
        )


def smoothed_cross_entropy(log_probabilities, labels, smoothing):
    """Mass smoothing / K on every class, the right one included, and the rest on the right one."""
    values = []
    for row, label in zip(log_probabilities, labels.tolist(), strict=True):
        classes = len(row)
        target = [smoothing / classes + (1 - smoothing if k == label else 0) for k in range(classes)]
        assert sum(target) == pytest.approx(1)
        values.append(-sum(t * row[k] for k, t in enumerate(target)))
    return torch.stack(values)


def reference(model, *arguments, **variant):
    """Gradients by name, per-image terms, statistics and total of the slow version, from a copy of the parameters."""
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    total, cross_entropy, robust, statistics = Slow(parameters, **variant).trades(*arguments)
    total.backward()
    return {name: p.grad for name, p in parameters.items()}, cross_entropy.detach(), robust.detach(), statistics, total


def max_difference(gradients, others):
    """Largest difference of gradients, as a share of the largest gradient of that parameter."""
    return max(((gradients[name] - others[name]).abs().max() / others[name].abs().max()).item() for name in gradients)


@pytest.mark.parametrize("norm", SETTINGS)
def test_trades_step_equals_the_slow_version(norm):
    model, images, labels, start = example_batch(norm)
    settings, before = SETTINGS[norm], copy.deepcopy(model)
    gradients, cross_entropy, robust, statistics, total = reference(model, images, labels, start, settings)
    loss = losses.trades(model, images, labels, start, settings)
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.mean().double(), total, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(loss.clean.double(), cross_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.robust.double(), robust, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.total.detach(), loss.clean + settings.beta * loss.robust)
    assert max_difference({name: p.grad for name, p in model.named_parameters()}, gradients) < 1e-5
    # the attack did something, and both terms matter
    assert robust.mean() > 0.03
    # two tracked passes, clean first
    mean, variance = before.norm.running_mean, before.norm.running_var
    for batch_mean, batch_variance in statistics:
        mean, variance = 0.7 * mean + 0.3 * batch_mean, 0.7 * variance + 0.3 * batch_variance
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.norm.running_var, variance, rtol=1e-6, atol=1e-8)
    assert model.norm.num_batches_tracked == 2


def test_l2_attack_of_trades_starts_outside_the_pixel_range():
    """Wang et al.'s code: the first gradient is taken at image + 0.001 x Gaussian, border pixels included."""
    model, images, labels, _ = example_batch("l2")
    start = losses.draw_start("trades", SETTINGS["l2"].ball, seeds.stream(1, "attack/start"), tuple(images.shape))
    inputs = []
    model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach().clone()))
    losses.trades(model, images, labels, start, SETTINGS["l2"])
    clean_input, first, *later, adversarial = inputs
    assert torch.equal(clean_input, images)
    torch.testing.assert_close(first, images + start)
    assert first.min() < 0
    assert first.max() > 1
    for x in (*later, adversarial):
        assert (x.min(), x.max()) == (0, 1)
    slow = Slow({name: p.detach() for name, p in model.named_parameters()})
    # near the images the divergence is so flat that logits in float32 turn its gradient by 1e-4
    assert (adversarial - slow.attack(images, start, SETTINGS["l2"])).abs().max() < 1e-4
    clipped = Slow.pull_back(images, start, SETTINGS["l2"].ball) - images
    assert (adversarial - slow.attack(images, clipped, SETTINGS["l2"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", losses.ADVERSARIAL)
@pytest.mark.parametrize("norm", SETTINGS)
def test_starts_are_those_of_the_published_code(name, norm):
    """linf: uniform in the ball, but mart 0.001 x Gaussian. l2: 0.001 x Gaussian, but pgd_at on the sphere towards a
    random image."""
    model, images, labels, _ = example_batch(norm)
    epsilon = SETTINGS[norm].ball.epsilon
    images = images.repeat(50, 1, 1, 1)
    drawn = losses.draw_start(name, SETTINGS[norm].ball, seeds.stream(1, "attack/start"), tuple(images.shape))
    numbers = drawn.flatten().double().numpy()
    if name == "mart" or (norm == "l2" and name != "pgd_at"):
        assert stats.kstest(numbers, "norm", args=(0, 0.001)).pvalue > 0.001
    elif norm == "linf":
        assert stats.kstest(numbers, "uniform", args=(-epsilon, 2 * epsilon)).pvalue > 0.001
    else:
        assert stats.kstest(numbers, "uniform").pvalue > 0.001
        inputs = []
        model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach().clone()))
        losses.pgd_at(model, images, labels.repeat(50), drawn, SETTINGS[norm])
        moved = inputs[0] - images
        assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([epsilon] * 300, rel=1e-5)
        towards = (drawn - images).flatten(1)
        assert F.cosine_similarity(moved.flatten(1), towards).min() > 1 - 1e-6
        assert 0 <= inputs[0].min() <= inputs[0].max() <= 1


@pytest.mark.parametrize("norm", SETTINGS)
def test_clean_and_adversarial_statistics_differ(norm):
    """Checks the test above: clean and adversarial statistics differ by far more than its tolerance."""
    model, images, labels, start = example_batch(norm)
    *_, ((clean_mean, _), (adversarial_mean, _)), _ = reference(model, images, labels, start, SETTINGS[norm])
    assert (clean_mean - adversarial_mean).abs().max() > 1e-3


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
@pytest.mark.parametrize("norm", SETTINGS)
def test_gradient_flows_through_both_branches_of_the_divergence(norm, branch):
    model, images, labels, start = example_batch(norm)
    without, *_ = reference(model, images, labels, start, SETTINGS[norm], **{f"detach_{branch}": True})
    losses.trades(model, images, labels, start, SETTINGS[norm]).total.mean().backward()
    assert max_difference({name: p.grad for name, p in model.named_parameters()}, without) > 0.05


def test_returned_logits_belong_to_the_terms_and_are_detached():
    model, images, labels, start = example_batch("linf")
    loss = losses.trades(model, images, labels, start, SETTINGS["linf"])
    for name in ("clean", "robust", "clean_logits", "adversarial_logits"):
        assert not getattr(loss, name).requires_grad
    assert loss.total.requires_grad
    slow = Slow({})
    torch.testing.assert_close(slow.divergence(loss.clean_logits, loss.adversarial_logits), loss.robust)
    expected = smoothed_cross_entropy(slow.log_softmax(loss.clean_logits), labels, 0.1)
    torch.testing.assert_close(expected, loss.clean)


def test_robust_term_is_zero_without_radius():
    model, images, labels, start = example_batch("linf")
    settings = dataclasses.replace(SETTINGS["linf"], ball=Ball("linf", 0.0))
    loss = losses.trades(model, images, labels, start, settings)
    assert loss.robust.abs().max() < 1e-6
    assert torch.equal(loss.clean_logits, loss.adversarial_logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name not in ("mart", "lse")])  # tests of their own
def test_label_smoothing_spreads_over_every_class(name, smoothing):
    model, images, labels, start = example_batch("linf")
    settings = dataclasses.replace(SETTINGS["linf"], label_smoothing=smoothing, steps=1)
    loss = losses.LOSSES[name](model, images, labels, start, settings, MEANS)
    logits, actual = (loss.adversarial_logits, loss.robust) if name == "pgd_at" else (loss.clean_logits, loss.clean)
    expected = smoothed_cross_entropy(logits.double().log_softmax(1), labels, smoothing)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_standard_loss_is_the_cross_entropy_and_one_tracked_pass():
    model, images, labels, _ = example_batch("linf")
    before = copy.deepcopy(model)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    logits, (batch_mean, _) = Slow(parameters).forward(images)
    expected = smoothed_cross_entropy(Slow.log_softmax(logits), labels, 0.1)
    expected.mean().backward()
    # the start is not used: NaN would show
    loss = losses.standard(model, images, labels, torch.full_like(images, torch.nan), SETTINGS["linf"])
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert (
        max_difference({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in parameters.items()})
        < 1e-5
    )
    assert torch.equal(loss.robust, torch.zeros(6))
    assert torch.equal(loss.clean, loss.total.detach())
    assert loss.adversarial_logits is None
    assert not loss.clean_logits.requires_grad
    torch.testing.assert_close(loss.clean_logits, logits.detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.norm.running_mean, 0.7 * before.norm.running_mean + 0.3 * batch_mean)
    assert model.norm.num_batches_tracked == 1


def modes_of(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.norm.track_running_stats,
    )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_modes_are_restored(name):
    model, images, labels, start = example_batch("linf")
    model.conv.weight.requires_grad_(False)  # frozen by the caller: stays frozen
    before = modes_of(model)
    losses.LOSSES[name](model, images, labels, start, SETTINGS["linf"], MEANS)
    assert modes_of(model) == before


@pytest.mark.parametrize("failing", [1, 3])
def test_modes_are_restored_when_a_pass_fails(failing):
    model, images, labels, start = example_batch("linf")
    before, calls = modes_of(model), []

    def fail(module, arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise MemoryError

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        losses.trades(model, images, labels, start, SETTINGS["linf"])
    handle.remove()
    assert modes_of(model) == before
    assert model.norm.num_batches_tracked == (failing > 1)


def test_passes_of_a_trades_step():
    """The clean pass, which gives the target too, one per attack step, the adversarial pass: 26 of FLOPs, not 27."""
    model, images, labels, start = example_batch("linf")
    passes = []
    model.register_forward_pre_hook(
        lambda module, arguments: passes.append((module.norm.track_running_stats, module.conv.weight.requires_grad))
    )
    with modes.mode(model, training=True):
        losses.trades(model, images, labels, start, SETTINGS["linf"])
    assert passes == [(True, True)] + [(False, False)] * SETTINGS["linf"].steps + [(True, True)]


# --- other losses


@pytest.mark.parametrize("gamma", [1.0, 0.2])
@pytest.mark.parametrize("norm", SETTINGS)
def test_ikl_equals_the_definition_of_cui_et_al(norm, gamma):
    """Pairs of classes one by one, in float64; the attack is that of TRADES. gamma: below 1, GKL."""
    model, images, labels, start = example_batch(norm)
    settings = dataclasses.replace(SETTINGS[norm], alpha=3.0, gkl_gamma=gamma)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    slow = Slow(parameters)
    adversarial = slow.attack(images, start, settings)
    (clean_logits, _), (adversarial_logits, _) = slow.forward(images), slow.forward(adversarial)
    values, pairs = [], [(j, k) for j in range(CLASSES) for k in range(CLASSES)]
    means = MEANS.double() ** gamma
    mass = sum(means[label][j] * means[label][k] for label in labels.tolist() for j, k in pairs)
    for n, a, label in zip(clean_logits, adversarial_logits, labels.tolist(), strict=True):
        weights, squared = means[label], 0
        for j, k in pairs:
            squared = squared + weights[j] * weights[k] * ((n[j] - n[k]) - (a[j] - a[k])) ** 2 / 4
        soft = -(n.detach().softmax(0) * a.log_softmax(0)).sum()
        values.append(settings.beta * squared * len(labels) / mass + 3.0 * soft)
    cross_entropy = smoothed_cross_entropy(slow.log_softmax(clean_logits), labels, settings.label_smoothing)
    expected = cross_entropy + torch.stack(values)
    expected.mean().backward()
    loss = losses.ikl(model, images, labels, start, settings, MEANS)
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.clean + settings.beta * loss.robust, loss.total.detach())
    gradients = {name: p.grad for name, p in parameters.items()}
    assert max_difference({name: p.grad for name, p in model.named_parameters()}, gradients) < 1e-5


def test_ikl_weighed_with_predictions_has_the_gradient_of_the_divergence():
    """Theorem 1 of Cui et al.: with w = p_clean, wMSE gives KL's gradient to the clean logits, and the soft
    cross-entropy KL's to the adversarial ones."""
    torch.manual_seed(0)
    clean, adversarial = (torch.randn(1, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))

    class Two(nn.Module):
        """First the clean logits, then (the attack makes no step) the adversarial ones."""

        calls = 0

        def forward(self, images):
            self.calls += 1
            return (clean if self.calls == 1 else adversarial) * 1.0

    images, label = torch.rand(1, 1, 2, 2), torch.tensor([2])
    settings = LossSettings(Ball("linf", 0.1), steps=0, step_size=0.0, beta=1.0, label_smoothing=0.0, alpha=1.0)
    means = clean.detach().softmax(1).repeat(CLASSES, 1)
    loss = losses.ikl(Two(), images, label, torch.zeros_like(images), settings, means.float())
    cross_entropy = F.cross_entropy(clean, label)
    divergence = F.kl_div(adversarial.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="sum")
    actual = torch.autograd.grad(loss.total.sum() - cross_entropy, [clean, adversarial], retain_graph=True)
    expected = torch.autograd.grad(divergence, [clean, adversarial])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    # the other branch has, beyond that, what breaks the asymmetry: wMSE's own gradient with the opposite sign
    torch.testing.assert_close(actual[1], expected[1] - expected[0], rtol=1e-5, atol=1e-6)


def logits_in_evaluation(before, x):
    """Logits of the example network with its running statistics."""
    mean, variance = before.norm.running_mean, before.norm.running_var
    h = F.conv2d(x, before.conv.weight, padding=1)
    h = (h - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    h = F.silu(h * before.norm.weight[:, None, None] + before.norm.bias[:, None, None])
    return before.logits(h.reshape(len(h), 5, 2, 3, 2, 3).mean((3, 5)).flatten(1))


@pytest.mark.parametrize("norm", SETTINGS)
def test_pgd_at_trains_on_the_images_that_maximise_cross_entropy_in_evaluation_mode(norm):
    model, images, labels, start = example_batch(norm)
    settings, before = SETTINGS[norm], copy.deepcopy(model)
    if norm == "l2":  # published: a random image, brought to the distance epsilon
        start = torch.rand(images.shape, dtype=torch.float64)
        direction = start - images
        x = images + settings.ball.epsilon * direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
    else:
        x = Slow.pull_back(images, start, settings.ball)
    for _ in range(settings.steps):
        x = x.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(logits_in_evaluation(before, x), labels, reduction="sum"), x)
        unit = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1)[:, None, None, None]
        x = Slow.pull_back(images, x.detach() + settings.step_size * unit - images, settings.ball)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    logits, (batch_mean, _) = Slow(parameters).forward(x.detach())
    expected = smoothed_cross_entropy(Slow.log_softmax(logits), labels, settings.label_smoothing)
    expected.mean().backward()
    loss = losses.pgd_at(model, images, labels, start, settings)
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = {name: p.grad for name, p in parameters.items()}
    assert max_difference({name: p.grad for name, p in model.named_parameters()}, gradients) < 1e-5
    assert loss.clean_logits is None
    assert not loss.clean.any()
    torch.testing.assert_close(model.norm.running_mean, 0.7 * before.norm.running_mean + 0.3 * batch_mean)
    assert model.norm.num_batches_tracked == 1


def test_trades_attacks_mixed_targets_without_smoothing():
    """Wang et al.'s code with CutMix: the inner attack aims away from the mixed label."""
    model, images, labels, start = example_batch("linf")
    settings = SETTINGS["linf"]
    mixed = 0.7 * F.one_hot(labels, CLASSES).double() + 0.3 * F.one_hot(labels.roll(1), CLASSES).double()
    inputs = []
    model.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach().clone()))
    loss = losses.trades(model, images, mixed, start, settings)
    slow, x = Slow(dict(model.named_parameters())), Slow.pull_back(images, start, settings.ball)
    for _ in range(settings.steps):
        x = x.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(-(mixed * slow.log_softmax(slow.forward(x)[0])).sum(), x)
        x = Slow.pull_back(images, x.detach() + settings.step_size * g.sign() - images, settings.ball)
    torch.testing.assert_close(inputs[-1].double(), x.detach(), rtol=1e-6, atol=1e-7)
    expected = -(mixed * slow.log_softmax(slow.forward(images)[0])).sum(1)
    torch.testing.assert_close(loss.clean.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    divergence = slow.divergence(slow.forward(images)[0], slow.forward(x)[0]).detach()
    torch.testing.assert_close(loss.robust.double(), divergence, rtol=1e-4, atol=1e-5)


def compare_step(model, loss, expected, parameters, tolerance=1e-5):
    """Values per image and gradients of the model equal those of the reference, whose parameters are plain tensors."""
    expected.mean().backward()
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=tolerance, atol=1e-6)
    gradients = {name: p.grad for name, p in parameters.items()}
    assert max_difference({name: p.grad for name, p in model.named_parameters()}, gradients) < tolerance


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("norm", SETTINGS)
def test_mart_equals_the_definition_of_wang_et_al_2020(norm, smoothing):
    """Probability by probability, in float64; the attack maximises cross-entropy in evaluation mode."""
    model, images, labels, _ = example_batch(norm)
    settings, before = dataclasses.replace(SETTINGS[norm], label_smoothing=smoothing), copy.deepcopy(model)
    start = losses.draw_start("mart", settings.ball, seeds.stream(1, "attack/start"), tuple(images.shape)).double()
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    slow, frozen = Slow(parameters), Slow({})
    frozen.forward = lambda x: (logits_in_evaluation(before, x), None)
    x = frozen.ascend(images, images + start, lambda z: F.cross_entropy(z, labels, reduction="none"), settings)
    (clean_logits, (clean_mean, _)), (adversarial_logits, (adversarial_mean, _)) = slow.forward(images), slow.forward(x)
    values = []
    for n, a, label in zip(clean_logits.softmax(1), adversarial_logits.softmax(1), labels.tolist(), strict=True):
        target = [smoothing / CLASSES + (1 - smoothing if k == label else 0) for k in range(CLASSES)]
        boosted = -sum(t * a[k].log() for k, t in enumerate(target))
        boosted = boosted - (1 - max(a[k] for k in range(CLASSES) if k != label)).log()
        divergence = sum(n[k] * (n[k].log() - a[k].log()) for k in range(CLASSES))
        values.append(boosted + settings.beta * divergence * (1 - n[label]))
    loss = losses.mart(model, images, labels, start, settings)
    compare_step(model, loss, torch.stack(values), parameters)
    assert not loss.clean.any()
    torch.testing.assert_close(loss.robust, loss.total.detach())
    torch.testing.assert_close(loss.adversarial.double(), x, rtol=1e-6, atol=1e-6)
    mean = before.norm.running_mean
    for batch_mean in (clean_mean, adversarial_mean):
        mean = 0.7 * mean + 0.3 * batch_mean
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-6, atol=1e-8)
    assert model.norm.num_batches_tracked == 2


def test_mart_is_finite_where_the_wrong_class_is_certain():
    """float32 has no number between p and 1 there: log(1 - p) of probabilities would be minus infinity."""
    logits = torch.tensor([[0.0, 200.0, -5.0, 0.0]])

    class Certain(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return logits + self.bias * torch.tensor([0.0, 1.0, 0.0, 0.0]) + images.sum() * 0

    model, images = Certain(), torch.rand(1, 1, 2, 2)
    settings = LossSettings(Ball("linf", 0.1), steps=0, step_size=0.0, beta=0.0, label_smoothing=0.0)
    loss = losses.mart(model, images, torch.tensor([0]), torch.zeros_like(images), settings)
    loss.total.sum().backward()
    rest = torch.tensor([0.0, -5.0, 0.0]).double().logsumexp(0) - 200
    assert loss.total.item() == pytest.approx(200 - rest.item(), rel=1e-6)
    assert model.bias.grad.item() == pytest.approx(2, rel=1e-6)  # one of each term: p of the wrong class is 1


def test_mart_refuses_mixed_targets():
    model, images, labels, start = example_batch("linf")
    with pytest.raises(TypeError, match="mart needs labels"):
        losses.mart(model, images, F.one_hot(labels, CLASSES).double(), start, SETTINGS["linf"])


@pytest.mark.parametrize("targets", ["labels", "smoothed", "mixed"])
@pytest.mark.parametrize("norm", SETTINGS)
def test_lse_equals_the_definition_of_pang_et_al(norm, targets):
    """Squared differences one by one, in float64; the attack maximises the distance to the clean prediction."""
    model, images, labels, start = example_batch(norm)
    smoothing = 0.3 if targets == "smoothed" else 0.0
    settings = dataclasses.replace(SETTINGS[norm], label_smoothing=smoothing)
    expected = torch.full((6, CLASSES), smoothing / 3).double()
    expected[range(6), labels] = 1 - smoothing  # published: nothing of the smoothing stays at the label
    if targets == "mixed":
        one_hot = F.one_hot(labels, CLASSES).double()
        labels = expected = 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    slow = Slow(parameters)
    aim = expected if targets == "mixed" else slow.forward(images)[0].detach().softmax(1)
    x = slow.pull_back(images, start, settings.ball) if norm == "linf" else images + start
    x = slow.ascend(images, x, lambda z: ((z.softmax(1) - aim) ** 2).sum(1), settings)
    clean, adversarial = slow.forward(images)[0].softmax(1), slow.forward(x)[0].softmax(1)
    values = [
        sum((clean[i, k] - expected[i, k]) ** 2 + settings.beta * (adversarial[i, k] - clean[i, k]) ** 2
            for k in range(CLASSES))
        for i in range(6)
    ]  # fmt: skip
    loss = losses.lse(model, images, labels, start, settings)
    compare_step(model, loss, torch.stack(values), parameters)
    torch.testing.assert_close(loss.total.detach(), loss.clean + settings.beta * loss.robust)
    assert loss.robust.mean() > 0.001


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_consistency_adds_the_divergence_between_the_views_to_trades(temperature):
    model, images, _, start = example_batch("linf")
    labels = torch.tensor([2, 2, 0, 0, 3, 3])
    settings = dataclasses.replace(SETTINGS["linf"], alpha=3.0, temperature=temperature)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    slow = Slow(parameters)
    _, cross_entropy, divergence, _ = slow.trades(images, labels, start, settings)
    softened = (slow.forward(slow.attack(images, start, settings))[0] / temperature).softmax(1)
    pairs = []
    for p, q in softened.reshape(3, 2, CLASSES):
        m = [(p[k] + q[k]) / 2 for k in range(CLASSES)]
        sides = [sum(r[k] * (r[k] / m[k]).log() for k in range(CLASSES)) for r in (p, q)]
        pairs += [(sides[0] + sides[1]) / 2] * 2
    assert torch.stack(pairs).min() > 1e-4
    loss = losses.consistency(model, images, labels, start, settings)
    compare_step(model, loss, cross_entropy + settings.beta * divergence + 3.0 * torch.stack(pairs), parameters)
    torch.testing.assert_close(loss.clean + settings.beta * loss.robust, loss.total.detach())


@pytest.mark.parametrize("name", losses.ADVERSARIAL)
@pytest.mark.parametrize("norm", SETTINGS)
def test_a_loss_repeats_its_adversarial_images_without_a_step(name, norm):
    """As adversarial weight perturbation needs it: same images, values and gradients; no attack."""
    model, images, labels, _ = example_batch(norm)
    settings = dataclasses.replace(SETTINGS[norm], alpha=2.0)
    start = losses.draw_start(name, settings.ball, seeds.stream(1, "attack/start"), tuple(images.shape))
    results = []
    for _ in range(2):
        with modes.untracked_batch_norm(model):
            loss = losses.LOSSES[name](model, images, labels, start, settings, MEANS)
        gradients = torch.autograd.grad(loss.total.mean(), [*model.parameters()])
        results.append((loss.adversarial, loss.total.detach(), *gradients))
        start = losses.start_at(name, settings.ball, images, loss.adversarial)
        settings = dataclasses.replace(settings, steps=0)
    assert (results[0][0] - images).abs().max() > 0.05
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_class_means_are_those_of_the_last_epoch():
    torch.manual_seed(0)
    keeper = losses.ClassMeans(3, 2.0, torch.device("cpu"))
    assert torch.equal(keeper.means, torch.full((3, 3), 1 / 3))
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    keeper.add(keeper.batch_sums(logits[:5], labels[:5]))
    keeper.add(keeper.batch_sums(logits[5:], labels[5:]))
    assert torch.equal(keeper.means, torch.full((3, 3), 1 / 3))  # until the epoch is over
    keeper.next_epoch()
    probabilities = (logits / 2.0).softmax(1)
    torch.testing.assert_close(keeper.means[0], probabilities[labels == 0].mean(0))
    torch.testing.assert_close(keeper.means[1], probabilities[labels == 1].mean(0))
    torch.testing.assert_close(keeper.means[2], torch.full((3,), 1 / 3))  # no image of this class: unchanged
    again = losses.ClassMeans(3, 2.0, torch.device("cpu"))
    again.load(keeper.state())
    again.next_epoch()
    assert torch.equal(again.means, keeper.means)


def test_a_bf16_attack_casts_weights_once_without_changing_results(monkeypatch):
    """The step under autocast is bit for bit the step that leaves the casting to autocast."""
    torch.manual_seed(0)
    images, labels = torch.rand(6, 2, 6, 6), torch.tensor([0, 1, 2, 3, 1, 0])
    start = SETTINGS["linf"].ball.random_start(seeds.stream(1, "start"), images.shape)

    def step():
        torch.manual_seed(1)
        model = Net().train()
        with torch.autocast("cpu", torch.bfloat16):
            dtypes = []
            model.conv.register_forward_pre_hook(lambda layer, arguments: dtypes.append(layer.weight.dtype))
            loss = losses.trades(model, images, labels, start, SETTINGS["linf"])
        loss.total.mean().backward()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return dtypes, [loss.total.detach(), *(p.grad for p in model.parameters())]

    dtypes, results = step()
    steps = SETTINGS["linf"].steps
    assert dtypes == [torch.float32, *[torch.bfloat16] * steps, torch.float32]
    monkeypatch.setattr(modes, "_cast_by_autocast", lambda model: [])
    dtypes_by_autocast, results_by_autocast = step()
    assert set(dtypes_by_autocast) == {torch.float32}
    assert all(torch.equal(first, second) for first, second in zip(results, results_by_autocast, strict=True))
