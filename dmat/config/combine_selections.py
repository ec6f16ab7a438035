"""Settings of combine_selections."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat.config.fields import Positive, Record, name_problem
from dmat.data.turns import weights_of


class Mixture(Record):
    """Generated images of several selections, in fixed proportions."""

    of: Annotated[dict[str, Positive], Field(min_length=2)]  # selection -> its share of the generated images
    # "none": every batch has images of all selections; "epoch": one selection after the other, for an epoch each, which
    # is as many training images as there are real ones.
    rotate: Literal["none", "epoch"] = "none"

    @pydantic.model_validator(mode="after")
    def _shares(self) -> Self:
        for name in self.of:
            if problem := name_problem(name):
                raise ValueError(f"of.{name}: {problem}")
        weights_of(list(self.of.values()))
        return self
