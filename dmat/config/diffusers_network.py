"""Denoisers in the format of the library diffusers, as sidecars describe them. No params.yaml has these records."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat.config import names
from dmat.config.fields import Positive, Record, named_in

_Width = Annotated[int, Field(ge=1, le=100_000)]
_Number = Annotated[int, Field(ge=1, le=64)]  # more would only ask for memory that no machine has


class DiffusersNetwork(Record):
    """Architecture of a `UNet2DModel`, in its own words. Satisfies `diffusion.diffusers_unet.DiffusersUNetSettings`.

    No value is a default: sidecars have all of them, and the defaults of diffusers are where its files are read.
    """

    name: Literal["diffusers_unet"]
    block_out_channels: Annotated[tuple[_Width, ...], Field(min_length=1, max_length=8, strict=False)]
    down_block_types: Annotated[tuple[Literal["DownBlock2D", "AttnDownBlock2D"], ...], Field(strict=False)]
    mid_block_type: Literal["UNetMidBlock2D"] | None
    up_block_types: Annotated[tuple[Literal["UpBlock2D", "AttnUpBlock2D"], ...], Field(strict=False)]
    add_attention: bool
    layers_per_block: _Number
    attention_head_dim: _Width | None
    norm_num_groups: _Width
    attn_norm_num_groups: _Width | None
    norm_eps: Positive
    act_fn: Literal["silu", "swish"]  # two names of one function
    resnet_time_scale_shift: Literal["default", "scale_shift"]
    downsample_padding: Annotated[int, Field(ge=0, le=1)]
    downsample_type: Literal["conv", "resnet"]
    upsample_type: Literal["conv", "resnet"]
    mid_block_scale_factor: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    center_input_sample: bool
    time_embedding_dim: _Width | None
    flip_sin_to_cos: bool
    freq_shift: Annotated[float, Field(ge=0, le=1)]

    @pydantic.model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.block_out_channels)
        for name, types in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            if len(types) != levels:
                raise ValueError(f"{name} has {len(types)} entries; expected {levels}, as block_out_channels has")
        return self


class NoiseProcess(Record):
    """The noise process of the formulation ddpm: the fields of `diffusion.formulations.DDPM`."""

    steps: Annotated[int, Field(ge=2, le=100_000)]
    beta_start: Annotated[float, Field(gt=0, lt=1)]
    beta_end: Annotated[float, Field(gt=0, lt=1)]
    beta_schedule: Annotated[str, named_in(names.BETA_SCHEDULES, plugins_allowed=False)]
    prediction_type: Annotated[str, named_in(names.PREDICTION_TYPES, plugins_allowed=False)]

    @pydantic.model_validator(mode="after")
    def _betas_rise(self) -> Self:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start is {self.beta_start} and beta_end {self.beta_end}; expected rising values")
        return self
