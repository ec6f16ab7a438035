"""Cost of an arm: device hours of everything that had to run for it, and the throughput of its training.

Read from provenance, so the hours are those of the runs that wrote these files, interrupted attempts included. Files
that DVC restored count with the hours of the run that wrote them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmat.workspace import Provenance

SECONDS = 3600.0  # of an hour


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one arm.

    hours: stage -> device hours (seconds times processes). What several seeds share counts once.
    training_flops: floating-point operations of training (`dmat.robust.flops`), summed over seeds. images_per_second,
    utilisation: images per second and fraction of the device's measured matrix peak (MFU) in training, means over
    seeds. These three are None where they were not measured.
    """

    arm: str
    devices: tuple[str, ...]
    hours: Mapping[str, float]
    images_seen: int  # in training, summed over seeds
    training_flops: float | None
    images_per_second: float | None
    utilisation: float | None

    @property
    def total(self) -> float:
        """Device hours of all stages."""
        return sum(self.hours.values())


def arm_cost(
    arm: str, ancestors: "Sequence[Provenance]", images_seen: int, training_flops: Sequence[float | None]
) -> Cost:
    """Returns the cost of an arm.

    ancestors: provenance of every stage instance that the arm's evaluations come from, the evaluations included.
    training_flops: of each seed; None where it was not measured.
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
        None if None in training_flops else sum(value for value in training_flops if value is not None),
        _mean([record.get("images_per_second") for record in speeds]),
        _mean([record.get("model_flops_utilisation") for record in speeds]),
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


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
