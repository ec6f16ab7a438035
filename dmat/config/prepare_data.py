"""Settings of prepare_data."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import pydantic
from pydantic import BeforeValidator, Field

from dmat import NONE
from dmat.config import names
from dmat.config.fields import Count, Positive, Record, Seed, Share, named_in, source_problem
from dmat.data.data_sets import NORMALISATIONS


class Normalisation(Record):
    """What every network subtracts from each channel of the images in [0, 1], and what it divides by."""

    mean: Annotated[tuple[Share, ...], Field(min_length=1, strict=False)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]


def _normalisation(value: object) -> object:
    """Validates the form that is meant, because errors of the other one would only confuse."""
    if isinstance(value, Mapping):
        return Normalisation.model_validate(value)
    if value not in (choices := ("measured", *NORMALISATIONS)):
        raise ValueError(f"expected one of {', '.join(choices)}, or a mapping of mean and std")
    return value


class PrepareData(Record):
    """Where the real images come from and how they are split."""

    source: Annotated[str, named_in(names.SOURCES)]
    path: str  # of a file or folder below sources/; none for digits
    train: Count  # images
    validation: Count
    test: Count
    validation_split: Literal["stratified", "first"] = "stratified"
    normalisation: Annotated[str | Normalisation, BeforeValidator(_normalisation)] = "measured"
    seed: Seed

    @pydantic.model_validator(mode="after")
    def _files_lie_in_sources(self) -> Self:
        if self.source == "digits" and self.path != NONE:
            raise ValueError(f"path is {self.path!r} and source 'digits'; expected path: {NONE}, as it needs no files")
        if self.source in names.SOURCES_WITH_FILES and self.path in ("", ".", NONE):
            raise ValueError(
                f"path is {self.path!r} and source {self.source!r}; expected the name of a file or folder in sources/"
            )
        if self.path != NONE and (problem := source_problem(self.path)):
            raise ValueError(f"path is {self.path!r}; {problem}")
        return self
