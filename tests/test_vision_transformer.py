"""The vision transformer has the arithmetic and the size of ViT-B/2, and takes images of any even size.

Oracle: the whole network again, in float64, head by head. Run alone: pytest tests/test_vision_transformer.py
"""

import math

import pytest
import torch
from torch.nn import functional as F

from dmat.errors import DmatError
from dmat.robust import flops
from dmat.robust.networks import DataSpec
from dmat.robust.vision_transformer import sine_cosine_positions, vit

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def network(depth=2, width=2, classes=10):
    torch.manual_seed(0)
    model = vit(DataSpec(classes, 3, MEAN, STD), depth, width, "gelu")
    for parameter in model.parameters():  # as after some training: norms and biases are not 1 and 0
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(("width", "published"), [(12, 86_567_656), (6, 22_050_664), (3, 5_717_416)])
def test_blocks_have_the_size_of_vit_b_s_and_ti(width, published):
    """Dosovitskiy et al. 2021 and Touvron et al. 2021: 86, 22 and 5.7 million with patches of 16, 1,000 classes, a
    class token and learned positions. What is neither patches, head, token nor positions is equal."""
    with torch.device("meta"):
        model = vit(DataSpec(10, 3, MEAN, STD), 12, width, "gelu")
    channels = 64 * width
    ends_here = (2 * 2 * 3 + 1) * channels + 10 * (channels + 1)
    ends_there = (16 * 16 * 3 + 1) * channels + 1000 * (channels + 1) + (1 + 197) * channels
    assert sum(parameter.numel() for parameter in model.parameters()) - ends_here == published - ends_there


def test_vit_b_2_has_a_third_of_the_parameters_of_the_largest_wide_resnet():
    """Wu et al. 2025: "3 times fewer parameters" than WRN-70-16, which has 266,796,506."""
    with torch.device("meta"):
        model = vit(DataSpec(10, 3, MEAN, STD), 12, 12, "gelu")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 85_073_674  # as in docs/models.md
    assert 3 < 266_796_506 / count < 3.2


def slow_logits(state, images, depth, heads):
    """Patch by patch and head by head."""
    x = (images - torch.tensor(MEAN)[:, None, None].double()) / torch.tensor(STD)[:, None, None].double()
    _, _, height, width = x.shape
    channels, tokens = 64 * heads, []
    for i in range(height // 2):
        for j in range(width // 2):
            patch = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            token = patch @ state["patches.weight"].flatten(1).T + state["patches.bias"]
            quarter, position = channels // 4, []
            for function, place in ((math.sin, j), (math.cos, j), (math.sin, i), (math.cos, i)):
                position += [function(place / 10_000 ** (k / (quarter - 1))) for k in range(quarter)]
            tokens.append(token + torch.tensor(position).double())
    h = torch.stack(tokens, 1)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for k in range(depth):
        base = f"blocks.{k}"
        qkv = norm(h, f"{base}.norm_0") @ state[f"{base}.attention.qkv.weight"].T + state[f"{base}.attention.qkv.bias"]
        q, key, v = qkv.chunk(3, dim=-1)
        outputs = []
        for head in range(heads):
            part = slice(64 * head, 64 * head + 64)
            scores = (q[..., part] @ key[..., part].transpose(1, 2) / 8).exp()
            outputs.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
        h = h + torch.cat(outputs, -1) @ state[f"{base}.attention.out.weight"].T + state[f"{base}.attention.out.bias"]
        inner = norm(h, f"{base}.norm_1") @ state[f"{base}.mlp.0.weight"].T + state[f"{base}.mlp.0.bias"]
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        h = h + inner @ state[f"{base}.mlp.2.weight"].T + state[f"{base}.mlp.2.bias"]
    return norm(h, "norm").mean(1) @ state["logits.weight"].T + state["logits.bias"]


@pytest.mark.parametrize(("depth", "width", "size"), [(2, 2, (8, 8)), (1, 3, (4, 10))])
def test_logits_equal_the_network_written_from_its_tensor_names(depth, width, size):
    model, images = network(depth, width), torch.rand(3, 3, *size)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(
        model(images).double(), slow_logits(state, images.double(), depth, width), rtol=1e-4, atol=1e-4
    )
    assert model.features(images).shape == (3, 64 * width)


def test_positions_are_in_no_file_and_differ():
    positions = sine_cosine_positions(16, 16, 192)
    assert positions.shape == (256, 192)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    assert not any("position" in name for name in network().state_dict())
    assert not network().training


def test_the_order_of_patches_matters():
    model, images = network(), torch.rand(2, 3, 8, 8)
    assert (model(images) - model(images.flip(3))).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)])
def test_odd_sizes_are_refused(size):
    with pytest.raises(DmatError, match=rf"of 2 x 2 pixels, and these are {size[0]} x {size[1]}; expected even"):
        network()(torch.rand(2, 3, *size))


def test_linear_layers_start_as_assumed_and_gradients_reach_everything():
    torch.manual_seed(0)
    model = vit(DataSpec(10, 3, MEAN, STD), 2, 2, "gelu")
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(layer.weight.shape)), rel=0.02)
            assert not layer.bias.any()
    F.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8)).backward()
    keys = slice(128, 256)  # a bias of all keys changes no attention
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.clone()
        if name.endswith("qkv.bias"):
            gradient[keys] = 1
        assert gradient.abs().amax() > 0, name


def test_flops_count_the_products_of_attention():
    with torch.device("meta"):
        model = vit(DataSpec(10, 3, MEAN, STD), 12, 12, "gelu")
    tokens, channels = 256, 768
    layers = 12 * channels + 12 * 12 * channels**2  # patches, then qkv, out and two of the MLP in each block
    attention = 12 * 2 * tokens * channels
    assert flops.forward(model, (3, 32, 32)) == 2 * (tokens * (layers + attention) + 10 * channels)
