"""Adversarial weight perturbation: its size and direction, exact restoration, and a whole training step.

Oracle: the formula of Wu et al. 2020 by hand, and a loss whose gradient is known. Run alone:
pytest tests/test_weight_perturbation.py
"""

import numpy as np
import pytest
import torch
from torch import nn

from dmat import config, devices
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import load_all
from dmat.data.shards import open_shards, write_set
from dmat.errors import UnfitError
from dmat.robust import losses, weight_perturbation
from dmat.robust.attacks import Ball
from dmat.robust.losses import Loss, LossSettings
from dmat.robust.networks import DataSpec, wide_resnet
from dmat.training import classifier
from dmat.training.long_run import LongRun

GAMMA = 0.25


def test_each_weight_moves_by_its_norm_along_its_gradient():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0]]))  # norm 5
        model[2].weight.copy_(torch.tensor([[0.0], [2.0]]))  # norm 2
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.grad = torch.tensor([[0.0, -1e-6]]).double()  # its size does not count
    model[2].weight.grad = torch.tensor([[30.0], [40.0]]).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with weight_perturbation.perturbed(model, GAMMA):
        assert model[0].weight.tolist() == [[3.0, pytest.approx(4.0 - GAMMA * 5)]]
        torch.testing.assert_close(model[2].weight.detach(), torch.tensor([[0.3], [2.4]]).double())
        for k in (1, 2, 3, 5):  # biases and batch norm
            assert torch.equal([*model.parameters()][k], before[k])
    assert all(map(torch.equal, model.parameters(), before))


def test_weights_are_restored_exactly_after_an_error_and_without_a_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model[0].weight.grad = torch.randn(7, 7)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(MemoryError), weight_perturbation.perturbed(model, GAMMA):
        assert not torch.equal(model[0].weight, before[0])
        assert torch.equal(model[1].weight, before[2])  # no gradient: not part of the loss
        raise MemoryError
    assert all(map(torch.equal, model.parameters(), before))
    model[0].weight.grad = torch.zeros(7, 7)
    for gamma in (0.0, GAMMA):  # a gradient of zero has no direction
        with weight_perturbation.perturbed(model, gamma):
            assert all(map(torch.equal, model.parameters(), before))


def test_the_perturbation_is_the_worst_of_its_size():
    """For a loss that is linear in each weight no perturbation of the same norm raises it more."""
    torch.manual_seed(0)
    model, slope = nn.Linear(5, 4).double(), torch.randn(4, 5, dtype=torch.float64)
    (model.weight * slope).sum().backward()
    size = GAMMA * model.weight.detach().norm()
    with weight_perturbation.perturbed(model, GAMMA):
        worst = (model.weight.detach() * slope).sum()
    others = torch.randn(1000, 4, 5, dtype=torch.float64)
    others *= size / others.flatten(1).norm(dim=1)[:, None, None]
    assert ((model.weight.detach() + others) * slope).sum((1, 2)).max() < worst
    assert worst - (model.weight.detach() * slope).sum() == pytest.approx((size * slope.norm()).item())


def quadratic(model, images, targets, start, settings, class_means=None):
    """Half the squared norm of the weights, for every image: its gradient is the weight. The attack changes nothing."""
    value = sum((p**2).sum() for p in model.parameters() if p.ndim > 1) / 2
    logits = model(images)
    total = (value + 0 * logits.sum()).expand(len(images))
    quadratic.calls.append((settings.steps, value.item(), model.batchnorm.track_running_stats))
    return Loss(total, total.detach(), total.detach(), logits.detach(), logits.detach(), images)


@pytest.fixture
def train_a_step(tmp_path, tiny_params, monkeypatch):
    """Makes one step of SGD with a batch of 16, and returns the weights before and after it."""
    quadratic.calls = []
    labels = np.arange(32) % 4
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1)).astype(np.uint8)
    write_set(tmp_path / "set", images, labels, class_names=list("abcd"), metadata={})
    shards = open_shards(tmp_path / "set")

    def step(**changes):
        one_step = {"images_seen": 16, "batch": 16, "selection_steps": 0, "ema_decay": 0.0}
        section = tiny_params["train_robust"] | one_step | changes
        settings = config.TrainRobust.model_validate(section)
        torch.manual_seed(3)
        model = wide_resnet(DataSpec(4, 1, (0.4,), (0.3,)), 10, 1, "silu")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loss_settings, compute = LossSettings(Ball("linf", 0.1), 3, 0.05, 5.0, 0.1), devices.resolve("cpu", "fp32", 1)
        with LongRun(tmp_path / "run", compute, 16, quiet=True) as run:
            outcome = classifier.train(
                model, 4, MixedBatches(Mix(32, 0, 16, 0.0), 1, shards, None), load_all(shards), loss_settings, settings,
                1, run, compute,
            )  # fmt: skip
        return before, outcome.last, settings

    monkeypatch.setitem(losses.LOSSES, "trades", quadratic)
    return step


@pytest.mark.parametrize(("gamma", "warmup", "perturbs"), [(0.0, 0.0, False), (GAMMA, 0.0, True), (GAMMA, 1.0, False)])
def test_a_training_step_descends_from_the_perturbed_weights(train_a_step, gamma, warmup, perturbs):
    """The gradient at w + v is (1 + gamma) w; weight decay acts on w; SGD's first Nesterov step is 1 + momentum."""
    before, after, settings = train_a_step(awp_gamma=gamma, awp_warmup=warmup)
    factor = 1 + (gamma if perturbs else 0) + settings.weight_decay
    rate = settings.learning_rate * (1 + settings.momentum_lowest)  # one step: at the peak
    expected = {n: t * (1 - rate * factor) for n, t in before.items() if n.endswith("weight") and t.ndim > 1}
    assert len(expected) == 10
    for name, weight in expected.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-7)
    passes = [(steps, tracked) for steps, _, tracked in quadratic.calls]
    assert passes == ([(3, False), (0, True)] if perturbs else [(3, True)])  # the attack is not repeated
    if perturbs:
        values = [value for _, value, _ in quadratic.calls]
        assert values[1] == pytest.approx((1 + gamma) ** 2 * values[0], rel=1e-5)
    assert after["batchnorm.num_batches_tracked"] == 1


def test_a_loss_without_adversarial_images_is_refused(train_a_step, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "trades", losses.standard)
    with pytest.raises(UnfitError, match=r"awp_gamma is 0\.25 and loss trades returns no adversarial images"):
        train_a_step(awp_gamma=GAMMA)
