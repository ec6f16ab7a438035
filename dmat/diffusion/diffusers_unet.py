"""The U-Net of published DDPM models (Ho et al. 2020) in the layout of the library diffusers, its `UNet2DModel`.

Written from the papers and from what that library documents. Names and shapes of parameters equal those of its weights,
so its state dicts load as they are. It is not in `NETWORKS`: dmat loads such networks and does not train them.

Legend: B batch, C channels, H and W height and width, E width of the embedding.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat.diffusion.networks import DenoiserSpec

NAME = "diffusers_unet"  # of this network in sidecars
WITH_ATTENTION = {  # type of a level in a configuration -> whether its residual layers are each followed by attention
    "DownBlock2D": False,
    "AttnDownBlock2D": True,
    "UpBlock2D": False,
    "AttnUpBlock2D": True,
}


class DiffusersUNetSettings(Protocol):
    """The settings, named as in `unet/config.json`; `config.DiffusersNetwork` satisfies this and has the ranges."""

    @property
    def block_out_channels(self) -> Sequence[int]: ...  # channels of each level, the largest images first
    @property
    def down_block_types(self) -> Sequence[str]: ...
    @property
    def mid_block_type(self) -> str | None: ...
    @property
    def up_block_types(self) -> Sequence[str]: ...  # the smallest images first
    @property
    def add_attention(self) -> bool: ...  # in the middle
    @property
    def layers_per_block(self) -> int: ...
    @property
    def attention_head_dim(self) -> int | None: ...  # channels of a head; None: one head
    @property
    def norm_num_groups(self) -> int: ...
    @property
    def attn_norm_num_groups(self) -> int | None: ...  # of the attention in the middle
    @property
    def norm_eps(self) -> float: ...
    @property
    def resnet_time_scale_shift(self) -> str: ...  # "default": the embedding shifts; "scale_shift": it scales too
    @property
    def downsample_padding(self) -> int: ...
    @property
    def downsample_type(self) -> str: ...  # "conv" or "resnet", of levels with attention
    @property
    def upsample_type(self) -> str: ...
    @property
    def mid_block_scale_factor(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def center_input_sample(self) -> bool: ...
    @property
    def time_embedding_dim(self) -> int | None: ...  # None: four times the channels of the first level
    @property
    def flip_sin_to_cos(self) -> bool: ...
    @property
    def freq_shift(self) -> float: ...


class DiffusersUNet(nn.Module):
    """The raw network F of a denoiser with the arithmetic of `UNet2DModel`."""

    def __init__(self, spec: DenoiserSpec, settings: DiffusersUNetSettings):
        """Raises ValueError where the settings do not fit the images or each other."""
        super().__init__()
        channels = [*settings.block_out_channels]
        _expect_fit(spec, settings)
        self.flip_sin_to_cos, self.freq_shift = settings.flip_sin_to_cos, settings.freq_shift
        self.centres_input = settings.center_input_sample
        embedding = settings.time_embedding_dim or 4 * channels[0]
        self.conv_in = nn.Conv2d(spec.channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], embedding)
        self.class_embedding = nn.Embedding(spec.label_dim, embedding) if spec.label_dim else None
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width, skips, last = channels[0], [channels[0]], len(channels) - 1
        for level, (kind, level_width) in enumerate(zip(settings.down_block_types, channels, strict=True)):
            self.down_blocks.append(DownLevel(kind, width, level_width, embedding, settings, level < last))
            width = level_width
            skips += [width] * (settings.layers_per_block + (level < last))
        self.mid_block = MiddleLevel(width, embedding, settings) if settings.mid_block_type else None
        for level, (kind, level_width) in enumerate(zip(settings.up_block_types, reversed(channels), strict=True)):
            used = [skips.pop() for _ in range(settings.layers_per_block + 1)]
            self.up_blocks.append(UpLevel(kind, width, used, level_width, embedding, settings, level < last))
            width = level_width
        self.conv_norm_out = nn.GroupNorm(settings.norm_num_groups, width, settings.norm_eps)
        self.conv_out = nn.Conv2d(width, spec.channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Computes F(x; c_noise, label), [B, C, H, W].

        x [B, C, H, W]; noise [B], the c_noise of each image; labels int64 [B] or None. augment has no effect. Raises
        ValueError for no labels if the network has classes: it never learned to go without.
        """
        sines = sines_and_cosines(noise, self.time_embedding.linear_1.in_features, self.freq_shift)
        if self.flip_sin_to_cos:
            half = sines.shape[1] // 2
            sines = torch.cat([sines[:, half : 2 * half], sines[:, :half], sines[:, 2 * half :]], dim=1)
        embedding = self.time_embedding(sines.to(x.dtype))
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError("this network needs the class of each image; expected labels")
            embedding = embedding + self.class_embedding(labels)
        x = self.conv_in(2 * x - 1 if self.centres_input else x)
        skips = [x]
        for level in self.down_blocks:
            skips += level(skips[-1], embedding)
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], embedding)
        for level in self.up_blocks:
            x = level(x, skips, embedding)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return output


def _expect_fit(spec: DenoiserSpec, settings: DiffusersUNetSettings) -> None:
    levels, channels = len(settings.block_out_channels), settings.block_out_channels[0]
    if spec.augment_dim:
        raise ValueError(f"augment_dim is {spec.augment_dim}; this network takes no augmentation labels")
    if spec.height % 2 ** (levels - 1) or spec.width % 2 ** (levels - 1):
        raise ValueError(f"{levels} levels cannot halve {spec.height}x{spec.width} pixels {levels - 1} times")
    if channels // 2 <= settings.freq_shift:
        raise ValueError(f"freq_shift is {settings.freq_shift}; expected less than half of {channels} channels")


def sines_and_cosines(noise: Tensor, channels: int, freq_shift: float) -> Tensor:
    """Sines, then cosines of the noise at frequencies from 1 down to about 1 / 10,000 (Vaswani et al. 2017), float32.

    noise [B] -> [B, channels]; an odd number of channels ends with a zero. freq_shift 1: the lowest is reached.
    """
    half = channels // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=noise.device) / (half - freq_shift)
    angles = noise.float()[:, None] * exponents.exp()  # [B, channels / 2]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


class TimeEmbedding(nn.Module):
    """Two linear layers on the sines and cosines of c_noise."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, sines: Tensor) -> Tensor:
        """[B, C] -> [B, E]."""
        embedding: Tensor = self.linear_2(F.silu(self.linear_1(sines)))
        return embedding


class ResnetLayer(nn.Module):
    """Two convolutions and a skip path; the embedding acts between them. Optionally twice or half the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        settings: DiffusersUNetSettings,
        *,
        up: bool = False,
        down: bool = False,
        scale: float = 1.0,
    ):
        """scale: of the sum at the end, which is divided by it."""
        super().__init__()
        groups, eps = settings.norm_num_groups, settings.norm_eps
        self.up, self.down, self.scale, self.dropout = up, down, scale, settings.dropout
        self.scales_and_shifts = settings.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels * (2 if self.scales_and_shifts else 1))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C_in, H, W], embedding [B, E] -> [B, C_out, H', W']: the same, twice or half the height and width."""
        residual = self._resized(x)
        x = self.conv1(self._resized(F.silu(self.norm1(x))))
        condition = self.time_emb_proj(F.silu(embedding))[:, :, None, None]  # [B, C_out or 2 C_out, 1, 1]
        if self.scales_and_shifts:
            scale, shift = condition.chunk(2, dim=1)
            x = self.norm2(x) * (1 + scale) + shift
        else:
            x = self.norm2(x + condition)
        x = self.conv2(F.dropout(F.silu(x), self.dropout, self.training))
        return ((residual if self.conv_shortcut is None else self.conv_shortcut(residual)) + x) / self.scale

    def _resized(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H', W']
        if self.up:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x


class AttentionLayer(nn.Module):
    """Self-attention over all positions, and a skip path."""

    def __init__(self, channels: int, head_dim: int | None, groups: int | None, eps: float, scale: float = 1.0):
        """head_dim: channels of a head; None: one head. groups: of its normalisation; None: it has none.

        scale: of the sum at the end, which is divided by it.
        """
        super().__init__()
        if (head_dim or channels) > channels:
            raise ValueError(f"attention_head_dim is {head_dim}; expected at most {channels}, the channels of a level")
        head_width = head_dim or channels
        self.heads, self.scale = channels // head_width, scale
        inner = self.heads * head_width  # fewer channels, if those of a head do not divide them
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        normalised = x if self.group_norm is None else self.group_norm(x)
        positions = normalised.flatten(2).transpose(1, 2)  # [B, H W, C]
        query, key, value = (
            project(positions).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, H W, channels of a head]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # [B, H W, inner]
        return (x + self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)) / self.scale


class DownConv(nn.Module):
    """A convolution of stride 2. padding 0: one row and column of zeros at the bottom and on the right."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.extra = (0, 1, 0, 1) if padding == 0 else (0, 0, 0, 0)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H / 2, W / 2]; the embedding has no effect."""
        output: Tensor = self.conv(F.pad(x, self.extra))
        return output


class UpConv(nn.Module):
    """Each pixel four times, and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2 H, 2 W]; the embedding has no effect."""
        output: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return output


def _attentions(kind: str, width: int, count: int, settings: DiffusersUNetSettings) -> nn.ModuleList:
    """The attention layers of a level of type `kind`; none if it has none."""
    groups, eps = settings.norm_num_groups, settings.norm_eps
    return nn.ModuleList(
        AttentionLayer(width, settings.attention_head_dim, groups, eps) for _ in range(WITH_ATTENTION[kind] * count)
    )


class DownLevel(nn.Module):
    """A level of the encoder: residual layers, and half the size at the end if `halves`."""

    def __init__(
        self, kind: str, width: int, out_width: int, embedding: int, settings: DiffusersUNetSettings, halves: bool
    ):
        super().__init__()
        widths = [width] + [out_width] * (settings.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetLayer(channels, out_width, embedding, settings) for channels in widths)
        self.attentions = _attentions(kind, out_width, settings.layers_per_block, settings)
        self.downsamplers = nn.ModuleList()
        if halves:
            self.downsamplers.append(
                ResnetLayer(out_width, out_width, embedding, settings, down=True)
                if WITH_ATTENTION[kind] and settings.downsample_type == "resnet"
                else DownConv(out_width, settings.downsample_padding)
            )

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """x [B, C_in, H, W], embedding [B, E] -> the outputs of its layers, [B, C_out, H', W'] each, in their order."""
        outputs: list[Tensor] = []
        for number, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            x = self.attentions[number](x) if self.attentions else x
            outputs.append(x)
        return outputs + [downsampler(x, embedding) for downsampler in self.downsamplers]


class MiddleLevel(nn.Module):
    """The level between encoder and decoder: a residual layer, attention if `add_attention`, a residual layer."""

    def __init__(self, width: int, embedding: int, settings: DiffusersUNetSettings):
        super().__init__()
        scale, groups = settings.mid_block_scale_factor, settings.attn_norm_num_groups
        if groups is None and settings.resnet_time_scale_shift == "default":
            groups = settings.norm_num_groups
        self.resnets = nn.ModuleList(ResnetLayer(width, width, embedding, settings, scale=scale) for _ in range(2))
        self.attentions = nn.ModuleList(
            AttentionLayer(width, settings.attention_head_dim, groups, settings.norm_eps, scale)
            for _ in range(settings.add_attention)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C, H, W], embedding [B, E] -> [B, C, H, W]."""
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x)
        output: Tensor = self.resnets[1](x, embedding)
        return output


class UpLevel(nn.Module):
    """A level of the decoder: residual layers that each take an output of the encoder, and twice the size if `doubles`.

    skip_widths: channels of those outputs.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        skip_widths: Sequence[int],
        out_width: int,
        embedding: int,
        settings: DiffusersUNetSettings,
        doubles: bool,
    ):
        super().__init__()
        widths = [width] + [out_width] * (len(skip_widths) - 1)
        self.resnets = nn.ModuleList(
            ResnetLayer(channels + skip, out_width, embedding, settings)
            for channels, skip in zip(widths, skip_widths, strict=True)
        )
        self.attentions = _attentions(kind, out_width, len(skip_widths), settings)
        self.upsamplers = nn.ModuleList()
        if doubles:
            self.upsamplers.append(
                ResnetLayer(out_width, out_width, embedding, settings, up=True)
                if WITH_ATTENTION[kind] and settings.upsample_type == "resnet"
                else UpConv(out_width)
            )

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """x [B, C_in, H, W], embedding [B, E] -> [B, C_out, H', W'].

        skips: outputs of the encoder, [B, C_skip, H, W] each; the last ones are used and removed.
        """
        for number, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
            x = self.attentions[number](x) if self.attentions else x
        for upsampler in self.upsamplers:
            x = upsampler(x, embedding)
        return x
