"""RaWRN has the published sizes, names and arithmetic, so that weights can be exchanged.

Oracle: the whole network again, in float64, from the published tensor names. `make test-robustbench` compares it with
RobustBench's own class. Run alone: pytest tests/test_ra_wide_resnet.py
"""

import math

import pytest
import torch
from torch.nn import functional as F

import dmat
from dmat.errors import DmatError
from dmat.models.importing import import_model
from dmat.robust.networks import DataSpec
from dmat.robust.ra_wide_resnet import ra_blocks, ra_channels, ra_wide_resnet
from tests.test_networks import CIFAR_MEAN, CIFAR_STD, slow_conv, slow_norm

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def network(depth=10, width=2, classes=10):
    """As after some training, so that a mix-up of tensors is noticed."""
    torch.manual_seed(0)
    model = ra_wide_resnet(DataSpec(classes, 3, CIFAR_MEAN, CIFAR_STD), depth, width, "silu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "batchnorm" in name and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(("classes", "count"), [(10, 267_240_802), (100, 267_318_652)])
def test_ra_wrn_70_16_has_the_size_of_robustbench_s(classes, count):
    """267,240,802: the parameters of `get_model("ra_wrn70_16")` in RobustBench 1.1.1."""
    with torch.device("meta"):
        model = ra_wide_resnet(DataSpec(classes, 3, CIFAR_MEAN, CIFAR_STD), 70, 16, "silu")
    assert (ra_blocks(70), ra_channels(16)) == ((30, 31, 10), (96, 216, 432, 864))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(model.state_dict()) == 1 + 71 * 16 + 3 + 5 + 2  # 16 tensors per block, and 3 shortcuts


def test_other_sizes_are_in_proportion():
    assert [ra_blocks(6 * n + 4) for n in (1, 2, 4)] == [(3, 3, 1), (5, 6, 2), (11, 11, 4)]
    assert [ra_channels(width) for width in (1, 2, 10)] == [(6, 13, 27, 54), (12, 27, 54, 108), (60, 135, 270, 540)]
    assert len({ra_blocks(6 * n + 4) for n in range(1, 200)}) == 199  # so that a file shows its depth


def slow_features(state, images, blocks):
    """Activation before the shortcut, TensorFlow's padding for stride 2, squeeze-excitation after the second
    convolution, with ReLU inside."""
    act = lambda x: x * torch.sigmoid(x)  # noqa: E731
    x = (images - torch.tensor(CIFAR_MEAN)[:, None, None].double()) / torch.tensor(CIFAR_STD)[:, None, None].double()
    x = slow_conv(x, state["init_conv.weight"], 1, (1, 1, 1, 1))
    for group, count in enumerate(blocks):
        for block in range(count):
            base = f"layer.{group}.block.{block}"
            stride = 2 if group > 0 and block == 0 else 1
            pad = (1, 1, 1, 1) if stride == 1 else (0, 0, 1, 1)
            active = act(slow_norm(x, state, f"{base}.batchnorm_0"))
            h = slow_conv(active, state[f"{base}.conv_0.weight"], stride, pad)
            h = slow_conv(act(slow_norm(h, state, f"{base}.batchnorm_1")), state[f"{base}.conv_1.weight"], 1, (1,) * 4)
            means = h.mean((2, 3))
            inner = (means @ state[f"{base}.se.fc1.weight"][:, :, 0, 0].T + state[f"{base}.se.fc1.bias"]).clamp(min=0)
            gate = inner @ state[f"{base}.se.fc2.weight"][:, :, 0, 0].T + state[f"{base}.se.fc2.bias"]
            h = h / (1 + (-gate).exp())[:, :, None, None]
            shortcut = state.get(f"{base}.shortcut.weight")
            x = h + (x if shortcut is None else slow_conv(active, shortcut, stride, (0, 0, 0, 0)))
    return act(slow_norm(x, state, "batchnorm")).mean((2, 3))


@pytest.mark.parametrize(("depth", "width", "size"), [(10, 2, 8), (16, 1, 12)])
def test_logits_equal_the_network_written_from_its_tensor_names(depth, width, size):
    model, images = network(depth, width), torch.rand(3, 3, size, size)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    logits = slow_features(state, images.double(), ra_blocks(depth)) @ state["logits.weight"].T + state["logits.bias"]
    torch.testing.assert_close(model(images).double(), logits, rtol=1e-4, atol=1e-4)
    assert model.features(images).shape == (3, 54 * width)


def test_names_are_the_published_ones():
    block = {"batchnorm_0", "conv_0", "batchnorm_1", "conv_1", "shortcut", "se.fc1", "se.fc2"}
    expected = {"init_conv.weight", "logits.weight", "logits.bias", *(f"batchnorm.{part}" for part in NORM)}
    for group, count in enumerate(ra_blocks(10)):
        for k in range(count):
            for name in block - ({"shortcut"} if k else set()):
                leaves = NORM if "norm" in name else ("weight", "bias") if "se." in name else ("weight",)
                expected |= {f"layer.{group}.block.{k}.{name}.{leaf}" for leaf in leaves}
    assert set(network().state_dict()) == expected


def test_convolutions_start_with_the_published_spread_and_gates_half_open():
    torch.manual_seed(0)
    model = ra_wide_resnet(DataSpec(10, 3, CIFAR_MEAN, CIFAR_STD), 10, 8, "silu")
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            expected = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            spread = 4 / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(expected, rel=spread)
    assert not model.logits.bias.any()


def test_gradient_reaches_every_parameter():
    model = network().train()
    F.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- files of other projects


@pytest.mark.parametrize("prefix", ["", "module.", "module.0."])
@pytest.mark.parametrize(("depth", "width", "data"), [(10, 2, "cifar10"), (16, 1, "cifar100")])
def test_a_published_file_is_imported_bit_for_bit(tmp_path, prefix, depth, width, data):
    model = network(depth, width, {"cifar10": 10, "cifar100": 100}[data])
    torch.save({"state_dict": {prefix + k: v for k, v in model.state_dict().items()}}, tmp_path / "ra.pt")
    result = import_model(tmp_path / "ra.pt", data=data)
    assert result.notes == ["activation silu was assumed, because no tensor shows it: see --activation"]
    expected = {"name": "ra_wide_resnet", "depth": depth, "width": width, "activation": "silu"}
    assert result.sidecar["network"] == expected
    loaded = dmat.load_model(result.path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    pixels = torch.rand(2, 3, 16, 16)
    if data == "cifar10":  # CIFAR-100 has other constants of normalisation
        assert torch.equal(loaded(pixels), model(pixels))


ALMOST = {
    "a block is missing": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("layer.1.block.2.")},
        "groups of 3, 2 and 1 blocks with squeeze-excitation; expected 30, 31 and 10",
    ),
    "another width": (
        lambda s: s | {"logits.weight": torch.zeros(10, 100)},
        "the last group has 100 channels; expected a multiple of 54, as RaWRN-70-16 has 864",
    ),
    "another first convolution": (
        lambda s: s | {"init_conv.weight": torch.zeros(16, 3, 3, 3)},
        "does not match RaWRN-10-2",
    ),
    "a gate is missing": (
        lambda s: {k: v for k, v in s.items() if k != "layer.2.block.0.se.fc2.bias"},
        "does not match RaWRN-10-2",
    ),
    "the first gate is missing": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("layer.0.block.0.se.")},
        "has groups of 3, 3 and 1 blocks; expected three equal numbers",
    ),
}


@pytest.mark.parametrize("case", ALMOST)
def test_tensors_that_are_almost_a_ra_wrn_are_refused(tmp_path, case):
    change, message = ALMOST[case]
    torch.save({"state_dict": change(network().state_dict())}, tmp_path / "ra.pt")
    with pytest.raises(DmatError, match=message):
        import_model(tmp_path / "ra.pt", data="cifar10")
    assert [path.name for path in tmp_path.iterdir()] == ["ra.pt"]
