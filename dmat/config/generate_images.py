"""Settings of generate_images and of the sampler."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat import NONE
from dmat.config import names
from dmat.config.fields import Count, Name, Natural, NotNegative, Positive, Record, Seed, Source, named_in


class Sampler(Record):
    """Settings of a sampler. Defaults: Karras et al. 2022, deterministic. Satisfies
    `diffusion.samplers.SamplerSettings`."""

    name: Annotated[str, named_in(names.SAMPLERS)] = "heun"
    steps: Annotated[int, Field(ge=1, le=100_000)] = 18
    sigma_min: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.002
    sigma_max: Annotated[float, Field(ge=1e-6, le=1e6)] = 80.0
    schedule: Literal["edm", "log_snr", "ddpm", "vp", "ve", "iddpm", "searched"] = "edm"
    rho: Annotated[float, Field(ge=0.5, le=1000)] = 7.0  # of the schedule edm
    guidance: Annotated[float, Field(ge=0, le=1000)] = 1.0
    s_churn: NotNegative = 0.0
    s_min: NotNegative = 0.0
    s_max: Positive = 1e9
    s_noise: Positive = 1.0

    @pydantic.model_validator(mode="after")
    def _noise_levels_decrease(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}; expected less than sigma_max, {self.sigma_max}")
        return self

    @pydantic.model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.s_churn and self.name in names.SAMPLERS and self.name not in names.CHURNED:
            raise ValueError(
                f"s_churn is {self.s_churn}; {self.name} has no churn; expected 0, or name: "
                f"{' or '.join(names.CHURNED)}"
            )
        for name in ("s_min", "s_max", "s_noise"):
            if not self.s_churn and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {getattr(self, name)} and s_churn 0, so no noise is added; expected s_churn above "
                    f"0, or no {name}"
                )
        if self.s_churn and self.s_min > self.s_max:
            raise ValueError(f"s_min is {self.s_min}; expected at most s_max, {self.s_max}")
        unused = {"edm": (), "log_snr": ("rho",), "ve": ("rho",), "searched": ("rho",)}
        for name in unused.get(self.schedule, ("rho", "sigma_min", "sigma_max")):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the schedule {self.schedule} has none; leave it out"
                )
        if self.steps > (limit := names.MAX_STEPS.get(self.schedule, self.steps)):
            raise ValueError(
                f"steps is {self.steps}; expected at most {limit} with the schedule {self.schedule}; take fewer"
            )
        return self


class GenerateImages(Record):
    """How the images of all sets are generated."""

    shard: Count  # images per file
    block: Count  # images sampled together; fixed, because sums in another order are rounded differently
    seed: Seed
    sampler: Sampler
    compile: bool = False  # sample with torch.compile: takes a minute once, and rounds otherwise

    @pydantic.model_validator(mode="after")
    def _shards_are_whole_blocks(self) -> Self:
        if self.shard % self.block:
            raise ValueError(
                f"shard is {self.shard} and block {self.block}; expected a multiple of block, so that an image has "
                f"the same bytes in sets of any size"
            )
        return self


class ImageSet(GenerateImages):
    """A set of generated images: the first `images` that its generator makes with this seed and sampler.

    Images of other people are imported from `source` instead; then `generator` is none.
    """

    generator: Name
    source: Source  # an .npz in the format of Wang et al. 2023, or a folder of its parts; none to generate
    images: Count | None = None  # None: all of the source
    # For each class of the data set, the class of the model that generates its images; empty: the same.
    classes: Annotated[tuple[Natural, ...], Field(strict=False)] = ()

    @pydantic.model_validator(mode="after")
    def _generated_or_imported(self) -> Self:
        if self.generator != NONE and self.source != NONE:
            raise ValueError(
                f"generator is {self.generator!r} and source {self.source!r}; expected {NONE} for one of them: images "
                f"are generated or imported"
            )
        if self.source == NONE and self.images is None:
            raise ValueError("images is missing; expected the number of images to generate")
        if self.source != NONE and self.classes:
            raise ValueError(f"classes has no effect, as source {self.source} is imported; leave it out")
        return self


class ImportedImageSet(Record):
    """An image set that is imported: no setting of a generation has an effect on it."""

    source: Source
    images: Count | None  # the first of the source; None: all
    shard: Count
