"""Settings of train_scorer."""

from typing import Literal, Self

import pydantic

from dmat.config.classifier_training import ClassifierTraining
from dmat.config.fields import Seed


class TrainScorer(ClassifierTraining):
    """Settings of the scorer: an ordinary classifier, trained without attacks."""

    loss: Literal["standard"]
    seed: Seed

    @pydantic.model_validator(mode="after")
    def _is_not_attacked(self) -> Self:
        if self.selection_steps:
            raise ValueError(f"selection_steps is {self.selection_steps}; expected 0, as a scorer has no threat")
        return self
