"""The networks of Karras et al. 2022 (EDM), written from the papers: DDPM++ and NCSN++ (Song et al. 2021) and ADM
(Dhariwal and Nichol 2021). Names and shapes of parameters and buffers equal those of the published weights.

Legend: B batch, C channels, H and W height and width, E width of the embedding.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResampleConv2d(nn.Module):
    """Convolution with "same" padding, before it a change of size by a fixed filter: up or down by 2, or none.

    kernel 0: the change of size alone. fused: the filter follows the convolution of a downsampling layer, so that
    only one of them pads (NCSN++'s residual branch).
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: Sequence[int] = (1, 1),
        fused: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.fused = up, down, fused
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        row = torch.tensor(taps, dtype=torch.float32)
        plane = torch.outer(row, row)[None, None] / row.sum() ** 2
        self.register_buffer("resample_filter", plane if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> [B, C_out, H', W']: twice, half or the same height and width."""
        padding = self.kernel // 2
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.fused and self.down and weight is not None:
            assert self.resample_filter is not None
            x = F.conv2d(x, weight, bias, padding=padding + _filter_padding(self.resample_filter))
            return self._filtered(x, padding=0)
        if self.up or self.down:
            assert self.resample_filter is not None
            x = self._filtered(x, padding=_filter_padding(self.resample_filter))
        return x if weight is None else F.conv2d(x, weight, bias, padding=padding)

    def _filtered(self, x: Tensor, padding: int) -> Tensor:  # [B, C, H, W] -> [B, C, H', W']
        assert self.resample_filter is not None
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)


def _filter_padding(resample_filter: Tensor) -> int:  # [1, 1, K, K] for K taps
    return (resample_filter.shape[-1] - 1) // 2


class ResidualBlock(nn.Module):
    """Residual block with optional change of size and self-attention (Dhariwal and Nichol 2021, Section 3).

    adaptive_scale: the embedding scales and shifts (ADM) or only shifts (DDPM++) the second normalisation.
    project_resampled: a 1x1 convolution on the skip path where the size changes, not only where the channels do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        adaptive_scale: bool = True,
        project_resampled: bool = False,
        taps: Sequence[int] = (1, 1),
    ):
        super().__init__()
        self.heads, self.skip_scale, self.adaptive_scale = heads, skip_scale, adaptive_scale
        self.dropout = dropout
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = ResampleConv2d(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = nn.Linear(embedding, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = ResampleConv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if project_resampled or in_channels != out_channels else 0
            self.skip = ResampleConv2d(in_channels, out_channels, kernel, up=up, down=down, taps=taps)
        if heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = ResampleConv2d(out_channels, 3 * out_channels, 1)
            self.proj = ResampleConv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, C_in, H, W], embedding [B, E] -> [B, C_out, H', W']."""
        residual = x
        x = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(embedding)[:, :, None, None].to(x.dtype)  # [B, C or 2 C, 1, 1]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + condition))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = (x + (residual if self.skip is None else self.skip(residual))) * self.skip_scale
        return (x + self._attention(x)) * self.skip_scale if self.heads else x

    def _attention(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]. The published order of the channels is [heads, C / heads, (q, k, v)]."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = qkv.permute(3, 0, 1, 4, 2)  # each [B, heads, H W, C / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(2, 3).reshape(batch, channels, height, width))


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels: as many as divide the channels."""
    return nn.GroupNorm(_largest_divisor(channels, min(32, channels // 4)), channels, eps)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most `limit`, or 1."""
    return next((divisor for divisor in range(limit, 1, -1) if number % divisor == 0), 1)


class PositionalEmbedding(nn.Module):
    """Sines and cosines of c_noise at frequencies from 1 down to 1 / 10,000 (Vaswani et al. 2017)."""

    def __init__(self, channels: int, endpoint: bool):
        """endpoint: the lowest frequency is reached (DDPM++), or approached (ADM)."""
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, noise: Tensor) -> Tensor:
        """noise [B] -> [B, channels]: cosines, then sines."""
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=noise.device) / (half - self.endpoint)
        angles = torch.outer(noise.float(), (1 / 10_000) ** exponent).to(noise.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Sines and cosines of c_noise at random frequencies that are kept with the weights (Tancik et al. 2020)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, noise: Tensor) -> Tensor:
        """noise [B] -> [B, channels]: cosines, then sines."""
        angles = torch.outer(noise, 2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class EncoderDecoder(nn.Module):
    """The part that both networks share: `enc` and `dec`, blocks by name in the order in which they run.

    Every block named `..._block<k>` of the decoder takes the output of one layer of the encoder, the last one first.
    """

    def __init__(
        self,
        resolution: int,
        image_channels: int,
        first_width: int,
        widths: Sequence[int],
        blocks: int,
        block: Callable[..., ResidualBlock],
        heads: Callable[[int, str], int],
        residual_taps: Sequence[int] = (),
    ):
        """widths: channels of each level. block(in_channels, out_channels, heads=, up=, down=) creates a block.

        heads(size, name): attention heads of the block of this name at this height and width. residual_taps: filter of
        the second path of the encoder, which adds the downsampled image at each level (NCSN++); empty: no such path.
        """
        super().__init__()
        sizes = [resolution >> level for level in range(len(widths))]
        if resolution % 2 ** (len(widths) - 1):
            raise ValueError(f"{len(widths)} levels cannot halve {resolution} pixels {len(widths) - 1} times")
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{resolution}x{resolution}_conv"] = ResampleConv2d(image_channels, first_width, 3)
        width, residual_width, skips = first_width, image_channels, [first_width]
        for level, (size, level_width) in enumerate(zip(sizes, widths, strict=True)):
            if level:
                self.enc[f"{size}x{size}_down"] = block(width, width, down=True)
                skips.append(width)
                if residual_taps:
                    self.enc[f"{size}x{size}_aux_residual"] = ResampleConv2d(
                        residual_width, width, 3, down=True, taps=residual_taps, fused=True
                    )
                    residual_width = width
            for index in range(blocks):
                name = f"block{index}"
                self.enc[f"{size}x{size}_{name}"] = block(width, level_width, heads=heads(size, f"enc.{name}"))
                width = level_width
                skips.append(width)
        for level, (size, level_width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(width, width, heads=heads(size, "dec.in0"))
                self.dec[f"{size}x{size}_in1"] = block(width, width)
            else:
                self.dec[f"{size}x{size}_up"] = block(width, width, up=True)
            for index in range(blocks + 1):
                name = f"block{index}"
                self.dec[f"{size}x{size}_{name}"] = block(
                    width + skips.pop(), level_width, heads=heads(size, f"dec.{name}")
                )
                width = level_width
        self.out_width = width

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """x [B, C, H, W], embedding [B, E] -> outputs of the layers, [B, C', H', W'] each, in their order."""
        outputs: list[Tensor] = []
        residual = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                residual = (outputs[-1] + layer(residual)) * math.sqrt(0.5)
                outputs[-1] = residual
            else:
                source = outputs[-1] if outputs else x
                outputs.append(layer(source, embedding) if isinstance(layer, ResidualBlock) else layer(source))
        return outputs

    def decode(self, outputs: list[Tensor], embedding: Tensor) -> Tensor:
        """Outputs of `encode`, embedding [B, E] -> [B, out_width, H, W]."""
        x = outputs[-1]
        for name, layer in self.dec.items():
            if isinstance(layer, ResidualBlock):
                x = layer(torch.cat([x, outputs.pop()], dim=1) if "_block" in name else x, embedding)
        return x


class SongUNet(EncoderDecoder):
    """DDPM++ and NCSN++ of Song et al. 2021, as Karras et al. 2022 configure them (Table 7).

    DDPM++: embedding "positional", encoder "standard". NCSN++: "fourier", "residual", noise_multiplier 2 and the filter
    taps (1, 3, 3, 1).
    """

    def __init__(
        self,
        resolution: int,
        image_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding: str = "positional",
        noise_multiplier: int = 1,
        encoder: str = "standard",
        taps: Sequence[int] = (1, 1),
    ):
        """label_dim, augment_dim: numbers per image that describe its class and its augmentation; 0: none.

        attention: heights of the levels whose blocks attend. label_dropout: fraction of labels dropped in training.
        """
        width, noise_width = 4 * channels, channels * noise_multiplier
        block = functools.partial(
            ResidualBlock,
            embedding=width,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            adaptive_scale=False,
            project_resampled=True,
            taps=taps,
        )

        def heads(size: int, name: str) -> int:
            """One head: in the encoder's blocks, the decoder's last block of a level, and its first block of all."""
            return int(name == "dec.in0" or (size in attention and name.startswith(("enc.", f"dec.block{blocks}"))))

        widths = [channels * multiplier for multiplier in multipliers]
        residual_taps = taps if encoder == "residual" else ()
        super().__init__(resolution, image_channels, channels, widths, blocks, block, heads, residual_taps)
        self.label_dropout, self.sines_first = label_dropout, embedding == "positional"
        self.map_noise = (
            PositionalEmbedding(noise_width, endpoint=True) if self.sines_first else FourierEmbedding(noise_width)
        )
        self.map_label = nn.Linear(label_dim, noise_width) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_width, width)
        self.map_layer1 = nn.Linear(width, width)
        self.dec[f"{resolution}x{resolution}_aux_norm"] = group_norm(self.out_width, 1e-6)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = ResampleConv2d(self.out_width, image_channels, 3)
        self._last = f"{resolution}x{resolution}_aux_"
        _initialise_song(self)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Computes F(x; c_noise, label, augmentation), [B, C, H, W].

        x [B, C, H, W]; noise [B], the c_noise of each image; labels int64 [B], or None for no label; augment
        [B, augment_dim] or None.
        """
        embedding = self.map_noise(noise)
        if self.sines_first:
            embedding = torch.cat(embedding.chunk(2, dim=1)[::-1], dim=1)
        if self.map_label is not None:
            classes = self.map_label.in_features
            if labels is None:  # zeros, whose map still has a bias
                one_hot = embedding.new_zeros(len(x), classes)
            else:
                one_hot = drop_labels(F.one_hot(labels, classes).to(embedding), self.label_dropout, self.training)
            embedding = embedding + self.map_label(one_hot * math.sqrt(classes))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
        x = self.decode(self.encode(x, embedding), embedding)
        output: Tensor = self.dec[f"{self._last}conv"](F.silu(self.dec[f"{self._last}norm"](x)))
        return output


class DhariwalUNet(EncoderDecoder):
    """ADM (Dhariwal and Nichol 2021, Table 4), as Karras et al. 2022 configure it (Table 7)."""

    def __init__(
        self,
        resolution: int,
        image_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ):
        """Arguments are those of `SongUNet`. There is a head for every 64 channels, but at least one."""
        width = 4 * channels
        widths = [channels * multiplier for multiplier in multipliers]

        def heads(size: int, name: str) -> int:
            level_width = widths[(resolution // size).bit_length() - 1]
            attending = name == "dec.in0" or size in attention
            return _largest_divisor(level_width, level_width // 64) if attending else 0

        block = functools.partial(ResidualBlock, embedding=width, dropout=dropout)
        super().__init__(resolution, image_channels, widths[0], widths, blocks, block, heads)
        self.label_dropout = label_dropout
        self.map_noise = PositionalEmbedding(channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        self.out_norm = group_norm(self.out_width, 1e-5)
        self.out_conv = ResampleConv2d(self.out_width, image_channels, 3)
        _initialise_adm(self)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Computes F(x; c_noise, label, augmentation), [B, C, H, W]. Arguments are those of `SongUNet.forward`.

        x [B, C, H, W]; noise [B]; labels int64 [B]; augment [B, augment_dim].
        """
        embedding = self.map_noise(noise)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and labels is not None:
            one_hot = F.one_hot(labels, self.map_label.in_features).to(embedding)
            embedding = embedding + self.map_label(drop_labels(one_hot, self.label_dropout, self.training))
        embedding = F.silu(embedding)
        output: Tensor = self.out_conv(F.silu(self.out_norm(self.decode(self.encode(x, embedding), embedding))))
        return output


def drop_labels(labels: Tensor, rate: float, training: bool) -> Tensor:
    """Sets the one-hot labels [B, K] of a random fraction of the images to zero in training. Returns [B, K].

    So the network also learns to denoise without a label (classifier-free guidance, Ho and Salimans 2022).
    """
    if not training or not rate:
        return labels
    return labels * (torch.rand(len(labels), 1, device=labels.device) >= rate).to(labels.dtype)


def _initialise_song(network: SongUNet) -> None:
    """Xavier-uniform weights and zero biases; nearly zero where a residual branch ends (Song et al. 2021)."""
    gains = {"conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | ResampleConv2d) and layer.weight is not None:
            gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
            nn.init.xavier_uniform_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _initialise_adm(network: DhariwalUNet) -> None:
    """torch's own uniform rule; zero where a residual branch ends; labels standard normal (Karras et al.'s setting)."""
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | ResampleConv2d) or layer.weight is None:
            continue
        if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif name == "map_label":
            nn.init.normal_(layer.weight)  # He's rule for one input, as labels are one-hot
        else:
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound)
