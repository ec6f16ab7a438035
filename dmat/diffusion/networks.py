"""The raw networks F of denoisers by name. All have one signature: F(x, c_noise, labels, augment) -> [B, C, H, W].

x [B, C, H, W]; c_noise [B]; labels int64 [B] or None for "no class"; augment float [B, augment_dim] or None.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

from torch import nn

from dmat.diffusion.edm_networks import DhariwalUNet, SongUNet
from dmat.diffusion.unet import UNet


@dataclasses.dataclass(frozen=True)
class DenoiserSpec:
    """What a network must know of its images.

    height, width: pixels. channels: of the image. label_dim: number of classes; 0: the network is unconditional.
    augment_dim: numbers per image that describe its augmentation; 0: none.
    """

    height: int
    width: int
    channels: int
    label_dim: int
    augment_dim: int = 0


class NetworkSettings(Protocol):
    """The settings of a network; `config.DenoiserNetwork` satisfies this and has units and ranges."""

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    dropout: float
    label_dropout: float


def _unet(spec: DenoiserSpec, settings: NetworkSettings) -> nn.Module:
    if settings.attention or settings.label_dropout:
        raise ValueError("unet has attention at its lowest size and no label_dropout; leave both out")
    _expect_halvings(spec, settings)
    return UNet(
        spec.channels,
        spec.label_dim,
        settings.channels,
        settings.multipliers,
        settings.blocks,
        settings.dropout,
        spec.augment_dim,
    )


def _published(network: Callable[..., nn.Module], spec: DenoiserSpec, settings: NetworkSettings) -> nn.Module:
    _expect_halvings(spec, settings)
    if spec.height != spec.width:
        raise ValueError(f"the images have {spec.height}x{spec.width} pixels; this network takes square ones")
    return network(
        spec.height,
        spec.channels,
        spec.label_dim,
        spec.augment_dim,
        channels=settings.channels,
        multipliers=settings.multipliers,
        blocks=settings.blocks,
        attention=settings.attention,
        dropout=settings.dropout,
        label_dropout=settings.label_dropout,
    )


_ncsnpp = functools.partial(SongUNet, embedding="fourier", noise_multiplier=2, encoder="residual", taps=(1, 3, 3, 1))


def _expect_halvings(spec: DenoiserSpec, settings: NetworkSettings) -> None:
    halvings = len(settings.multipliers) - 1
    if spec.height % 2**halvings or spec.width % 2**halvings:
        raise ValueError(
            f"{len(settings.multipliers)} multipliers halve the images {halvings} times, which "
            f"{spec.height}x{spec.width} pixels do not allow; give fewer multipliers"
        )


# Name -> network(spec, settings). Raises ValueError where the settings do not fit the images.
NETWORKS: dict[str, Callable[[DenoiserSpec, NetworkSettings], nn.Module]] = {
    "unet": _unet,
    "ddpmpp": functools.partial(_published, SongUNet),
    "ncsnpp": functools.partial(_published, _ncsnpp),
    "adm": functools.partial(_published, DhariwalUNet),
}
