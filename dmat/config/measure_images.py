"""Settings of measure_images."""

from dmat.config.fields import Count, Positive, Record


class MeasureImages(Record):
    images: Count  # at most this many kept images are measured
    near: Positive  # an image is near a training image below this share of the median distance of real ones
