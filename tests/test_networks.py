"""The wide residual network has the published sizes, names and arithmetic, so that weights can be exchanged.

Oracle: the whole network again, written with functions from the published tensor names. Run alone:
pytest tests/test_networks.py
"""

import collections
import math

import pytest
import torch
from torch.nn import functional as F

from dmat.robust import flops
from dmat.robust.networks import ACTIVATIONS, NETWORKS, DataSpec, WideBlock, preact_resnet, wide_resnet

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def data_spec(classes=10, channels=3):
    return DataSpec(classes, channels, CIFAR_MEAN[:channels], CIFAR_STD[:channels])


def network(depth=10, width=1, activation="silu", random_batch_norms=True, **options):
    """random_batch_norms: as after some training, so that a mix-up of their four tensors is noticed."""
    torch.manual_seed(0)
    model = wide_resnet(data_spec(**options), depth, width, activation)
    if random_batch_norms:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "batchnorm" in name and tensor.is_floating_point():
                tensor.data.uniform_(0.5, 1.5)
    return model.eval()


# --- sizes and names


@pytest.mark.parametrize(
    ("depth", "width", "classes", "count"),
    [
        (28, 10, 10, 36_479_194),  # the papers' networks: shared facts, section 4.3
        (28, 10, 100, 36_536_884),
        (70, 16, 10, 266_796_506),
        (70, 16, 100, 266_888_756),
    ],
)
def test_number_of_parameters_is_the_published_one(depth, width, classes, count):
    with torch.device("meta"):  # shapes only
        model = wide_resnet(data_spec(classes), depth, width, "silu")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_names_of_the_state_dict_are_the_published_ones(depth):
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"init_conv.weight", "logits.weight", "logits.bias", *(f"batchnorm.{part}" for part in norm)}
    for group in range(3):
        for block in range((depth - 4) // 6):
            base = f"layer.{group}.block.{block}"
            expected |= {f"{base}.conv_0.weight", f"{base}.conv_1.weight"}
            expected |= {f"{base}.batchnorm_{k}.{part}" for k in (0, 1) for part in norm}
            if block == 0:
                expected.add(f"{base}.shortcut.weight")
    with torch.device("meta"):
        actual = set(wide_resnet(data_spec(), depth, 2, "silu").state_dict())
    assert actual == expected  # no mean and no std either


def test_shortcut_exists_only_where_the_width_changes():
    with torch.device("meta"):
        names = set(wide_resnet(data_spec(), 16, 1, "silu").state_dict())
    assert "layer.0.block.0.shortcut.weight" not in names  # 16 channels in, 16 out
    assert "layer.1.block.0.shortcut.weight" in names
    assert "layer.1.block.1.shortcut.weight" not in names


# --- arithmetic


def slow_conv(x, weight, stride, pad):
    """A convolution as a sum over its taps; pad = (top, left, bottom, right), written out."""
    top, left, bottom, right = pad
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, channels, height + top + bottom, width + left + right)
    padded[:, :, top : top + height, left : left + width] = x
    size = weight.shape[2]
    out_height = (padded.shape[2] - size) // stride + 1
    out_width = (padded.shape[3] - size) // stride + 1
    total = 0
    for i in range(size):
        for j in range(size):
            rows = range(i, i + stride * out_height, stride)
            columns = range(j, j + stride * out_width, stride)
            window = padded[:, :, list(rows)][:, :, :, list(columns)]  # [N, C, H', W']
            total = total + torch.einsum("nchw,oc->nohw", window, weight[:, :, i, j])
    return total


def slow_norm(x, state, name):
    """Batch norm with running statistics."""
    parts = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (state[f"{name}.{part}"][:, None, None] for part in parts)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def slow_features(state, images, depth, mean, std, act):
    """Zagoruyko and Komodakis 2016 with activation before the shortcut and TensorFlow's padding for stride 2."""
    x = (images - torch.tensor(mean)[:, None, None].double()) / torch.tensor(std)[:, None, None].double()
    x = slow_conv(x, state["init_conv.weight"], 1, (1, 1, 1, 1))
    for group in range(3):
        for block in range((depth - 4) // 6):
            base = f"layer.{group}.block.{block}"
            stride = 2 if group > 0 and block == 0 else 1
            pad = (1, 1, 1, 1) if stride == 1 else (0, 0, 1, 1)
            active = act(slow_norm(x, state, f"{base}.batchnorm_0"))
            h = slow_conv(active, state[f"{base}.conv_0.weight"], stride, pad)
            h = act(slow_norm(h, state, f"{base}.batchnorm_1"))
            h = slow_conv(h, state[f"{base}.conv_1.weight"], 1, (1, 1, 1, 1))
            shortcut = state.get(f"{base}.shortcut.weight")
            x = h + (x if shortcut is None else slow_conv(active, shortcut, stride, (0, 0, 0, 0)))
    return act(slow_norm(x, state, "batchnorm")).mean((2, 3))


SLOW_ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("depth", "width", "channels", "size"), [(10, 2, 3, 8), (16, 1, 1, 12)])
def test_logits_equal_the_network_written_from_its_tensor_names(depth, width, channels, size, activation):
    model = network(depth, width, activation, channels=channels)
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    act = SLOW_ACTIVATIONS[activation]
    features = slow_features(state, images.double(), depth, CIFAR_MEAN[:channels], CIFAR_STD[:channels], act)
    logits = features @ state["logits.weight"].T + state["logits.bias"]
    torch.testing.assert_close(model.features(images).double(), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images).double(), logits, rtol=1e-4, atol=1e-4)


def test_stride_two_looks_right_and_down_only():
    """The first output pixel of a downsampling block depends on the pixels 0 to 2, not on a border above or left."""
    block = WideBlock(8, 16, stride=2, activation=torch.nn.ReLU).eval()
    torch.nn.init.zeros_(block.shortcut.weight)
    with torch.no_grad():
        block.conv_1.weight.zero_()[:, :, 1, 1] = 0.1  # the second convolution looks at its own pixel
    images = torch.rand(1, 8, 8, 8).add_(0.5).requires_grad_(True)
    block(images)[0, :, 0, 0].sum().backward()
    seen = images.grad.abs().sum((0, 1)) > 0
    assert seen.nonzero().amax(0).tolist() == [2, 2]
    assert seen[:3, :3].all()
    images.grad = None
    block(images)[0, :, 3, 3].sum().backward()  # the last one: pixels 6 and 7, and the border of zeros
    seen = images.grad.abs().sum((0, 1)) > 0
    assert seen.nonzero().tolist() == [[6, 6], [6, 7], [7, 6], [7, 7]]


@pytest.mark.parametrize(("size", "feature_size"), [(8, 2), (32, 8), (64, 16)])
def test_any_size_gives_one_row_of_logits(size, feature_size):
    model = network(classes=7, channels=3)
    sizes = []
    model.batchnorm.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    images = torch.rand(2, 3, size, size)
    assert model(images).shape == (2, 7)
    assert model.features(images).shape == (2, 64)
    assert sizes == [(feature_size, feature_size)] * 2  # halved twice


def test_normalisation_is_a_layer_of_the_network():
    """The network takes pixels in [0, 1]: the same weights without it need normalised images."""
    model, bare = network(), wide_resnet(DataSpec(10, 3, (0.0,) * 3, (1.0,) * 3), 10, 1, "silu").eval()
    bare.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 8, 8)
    normalised = torch.stack([(images[:, c] - CIFAR_MEAN[c]) / CIFAR_STD[c] for c in range(3)], 1)
    torch.testing.assert_close(model(images), bare(normalised))
    # another mean is another shift of the pixels
    shifted = wide_resnet(DataSpec(10, 3, tuple(m + 0.125 for m in CIFAR_MEAN), CIFAR_STD), 10, 1, "silu").eval()
    shifted.load_state_dict(model.state_dict())
    torch.testing.assert_close(shifted(images + 0.125), model(images), rtol=1e-4, atol=1e-5)


# --- initialisation


def fan_out_normal(layer):
    """Gowal et al. 2020: std of a normal distribution, sqrt(2 / (k k out))."""
    return math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels))


def uniform_by_fan_in(layer):
    """The default of nn.Conv2d and nn.Linear, as their pages say: uniform within 1 / sqrt(fan in) of 0."""
    return 1 / math.sqrt(layer.weight[0].numel()) / math.sqrt(3)


# network -> (depth, width), std of a convolution, whether the bias of the last layer is 0
INITIALISATIONS = {
    "wide_resnet": ((10, 4), fan_out_normal, True),
    "wide_resnet_symmetric": ((10, 4), fan_out_normal, True),
    "preact_resnet": ((18, 0), uniform_by_fan_in, False),  # Rebuffi et al. 2021's file initialises nothing
}
assert {*NETWORKS} - {*INITIALISATIONS} == {"ra_wide_resnet", "vit"}  # which have test files of their own


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_initialisation_is_the_published_one(name):
    """Convolutions by the rule of the network, the last layer by torch's; batch norm 1 and 0 with momentum 0.01."""
    size, std_of, bias_is_zero = INITIALISATIONS[name]
    torch.manual_seed(0)
    model, kinds = NETWORKS[name](data_spec(), *size, "silu"), collections.Counter()
    for layer in model.modules():
        kinds[type(layer)] += 1
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            weight, expected = layer.weight, (std_of if type(layer) is torch.nn.Conv2d else uniform_by_fan_in)(layer)
            spread = 4 / math.sqrt(2 * weight.numel())  # four standard errors of a standard deviation
            assert weight.std().item() == pytest.approx(expected, rel=spread)
            assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel())
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.bias is None
            # a uniform distribution ends at sqrt(3) of its std, a normal one goes far beyond
            assert (layer.weight.abs().max() < 1.8 * std_of(layer)) == (std_of is uniform_by_fan_in)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
            assert (layer.momentum, layer.eps) == (0.01, 1e-5)
    counts = (kinds[torch.nn.Conv2d], kinds[torch.nn.BatchNorm2d], kinds[torch.nn.Linear])
    assert counts == ((1 + 8 * 2 + 3, 8 * 2 + 1, 1) if name == "preact_resnet" else (1 + 3 * 2 + 3, 3 * 2 + 1, 1))
    assert (model.logits.bias == 0).all() == bias_is_zero


def test_gradient_reaches_every_parameter():
    model = network().train()
    F.cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- PreActResNet


def slow_preact_features(state, images, blocks, act):
    """He et al. 2016 as in Rebuffi et al. 2021: 3x3 shortcuts from the input itself, padding right and below."""
    x = (images - torch.tensor(CIFAR_MEAN)[:, None, None].double()) / torch.tensor(CIFAR_STD)[:, None, None].double()
    x = slow_conv(x, state["conv_2d.weight"], 1, (1, 1, 1, 1))
    for group, count in enumerate(blocks):
        for block in range(count):
            base = f"layer_{group}.{block}"
            stride = 2 if group > 0 and block == 0 else 1
            pad = (1, 1, 1, 1) if stride == 1 else (0, 0, 1, 1)
            h = slow_conv(
                act(slow_norm(x, state, f"{base}.batchnorm_0")), state[f"{base}.conv_2d_1.weight"], stride, pad
            )
            h = slow_conv(
                act(slow_norm(h, state, f"{base}.batchnorm_1")), state[f"{base}.conv_2d_2.weight"], 1, (1,) * 4
            )
            shortcut = state.get(f"{base}.shortcut.weight")
            x = h + (x if shortcut is None else slow_conv(x, shortcut, stride, pad))
    return act(slow_norm(x, state, "batchnorm")).mean((2, 3))


@pytest.mark.parametrize(("depth", "blocks", "size"), [(18, (2, 2, 2, 2), 16), (34, (3, 4, 6, 3), 8)])
def test_preact_logits_equal_the_network_written_from_its_tensor_names(depth, blocks, size):
    torch.manual_seed(0)
    model = preact_resnet(data_spec(), depth, 0, "silu").eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "batchnorm" in name and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, size, size)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    features = slow_preact_features(state, images.double(), blocks, lambda x: x * torch.sigmoid(x))
    logits = features @ state["logits.weight"].T + state["logits.bias"]
    torch.testing.assert_close(model(images).double(), logits, rtol=1e-4, atol=1e-4)
    assert {name.split(".")[2] for name in state if "shortcut" in name} == {"shortcut"}


def test_preact_has_the_published_size():
    """ResNet-18 of CIFAR has 11.17 M parameters; the three 3x3 shortcuts instead of 1x1 add 8/9 of theirs."""
    with torch.device("meta"):
        model = preact_resnet(data_spec(), 18, 0, "silu")
    shortcuts = sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
    assert shortcuts == 9 * (64 * 128 + 128 * 256 + 256 * 512)
    rest = sum(p.numel() for p in model.parameters()) - shortcuts
    assert rest + shortcuts / 9 == pytest.approx(11.17e6, rel=1e-3)


# --- floating-point operations


def test_flops_of_single_layers_equal_their_formulas():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.Flatten(), torch.nn.Linear(5 * 16, 7)
    )
    assert flops.forward(model, (3, 8, 8)) == 2 * (5 * 16 * 27 + 7 * 80)


@pytest.mark.parametrize(("depth", "width"), [(28, 10), (70, 16)])
def test_a_step_of_trades_costs_what_the_scaling_study_reports(depth, width):
    """Bartoldson et al. 2024: 7822 operations for each parameter and image seen, with 10 attack steps."""
    with torch.device("meta"):
        model = wide_resnet(data_spec(), depth, width, "silu")
    step = flops.forward(model, (3, 32, 32)) * flops.forward_passes_per_step("trades", 10)
    assert step / sum(p.numel() for p in model.parameters()) == pytest.approx(7822, rel=0.01)
    assert [flops.forward_passes_per_step(loss, 10) for loss in ("standard", "pgd_at", "ikl")] == [3, 23, 27]
    assert [flops.forward_passes_per_step(loss, 10) for loss in ("mart", "lse", "consistency")] == [26, 27, 27]
    assert [flops.forward_passes_per_step(loss, 10, True) for loss in ("pgd_at", "trades")] == [26, 33]
