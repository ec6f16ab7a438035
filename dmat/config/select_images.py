"""Settings of select_images."""

from typing import Annotated, Literal

from pydantic import Field

from dmat.config import names
from dmat.config.fields import Name, NotNegative, Record, named_in


class SelectImages(Record):
    """Which of the scored images are kept."""

    keep: Annotated[float, Field(gt=0, le=1)]  # share of each class; 1 keeps everything
    score: Annotated[str, named_in(names.SCORES, plugins_allowed=False)] = "probability"
    # Images nearer than this to an earlier image of their class are left out first; pixels in [0, 1], 0: none is.
    min_distance: NotNegative = 0.0
    band: Literal["easy", "middle", "hard"] = "easy"  # the images of the highest, middle or lowest scores are kept


class Selection(SelectImages):
    """A selection of the images of one image set."""

    image_set: Name
