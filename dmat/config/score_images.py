"""Settings of score_images."""

from dmat.config.fields import Count, Record


class ScoreImages(Record):
    """How generated images are scored."""

    batch: Count  # images scored together
