"""What an arm cost: everything that had to run for it, in device hours, and what its training did with them.

Read from provenance, so hours are those of the runs that made these files, interrupted attempts included; what DVC
restored counts as it did when it was made.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 3600.0  # of an hour


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one arm. hours: stage -> device hours (seconds times processes), summed over what its seeds share once.

    Of training alone, None where it was not measured: floating-point operations (`dmat.robust.flops`) summed over
    seeds; images a second and the share of the device's measured matrix peak, means over seeds.
    """

    arm: str
    devices: tuple[str, ...]
    hours: Mapping[str, float]
    images_seen: int  # by the trainings of all seeds
    training_flops: float | None
    images_per_second: float | None
    utilisation: float | None

    @property
    def total(self) -> float:
        return sum(self.hours.values())


def of_arm(
    arm: str, ancestors: Sequence[Mapping[str, Any]], images_seen: int, training_flops: Sequence[float | None]
) -> Cost:
    """behind: provenance of every stage instance that the arm's evaluations come from, themselves included."""
    hours: dict[str, float] = {}
    for one in ancestors:
        spent = float(one["seconds"]) * int(one["compute"].get("processes", 1)) / SECONDS
        hours[one["stage"]] = hours.get(one["stage"], 0.0) + spent
    trained = [one["measured"] for one in ancestors if one["stage"] == "train_robust"]
    return Cost(
        arm,
        tuple(dict.fromkeys(str(one["compute"]["device"]) for one in ancestors)),
        hours,
        images_seen,
        None if None in training_flops else sum(value for value in training_flops if value is not None),
        _mean([one.get("images_per_second") for one in trained]),
        _mean([one.get("model_flops_utilisation") for one in trained]),
    )


def one_peak(costs: Sequence[Cost]) -> list[Cost]:
    """The same with utilisations of one matrix peak for each device, the highest that any of its trainings measured: a
    busy machine measures a lower one, and the slower training would seem to use more of it."""
    implied = [_implied_peak(cost) for cost in costs]
    highest = {
        cost.devices: max(
            peak or 0.0 for other, peak in zip(costs, implied, strict=True) if other.devices == cost.devices
        )
        for cost in costs
    }
    return [
        cost
        if not peak
        else dataclasses.replace(cost, utilisation=(cost.utilisation or 0.0) * peak / highest[cost.devices])
        for cost, peak in zip(costs, implied, strict=True)
    ]


def _implied_peak(cost: Cost) -> float | None:
    """In operations a second, up to what an image costs, which is the same for all that are compared by it."""
    if not cost.utilisation or not cost.images_per_second or not cost.training_flops or not cost.images_seen:
        return None
    return cost.images_per_second * cost.training_flops / cost.images_seen / cost.utilisation


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
