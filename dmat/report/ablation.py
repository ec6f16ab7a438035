"""The quantity that the arms of an ablation vary, from the settings with which each was computed.

Nothing names this quantity in params.yaml: it is the key in which alone the settings of the arms differ. Names of
entries do not count as settings. Arms that differ in several keys have no such quantity, and then no figure is drawn.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from dmat.report.comparison import HEADLINE, ArmMeasure, Comparison

if TYPE_CHECKING:
    from dmat.workspace import Provenance

AMOUNT = "generated images"  # the quantity of arms whose sources or selections differ in size
_STAGES = ("train_diffusion", "generate_images", "select_images", "train_robust")  # whose settings define an arm
_NAMES = ("generate_images.generator", "select_images.image_set", "train_robust.images")  # of entries
_SIZES = {"generate_images.source", "generate_images.images", "select_images.keep"}  # decide how many images there are
_DECADE = 10  # values that span more are drawn on a logarithmic axis
_NEAR = 0.05  # of the axis: ticks nearer to the one before have no text

Lines = dict[str, list[tuple[float, float, float, float]]]  # series -> position, value, low, high of each point
Settings = dict[str, object]  # dotted key -> value
Value = float | str


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What the arms vary, and where they are on its axis.

    key: such as "generate_images.sampler.steps", or `AMOUNT`. values: arm -> value, in the order of the axis. series:
    name -> arms on one line, those with and those without generated images. references: arms that have no value.
    """

    key: str
    values: Mapping[str, Value]
    series: Mapping[str, Sequence[str]]
    references: Sequence[str]

    @property
    def scale(self) -> Literal["linear", "log", "words"]:
        """Of the axis: logarithmic if all numbers are above 0, and the largest is ten times the smallest or more."""
        numbers = [value for value in self.values.values() if not isinstance(value, str)]
        if len(numbers) < len(self.values):
            return "words"
        return "log" if min(numbers) > 0 and max(numbers) >= _DECADE * min(numbers) else "linear"

    @property
    def positions(self) -> dict[str, float]:
        """Arm -> its place on the axis: the value itself, and 0, 1, 2, ... where values are words."""
        words = list(dict.fromkeys(self.values.values()))
        return {arm: float(words.index(v) if isinstance(v, str) else v) for arm, v in self.values.items()}

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Positions and texts of the axis, rising. Texts that would touch the one before are empty."""
        scale = math.log if self.scale == "log" else float
        texts = {position: _text(self.values[arm]) for arm, position in self.positions.items()}
        places = sorted(texts)
        length = scale(places[-1]) - scale(places[0]) or 1.0
        ticks, previous = list[tuple[float, str]](), -math.inf
        for position in places:
            is_clear = scale(position) - previous >= _NEAR * length
            ticks.append((position, texts[position] if is_clear else ""))
            previous = scale(position) if is_clear else previous
        return ticks


def varied(ancestors: "Mapping[str, Sequence[Provenance]]", image_counts: Mapping[str, int]) -> Ablation | None:
    """What the arms vary; None if that is nothing or more than one thing.

    Arms with generated images are compared with each other, and those without. ancestors: arm -> provenance of all
    that its results come from. image_counts: arm -> number of its generated images.
    """
    settings = {arm: _settings(records) for arm, records in ancestors.items()}
    groups = {
        "with generated images": [arm for arm in settings if image_counts[arm]],
        "real images alone": [arm for arm in settings if not image_counts[arm]],
    }
    compared = {name: arms for name, arms in groups.items() if len(arms) > 1}
    different = [_different_keys([settings[arm] for arm in arms]) for arms in compared.values()]
    keys = set[str]().union(*different)
    counts = {arm: float(image_counts[arm]) for arm in groups["with generated images"]}
    sizes_alone = keys <= _SIZES and ("generate_images.source" in keys or len(keys) > 1)
    if sizes_alone and len(set(counts.values())) == len(counts):
        return _ordered(AMOUNT, counts, {"with generated images": list(counts)}, groups["real images alone"])
    if len(keys) != 1 or any(other != keys for other in different):
        return None
    (key,) = keys
    placed = [arm for arms in compared.values() for arm in arms]
    first = settings[placed[0]]
    placed += [
        arm for arm in settings if arm not in placed and _different_keys([first, settings[arm]]) <= {key}
        and key in settings[arm]
    ]  # fmt: skip
    series = {name: [arm for arm in arms if arm in placed] for name, arms in groups.items()}
    values = {arm: _value(settings[arm][key]) for arm in settings if arm in placed}
    if any(isinstance(value, str) for value in values.values()):
        values = {arm: str(value) for arm, value in values.items()}
    return _ordered(key, values, series, [arm for arm in settings if arm not in placed])


def measures(comparison: Comparison) -> tuple[ArmMeasure, ArmMeasure]:
    """The two measures of the figure: clean accuracy, and AutoAttack where every arm has a headline, else PGD."""
    return "best_clean", HEADLINE if all(HEADLINE in values for values in comparison["arms"].values()) else "best_pgd"


def panel(ablation: Ablation, comparison: Comparison, measure: ArmMeasure) -> tuple[Lines, dict[str, float]]:
    """One measure of the figure, as `pictures.ablation` takes it: the points of each series, and the references."""
    arms, positions = comparison["arms"], ablation.positions
    lines = {
        name: [
            (positions[arm], value["value"], value["low"], value["high"])
            for arm in members
            for value in [arms[arm][measure]]
        ]
        for name, members in ablation.series.items()
    }
    return lines, {arm: arms[arm][measure]["value"] for arm in ablation.references}


def _ordered(
    key: str, values: Mapping[str, Value], series: Mapping[str, Sequence[str]], references: Sequence[str]
) -> Ablation:
    """An ablation whose arms are in the order of the axis: numbers rise, words stay as they are."""
    numbers = {arm: value for arm, value in values.items() if not isinstance(value, str)}
    order = sorted(numbers, key=numbers.__getitem__) if len(numbers) == len(values) else list(values)
    sorted_series = {name: sorted(arms, key=order.index) for name, arms in series.items() if arms}
    return Ablation(key, {arm: values[arm] for arm in order}, sorted_series, references)


def _settings(records: "Iterable[Provenance]") -> Settings:
    """All settings of an arm. Where a stage has several instances, such as seeds, a key has all different values."""
    values: dict[str, list[object]] = {}
    for record in records:
        for key, value in _flat(record["stage"], record["settings"]) if record["stage"] in _STAGES else ():
            if key not in _NAMES and value not in values.setdefault(key, []):
                values[key].append(value)
    return {key: all_values[0] if len(all_values) == 1 else all_values for key, all_values in values.items()}


def _flat(key: str, value: object) -> Iterable[tuple[str, object]]:
    """Dotted keys and values below a mapping."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, entry in value.items():
        yield from _flat(f"{key}.{name}", entry)


def _different_keys(settings: Sequence[Settings]) -> set[str]:
    """The keys that all have, with different values. A key that some lack is a default of another version, or of
    another kind of generator."""
    shared = set(settings[0]).intersection(*settings)
    return {key for key in shared if any(other[key] != settings[0][key] for other in settings)}


def _value(value: object) -> Value:
    """A value of the axis: a number, or a word."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return float(value) if isinstance(value, (int, float)) else str(value)


def _text(value: Value) -> str:
    """A tick: 0.05, 512, "20k", "1.5M"."""
    if isinstance(value, str):
        return value
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
