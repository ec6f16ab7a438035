"""Classifiers: images [B, C, H, W] in [0, 1] -> logits [B, K]. A `DataSpec` says what a network must know of its data.

`WideResNet` has the layout and the parameter names of the networks that Gowal et al. 2020 and Wang et al. 2023
published (TensorFlow-style "same" padding for stride 2: right and bottom only), so that weights can be exchanged.

Shapes: B batch, C channels, H height, W width, K classes, F features; H' and W' after a stride.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dmat.robust.classifier_parts import ACTIVATIONS, Classifier, DataSpec, Normalise, initialise
from dmat.robust.ra_wide_resnet import ra_wide_resnet
from dmat.robust.vision_transformer import vit

__all__ = ["ACTIVATIONS", "NETWORKS", "PREACT_BLOCKS", "Classifier", "DataSpec", "Normalise"]


def wide_resnet(data_spec: DataSpec, depth: int, width: int, activation: str) -> "WideResNet":
    """Builds WRN-depth-width. depth = 6 n + 4 with n >= 1; activation: a name in `ACTIVATIONS`."""
    return WideResNet(data_spec, depth, width, ACTIVATIONS[activation])


def wide_resnet_symmetric(data_spec: DataSpec, depth: int, width: int, activation: str) -> "WideResNet":
    """Builds a `wide_resnet` that pads all four sides at stride 2, as the networks of TRADES and Carmon et al. 2019."""
    model = wide_resnet(data_spec, depth, width, activation)
    for group in model.layer:
        if isinstance(group, Group) and isinstance(first := group.block[0], WideBlock) and first.conv_0.stride[0] == 2:
            group.block[0] = SymmetricBlock(
                first.conv_0.in_channels, first.conv_0.out_channels, ACTIVATIONS[activation]
            )
    return model


def preact_resnet(data_spec: DataSpec, depth: int, width: int, activation: str) -> "PreActResNet":
    """Builds PreActResNet-18 or -34 (depth 18 or 34); width is not used. activation: a name in `ACTIVATIONS`."""
    return PreActResNet(data_spec, PREACT_BLOCKS[depth], ACTIVATIONS[activation])


NETWORKS: dict[str, Callable[[DataSpec, int, int, str], Classifier]] = {
    "wide_resnet": wide_resnet,
    "wide_resnet_symmetric": wide_resnet_symmetric,
    "preact_resnet": preact_resnet,
    "ra_wide_resnet": ra_wide_resnet,
    "vit": vit,
}


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
        self.apply(initialise)

    def features(self, images: Tensor) -> Tensor:
        """Computes the input of the last layer: images [B, C, H, W] in [0, 1] -> [B, 64 * width]."""
        h = self.layer(self.init_conv(self.normalise(images)))  # [B, 64 * width, H', W']
        return self.activation(self.batchnorm(h)).mean((2, 3))


PREACT_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth -> blocks of each group


class PreActResNet(Classifier):
    """Pre-activation residual network (He et al. 2016) as Rebuffi et al. 2021 published it.

    Groups have 64, 128, 256 and 512 channels. 3x3 shortcuts start at the raw input of a block. Names are those of their
    files. Weights start as torch initialises its layers, unlike those of their `WideResNet`.
    """

    def __init__(self, data_spec: DataSpec, blocks: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.conv_2d = nn.Conv2d(data_spec.channels, 64, 3, padding=1, bias=False)
        width = 64
        for group, count in enumerate(blocks):
            out_width = 64 * 2**group
            strides = [1 if group == 0 else 2] + [1] * (count - 1)
            layers = [
                PreActBlock(width if k == 0 else out_width, out_width, strides[k], activation) for k in range(count)
            ]
            setattr(self, f"layer_{group}", nn.Sequential(*layers))
            width = out_width
        self.batchnorm = nn.BatchNorm2d(width, momentum=0.01)
        self.relu = activation()
        self.logits = nn.Linear(width, data_spec.classes)

    def features(self, images: Tensor) -> Tensor:
        """Computes the input of the last layer: images [B, C, H, W] in [0, 1] -> [B, 512]."""
        h = self.conv_2d(self.normalise(images))  # [B, 64, H, W]
        for group in range(4):
            h = getattr(self, f"layer_{group}")(h)
        return self.relu(self.batchnorm(h)).mean((2, 3))


class PreActBlock(nn.Module):
    """Two convolutions, each after batch norm and activation; the shortcut takes the raw input of the block.

    width and out_width: channels of input and output. [B, width, H, W] -> [B, out_width, H', W'].
    """

    def __init__(self, width: int, out_width: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        pad = 1 if stride == 1 else 0  # stride 2 pads right and bottom in forward()
        self.batchnorm_0 = nn.BatchNorm2d(width, momentum=0.01)
        self.relu_0 = activation()
        self.conv_2d_1 = nn.Conv2d(width, out_width, 3, stride=stride, padding=pad, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_width, momentum=0.01)
        self.relu_1 = activation()
        self.conv_2d_2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        projects = stride != 1 or width != out_width
        self.shortcut = nn.Conv2d(width, out_width, 3, stride=stride, padding=pad, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        active = self.relu_0(self.batchnorm_0(x))
        h = self.conv_2d_2(self.relu_1(self.batchnorm_1(self.conv_2d_1(self._padded(active)))))
        return h + (x if self.shortcut is None else self.shortcut(self._padded(x)))

    def _padded(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same, or [B, C, H + 1, W + 1] before stride 2
        return x if self.conv_2d_1.stride[0] == 1 else F.pad(x, (0, 1, 0, 1))


class Group(nn.Module):
    """Blocks of one width; the first block changes width and size. [B, width, H, W] -> [B, out_width, H', W']."""

    def __init__(self, width: int, out_width: int, blocks: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.block = nn.Sequential(
            *(
                WideBlock(width if k == 0 else out_width, out_width, stride if k == 0 else 1, activation)
                for k in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        return self.block(x)


class WideBlock(nn.Module):
    """Two convolutions, each after batch norm and activation; a 1x1 shortcut only where the width changes.

    width and out_width: channels of input and output. [B, width, H, W] -> [B, out_width, H', W'].
    """

    def __init__(self, width: int, out_width: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(width, momentum=0.01)
        self.activation_0 = activation()
        # Stride 2 pads right and bottom in forward(); stride 1 pads symmetrically inside the convolution.
        self.conv_0 = nn.Conv2d(width, out_width, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_width, momentum=0.01)
        self.activation_1 = activation()
        self.conv_1 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, out_width, 1, stride=stride, bias=False) if width != out_width else None

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        active = self.activation_0(self.batchnorm_0(x))
        padded = active if self.conv_0.stride[0] == 1 else F.pad(active, (0, 1, 0, 1))
        h = self.conv_1(self.activation_1(self.batchnorm_1(self.conv_0(padded))))
        return h + (x if self.shortcut is None else self.shortcut(active))


class SymmetricBlock(WideBlock):
    """A block of stride 2 that pads one pixel on every side; names and sizes are those of `WideBlock`.

    [B, width, H, W] -> [B, out_width, H', W'].
    """

    def __init__(self, width: int, out_width: int, activation: type[nn.Module]):
        super().__init__(width, out_width, 2, activation)
        self.conv_0.padding = (1, 1)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        active = self.activation_0(self.batchnorm_0(x))
        h = self.conv_1(self.activation_1(self.batchnorm_1(self.conv_0(active))))
        return h + (x if self.shortcut is None else self.shortcut(active))
