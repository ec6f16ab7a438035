"""A small U-Net F(x; c_noise, class, augmentation): group norm, scale-shift embedding, attention at the lowest size.

A small relative of the "DDPM++" network of Song et al. 2021 as configured in Karras et al. 2022, appendix F.
Shapes: B batch, C channels, H height, W width, E = 4 * channels size of the embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8  # assumed: 4 channels per group at the digits' width of 32; the paper has at least 4 too


class UNet(nn.Module):
    """The raw network F of `Preconditioned`. Height and width must be divisible by 2 ** (len(multipliers) - 1).

    Each multiplier makes a level of `blocks` residual blocks with channels * multiplier channels, at half the height
    and width of the level before. classes and augment_dim may be 0.
    """

    def __init__(
        self,
        image_channels: int,
        classes: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        dropout: float,
        augment_dim: int = 0,
    ):
        super().__init__()
        embedding = 4 * channels
        self.frequencies: Tensor
        self.register_buffer("frequencies", _frequencies(channels), persistent=False)
        self.embed_noise = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.embed_class = nn.Embedding(classes + 1, embedding)  # the last row stands for "no class"
        self.first = nn.Conv2d(image_channels, channels, 3, padding=1)
        widths = [channels * m for m in multipliers]
        self.down, skips, width = nn.ModuleList(), [channels], channels
        for level, out_width in enumerate(widths):
            if level:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(blocks):
                self.down.append(
                    UNetBlock(width, out_width, embedding, dropout, attention=_has_attention(level, widths))
                )
                width = out_width
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                UNetBlock(width, width, embedding, dropout, attention=True),
                UNetBlock(width, width, embedding, dropout, attention=False),
            ]
        )
        self.up = nn.ModuleList()
        for level, out_width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(
                    UNetBlock(
                        width + skips.pop(), out_width, embedding, dropout, attention=_has_attention(level, widths)
                    )
                )
                width = out_width
            if level:
                self.up.append(Upsample(width))
        self.last = nn.Sequential(
            nn.GroupNorm(_GROUPS, width), nn.SiLU(), _zeroed(nn.Conv2d(width, image_channels, 3, padding=1))
        )
        self.embed_augment = nn.Linear(augment_dim, embedding, bias=False) if augment_dim else None

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W], c_noise [B], labels int64 [B] or None, augment [B, augment_dim] or None -> [B, C, H, W]."""
        if labels is None:
            labels = torch.full((len(x),), self.embed_class.num_embeddings - 1, device=x.device)
        angle = c_noise[:, None] * self.frequencies  # [B, channels / 2]
        embedding = self.embed_noise(torch.cat([angle.cos(), angle.sin()], 1)) + self.embed_class(labels)
        if self.embed_augment is not None and augment is not None:
            embedding = embedding + self.embed_augment(augment)
        embedding = F.silu(embedding)  # [B, E]
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            h = layer(h if isinstance(layer, Upsample) else torch.cat([h, skips.pop()], 1), embedding)
        return self.last(h)


def _has_attention(level: int, widths: list[int]) -> bool:
    """Whether the blocks of a level have self-attention: those where images are smallest."""
    return level == len(widths) - 1


class UNetBlock(nn.Module):
    """Residual block with a scale and shift from the embedding, then optional self-attention.

    width and out_width: channels of input and output; embedding: E.
    """

    def __init__(self, width: int, out_width: int, embedding: int, dropout: float, attention: bool):
        super().__init__()
        self.norm_0 = nn.GroupNorm(_GROUPS, width)
        self.conv_0 = nn.Conv2d(width, out_width, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * out_width)
        self.norm_1 = nn.GroupNorm(_GROUPS, out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv_1 = _zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else nn.Identity()
        self.attention = Attention(out_width) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, width, H, W], embedding [B, E] -> [B, out_width, H, W]."""
        h = self.conv_0(F.silu(self.norm_0(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)  # [B, out_width, 1, 1] each
        h = self.dropout(F.silu(self.norm_1(h) * (1 + scale) + shift))
        return self.attention((self.shortcut(x) + self.conv_1(h)) * math.sqrt(0.5))


class Attention(nn.Module):
    """Single-head self-attention over pixels, with a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, 2)  # [B, H W, C] each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return (x + self.out(h)) * math.sqrt(0.5)


class Downsample(nn.Module):
    """Halves height and width with a convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C, H, W], [B, E] unused -> [B, C, H / 2, W / 2]
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour interpolation, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # [B, C, H, W], [B, E] unused -> [B, C, 2 H, 2 W]
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """Sets a layer to zero, so that the network starts near the identity (Ho et al. 2020's code; usual)."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _frequencies(channels: int) -> Tensor:
    """Returns the angular frequencies of the noise embedding, [channels // 2]: geometric from 1 to 100.

    c_noise = ln(sigma) / 4 is small, about -1.6 to 1.1, so frequencies above those of integer time steps are used
    (assumed).
    """
    return torch.logspace(0, 2, channels // 2)
