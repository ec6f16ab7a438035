"""Settings of score_images."""

from dmat.config.fields import Count, Record


class ScoreImages(Record):
    batch: Count  # images scored together
