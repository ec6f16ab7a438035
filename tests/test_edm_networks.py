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

# File of names and shapes -> the network, its parameters in millions, FLOPs of a forward pass (a multiplication and an
# addition are two) in billions.
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
            network(torch.empty(1, 3, 32, 32), torch.empty(1), torch.empty(1, 10))
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
    return x, noise, F.one_hot(torch.arange(batch) % 10, 10).float(), torch.randn(batch, 9, generator=generator)


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
    zeros = small(x, noise, torch.zeros_like(labels), torch.zeros_like(augment))
    torch.testing.assert_close(small(x, noise), zeros)


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
    silent = [name for name, parameter in small.named_parameters() if parameter.grad is None]
    assert silent == []


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
    found = ResampleConv2d(1, 1, 0, down=True, taps=(1, 3, 3, 1))(image)[0, 0]
    np.testing.assert_allclose(found.numpy(), _filtered(image[0, 0].numpy(), (1, 3, 3, 1)), atol=1e-7)


def test_the_fused_convolution_comes_first_and_pads_once():
    """In the interior, where no padding is seen, both orders are equal; at the border only one of them is fused."""
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
def test_a_new_network_nearly_ends_in_zero(make):
    """Residual branches and the last layer start at (nearly) zero, so the output does too."""
    torch.manual_seed(0)
    network = make()
    x, noise, labels, augment = _inputs()
    assert network(x, noise, labels, augment).abs().max() < 1e-3
    spread = network.map_layer1.weight.std().item()
    fan_in, fan_out = network.map_layer1.in_features, network.map_layer1.out_features
    bound = 1 / math.sqrt(fan_in) if isinstance(network, DhariwalUNet) else math.sqrt(6 / (fan_in + fan_out))
    assert spread == pytest.approx(bound / math.sqrt(3), rel=0.05)
