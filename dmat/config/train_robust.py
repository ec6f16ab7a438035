"""Settings of train_robust, the threat model and the images of an arm."""

from typing import Literal, Self

import pydantic

from dmat.config.classifier_training import ClassifierTraining
from dmat.config.fields import Name, Radius, Record, Share, WrittenNumber
from dmat.robust.step_size import default_step

Sampling = Literal["without_replacement", "with_replacement", "one_pass"]  # of generated images


class Threat(Record):
    """The threat model: perturbations of a norm up to epsilon."""

    norm: Literal["linf", "l2"]
    epsilon: Radius  # pixels in [0, 1], kept as written

    @pydantic.model_validator(mode="after")
    def _pixel_range(self) -> Self:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"epsilon {self.epsilon.text} is larger than the pixel range [0, 1]; "
                f"for {self.epsilon.text} of 255 levels write {self.epsilon.text}/255"
            )
        return self


def step_problem(threat: Threat, step: WrittenNumber) -> str | None:
    """A phrase on a step size larger than epsilon, to follow the name of its key; None for a valid one.

    A step larger than epsilon leaves the ball at once. step: pixels of [0, 1].
    """
    if step <= threat.epsilon:
        return None
    default = "a quarter of epsilon" if threat.norm == "linf" else "2 epsilon / steps"
    return (
        f"is {step.text}, larger than threat.epsilon {threat.epsilon.text}; expected at most epsilon; "
        f"leave it out for {default}"
    )


class TrainRobust(ClassifierTraining):
    """Settings of adversarial training."""

    threat: Threat
    generated_share: Share = 0.0  # of each batch; below 1
    real_sampling: Literal["without_replacement", "reshuffled"] = "without_replacement"
    generated_sampling: Sampling = "without_replacement"

    @pydantic.model_validator(mode="after")
    def _steps_stay_inside(self) -> Self:
        for name in ("attack_step_size", "selection_step_size"):
            if (sentence := step_problem(self.threat, getattr(self, name))) is not None:
                raise ValueError(f"{name} {sentence}")
        return self

    @pydantic.model_validator(mode="after")
    def _batches_have_real_images(self) -> Self:
        if self.generated_share == 1:
            raise ValueError(
                f"generated_share is {self.generated_share}; expected below 1, because every batch has real images"
            )
        return self

    def with_step_sizes(self) -> Self:
        """A copy with defaults for the step sizes that are not given."""
        defaults = {
            f"{name}_size": WrittenNumber(
                default_step(self.threat.norm, self.threat.epsilon, getattr(self, f"{name}s"))
            )
            for name in ("attack_step", "selection_step")
            if not getattr(self, f"{name}_size")
        }
        return self.model_copy(update=defaults)


class Arm(TrainRobust):
    """One of the trainings that are compared. images: the selection that it uses beside the real images, or none."""

    images: Name
