"""Settings of a study and of its trials, and the check that every point of its space makes a valid trial."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BeforeValidator, Field

from dmat import NONE
from dmat.config.fields import AnyRecord, Count, Name, Natural, Record, Seed, WrittenNumber
from dmat.config.generate_images import ImageSet
from dmat.config.merging import merge
from dmat.config.messages import name_list, sentence
from dmat.config.select_images import Selection
from dmat.config.train_robust import Arm, TrainRobust
from dmat.errors import DmatError, UnfitError, did_you_mean


class Range(Record):
    """An interval of values of a numeric parameter, both ends included; whole numbers if the parameter is one."""

    low: Annotated[float, Field(ge=-1e30, le=1e30)]
    high: Annotated[float, Field(ge=-1e30, le=1e30)]
    scale: Literal["linear", "log"] = "linear"

    @pydantic.model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; expected low below high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low is {self.low} on a log scale; expected above 0, or scale: linear")
        return self

    @property
    def ends(self) -> dict[str, float]:
        """Key -> value, for the values that must be valid by themselves."""
        return {"low": self.low, "high": self.high}

    def contains(self, value: object) -> bool:
        """Whether a value lies in the interval."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def words(self) -> str:
        """For messages."""
        return f"from {self.low} to {self.high}"


class Choices(Record):
    """A list of values of a parameter: one without an order, or one of which only some values shall be tried."""

    choices: Annotated[tuple[bool | int | float | str, ...], Field(min_length=2, strict=False)]

    @pydantic.model_validator(mode="after")
    def _choices_differ(self) -> Self:
        if len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"choices are {list(self.choices)}; expected each once")
        return self

    @property
    def ends(self) -> dict[str, Any]:
        """Key -> value, for the values that must be valid by themselves: all of them."""
        return {f"choices.{k}": value for k, value in enumerate(self.choices)}

    def contains(self, value: object) -> bool:
        """Whether a value is one of the choices. 1, 1.0 and true are different."""
        return any(value == choice and type(value) is type(choice) for choice in self.choices)

    @property
    def words(self) -> str:
        """For messages."""
        return f"one of {', '.join(map(str, self.choices))}"


def _range_or_choices(value: object) -> object:
    """Validates the record that is meant, because errors of the other one would only confuse."""
    if not isinstance(value, Mapping):
        raise ValueError("expected {low: ..., high: ...}, or {choices: [...]}")
    record = Choices if "choices" in value else Range
    for key in value.keys() - record.model_fields.keys():
        keys = [*Range.model_fields, *Choices.model_fields]
        raise ValueError(f"{key} is not known; expected low, high and scale, or choices{did_you_mean(key, keys)}")
    return record.model_validate(value)


Dimension = Annotated[Range | Choices, BeforeValidator(_range_or_choices)]
# Settings that the study itself decides, and settings that would make trials incomparable.
NOT_IN_A_SPACE = (
    *("images", "images_seen", "evaluate_every", "threat", "selection_steps", "selection_step_size", "patience"),
    *("image_set.generator", "image_set.source", "selection.image_set"),
)
IMAGE_SET, SELECTION = "image_set", "selection"  # first part of names in a space that are not settings of the arm


def _with_changes(record: AnyRecord, values: Mapping[str, object]) -> AnyRecord:
    """The record with values merged in, validated again. Raises pydantic.ValidationError."""
    return type(record).model_validate(merge(record.plain(), values))


class Tune(Record):
    """A study. Its trials are short runs of train_robust that start from the settings of an arm and differ only in
    `space`."""

    arm: Name
    trials: Count = 40  # total
    images_seen: Count  # length of each trial, the same for all
    evaluate_every: Count  # images between two reports of validation PGD accuracy
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    startup_trials: Natural = 5  # complete trials before the median prunes
    warmup_images: Natural = 0  # of a trial before it may be pruned
    retries: Annotated[int, Field(ge=0, le=100)] = 2  # of a trial that ends with an unexpected exception
    rerank: Natural = 3  # number of best trials whose final order AutoAttack on the validation split decides
    seed: Seed  # of the sampler, and of every trial's training
    overrides: dict[str, Any] = Field(default_factory=dict)  # of the arm, in every trial: settings for a short run
    enqueue: tuple[dict[str, Any], ...] = Field(default=(), strict=False)  # known good points, tried first
    space: Annotated[dict[str, Dimension], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """Settings of a trial. image_set, selection: None for an arm without generated images, and one with a mixture."""

    arm: Arm
    image_set: ImageSet | None
    selection: Selection | None

    def value_of(self, name: str) -> float | int | str | None:
        """The value at a dotted name, as in a file. Raises DmatError for an unknown name and one that is not a single
        value."""
        first, _, rest = name.partition(".")
        record = {IMAGE_SET: self.image_set, SELECTION: self.selection}.get(first, self.arm)
        if record is None:
            reason = "has no generated images" if self.arm.images == NONE else "trains on a mixture"
            raise DmatError(f"{name} is not known: the arm {reason}; leave it out")
        value: Any = (record.with_step_sizes() if isinstance(record, TrainRobust) else record).plain()
        path: list[str] = []
        for key in (rest if first in (IMAGE_SET, SELECTION) else name).split("."):
            if not isinstance(value, Mapping):
                raise DmatError(f"{name} is not known, as {'.'.join(path)} is a single value; name that alone")
            if key not in value:
                keys = sorted({*value} - {*NOT_IN_A_SPACE})
                if record is self.arm and not path and self.image_set is not None:
                    keys += [IMAGE_SET, SELECTION]
                raise DmatError(f"{name} is not known; expected one of {', '.join(keys)}{did_you_mean(key, keys)}")
            path.append(key)
            value = value[key]
        if isinstance(value, Mapping | list):
            raise DmatError(f"{name} is not a single value; name one below it, with dots")
        return value

    def with_values(self, values: Mapping[str, object]) -> "TrialSettings":
        """A copy with other values, by dotted name, and with all step sizes. Raises UnfitError if they are not valid
        together."""
        of_arm, of_image_set, of_selection = nested_values(values)
        try:
            return TrialSettings(
                _with_changes(self.arm, of_arm).with_step_sizes(),
                self.image_set and _with_changes(self.image_set, of_image_set),
                self.selection and _with_changes(self.selection, of_selection),
            )
        except pydantic.ValidationError as error:
            sentences = [sentence("trial", error_details, TrainRobust) for error_details in error.errors()]
            raise UnfitError("; ".join(sentences)) from None

    def plain(self) -> dict[str, Any]:
        """JSON values. Settings of the arm are at the top level, as in a space."""
        values = self.arm.plain()
        if self.image_set is not None and self.selection is not None:
            values |= {IMAGE_SET: self.image_set.plain(), SELECTION: self.selection.plain()}
        return values


def nested_values(values: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Values with dotted names as nested mappings: those of the arm, of its image set and of its selection."""
    parts: dict[str, dict[str, Any]] = {"": {}, IMAGE_SET: {}, SELECTION: {}}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        part, path = (first, rest) if first in (IMAGE_SET, SELECTION) else ("", name)
        *parents, last = path.split(".")
        target = parts[part]
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = value
    return parts[""], parts[IMAGE_SET], parts[SELECTION]


def study_problems(study: Tune, trial: TrialSettings) -> Iterator[str]:
    """Sentences about the problems of a study. Each end of the space, tried alone, must make a valid trial."""
    if trial.arm.selection_steps == 0:
        yield f"arms.{study.arm} has selection_steps 0; expected some, as trials are compared by PGD accuracy"
    if study.evaluate_every > study.images_seen:
        yield (
            f"tune.evaluate_every is {study.evaluate_every} and tune.images_seen {study.images_seen}; expected at "
            f"least one report in a trial"
        )
    for name, dimension in study.space.items():
        path = f"tune.space.{name}"
        if name in NOT_IN_A_SPACE or name.partition(".")[0] in NOT_IN_A_SPACE:
            yield f"{path} cannot be chosen by a study: its trials could not be compared; leave it out"
            continue
        if name.startswith(f"{IMAGE_SET}.") and trial.image_set is not None and trial.image_set.source != NONE:
            yield f"{path} has no effect, as the images of arm {study.arm} are imported; leave it out"
            continue
        try:
            arm_value = trial.value_of(name)
        except DmatError as error:
            yield f"tune.space.{error}"
            continue
        if isinstance(dimension, Range) and not _is_numeric(arm_value):
            yield f"{path} is {arm_value!r} in arm {study.arm}, which is not a number; expected choices, not a range"
            continue
        yield from _share_problems(path, study, trial, dimension) if name == "generated_share" else ()
        for key, value in dimension.ends.items():
            if isinstance(dimension, Range) and type(arm_value) is int and value != int(value):
                yield f"{path}.{key} is {value}; expected a whole number, as {name} is one"
                continue
            try:
                trial.with_values(
                    {name: int(value) if type(arm_value) is int and isinstance(dimension, Range) else value}
                )
            except UnfitError as error:
                yield f"{path}.{key} is {value}; {str(error).partition('; ')[2] or error}"
    for k, point in enumerate(study.enqueue):
        yield from _point_problems(f"tune.enqueue.{k}", study, trial, point)
    if (trial.arm.images == NONE) != (trial.arm.generated_share == 0):
        yield (
            f"tune.overrides makes generated_share {trial.arm.generated_share} of arm {study.arm}; expected a share "
            f"above 0 exactly where the arm has generated images"
        )


def _share_problems(path: str, study: Tune, trial: TrialSettings, dimension: Range | Choices) -> Iterator[str]:
    if trial.arm.images == NONE:
        yield f"tune.space has generated_share and arm {study.arm} has no generated images; leave it out"
        return
    drawn_count = trial.arm.batch // trial.arm.copies
    shares = [value for value in dimension.ends.values() if _is_numeric(value)]
    counts = [round(drawn_count * share) for share in shares]
    if shares and (min(counts) < 1 or max(counts) > drawn_count - 1):
        yield (
            f"{path} goes from {min(shares)} to {max(shares)}, {min(counts)} to {max(counts)} of a batch of "
            f"{drawn_count} images; expected at least one generated and one real image"
        )


def _point_problems(path: str, study: Tune, trial: TrialSettings, point: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a point to enqueue. A point has values for some names of the space; the arm has the others."""
    for name, value in point.items():
        dimension = study.space.get(name)
        if dimension is None:
            nearest = did_you_mean(name, study.space)
            yield f"{path}.{name} is not in the space; expected some of {name_list(study.space)}{nearest}"
        elif isinstance(dimension, Choices) and not dimension.contains(value):
            yield f"{path}.{name} is {value!r}; expected {dimension.words}"
        elif isinstance(dimension, Range) and (
            type(value) not in (int, float)
            or not dimension.contains(value)
            or (_is_whole(trial, name) and value != int(value))
        ):
            kind = "whole number" if _is_whole(trial, name) else "number"
            yield f"{path}.{name} is {value!r}; expected a {kind} {dimension.words}"
    for name, dimension in study.space.items():
        if name not in point and (outside := _arm_value_outside(trial, name, dimension)):
            yield f"{path} leaves out {name}, which is {outside}; name it in the point"


def _is_whole(trial: TrialSettings, name: str) -> bool:
    try:
        return type(trial.value_of(name)) is int
    except DmatError:  # reported elsewhere
        return False


def _arm_value_outside(trial: TrialSettings, name: str, dimension: Range | Choices) -> str:
    """The arm's value and the dimension in which it does not lie, for a message; "" if it does."""
    try:
        value = trial.value_of(name)
        number_or_choice = float(WrittenNumber(value)) if isinstance(dimension, Range) else value
    except (DmatError, ValueError):  # reported elsewhere
        return ""
    return "" if dimension.contains(number_or_choice) else f"{value!r} in the arm; expected {dimension.words}"


def _is_numeric(value: object) -> bool:
    """Whether a value is a number, or a fraction such as 8/255."""
    try:
        WrittenNumber(value)
    except ValueError:
        return False
    return True
