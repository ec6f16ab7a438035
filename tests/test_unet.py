"""The U-Net keeps shapes, starts at zero, depends on noise level and class, and trains every parameter it has.

Run alone: pytest tests/test_unet.py
"""

import math

import pytest
import torch
from torch.nn import functional as F

from dmat.diffusion.unet import Attention, UNet, UNetBlock


def unet(image_channels=1, classes=10, channels=16, multipliers=(1, 2), blocks=1, dropout=0.0, perturbed=True):
    """perturbed: shifts every parameter a little, as after a first step, because layers of zeros hide what follows."""
    torch.manual_seed(0)
    network = UNet(image_channels, classes, channels, multipliers, blocks, dropout)
    if perturbed:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(batch=3, channels=1, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.randn(batch, generator=generator) / 2, torch.arange(batch) % 10


@pytest.mark.parametrize(
    ("channels", "size", "multipliers", "blocks"),
    [(1, 8, (1, 2), 1), (3, 8, (1,), 2), (3, 16, (1, 2, 2), 1), (1, 12, (2, 1, 3), 2)],
)
def test_output_has_the_shape_of_the_input(channels, size, multipliers, blocks):
    network = unet(channels, multipliers=multipliers, blocks=blocks)
    x, c_noise, labels = inputs(2, channels, size)
    assert network(x, c_noise, labels).shape == x.shape
    assert network(x, c_noise, None).shape == x.shape


def test_output_is_zero_at_initialisation():
    """The denoiser then starts as c_skip x."""
    x, c_noise, labels = inputs()
    assert torch.equal(unet(perturbed=False)(x, c_noise, labels), torch.zeros_like(x))


def test_no_label_is_a_class_of_its_own():
    network = unet()
    x, c_noise, _ = inputs(1)
    outputs = [network(x, c_noise, torch.tensor([label])) for label in range(10)] + [network(x, c_noise, None)]
    for k, output in enumerate(outputs):
        for other in outputs[:k]:
            assert (output - other).abs().max() > 1e-3
    assert network.embed_class.num_embeddings == 11


def test_output_depends_on_the_noise_level():
    network = unet()
    x, c_noise, labels = inputs()
    assert (network(x, c_noise, labels) - network(x, c_noise + 0.1, labels)).abs().amax((1, 2, 3)).min() > 1e-3


def test_noise_embedding_is_cosines_and_sines_of_frequencies_from_1_to_100():
    network = unet(channels=8)
    assert network.frequencies.tolist() == pytest.approx([1.0, 100 ** (1 / 3), 100 ** (2 / 3), 100.0], rel=1e-5)
    embedded = []
    network.embed_noise.register_forward_hook(lambda module, arguments, output: embedded.append(arguments[0]))
    x, _, labels = inputs(1)
    network(x, torch.tensor([0.3]), labels)
    angles = [0.3 * f for f in network.frequencies.tolist()]
    assert embedded[0][0].tolist() == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-5)


def test_an_image_does_not_depend_on_its_neighbours():
    network = unet()
    x, c_noise, labels = inputs()
    alone = [network(x[k : k + 1], c_noise[k : k + 1], labels[k : k + 1]) for k in range(len(x))]
    torch.testing.assert_close(network(x, c_noise, labels), torch.cat(alone))


def test_gradient_reaches_every_parameter():
    network = unet(classes=3, multipliers=(1, 2), blocks=2).train()
    x, c_noise, _ = inputs(3)
    loss = network(x, c_noise, torch.arange(3)).square().sum() + network(x, c_noise, None).square().sum()
    loss.backward()
    dead = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert dead == []
    assert network.embed_class.weight.grad.abs().amax(1).min() > 0  # every class, and "no class"


def test_dropout_acts_in_training_only():
    network = unet(dropout=0.5)
    x, c_noise, labels = inputs()
    assert torch.equal(network(x, c_noise, labels), network(x, c_noise, labels))
    network.train()
    assert not torch.equal(network(x, c_noise, labels), network(x, c_noise, labels))


def test_attention_is_at_the_smallest_size_only():
    network = unet(multipliers=(1, 2), blocks=1)
    sizes = []
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, arguments, output: sizes.append(arguments[0].shape[2]))
    x, c_noise, labels = inputs(1)
    network(x, c_noise, labels)
    assert sizes == [4, 4, 4, 4]  # one block down, one in the middle, two up


def test_attention_is_softmax_of_products_of_queries_and_keys():
    torch.manual_seed(2)
    layer = Attention(8)
    torch.nn.init.normal_(layer.out.weight, std=0.3)
    x = torch.randn(1, 8, 2, 3)
    pixels = layer.norm(x)[0].flatten(1).T.double()  # [6, 8]
    weight, bias = layer.qkv.weight[:, :, 0, 0].double(), layer.qkv.bias.double()
    q, k, v = (pixels @ weight[8 * i : 8 * i + 8].T + bias[8 * i : 8 * i + 8] for i in range(3))
    rows = []
    for i in range(6):
        scores = [math.exp((q[i] * k[j]).sum().item() / math.sqrt(8)) for j in range(6)]
        rows.append(sum(s / sum(scores) * v[j] for j, s in enumerate(scores)))
    mixed = torch.stack(rows) @ layer.out.weight[:, :, 0, 0].double().T  # [6, 8]
    expected = (x[0].double() + mixed.T.reshape(8, 2, 3)) * math.sqrt(0.5)
    torch.testing.assert_close(layer(x)[0].double(), expected, rtol=1e-4, atol=1e-5)


def slow_group_norm(x, layer):
    """Mean 0 and variance 1 over the pixels of 8 groups of channels, then weight and bias by channel."""
    grouped = x.reshape(len(x), 8, -1)
    grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return grouped.reshape(x.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize(("in_channels", "out_channels"), [(16, 16), (8, 16)])
def test_block_scales_and_shifts_by_the_embedding_and_adds_its_input(in_channels, out_channels):
    """(input + conv(silu(norm(conv(silu(norm(x)))) * (1 + scale) + shift))) / sqrt(2)."""
    torch.manual_seed(3)
    block = UNetBlock(in_channels, out_channels, embedding=6, dropout=0.0, attention=False)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    x, embedding = torch.randn(2, in_channels, 4, 4), torch.randn(2, 6)
    h = slow_group_norm(x, block.norm_0)
    h = F.conv2d(h * torch.sigmoid(h), block.conv_0.weight, block.conv_0.bias, padding=1)
    numbers = embedding @ block.modulate.weight.T + block.modulate.bias
    scale, shift = numbers[:, :out_channels, None, None], numbers[:, out_channels:, None, None]
    h = slow_group_norm(h, block.norm_1) * (1 + scale) + shift
    h = F.conv2d(h * torch.sigmoid(h), block.conv_1.weight, block.conv_1.bias, padding=1)
    skip = x if in_channels == out_channels else F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x, embedding), (skip + h) / math.sqrt(2), rtol=1e-4, atol=1e-5)
