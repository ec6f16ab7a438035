"""Settings of measure_images."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field

from dmat import NONE
from dmat.config.fields import Positive, Record, Seed, Source

# At least as many as have the neighbours that density needs (`quality.FEWEST_IMAGES`); at most as many as have their
# features in memory together, which is what publications take for FID.
Measured = Annotated[int, Field(ge=6, le=50_000)]


class MeasureImages(Record):
    """How generated images are measured."""

    images: Measured  # maximum number of kept images of a draw
    near: Positive  # an image is near another below this fraction of the median distance of real images
    features: Literal["scorer", "inception", "efficientnet_lite0"] = "scorer"  # the network that makes the features
    features_file: Source  # of the weights of inception, below sources/; none for the others
    reference: Literal["validation", "train"] = "validation"  # the real images that features are compared with
    draws: Annotated[int, Field(ge=1, le=100)] = 1  # disjoint samples of the kept images
    seed: Seed = 1  # of the samples

    @pydantic.model_validator(mode="after")
    def _inception_alone_has_a_file(self) -> Self:
        if self.features == "inception" and self.features_file == NONE:
            raise ValueError(
                f"features_file is {NONE!r} and features 'inception'; expected the name of a file of its weights in "
                f"sources/, such as pt_inception-2015-12-05-6726825d.pth"
            )
        if self.features != "inception" and self.features_file != NONE:
            raise ValueError(
                f"features_file is {self.features_file!r} and features {self.features!r}; expected {NONE}, as only "
                f"inception reads a file"
            )
        return self
