"""Settings of train_diffusion."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat.config import names
from dmat.config.fields import Count, Natural, Positive, Record, Seed, Share, Source, named_in
from dmat.config.measure_images import Measured

_Small = Annotated[int, Field(ge=1, le=64)]  # more would only ask for memory that no machine has


class DenoiserNetwork(Record):
    """Architecture of a denoiser: a name of `diffusion.networks.NETWORKS` or an import path of the project's code.

    Satisfies `diffusion.networks.NetworkSettings`.
    """

    name: Annotated[str, named_in(names.DENOISERS)]
    channels: Annotated[int, Field(ge=8, le=100_000, multiple_of=8)]
    multipliers: Annotated[tuple[_Small, ...], Field(min_length=1, max_length=8, strict=False)]
    blocks: _Small  # residual blocks per resolution
    attention: Annotated[tuple[Count, ...], Field(strict=False)] = ()  # heights in pixels where the blocks attend
    dropout: Annotated[float, Field(ge=0, lt=1)]
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # fraction of the labels that training leaves out

    @pydantic.model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.name == "unet" and self.attention:
            raise ValueError("attention is given; unet attends at its lowest size alone; leave it out")
        if self.name == "unet" and self.label_dropout:
            raise ValueError(f"label_dropout is {self.label_dropout}; unet has none; leave it out")
        return self


class DenoiserTraining(Record):
    """How denoisers are trained. Satisfies `training.denoiser.DenoiserSettings`.

    Satisfies `diffusion.formulations.FormulationSettings` too: sigma_data, p_mean and p_std are those of edm.
    """

    network: DenoiserNetwork
    formulation: Annotated[str, named_in(names.FORMULATIONS, plugins_allowed=False)] = "edm"
    conditional: bool = True  # whether the model learns the labels of the images
    augment_probability: Share = 0.0  # of each transformation of the augmentation pipe
    sigma_data: Positive  # standard deviation of the images in [-1, 1]
    p_mean: Annotated[float, Field(ge=-100, le=100)] = -1.2
    p_std: Positive = 1.2
    images_seen: Count  # length of the run
    batch: Count
    learning_rate: Positive
    ramp_up: Annotated[float, Field(gt=0, lt=1)]  # share of the run
    learning_rate_decay: Literal["cosine", "none"] = "cosine"  # after the ramp-up
    accumulation_steps: Count = 1  # parts of a batch that a process computes one after the other
    ema_half_life: Positive  # images
    log_every: Count  # images
    snapshot_every: Natural = 0  # images between two judged snapshots of the EMA weights; 0: none, the last are taken
    snapshot_images: Measured = 1000  # generated to judge a snapshot
    seed: Seed

    @pydantic.model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.network.label_dropout and not self.conditional:
            raise ValueError(
                f"network.label_dropout is {self.network.label_dropout}; a model that is not conditional has no labels "
                f"to leave out; expected 0, or conditional: true"
            )
        for name in ("p_mean", "p_std"):
            default = DenoiserTraining.model_fields[name].default
            if self.formulation != "edm" and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the formulation {self.formulation} has its own noise levels in "
                    f"training; leave it out, or write {default} where the section gives another"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _network_fits(self) -> Self:
        if self.network.name == "unet" and self.formulation != "edm":
            raise ValueError(
                f"formulation is {self.formulation!r}; unet embeds noise levels as EDM gives them; expected edm, or "
                f"another network"
            )
        return self


class Generator(DenoiserTraining):
    """One diffusion model. source: `none`, to train it, or the file of its published weights."""

    source: Source


class PublishedGenerator(Record):
    """A diffusion model that is imported: no setting of a training has an effect on it."""

    source: Source
