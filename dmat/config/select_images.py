"""Settings of select_images."""

from typing import Annotated

from pydantic import Field

from dmat.config.fields import Name, Record


class SelectImages(Record):
    """How many of the scored images are kept."""

    keep: Annotated[float, Field(gt=0, le=1)]  # best-scored share of each class; 1 keeps everything


class Selection(SelectImages):
    """A selection: the best-scored images of each class of one image set."""

    image_set: Name
