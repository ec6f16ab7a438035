"""The networks of Karras et al. 2022: names and shapes of the published weights, each part against a slow formula."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dmat.diffusion import edm_networks
from dmat.diffusion.edm_networks import DhariwalUNet, ResampleConv2d, ResidualBlock, SongUNet

# File of names and shapes -> the network, its parameters in millions (counted there), and FLOPs of a forward
# pass in billions, a multiplication and an addition being two (derived from the shapes, None where nobody did it).
PUBLISHED = {
    "ddpmpp_cifar10": (functools.partial(SongUNet, 32, 3, 10, 9, dropout=0.13), 55.7, 42.4),
    "ncsnpp_cifar10": (
        functools.partial(
            SongUNet, 32, 3, 10, 9, embedding="fourier", noise_multiplier=2, encoder="residual", taps=(1, 3, 3, 1)
        ), 56.4, None,
    ),
    "adm_imagenet64": (functools.partial(DhariwalUNet, 64, 3, 1000), 295.9, None),
}  # fmt: skip


def published_shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of the published weights, below "model."."""
    lines = (Path(__file__).parent / "edm_shapes" / f"{name}.txt").read_text().splitlines()
    entries = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    return {
        tensor.removeprefix("model."): [int(side) for side in shape.strip("[]").split(",") if side.strip()]
        for tensor, shape in entries
    }


@pytest.fixture(params=PUBLISHED)
def published(request):
    """Name and network without memory for its numbers."""
    with torch.device("meta"):
        return request.param, PUBLISHED[request.param][0]()


def test_names_and_shapes_are_the_published_ones(published):
    name, network = published
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == published_shapes(name)


def test_the_number_of_parameters_is_the_published_one(published):
    name, network = published
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PUBLISHED[name][1], abs=0.05)


def test_a_forward_pass_of_the_cifar10_network_costs_what_is_published():
    with torch.device("meta"):
        network = PUBLISHED["ddpmpp_cifar10"][0]()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() / 1e9 == pytest.approx(PUBLISHED["ddpmpp_cifar10"][2], rel=0.01)


SMALL = {
    "ddpmpp": functools.partial(SongUNet, 8, 3, 10, 9, 16, (1, 2), 1, (4,)),
    "ncsnpp": functools.partial(
        SongUNet, 8, 3, 10, 9, 16, (1, 2), 1, (4,), embedding="fourier", encoder="residual", taps=(1, 3, 3, 1)
    ),
    "adm": functools.partial(DhariwalUNet, 8, 3, 10, 9, 64, (1, 2), 1, (4,)),
}


@pytest.fixture(params=SMALL)
def small(request):
    torch.manual_seed(0)
    network = SMALL[request.param]().eval()
    with torch.no_grad():  # the layers that start at zero would hide what lies before them
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def _inputs(batch=3, channels=3, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=generator)
    noise = torch.linspace(-1.5, 1.0, batch)
    return x, noise, torch.arange(batch) % 10, torch.randn(batch, 9, generator=generator)


def test_each_image_is_computed_by_itself(small):
    x, noise, labels, augment = _inputs()
    together = small(x, noise, labels, augment)
    alone = torch.cat([small(*(tensor[k : k + 1] for tensor in (x, noise, labels, augment))) for k in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("position", range(4), ids=["image", "noise", "label", "augmentation"])
def test_every_input_matters(small, position):
    inputs = _inputs()
    changed = list(inputs)
    changed[position] = changed[position] + 1
    assert (small(*inputs) - small(*changed)).abs().max() > 1e-3


def test_without_label_and_augmentation_equals_zeros(small):
    x, noise, labels, augment = _inputs()
    torch.testing.assert_close(small(x, noise), small(x, noise, None, torch.zeros_like(augment)))
    torch.testing.assert_close(small(x, noise, labels), small(x, noise, labels, torch.zeros_like(augment)))
    assert (small(x, noise, labels) - small(x, noise)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "network",
    [
        functools.partial(SongUNet, 28, 1, channels=16, multipliers=(1, 2, 2), blocks=1, attention=(7,)),
        functools.partial(SongUNet, 24, 1, channels=16, multipliers=(2,), blocks=2, attention=()),
        functools.partial(DhariwalUNet, 48, 3, 7, channels=32, multipliers=(1, 2), blocks=1, attention=(24,)),
    ],
    ids=["28", "24, one level", "48"],
)
def test_any_size_that_the_levels_divide_and_no_labels(network):
    network = network()
    channels, size = network.enc[next(iter(network.enc))].in_channels, int(next(iter(network.enc)).split("x")[0])
    x = torch.randn(2, channels, size, size)
    assert network(x, torch.zeros(2)).shape == x.shape


def test_a_size_that_the_levels_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 levels cannot halve 30 pixels 2 times"):
        SongUNet(30, 3, multipliers=(1, 1, 1))


def test_gradients_reach_every_parameter(small):
    small(*_inputs()).square().sum().backward()
    silent = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def _convolve(state, layer, x):
    weight = state[f"{layer}.weight"]
    return F.conv2d(x, weight, state[f"{layer}.bias"], padding=weight.shape[-1] // 2)


def _normalise(state, layer, x, eps):
    channels = x.shape[1]
    return F.group_norm(x, min(32, channels // 4), state[f"{layer}.weight"], state[f"{layer}.bias"], eps)


def _resample(x, kind, taps):
    """Doubles or halves [B, C, H, W] by the filter `taps`, written with zeros between or around the pixels."""
    if kind == "same":
        return x
    channels, weights = x.shape[1], torch.tensor(taps, dtype=x.dtype) / sum(taps)
    plane, margin = torch.outer(weights, weights).expand(channels, 1, -1, -1), (len(taps) - 1) // 2
    if kind == "down":
        return F.conv2d(F.pad(x, [margin] * 4), plane, stride=2, groups=channels)
    spread = torch.zeros(len(x), channels, 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    spread[:, :, ::2, ::2] = x
    after = len(taps) - 1 - margin
    return F.conv2d(F.pad(spread, [after, margin] * 2), 4 * plane, groups=channels)


def _block(state, name, x, embedding, song, taps):
    """A residual block by the names of its tensors. song: DDPM++ or NCSN++, else ADM."""
    kind = "down" if name.endswith("_down") else "up" if name.endswith("_up") else "same"
    eps, scale = (1e-6, math.sqrt(0.5)) if song else (1e-5, 1.0)
    h = _convolve(state, f"{name}.conv0", _resample(F.silu(_normalise(state, f"{name}.norm0", x, eps)), kind, taps))
    condition = F.linear(embedding, state[f"{name}.affine.weight"], state[f"{name}.affine.bias"])[:, :, None, None]
    if song:
        h = F.silu(_normalise(state, f"{name}.norm1", h + condition, eps))
    else:
        factor, shift = condition.chunk(2, 1)
        h = F.silu(_normalise(state, f"{name}.norm1", h, eps) * (1 + factor) + shift)
    shortcut = _resample(x, kind, taps)
    if f"{name}.skip.weight" in state:
        shortcut = _convolve(state, f"{name}.skip", shortcut)
    h = (_convolve(state, f"{name}.conv1", h) + shortcut) * scale
    if f"{name}.qkv.weight" in state:
        heads = 1 if song else h.shape[1] // 64
        qkv = _convolve(state, f"{name}.qkv", _normalise(state, f"{name}.norm2", h, eps))
        q, k, v = qkv.reshape(len(h), heads, -1, 3, h.shape[2] * h.shape[3]).unbind(3)  # [B, heads, C, H W] each
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(3)
        h = (h + _convolve(state, f"{name}.proj", (v @ weights.transpose(2, 3)).reshape(h.shape))) * scale
    return h


def reference(state, x, noise, labels, augment, song, fourier, taps):
    """The forward pass by the names of the tensors alone, in the order of the published networks."""
    if fourier:
        angles = torch.outer(noise, 2 * math.pi * state["map_noise.freqs"])
        embedding = torch.cat([angles.cos(), angles.sin()], 1)
    else:
        half = state["map_layer0.weight"].shape[1] // 2
        angles = torch.outer(noise, torch.tensor(1e-4, dtype=x.dtype) ** (torch.arange(half) / (half - song)))
        embedding = torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], 1)
    embedding = embedding + augment @ state["map_augment.weight"].T
    if labels is None:
        classes = torch.zeros_like(state["map_label.weight"].T[[0] * len(x)])
    else:
        classes = state["map_label.weight"].T[labels]
    if song:
        embedding = embedding + classes * math.sqrt(10) + state["map_label.bias"]
    embedding = F.silu(F.linear(embedding, state["map_layer0.weight"], state["map_layer0.bias"]))
    embedding = F.linear(embedding, state["map_layer1.weight"], state["map_layer1.bias"])
    embedding = F.silu(embedding if song else embedding + classes)
    names = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in state if name[:4] in ("enc.", "dec.")))
    skips, residual = [], x
    for name in [name for name in names if name.startswith("enc.")]:
        if name.endswith("_conv"):
            skips.append(_convolve(state, name, x))
        elif name.endswith("_aux_residual"):  # the filter after the convolution, and one border for both
            dense = F.conv2d(F.pad(residual, [2] * 4), state[f"{name}.weight"], state[f"{name}.bias"])
            weights = torch.tensor(taps, dtype=x.dtype) / sum(taps)
            plane = torch.outer(weights, weights).expand(dense.shape[1], 1, 4, 4)
            filtered = F.conv2d(dense, plane, stride=2, groups=dense.shape[1])
            residual = skips[-1] = (skips[-1] + filtered) / math.sqrt(2)
        else:
            skips.append(_block(state, name, skips[-1], embedding, song, taps))
    h = skips[-1]
    for name in [name for name in names if name.startswith("dec.") and "_aux_" not in name]:
        h = _block(state, name, torch.cat([h, skips.pop()], 1) if "_block" in name else h, embedding, song, taps)
    assert not skips
    last = next((name.removesuffix("norm") for name in names if name.endswith("_aux_norm")), "out_")
    return _convolve(state, f"{last}conv", F.silu(_normalise(state, f"{last}norm", h, 1e-6 if song else 1e-5)))


@pytest.mark.parametrize("name", SMALL)
def test_a_network_equals_its_forward_pass_by_the_names_of_its_tensors(name):
    """In float64, every tensor random, four heads or one, all levels."""
    torch.manual_seed(5)
    network = SMALL[name]().eval().double()
    state = {key: 0.3 * torch.randn_like(tensor) for key, tensor in network.state_dict().items()}
    state |= {key: tensor for key, tensor in network.state_dict().items() if key.endswith("resample_filter")}
    network.load_state_dict(state)
    x, noise, labels, augment = (tensor.double() if tensor.is_floating_point() else tensor for tensor in _inputs())
    taps = (1, 3, 3, 1) if name == "ncsnpp" else (1, 1)
    for classes in (labels, None):
        expected = reference(state, x, noise, classes, augment, song=name != "adm", fourier=name == "ncsnpp", taps=taps)
        torch.testing.assert_close(network(x, noise, classes, augment), expected, rtol=1e-8, atol=1e-8)


def test_dropout_comes_before_the_second_convolution_and_in_training_alone():
    """With all dropped, a block is its skip path and the bias of that convolution."""
    block = ResidualBlock(8, 8, 12, dropout=1 - 1e-7)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    torch.testing.assert_close(block.train()(x, embedding), x + block.conv1.bias[:, None, None])
    assert (block.eval()(x, embedding) - x).abs().max() > 1


# --- parts


def test_two_equal_taps_are_nearest_neighbour_and_mean():
    x = torch.randn(2, 5, 6, 6)
    up = ResampleConv2d(5, 5, 0, up=True)(x)
    torch.testing.assert_close(up, F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(ResampleConv2d(5, 5, 0, down=True)(x), F.avg_pool2d(x, 2))


def _filtered(image: np.ndarray, taps: tuple[int, ...]) -> np.ndarray:
    """image [H, W] filtered along both sides and halved: sample k sees the pixels from 2 k - 1 on, zeros outside."""
    weights = np.array(taps) / sum(taps)
    padded = np.pad(image, 1)
    half = [len(image) // 2] * 2
    return np.array([
        [(np.outer(weights, weights) * padded[2 * i : 2 * i + 4, 2 * j : 2 * j + 4]).sum() for j in range(half[1])]
        for i in range(half[0])
    ])  # fmt: skip


def test_four_taps_are_a_binomial_filter():
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    halved = ResampleConv2d(1, 1, 0, down=True, taps=(1, 3, 3, 1))(image)[0, 0]
    np.testing.assert_allclose(halved.numpy(), _filtered(image[0, 0].numpy(), (1, 3, 3, 1)), atol=1e-7)


def test_the_fused_convolution_comes_first_and_pads_once():
    """A convolution with a padding of 2, then the filter without padding."""
    torch.manual_seed(0)
    fused = ResampleConv2d(2, 3, 3, down=True, taps=(1, 3, 3, 1), fused=True)
    torch.nn.init.normal_(fused.weight)
    x = torch.randn(1, 2, 16, 16)
    dense = F.conv2d(F.pad(x, (2, 2, 2, 2)), fused.weight)  # [1, 3, 18, 18]: a 3 x 3 kernel on 20 x 20 pixels
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    expected = F.conv2d(dense, torch.outer(taps, taps).expand(3, 1, 4, 4), stride=2, groups=3)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive_scale", [True, False])
@pytest.mark.parametrize("heads", [0, 1, 2])
def test_a_block_equals_its_formula(adaptive_scale, heads):
    """In float64, with attention written out; channels of q, k and v interleaved as in the published weights."""
    torch.manual_seed(3)
    block = ResidualBlock(8, 16, 12, heads=heads, skip_scale=0.7, adaptive_scale=adaptive_scale).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, embedding = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)

    def normalised(values, norm):
        groups = values.reshape(2, norm.num_groups, -1)
        scaled = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, keepdim=True, correction=0) + norm.eps).sqrt()
        return scaled.reshape(values.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]

    def convolved(values, layer):
        return F.conv2d(values, layer.weight, layer.bias, padding=layer.kernel // 2)

    h = convolved(F.silu(normalised(x, block.norm0)), block.conv0)
    condition = (embedding @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    if adaptive_scale:
        h = normalised(h, block.norm1) * (1 + condition[:, :16]) + condition[:, 16:]
    else:
        h = normalised(h + condition, block.norm1)
    h = (convolved(F.silu(h), block.conv1) + convolved(x, block.skip)) * 0.7
    if heads:
        qkv, width = convolved(normalised(h, block.norm2), block.qkv).flatten(2), 16 // heads  # [2, 48, 16]
        mixed = torch.empty(2, 16, 16, dtype=torch.float64)
        for image in range(2):
            for head in range(heads):
                rows = [[3 * (head * width + c) + kind for c in range(width)] for kind in range(3)]
                q, k, v = (qkv[image, kind_rows] for kind_rows in rows)  # [width, pixels]
                weights = (q.T @ k / math.sqrt(width)).softmax(1)  # [pixels, pixels]
                mixed[image, head * width : (head + 1) * width] = v @ weights.T
        h = (h + convolved(mixed.reshape(2, 16, 4, 4), block.proj)) * 0.7
    torch.testing.assert_close(block(x, embedding), h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("endpoint", "lowest"), [(True, 1e-4), (False, 1e-4 ** (7 / 8))])
def test_positional_frequencies_go_from_one_to_the_lowest(endpoint, lowest):
    noise = torch.tensor([0.5, -1.25])
    embedded = edm_networks.PositionalEmbedding(16, endpoint)(noise)
    frequencies = np.geomspace(1, lowest, 8)
    angles = np.outer(noise.numpy(), frequencies)
    np.testing.assert_allclose(embedded.numpy(), np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-6)


def test_fourier_frequencies_are_kept_with_the_weights():
    embedding = edm_networks.FourierEmbedding(6, scale=2.0)
    embedding.freqs.copy_(torch.tensor([0.5, 1.0, -2.0]))
    angles = 2 * math.pi * np.outer([0.3], [0.5, 1.0, -2.0])
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(embedding(torch.tensor([0.3])).numpy(), expected, atol=1e-6)


def test_labels_are_dropped_in_training_alone_and_at_their_rate():
    labels = torch.ones(20_000, 2)
    torch.manual_seed(0)
    kept = edm_networks.drop_labels(labels, 0.25, training=True)
    assert torch.equal(kept[:, 0], kept[:, 1]), "a label is dropped whole"
    assert kept[:, 0].mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(edm_networks.drop_labels(labels, 0.25, training=False), labels)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_initial_weights_are_the_published_ones(make):
    """Residual branches and the last layer start at (nearly) zero, so the output does too; the others by their rule."""
    torch.manual_seed(0)
    network = make()
    x, noise, labels, augment = _inputs()
    assert network(x, noise, labels, augment).abs().max() < 1e-3
    spread = network.map_layer1.weight.std().item()
    fan_in, fan_out = network.map_layer1.in_features, network.map_layer1.out_features
    bound = 1 / math.sqrt(fan_in) if isinstance(network, DhariwalUNet) else math.sqrt(6 / (fan_in + fan_out))
    assert spread == pytest.approx(bound / math.sqrt(3), rel=0.05)
    attention = network.dec["4x4_in0"].qkv.weight
    fan_in, fan_out = attention.shape[1], attention.shape[0]
    bound = 1 / math.sqrt(fan_in) if isinstance(network, DhariwalUNet) else math.sqrt(0.2 * 6 / (fan_in + fan_out))
    assert attention.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
