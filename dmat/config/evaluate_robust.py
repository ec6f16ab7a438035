"""Settings of evaluate_robust."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dmat.config import names
from dmat.config.fields import NOT_GIVEN, Count, Natural, Positive, Record, Seed, StepSize, named_in
from dmat.robust.step_size import default_step


def _attacks(value: object) -> object:
    if value in ("standard", "quick", "none"):
        return value
    if not isinstance(value, list | tuple) or not value or any(name not in names.ATTACKS for name in value):
        raise ValueError(f"expected 'standard', 'quick', 'none' or a list of some of {', '.join(names.ATTACKS)}")
    if len(set(value)) < len(value):
        raise ValueError("expected each attack once")
    return tuple(value)


class EvaluateRobust(Record):
    """Settings of the evaluation. Satisfies `evaluation.evaluate.EvaluationSettings`."""

    images: Natural = 0  # number of images, the first of the test split; 0: all
    pgd_steps: Count = 40
    pgd_step_size: StepSize = NOT_GIVEN
    pgd_loss: Annotated[str, named_in(names.OBJECTIVES)] = "cw"
    pgd_restarts: Count = 1
    pgd_seed: Seed = 1
    sweep: Annotated[tuple[Positive, ...], Field(strict=False)] = (0.25, 0.5, 0.75, 1.5, 2.0)  # multiples of epsilon
    auto_attack: Annotated[str | tuple[str, ...], BeforeValidator(_attacks)] = "standard"
    auto_attack_seed: Seed = 1
    auto_attack_code: Literal["dmat", "pyautoattack"] = (
        "dmat"  # which code runs the attacks; both break the same images
    )
    shard: Count = 250  # images of a shard, which has its own seed: the unit of resuming and of sharing work
    batch: Count = 250  # images at a time, within a shard
    check_images: Count = 200  # number of images that the checks of the model use
    check_queries: Count = 1000  # of the black-box attack among the checks

    def pgd_step(self, norm: str, epsilon: float) -> float:
        """The step size of PGD, in pixels of [0, 1]: `pgd_step_size`, or the default of norm, epsilon and steps."""
        return self.pgd_step_size or default_step(norm, epsilon, self.pgd_steps)
