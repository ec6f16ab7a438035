"""EfficientNet-Lite0, an ImageNet classifier of 4.7 million weights, for features of images (Tan and Le 2019).

Of the Lite variant: no squeeze-and-excitation, ReLU6 as the activation, and a stem and head of fixed width. The weights
were trained in TensorFlow, so a strided convolution pads its input at the right and at the bottom only.
Shapes: B batch, D features, K classes, C channels, H height, W width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 224  # height and width that the network was trained with
FEATURES, CLASSES = 1280, 1000
_STEM = 32
_STAGES = (  # expansion, channels, blocks, stride of the first block, kernel (Tan and Le 2019, Table 1)
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite0(nn.Module):
    """Images [B, 3, 224, 224], pixels (x - 127) / 128 of bytes x, to logits [B, K].

    The order of the weights in its state dict is that of the published file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, _STEM, 3, stride=2)
        channels, blocks = _STEM, list[nn.Module]()
        for expansion, width, repeats, stride, kernel in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(channels, width, expansion, kernel, stride if repeat == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(channels, FEATURES, 1)
        self.logits = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """The pooled features [B, D] of images [B, 3, H, W]."""
        pooled: Tensor = self.head(self.blocks(self.stem(images))).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.logits(self.features(images))
        return logits


class _Block(nn.Module):
    """An inverted residual block: expand, filter each channel, project. [B, C, H, W] to [B, width, H', W']."""

    def __init__(self, channels: int, width: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        inner = channels * expansion
        self.layers = nn.Sequential(
            *([_convolution(channels, inner, 1)] if expansion > 1 else []),
            _convolution(inner, inner, kernel, stride, groups=inner),
            *list(_convolution(inner, width, 1))[:-1],  # no activation
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class _SamePadding(nn.Module):
    """Zeros around [B, C, H, W], so that a convolution gives ceil(H / stride) rows: the odd one at the bottom."""

    def __init__(self, kernel: int, stride: int):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """To [B, C, H', W']."""
        padding = []
        for size in (x.shape[3], x.shape[2]):  # as F.pad orders them
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return F.pad(x, padding)


def _convolution(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU6."""
    return nn.Sequential(
        _SamePadding(kernel, stride),
        nn.Conv2d(channels, width, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(width, eps=1e-3),
        nn.ReLU6(),
    )
