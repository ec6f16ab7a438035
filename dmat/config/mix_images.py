"""Settings of mix_images, taken from an arm so that nothing is written twice."""

from typing import Self

from dmat.config.fields import Count, Name, Natural, Record, Share
from dmat.config.train_robust import Arm, Sampling


class MixImages(Record):
    """What an arm trains on. Not a section of params.yaml: `from_arm` takes the values from the arm."""

    images: Name  # the selection
    generated_share: Share
    batch: Count
    images_seen: Count  # by the whole training
    generated_sampling: Sampling
    copies: Count  # of each drawn image in a batch
    reshuffle_steps: Natural  # training steps after which real images are reshuffled; 0: after all were seen

    @classmethod
    def from_arm(cls, arm: Arm) -> Self:
        """The settings of an arm's mix."""
        return cls(
            images=arm.images,
            generated_share=arm.generated_share,
            batch=arm.batch,
            images_seen=arm.images_seen,
            generated_sampling=arm.generated_sampling,
            copies=arm.copies,
            reshuffle_steps=-(-arm.schedule_every // arm.batch) if arm.real_sampling == "reshuffled" else 0,
        )
