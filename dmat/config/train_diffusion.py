"""Settings of train_diffusion."""

from typing import Annotated

from pydantic import Field

from dmat.config.fields import Count, Positive, Record, Seed


class Generator(Record):
    """Settings of one diffusion model and its training. Satisfies `training.denoiser.DenoiserSettings`."""

    channels: Annotated[int, Field(ge=8, le=100_000, multiple_of=8)]
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    blocks: Count  # residual blocks per resolution
    dropout: Annotated[float, Field(ge=0, lt=1)]
    sigma_data: Positive  # standard deviation of the images in [-1, 1]
    p_mean: Annotated[float, Field(ge=-100, le=100)] = -1.2
    p_std: Positive = 1.2
    images_seen: Count  # length of the run
    batch: Count
    learning_rate: Positive
    ramp_up: Annotated[float, Field(gt=0, lt=1)]  # share of the run
    ema_half_life: Positive  # images
    log_every: Count  # images
    seed: Seed
