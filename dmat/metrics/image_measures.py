"""Measures of image sets as records: which number, of how many images, by the features of which network."""

import dataclasses
from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np

MEASURES = "measures.json"  # a list of records


class MeasureRecord(TypedDict):
    """A measure as JSON. The last four are None where features, real images or several draws have no part in it."""

    measure: str
    value: float
    images: int  # that were measured, of each draw
    draws: int
    network: str | None  # that made the features
    reference: str | None  # the split that the features were compared with
    references: int | None  # images of it
    spread: float | None  # standard deviation over the draws


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measured number; the fields are those of `MeasureRecord`."""

    measure: str
    value: float
    images: int
    network: str | None = None
    reference: str | None = None
    references: int | None = None
    draws: int = 1
    spread: float | None = None

    @property
    def metric(self) -> str:
        """Its name among metrics: with network and images where features decide it, such as precision_scorer_297."""
        parts = [self.measure, *([self.network, str(self.images)] if self.network else [])]
        return "_".join([*parts, *(["train"] if self.reference == "train" else [])])

    def plain(self) -> MeasureRecord:
        """The measure as JSON."""
        return cast(MeasureRecord, dataclasses.asdict(self))


def over_draws(draws: Sequence[Sequence[Measure]]) -> list[Measure]:
    """The mean of each measure over draws of the same size, and its standard deviation; one draw remains as it is."""
    if len(draws) == 1:
        return list(draws[0])
    return [
        dataclasses.replace(
            measures[0], value=float(np.mean(values)), draws=len(draws), spread=float(np.std(values, ddof=1))
        )
        for measures in zip(*draws, strict=True)
        for values in [[measure.value for measure in measures]]
    ]


def metrics(measures: Sequence[Measure]) -> dict[str, float]:
    """Measures as metrics: name -> value, and name_spread -> standard deviation over draws."""
    values = {measure.metric: measure.value for measure in measures}
    return values | {f"{m.metric}_spread": m.spread for m in measures if m.spread is not None}
