"""Vision transformer for small images, after the ViT-B/2 of Wu et al. 2025 ("Vision Transformers Beat WideResNets").

Published is that it is ViT-B/2: patches of 2 x 2 pixels, and the size of ViT-B (Dosovitskiy et al. 2021): 12 blocks,
768 channels, 12 heads, three times fewer parameters than WRN-70-16. Code and weights are not published. All else is
assumed here, after Beyer et al. 2022 ("Better plain ViT baselines"): fixed sine-cosine positions instead of learned
ones, so one network takes images of any size, and the mean over all patches instead of a class token.

Shapes: B batch, C channels, H height, W width, K classes, T patches (H / 2 * W / 2), F features.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat.errors import DmatError
from dmat.robust.classifier_parts import ACTIVATIONS, Classifier, DataSpec, Normalise

PATCH = 2  # pixels
HEAD_CHANNELS = 64  # of each attention head, in every size of Dosovitskiy et al. 2021


def vit(data_spec: DataSpec, depth: int, width: int, activation: str) -> "VisionTransformer":
    """Builds a ViT of `depth` blocks with `width` heads of 64 channels: ViT-B is depth 12, width 12; ViT-S 12, 6.

    activation: of the blocks, a name in `ACTIVATIONS`; `gelu` is that of Dosovitskiy et al. 2021.
    """
    return VisionTransformer(data_spec, depth, width, ACTIVATIONS[activation])


class VisionTransformer(Classifier):
    """Pre-norm transformer over the patches of an image. Height and width of images must be even."""

    def __init__(self, data_spec: DataSpec, depth: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        channels = heads * HEAD_CHANNELS
        self.normalise = Normalise(data_spec.mean, data_spec.std)
        self.patches = nn.Conv2d(data_spec.channels, channels, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.logits = nn.Linear(channels, data_spec.classes)
        self.apply(_initialise)

    def features(self, images: Tensor) -> Tensor:
        """Computes the input of the last layer: images [B, C, H, W] in [0, 1] -> [B, 64 * width]."""
        if images.shape[2] % PATCH or images.shape[3] % PATCH:
            raise DmatError(
                f"vit divides images into patches of {PATCH} x {PATCH} pixels, and these are {images.shape[2]} x "
                f"{images.shape[3]}; expected even height and width; use another network"
            )
        tokens = self.patches(self.normalise(images))  # [B, F, H / 2, W / 2]
        positions = sine_cosine_positions(tokens.shape[2], tokens.shape[3], tokens.shape[1], tokens.device)  # [T, F]
        h = tokens.flatten(2).transpose(1, 2) + positions.to(tokens.dtype)  # [B, T, F]
        return self.norm(self.blocks(h)).mean(1)


class TransformerBlock(nn.Module):
    """Self-attention, then two linear layers per patch, each after a layer norm and with a shortcut.

    [B, T, F] -> [B, T, F].
    """

    def __init__(self, channels: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        self.norm_0 = nn.LayerNorm(channels, eps=1e-6)
        self.attention = SelfAttention(channels, heads)
        self.norm_1 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), activation(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, F] -> [B, T, F]
        h = x + self.attention(self.norm_0(x))
        return h + self.mlp(self.norm_1(h))


class SelfAttention(nn.Module):
    """Multi-head self-attention of Vaswani et al. 2017: softmax(Q K^T / sqrt(64)) V. [B, T, F] -> [B, T, F]."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, F] -> [B, T, F]
        batch, count, channels = x.shape
        parts = self.qkv(x).reshape(batch, count, 3, self.heads, HEAD_CHANNELS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts)  # [B, heads, T, 64]
        return self.out(attended.transpose(1, 2).reshape(batch, count, channels))


def sine_cosine_positions(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Returns fixed positions of a grid [T, F], row by row: T = height * width, F = channels, a multiple of 4.

    A quarter of the channels each: sine and cosine of the column, sine and cosine of the row, at wavelengths from 2 pi
    to 10,000 * 2 pi patches (Vaswani et al. 2017 in two dimensions, as Beyer et al. 2022).
    """
    exponents = torch.arange(channels // 4, device=device) / max(channels // 4 - 1, 1)
    frequencies = torch.exp(-math.log(10_000) * exponents)  # [F / 4]
    row, column = (
        torch.outer(torch.arange(length, device=device).float(), frequencies) for length in (height, width)
    )  # [H, F / 4], [W, F / 4]
    rows = row[:, None].expand(height, width, -1)
    columns = column[None].expand(height, width, -1)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=2).flatten(0, 1)


def _initialise(layer: nn.Module) -> None:
    """Initialises one layer as Beyer et al. 2022: linear layers uniform by fan in and fan out, biases 0."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
