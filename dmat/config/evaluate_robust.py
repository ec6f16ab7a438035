"""Settings of evaluate_robust."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from dmat.config.fields import NOT_GIVEN, Count, Natural, Positive, Record, Seed, StepSize, named_in
from dmat.robust.step_size import default_step


def _attacks(value: Any) -> Any:
    from dmat.robust.auto_attack import ATTACKS  # late: it loads torch

    if value in ("standard", "none"):
        return value
    if not isinstance(value, list | tuple) or not value or any(name not in ATTACKS for name in value):
        raise ValueError(f"expected 'standard', 'none' or a list of some of {', '.join(ATTACKS)}")
    if len(set(value)) < len(value):
        raise ValueError("expected each attack once")
    return tuple(value)


class EvaluateRobust(Record):
    """Satisfies `evaluation.evaluate.EvaluationSettings`."""

    images: Natural = 0  # the first ones of the test split; 0: all
    pgd_steps: Count = 40
    pgd_step_size: StepSize = NOT_GIVEN
    pgd_loss: Annotated[str, named_in("dmat.robust.attacks", "OBJECTIVES")] = "cw"
    pgd_restarts: Count = 1
    pgd_seed: Seed = 1
    sweep: Annotated[tuple[Positive, ...], Field(strict=False)] = (0.25, 0.5, 0.75, 1.5, 2.0)  # x epsilon
    auto_attack: Annotated[str | tuple[str, ...], BeforeValidator(_attacks)] = "standard"
    auto_attack_seed: Seed = 1
    shard: Count = 250  # images with a seed of their own: the unit of resuming and of sharing
    batch: Count = 250  # images at a time, within a shard
    check_images: Count = 200  # that the checks of the model look at
    check_queries: Count = 1000  # of the black-box attack among the checks

    def pgd_step(self, norm: str, epsilon: float) -> float:
        """In pixels of [0, 1]."""
        return self.pgd_step_size or default_step(norm, epsilon, self.pgd_steps)
