"""Settings of a study, what its trials have in common, and whether every point of its space makes a valid trial."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BeforeValidator, Field

from dmat.config.fields import AnyRecord, Count, Name, Natural, Record, Seed, WrittenNumber
from dmat.config.generate_images import ImageSet
from dmat.config.merging import merge
from dmat.config.messages import names, sentence
from dmat.config.select_images import Selection
from dmat.config.train_robust import Arm, TrainRobust
from dmat.errors import DmatError, UnfitError


class Range(Record):
    """Values of a numeric parameter; whole numbers where the parameter is one."""

    low: Annotated[float, Field(ge=-1e30, le=1e30)]
    high: Annotated[float, Field(ge=-1e30, le=1e30)]
    scale: Literal["linear", "log"] = "linear"

    @pydantic.model_validator(mode="after")
    def _rises(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; expected low below high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low is {self.low} on a log scale; expected above 0, or scale: linear")
        return self

    @property
    def ends(self) -> dict[str, float]:
        """Values that must be possible, under the key that says them."""
        return {"low": self.low, "high": self.high}


class Choices(Record):
    """Values of a parameter that has no order, or of which only some are wanted."""

    choices: Annotated[tuple[bool | int | float | str, ...], Field(min_length=2, strict=False)]

    @pydantic.model_validator(mode="after")
    def _differ(self) -> Self:
        if len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"choices are {list(self.choices)}; expected each once")
        return self

    @property
    def ends(self) -> dict[str, Any]:
        return {f"choices.{k}": value for k, value in enumerate(self.choices)}


def _range_or_choices(value: Any) -> Any:
    """Which of the two is meant: the other one's complaints would only confuse."""
    if isinstance(value, Mapping):
        return (Choices if "choices" in value else Range).model_validate(value)
    return value


Dimension = Annotated[Range | Choices, BeforeValidator(_range_or_choices)]
# What the study itself decides, and what would make trials incomparable.
NOT_IN_A_SPACE = (
    *("images", "images_seen", "evaluate_every", "threat", "selection_steps", "selection_step_size", "patience"),
    *("image_set.generator", "selection.image_set"),
)
IMAGE_SET, SELECTION = "image_set", "selection"  # first part of a name in a space that is no parameter of an arm


def _changed(record: AnyRecord, values: Mapping[str, Any]) -> AnyRecord:
    return type(record).model_validate(merge(record.plain(), values))


class Tune(Record):
    """A study: trials are short runs of train_robust that start from an arm and differ in `space` alone."""

    arm: Name
    trials: Count = 40  # in all
    images_seen: Count  # by a trial, the same for all
    evaluate_every: Count  # images between two reports of validation PGD accuracy
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    startup_trials: Natural = 5  # complete trials before the median prunes
    warmup_images: Natural = 0  # of a trial before it may be pruned
    retries: Annotated[int, Field(ge=0, le=100)] = 2  # of a trial that ends with an unexpected exception
    rerank: Natural = 3  # best trials that AutoAttack on the validation split puts in their final order
    seed: Seed  # of the sampler, and of every trial's training
    overrides: dict[str, Any] = Field(default_factory=dict)  # of the arm, in every trial: what a short run needs
    enqueue: tuple[dict[str, Any], ...] = Field(default=(), strict=False)  # known good points, tried first
    space: Annotated[dict[str, Dimension], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """What a trial computes with. image_set and selection: None for an arm without generated images."""

    arm: Arm
    image_set: ImageSet | None
    selection: Selection | None

    def value_of(self, name: str) -> Any:
        """Of a parameter by its dotted name, as in a file. Raises DmatError for a name that is no single value."""
        first, _, rest = name.partition(".")
        record = {IMAGE_SET: self.image_set, SELECTION: self.selection}.get(first, self.arm)
        if record is None:
            raise DmatError(f"{name} is not known: the arm has no generated images; leave it out")
        found: Any = (record.with_step_sizes() if isinstance(record, TrainRobust) else record).plain()
        for part in (rest if first in (IMAGE_SET, SELECTION) else name).split("."):
            known = sorted(found) if isinstance(found, Mapping) else []
            if part not in known:
                raise DmatError(
                    f"{name} is not known; expected one of {', '.join(known)}" if known else f"{name} is not known"
                )
            found = found[part]
        if isinstance(found, Mapping | list):
            raise DmatError(f"{name} is not a single value; name one below it, with dots")
        return found

    def with_values(self, values: Mapping[str, Any]) -> "TrialSettings":
        """The same with values by dotted name, and with all step sizes. Raises UnfitError."""
        parts: dict[str, dict[str, Any]] = {"": {}, IMAGE_SET: {}, SELECTION: {}}
        for name, value in values.items():
            first, _, rest = name.partition(".")
            part, path = (first, rest) if first in (IMAGE_SET, SELECTION) else ("", name)
            *above, last = path.split(".")
            place = parts[part]
            for key in above:
                place = place.setdefault(key, {})
            place[last] = value
        try:
            return TrialSettings(
                _changed(self.arm, parts[""]).with_step_sizes(),
                self.image_set and _changed(self.image_set, parts[IMAGE_SET]),
                self.selection and _changed(self.selection, parts[SELECTION]),
            )
        except pydantic.ValidationError as error:
            said = [sentence("trial", item, TrainRobust) for item in error.errors()]
            raise UnfitError("; ".join(said)) from None

    def plain(self) -> dict[str, Any]:
        """JSON values; the arm's own at the top, as in a space."""
        found = self.arm.plain()
        if self.image_set is not None and self.selection is not None:
            found |= {IMAGE_SET: self.image_set.plain(), SELECTION: self.selection.plain()}
        return found


def study_problems(study: Tune, trial: TrialSettings) -> Iterator[str]:
    """Every end of the space, taken alone, must make a valid trial."""
    if trial.arm.selection_steps == 0:
        yield f"arms.{study.arm} has selection_steps 0; expected some, as trials are compared by PGD accuracy"
    if study.evaluate_every > study.images_seen:
        yield (
            f"tune.evaluate_every is {study.evaluate_every} and tune.images_seen {study.images_seen}; expected at "
            f"least one report in a trial"
        )
    for name, wanted in study.space.items():
        where = f"tune.space.{name}"
        if name in NOT_IN_A_SPACE or name.partition(".")[0] in NOT_IN_A_SPACE:
            yield f"{where} cannot be chosen by a study: its trials could not be compared; leave it out"
            continue
        try:
            own = trial.value_of(name)
        except DmatError as error:
            yield f"tune.space.{error}"
            continue
        if isinstance(wanted, Range) and not _is_numeric(own):
            yield f"{where} is {own!r} in arm {study.arm}, which is no number; expected choices, not a range"
            continue
        yield from _share_problems(where, study, trial, wanted) if name == "generated_share" else ()
        for key, value in wanted.ends.items():
            if isinstance(wanted, Range) and type(own) is int and value != int(value):
                yield f"{where}.{key} is {value}; expected a whole number, as {name} is one"
                continue
            try:
                trial.with_values({name: int(value) if type(own) is int and isinstance(wanted, Range) else value})
            except UnfitError as error:
                yield f"{where}.{key} is {value}; {str(error).partition('; ')[2] or error}"
    for k, point in enumerate(study.enqueue):
        yield from _point_problems(f"tune.enqueue.{k}", study, trial, point)
    if (trial.selection is None) != (trial.arm.generated_share == 0):
        yield (
            f"tune.overrides makes generated_share {trial.arm.generated_share} of arm {study.arm}; expected a share "
            f"above 0 exactly where the arm has generated images"
        )


def _share_problems(where: str, study: Tune, trial: TrialSettings, wanted: Range | Choices) -> Iterator[str]:
    if trial.selection is None:
        yield f"tune.space has generated_share and arm {study.arm} has no generated images; leave it out"
        return
    drawn = trial.arm.batch // trial.arm.cutmix_copies
    shares = [value for value in wanted.ends.values() if _is_numeric(value)]
    counts = [round(drawn * share) for share in shares]
    if shares and (min(counts) < 1 or max(counts) > drawn - 1):
        yield (
            f"{where} goes from {min(shares)} to {max(shares)}, {min(counts)} to {max(counts)} of a batch of "
            f"{drawn} images; expected at least one generated and one real image"
        )


def _point_problems(where: str, study: Tune, trial: TrialSettings, point: Mapping[str, Any]) -> Iterator[str]:
    """A point names some of the space; the others are the arm's own."""
    for name, value in point.items():
        wanted = study.space.get(name)
        if wanted is None:
            yield f"{where}.{name} is not in the space; expected some of {names(study.space)}"
        elif isinstance(wanted, Choices) and not any(
            value == choice and type(value) is type(choice) for choice in wanted.choices
        ):
            yield f"{where}.{name} is {value!r}; expected one of {', '.join(map(str, wanted.choices))}"
        elif isinstance(wanted, Range) and (
            type(value) not in (int, float)
            or not wanted.low <= value <= wanted.high
            or (_is_whole(trial, name) and value != int(value))
        ):
            kind = "whole number" if _is_whole(trial, name) else "number"
            yield f"{where}.{name} is {value!r}; expected a {kind} from {wanted.low} to {wanted.high}"
    for name, wanted in study.space.items():
        if name not in point and isinstance(wanted, Range) and not _own_is_inside(trial, name, wanted):
            yield f"{where} leaves out {name}, and the arm's lies outside the space; name it in the point"


def _is_whole(trial: TrialSettings, name: str) -> bool:
    try:
        return type(trial.value_of(name)) is int
    except DmatError:  # told elsewhere
        return False


def _own_is_inside(trial: TrialSettings, name: str, wanted: Range) -> bool:
    try:
        return wanted.low <= float(WrittenNumber(trial.value_of(name))) <= wanted.high
    except (DmatError, ValueError):  # told elsewhere
        return True


def _is_numeric(value: Any) -> bool:
    """A number, or a fraction as people write it."""
    try:
        WrittenNumber(value)
    except ValueError:
        return False
    return True
