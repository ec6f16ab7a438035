"""Classifiers: (images in [0, 1]) -> logits. Classes, channels, mean and std come from the data set's facts.

`WideResNet` has the layout and the parameter names of the networks that Gowal et al. 2020 and Wang et al. 2023
published (TensorFlow-style "same" padding for stride 2: right and bottom only), so that weights can be exchanged.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a network must know of its data: number of classes, channels, and each channel's mean and std in [0, 1]."""

    classes: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """What every network is: `features` and a last layer called `logits`, normalisation inside."""

    logits: nn.Linear

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] in [0, 1] -> logits [B, classes]."""
        result: Tensor = self.logits(self.features(images))
        return result

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: [B, F]."""
        raise NotImplementedError


def wide_resnet(data_spec: DataSpec, depth: int, width: int, activation: str) -> "WideResNet":
    """WRN-depth-width. depth = 6 n + 4 with n >= 1."""
    return WideResNet(data_spec, depth, width, ACTIVATIONS[activation])


def wide_resnet_symmetric(data_spec: DataSpec, depth: int, width: int, activation: str) -> "WideResNet":
    """`wide_resnet` with stride 2 padded on all four sides, as the networks of TRADES and Carmon et al. 2019 are."""
    model = wide_resnet(data_spec, depth, width, activation)
    for group in model.layer:
        if isinstance(group, Group) and isinstance(first := group.block[0], WideBlock) and first.conv_0.stride[0] == 2:
            group.block[0] = SymmetricBlock(
                first.conv_0.in_channels, first.conv_0.out_channels, ACTIVATIONS[activation]
            )
    return model


def preact_resnet(data_spec: DataSpec, depth: int, width: int, activation: str) -> "PreActResNet":
    """PreActResNet-18 or -34; width is not used."""
    return PreActResNet(data_spec, PREACT_BLOCKS[depth], ACTIVATIONS[activation])


NETWORKS: dict[str, Callable[[DataSpec, int, int, str], Classifier]] = {
    "wide_resnet": wide_resnet,
    "wide_resnet_symmetric": wide_resnet_symmetric,
    "preact_resnet": preact_resnet,
}


class Normalise(nn.Module):
    """(x - mean) / std by channel. The constants are not part of the state dict, as in the published networks."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class WideResNet(Classifier):
    """Pre-activation wide residual network (Zagoruyko and Komodakis 2016): groups of 16, 32, 64 x width channels."""

    def __init__(self, data_spec: DataSpec, depth: int, width: int, activation: type[nn.Module]):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.init_conv = nn.Conv2d(data_spec.channels, widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(
                Group(widths[k], widths[k + 1], blocks, stride=1 if k == 0 else 2, activation=activation)
                for k in range(3)
            )
        )
        self.batchnorm = nn.BatchNorm2d(widths[3], momentum=0.01)
        self.activation = activation()
        self.logits = nn.Linear(widths[3], data_spec.classes)
        self.apply(_initialise)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: [B, 64 * width]."""
        h = self.layer(self.init_conv(self.normalise(images)))
        return self.activation(self.batchnorm(h)).mean((2, 3))


PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth -> blocks of each group


class PreActResNet(Classifier):
    """Pre-activation residual network (He et al. 2016) as Rebuffi et al. 2021 published it: groups of 64, 128, 256 and
    512 channels, 3x3 shortcuts from the raw input of a block, names as in their files. Their weights start as torch
    initialises its layers, unlike those of their `WideResNet`."""

    def __init__(self, data_spec: DataSpec, blocks: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.conv_2d = nn.Conv2d(data_spec.channels, 64, 3, padding=1, bias=False)
        width = 64
        for group, count in enumerate(blocks):
            wanted = 64 * 2**group
            strides = [1 if group == 0 else 2] + [1] * (count - 1)
            made = [PreActBlock(width if k == 0 else wanted, wanted, strides[k], activation) for k in range(count)]
            setattr(self, f"layer_{group}", nn.Sequential(*made))
            width = wanted
        self.batchnorm = nn.BatchNorm2d(width, momentum=0.01)
        self.relu = activation()
        self.logits = nn.Linear(width, data_spec.classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: [B, 512]."""
        h = self.conv_2d(self.normalise(images))
        for group in range(4):
            h = getattr(self, f"layer_{group}")(h)
        return self.relu(self.batchnorm(h)).mean((2, 3))


class PreActBlock(nn.Module):
    """Two convolutions, each after batch norm and activation; the shortcut sees the input without either."""

    def __init__(self, width: int, wanted: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        inside = 1 if stride == 1 else 0  # stride 2 pads right and bottom in forward()
        self.batchnorm_0 = nn.BatchNorm2d(width, momentum=0.01)
        self.relu_0 = activation()
        self.conv_2d_1 = nn.Conv2d(width, wanted, 3, stride=stride, padding=inside, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(wanted, momentum=0.01)
        self.relu_1 = activation()
        self.conv_2d_2 = nn.Conv2d(wanted, wanted, 3, padding=1, bias=False)
        changes = stride != 1 or width != wanted
        self.shortcut = nn.Conv2d(width, wanted, 3, stride=stride, padding=inside, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu_0(self.batchnorm_0(x))
        h = self.conv_2d_2(self.relu_1(self.batchnorm_1(self.conv_2d_1(self._padded(active)))))
        return h + (x if self.shortcut is None else self.shortcut(self._padded(x)))

    def _padded(self, x: Tensor) -> Tensor:
        return x if self.conv_2d_1.stride[0] == 1 else F.pad(x, (0, 1, 0, 1))


class Group(nn.Module):
    """Blocks of one width; the first one changes width and size."""

    def __init__(self, width: int, wanted: int, blocks: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.block = nn.Sequential(
            *(
                WideBlock(width if k == 0 else wanted, wanted, stride if k == 0 else 1, activation)
                for k in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideBlock(nn.Module):
    """Two convolutions, each after batch norm and activation; a 1x1 shortcut only where the width changes."""

    def __init__(self, width: int, wanted: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(width, momentum=0.01)
        self.activation_0 = activation()
        # Stride 2 pads right and bottom in forward(); stride 1 pads symmetrically inside the convolution.
        self.conv_0 = nn.Conv2d(width, wanted, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(wanted, momentum=0.01)
        self.activation_1 = activation()
        self.conv_1 = nn.Conv2d(wanted, wanted, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, wanted, 1, stride=stride, bias=False) if width != wanted else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation_0(self.batchnorm_0(x))
        padded = active if self.conv_0.stride[0] == 1 else F.pad(active, (0, 1, 0, 1))
        h = self.conv_1(self.activation_1(self.batchnorm_1(self.conv_0(padded))))
        return h + (x if self.shortcut is None else self.shortcut(active))


def _initialise(layer: nn.Module) -> None:
    """Convolutions: normal, std sqrt(2 / (k k out)); linear bias 0 (facts of the published code)."""
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.bias)


class SymmetricBlock(WideBlock):
    """A block of stride 2 that sees one pixel beyond the image on every side; names and sizes are those of `Block`."""

    def __init__(self, width: int, wanted: int, activation: type[nn.Module]):
        super().__init__(width, wanted, 2, activation)
        self.conv_0.padding = (1, 1)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation_0(self.batchnorm_0(x))
        h = self.conv_1(self.activation_1(self.batchnorm_1(self.conv_0(active))))
        return h + (x if self.shortcut is None else self.shortcut(active))
