"""RaWRN: the wide residual network that Peng et al. 2023 ("Robust Principles", BMVC) derive for adversarial training.

Against a wide residual network of about the same size it has more and narrower blocks in the first two groups and few
in the last, a wider first convolution, and squeeze-excitation at the end of each block. Names and arithmetic are those
of their code and of RobustBench's `robustarch_wide_resnet`, so weights can be exchanged.

Published is RaWRN-70-16 alone: 30, 31 and 10 blocks of 216, 432 and 864 channels after 96 channels, named after the
WRN-70-16 that it replaces. Other sizes scale blocks and channels in proportion, which is an assumption of dmat.

Shapes: B batch, C channels, H height, W width, K classes; H' and W' after a stride.
"""

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from dmat.robust.classifier_parts import ACTIVATIONS, Classifier, DataSpec, Normalise, initialise

_PUBLISHED_BLOCKS = (30, 31, 10)  # of RaWRN-70-16, whose WRN-70-16 has 11 in each group
_SQUEEZE = 0.25  # channels inside squeeze-excitation, as a fraction of those of the block


def ra_wide_resnet(data_spec: DataSpec, depth: int, width: int, activation: str) -> "RaWideResNet":
    """Builds RaWRN-depth-width. depth = 6 n + 4 with n >= 1; activation: a name in `ACTIVATIONS`."""
    return RaWideResNet(data_spec, ra_blocks(depth), ra_channels(width), ACTIVATIONS[activation])


def ra_blocks(depth: int) -> tuple[int, ...]:
    """Returns the number of blocks of each group; as published for depth 70."""
    return tuple(round(blocks * (depth - 4) / 66) for blocks in _PUBLISHED_BLOCKS)


def ra_channels(width: int) -> tuple[int, ...]:
    """Returns the channels after the first convolution and after each group; as published for width 16."""
    return 6 * width, 27 * width // 2, 27 * width, 54 * width


class RaWideResNet(Classifier):
    """blocks: number of each group. channels: after the first convolution and after each group."""

    def __init__(
        self, data_spec: DataSpec, blocks: tuple[int, ...], channels: tuple[int, ...], activation: type[nn.Module]
    ):
        super().__init__()
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.init_conv = nn.Conv2d(data_spec.channels, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(
                RaGroup(*pair, count, stride=1 if k == 0 else 2, activation=activation)
                for k, (pair, count) in enumerate(zip(itertools.pairwise(channels), blocks, strict=True))
            )
        )
        self.batchnorm = nn.BatchNorm2d(channels[-1], momentum=0.01)
        self.relu = activation()
        self.logits = nn.Linear(channels[-1], data_spec.classes)
        self.apply(initialise)

    def features(self, images: Tensor) -> Tensor:
        """Computes the input of the last layer: images [B, C, H, W] in [0, 1] -> [B, 54 * width]."""
        h = self.layer(self.init_conv(self.normalise(images)))  # [B, 54 * width, H', W']
        return self.relu(self.batchnorm(h)).mean((2, 3))


class RaGroup(nn.Module):
    """Blocks of one width; the first block changes width and size. [B, width, H, W] -> [B, out_width, H', W']."""

    def __init__(self, width: int, out_width: int, blocks: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        first = RaBlock(width, out_width, stride, activation)
        self.block = nn.Sequential(first, *(RaBlock(out_width, out_width, 1, activation) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        return self.block(x)


class RaBlock(nn.Module):
    """Two convolutions, each after batch norm and activation, then squeeze-excitation; a 1x1 shortcut as in WRNs.

    width and out_width: channels of input and output. [B, width, H, W] -> [B, out_width, H', W'].
    """

    def __init__(self, width: int, out_width: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(width, momentum=0.01)
        self.relu_0 = activation()
        # Stride 2 pads right and bottom in forward(); stride 1 pads symmetrically inside the convolution.
        self.conv_0 = nn.Conv2d(width, out_width, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_width, momentum=0.01)
        self.relu_1 = activation()
        self.conv_1 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, out_width, 1, stride=stride, bias=False) if width != out_width else None
        self.se = SqueezeExcitation(out_width, max(1, round(_SQUEEZE * out_width)))

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W] -> [B, out_width, H', W']
        active = self.relu_0(self.batchnorm_0(x))
        padded = active if self.conv_0.stride[0] == 1 else F.pad(active, (0, 1, 0, 1))
        h = self.se(self.conv_1(self.relu_1(self.batchnorm_1(self.conv_0(padded)))))
        return h + (x if self.shortcut is None else self.shortcut(active))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in [0, 1] that all channel means decide (Hu et al. 2018). [B, C, H, W] -> the same.

    Two 1x1 convolutions with ReLU between them, whatever the activation of the network, as published.
    """

    def __init__(self, width: int, inner_width: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner_width, 1)
        self.fc2 = nn.Conv2d(inner_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        means = x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        return x * self.fc2(self.fc1(means).relu()).sigmoid()
