"""Settings of measure_images."""

from dmat.config.fields import AtLeastTwo, Positive, Record


class MeasureImages(Record):
    """How generated images are measured."""

    images: AtLeastTwo  # maximum number of kept images that are measured
    near: Positive  # an image is near a training image below this fraction of the median distance of real images
