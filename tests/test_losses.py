"""A step of TRADES is what Zhang et al. 2019 and Wang et al. 2023 wrote down, gradients and batch norm included.

Oracle: the whole step again in float64 with batch norm, attack and divergence spelled out. Run alone:
pytest tests/test_losses.py
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dmat import modes, seeds
from dmat.robust import losses
from dmat.robust.attacks import Ball
from dmat.robust.losses import Recipe

CLASSES = 4
RECIPES = {
    "linf": Recipe(Ball("linf", 0.1), steps=4, step_size=0.03, beta=5.0, label_smoothing=0.1),
    "l2": Recipe(Ball("l2", 0.5), steps=4, step_size=0.2, beta=6.0, label_smoothing=0.0),
}


class Net(nn.Module):
    """Convolution, batch norm, SiLU, average, linear: the least that has everything a step can get wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5, momentum=0.3)
        self.logits = nn.Linear(5 * 4, CLASSES)

    def forward(self, images):
        h = F.silu(self.norm(self.conv(images)))
        return self.logits(F.adaptive_avg_pool2d(h, 2).flatten(1))


def a_batch(norm):
    torch.manual_seed(3)
    model = Net().double()
    with torch.no_grad():
        model.logits.weight.mul_(4)
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.normal_(std=0.3)
        model.norm.running_mean.normal_()
    images, labels = torch.rand(6, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 0])
    start = RECIPES[norm].ball.random_start(seeds.stream(1, "start"), images.shape).double()
    return model.train(), images, labels, start


@dataclasses.dataclass
class Slow:
    """The reference. parameters and statistics are plain tensors by name; every forward returns its statistics."""

    parameters: dict
    detach_natural: bool = False
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

    def divergence(self, natural_logits, adversarial_logits):
        """sum p_natural (log p_natural - log p_adversarial), [B]."""
        natural, adversarial = self.log_softmax(natural_logits), self.log_softmax(adversarial_logits)
        return (natural.exp() * (natural - adversarial)).sum(1)

    def attack(self, images, start, recipe):
        target = self.forward(images)[0].detach()
        x = self.pull_back(images, start, recipe.ball)
        for _ in range(recipe.steps):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.divergence(target, self.forward(x)[0]).sum(), x)
            moved = []
            for k in range(len(x)):
                g = gradient[k]
                unit = g.sign() if recipe.ball.norm == "linf" else g / (g**2).sum().sqrt()
                moved.append(x[k] + recipe.step_size * unit - images[k])
            x = self.pull_back(images, torch.stack(moved), recipe.ball)
        return x.detach()

    @staticmethod
    def pull_back(images, perturbation, ball):
        rows = []
        for image, d in zip(images, perturbation, strict=True):
            if ball.norm == "linf":
                d = torch.minimum(torch.maximum(d, torch.tensor(-ball.epsilon)), torch.tensor(ball.epsilon))
            elif (d**2).sum().sqrt() > ball.epsilon:
                d = d * ball.epsilon / (d**2).sum().sqrt()
            rows.append(torch.clamp(image + d, 0, 1))
        return torch.stack(rows)

    def trades(self, images, labels, start, recipe):
        """Loss averaged over the batch, its terms per image, and the statistics of the two tracked passes in order."""
        adversarial = self.attack(images, start, recipe)
        natural_logits, natural_statistics = self.forward(images)
        adversarial_logits, adversarial_statistics = self.forward(adversarial)
        natural = smoothed_cross_entropy(self.log_softmax(natural_logits), labels, recipe.label_smoothing)
        robust = self.divergence(
            natural_logits.detach() if self.detach_natural else natural_logits,
            adversarial_logits.detach() if self.detach_adversarial else adversarial_logits,
        )
        return (natural + recipe.beta * robust).mean(), natural, robust, (natural_statistics, adversarial_statistics)


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
    total, natural, robust, statistics = Slow(parameters, **variant).trades(*arguments)
    total.backward()
    return {name: p.grad for name, p in parameters.items()}, natural.detach(), robust.detach(), statistics, total


def furthest(gradients, others):
    """Largest difference of gradients, as a share of the largest gradient of that parameter."""
    return max(((gradients[name] - others[name]).abs().max() / others[name].abs().max()).item() for name in gradients)


@pytest.mark.parametrize("norm", RECIPES)
def test_trades_step_equals_the_slow_version(norm):
    model, images, labels, start = a_batch(norm)
    recipe, before = RECIPES[norm], copy.deepcopy(model)
    gradients, natural, robust, statistics, total = reference(model, images, labels, start, recipe)
    loss = losses.trades(model, images, labels, start, recipe)
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.mean().double(), total, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(loss.natural.double(), natural, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.robust.double(), robust, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.total.detach(), loss.natural + recipe.beta * loss.robust)
    assert furthest({name: p.grad for name, p in model.named_parameters()}, gradients) < 1e-5
    # the attack did something, and both terms matter
    assert robust.mean() > 0.05
    # two tracked passes, natural first
    mean, variance = before.norm.running_mean, before.norm.running_var
    for batch_mean, batch_variance in statistics:
        mean, variance = 0.7 * mean + 0.3 * batch_mean, 0.7 * variance + 0.3 * batch_variance
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.norm.running_var, variance, rtol=1e-6, atol=1e-8)
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("norm", RECIPES)
def test_order_of_the_tracked_passes_would_show(norm):
    """A guard of the test above: natural and adversarial statistics differ by far more than its tolerance."""
    model, images, labels, start = a_batch(norm)
    *_, ((natural_mean, _), (adversarial_mean, _)), _ = reference(model, images, labels, start, RECIPES[norm])
    assert (natural_mean - adversarial_mean).abs().max() > 1e-3


@pytest.mark.parametrize("branch", ["natural", "adversarial"])
@pytest.mark.parametrize("norm", RECIPES)
def test_gradient_flows_through_both_branches_of_the_divergence(norm, branch):
    model, images, labels, start = a_batch(norm)
    without, *_ = reference(model, images, labels, start, RECIPES[norm], **{f"detach_{branch}": True})
    losses.trades(model, images, labels, start, RECIPES[norm]).total.mean().backward()
    assert furthest({name: p.grad for name, p in model.named_parameters()}, without) > 0.05


def test_logits_are_those_of_the_terms_and_detached():
    model, images, labels, start = a_batch("linf")
    loss = losses.trades(model, images, labels, start, RECIPES["linf"])
    for name in ("natural", "robust", "natural_logits", "adversarial_logits"):
        assert not getattr(loss, name).requires_grad
    assert loss.total.requires_grad
    slow = Slow({})
    torch.testing.assert_close(slow.divergence(loss.natural_logits, loss.adversarial_logits), loss.robust)
    expected = smoothed_cross_entropy(slow.log_softmax(loss.natural_logits), labels, 0.1)
    torch.testing.assert_close(expected, loss.natural)


def test_no_radius_means_no_robust_term():
    model, images, labels, start = a_batch("linf")
    recipe = dataclasses.replace(RECIPES["linf"], ball=Ball("linf", 0.0))
    loss = losses.trades(model, images, labels, start, recipe)
    assert loss.robust.abs().max() < 1e-6
    assert torch.equal(loss.natural_logits, loss.adversarial_logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_label_smoothing_spreads_over_every_class(name, smoothing):
    model, images, labels, start = a_batch("linf")
    recipe = dataclasses.replace(RECIPES["linf"], label_smoothing=smoothing, steps=1)
    loss = losses.LOSSES[name](model, images, labels, start, recipe)
    expected = smoothed_cross_entropy(loss.natural_logits.double().log_softmax(1), labels, smoothing)
    torch.testing.assert_close(loss.natural.double(), expected, rtol=1e-5, atol=1e-6)


def test_standard_loss_is_the_cross_entropy_and_one_tracked_pass():
    model, images, labels, _ = a_batch("linf")
    before = copy.deepcopy(model)
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    logits, (batch_mean, _) = Slow(parameters).forward(images)
    expected = smoothed_cross_entropy(Slow.log_softmax(logits), labels, 0.1)
    expected.mean().backward()
    # the start is not used: NaN would show
    loss = losses.standard(model, images, labels, torch.full_like(images, torch.nan), RECIPES["linf"])
    loss.total.mean().backward()
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert furthest({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in parameters.items()}) < 1e-5
    assert torch.equal(loss.robust, torch.zeros(6))
    assert torch.equal(loss.natural, loss.total.detach())
    assert loss.adversarial_logits is None
    assert not loss.natural_logits.requires_grad
    torch.testing.assert_close(loss.natural_logits, logits.detach().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.norm.running_mean, 0.7 * before.norm.running_mean + 0.3 * batch_mean)
    assert model.norm.num_batches_tracked == 1


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.norm.track_running_stats,
    )


@pytest.mark.parametrize("name", losses.LOSSES)
def test_modes_are_what_they_were(name):
    model, images, labels, start = a_batch("linf")
    model.conv.weight.requires_grad_(False)  # frozen by the caller: stays frozen
    before = state_of(model)
    losses.LOSSES[name](model, images, labels, start, RECIPES["linf"])
    assert state_of(model) == before


@pytest.mark.parametrize("failing", [1, 3])
def test_modes_come_back_when_a_pass_fails(failing):
    model, images, labels, start = a_batch("linf")
    before, calls = state_of(model), []

    def fail(module, given):
        calls.append(given)
        if len(calls) == failing:
            raise MemoryError

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        losses.trades(model, images, labels, start, RECIPES["linf"])
    handle.remove()
    assert state_of(model) == before
    assert model.norm.num_batches_tracked == 0


def test_passes_of_a_trades_step():
    """One for the target, one a step of the attack, and the two tracked ones, where alone parameters get gradients."""
    model, images, labels, start = a_batch("linf")
    seen = []
    model.register_forward_pre_hook(
        lambda module, given: seen.append((module.norm.track_running_stats, module.conv.weight.requires_grad))
    )
    with modes.mode(model, training=True):
        losses.trades(model, images, labels, start, RECIPES["linf"])
    assert seen == [(False, False)] * (1 + RECIPES["linf"].steps) + [(True, True)] * 2
