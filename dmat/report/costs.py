"""Cost of an arm: device hours of everything that had to run for it, and the throughput of its training.

Read from provenance, so the hours are those of the runs that wrote these files, interrupted attempts included. Files
that DVC restored count with the hours of the run that wrote them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from dmat.workspace import Provenance

SECONDS = 3600.0  # of an hour
PARTS = {  # part of the cost of an arm -> its stages
    "data": ("prepare_data", "mix_images"),
    "generator": ("train_diffusion",),
    "images": ("train_scorer", "generate_images", "score_images", "select_images", "combine_selections"),
    "training": ("train_robust",),
    "evaluation": ("evaluate_robust",),
}
# `auto_attack.Suite.passes` of the standard suite with 9 targets: forward passes for an image that no attack breaks, an
# input gradient counted as one more. A test compares them; the report would otherwise depend on the code of attacks.
STANDARD_PASSES = 9_721


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one arm.

    hours: stage -> device hours (seconds times processes). What several seeds share counts once.
    training_flops, evaluation_flops: floating-point operations (`dmat.robust.flops`), summed over seeds; those of an
    evaluation are an estimate (`evaluation_passes`). generator_flops, images_flops: of the trainings of its generators
    and of the sampling of its image sets; 0 without any. images_per_second, utilisation: images per second and fraction
    of the device's measured matrix peak (MFU) in training, means over seeds. All six are None where they were not
    counted or measured.
    """

    arm: str
    devices: tuple[str, ...]
    hours: Mapping[str, float]
    images_seen: int  # in training, summed over seeds
    training_flops: float | None
    images_per_second: float | None
    utilisation: float | None
    evaluation_flops: float | None = None
    generator_flops: float | None = None
    images_flops: float | None = None

    @property
    def flops(self) -> dict[str, float | None]:
        """Part of `PARTS` -> operations, for the parts whose operations are counted."""
        return {
            "generator": self.generator_flops,
            "images": self.images_flops,
            "training": self.training_flops,
            "evaluation": self.evaluation_flops,
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Part of `PARTS` -> device seconds."""
        return {part: SECONDS * sum(self.hours.get(stage, 0.0) for stage in stages) for part, stages in PARTS.items()}

    @property
    def total(self) -> float:
        """Device hours of all stages."""
        return sum(self.hours.values())


class CostRecord(TypedDict):
    """The cost of an arm, as comparison.json holds it."""

    seconds: dict[str, float]  # of devices, by part
    flops: dict[str, float | None]  # operations, by part


def record(cost: Cost) -> CostRecord:
    """The cost of an arm in plain values."""
    return {"seconds": {part: round(seconds, 1) for part, seconds in cost.seconds.items()}, "flops": cost.flops}


def evaluation_passes(
    pgd_steps: int, radii: int, robust_share: float | None, suite_passes: int = STANDARD_PASSES
) -> float:
    """Forward passes per test image of an evaluation: PGD on best and last weights and at each radius, AutoAttack.

    robust_share: of the images, which AutoAttack does not break; None without AutoAttack. suite_passes: that it makes
    for each of them. Broken images leave early and are not counted.
    """
    return (2 + radii) * (2 * pgd_steps + 1) + suite_passes * (robust_share or 0.0)


def arm_cost(
    arm: str,
    ancestors: "Sequence[Provenance]",
    images_seen: int,
    training_flops: Sequence[float | None],
    evaluation_flops: Sequence[float | None] = (None,),
    generator_flops: Sequence[float | None] = (None,),
    images_flops: Sequence[float | None] = (None,),
) -> Cost:
    """Returns the cost of an arm.

    ancestors: provenance of every stage instance that the arm's evaluations come from, the evaluations included.
    training_flops, evaluation_flops: of each seed; generator_flops, images_flops: of each generator and image set. None
    where it was not counted.
    """
    hours: dict[str, float] = {}
    for record in ancestors:
        device_hours = float(record["seconds"]) * int(record["compute"].get("processes", 1)) / SECONDS
        hours[record["stage"]] = hours.get(record["stage"], 0.0) + device_hours
    speeds = [record["measured"] for record in ancestors if record["stage"] == "train_robust"]
    return Cost(
        arm,
        tuple(dict.fromkeys(str(record["compute"]["device"]) for record in ancestors)),
        hours,
        images_seen,
        _sum(training_flops),
        _mean([record.get("images_per_second") for record in speeds]),
        _mean([record.get("model_flops_utilisation") for record in speeds]),
        _sum(evaluation_flops),
        _sum(generator_flops),
        _sum(images_flops),
    )


def with_common_peak(costs: Sequence[Cost]) -> list[Cost]:
    """Returns the costs with all utilisations relative to one matrix peak per device, the highest that was measured.

    A training on a busy machine measures a lower peak, so the slower training would seem to use more of it.
    """
    peaks = [_implied_peak(cost) for cost in costs]
    highest_peak = {
        cost.devices: max(
            peak or 0.0 for other, peak in zip(costs, peaks, strict=True) if other.devices == cost.devices
        )
        for cost in costs
    }
    return [
        cost
        if not peak
        else dataclasses.replace(cost, utilisation=(cost.utilisation or 0.0) * peak / highest_peak[cost.devices])
        for cost, peak in zip(costs, peaks, strict=True)
    ]


def _implied_peak(cost: Cost) -> float | None:
    """The matrix peak that the utilisation refers to, in operations per second; None where something was not measured.

    Up to the cost of one image, which is the same for all costs that are compared by it.
    """
    if not cost.utilisation or not cost.images_per_second or not cost.training_flops or not cost.images_seen:
        return None
    return cost.images_per_second * cost.training_flops / cost.images_seen / cost.utilisation


def _sum(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) if len(measured) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
