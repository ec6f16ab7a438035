"""`params.yaml` as frozen, validated records: one per stage, with every problem of the file told at once.

The lists (`generators`, `image_sets`, `selections`, `arms`) hold overrides of the section of their stage; a record is
the section with its overrides merged in. Limits stand in the records alone; messages are made from them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import CoreSchema, core_schema

from dmat import ARTIFACTS, yaml_file
from dmat.errors import ConfigError, DmatError, UnfitError
from dmat.robust.step_size import default_step

_NUMBER = r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
_FRACTION = re.compile(rf"(?P<top>{_NUMBER})(/(?P<bottom>{_NUMBER}))?", re.ASCII)
SOURCES_WITH_PATH = ("npz", "cifar10", "cifar100", "folder", "shards")
REAL_ONLY = f"{ARTIFACTS}/prepare_data/train"  # what an arm without generated images names


class Fraction(float):
    """A number that remembers how it was written, so that 8/255 stays 8/255 in every record and log."""

    text: str

    def __new__(cls, value: Any) -> Self:
        """value: a number or text such as "8/255". Raises ValueError."""
        text = str(value).strip()
        parts = None if isinstance(value, bool) else _FRACTION.fullmatch(text)
        if parts is None or (bottom := float(parts["bottom"] or 1)) <= 0:
            raise ValueError("expected a number or a fraction such as 8/255")
        number = float(parts["top"]) / bottom
        made = super().__new__(cls, number)
        made.text = text
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.text)
        )


def _radius(value: Fraction) -> Fraction:
    if not 0 < value < float("inf"):
        raise ValueError("expected a finite number above 0, for example 8/255")
    return value


def _step_size(value: Fraction) -> Fraction:
    return _radius(value) if value else NOT_GIVEN


def _name(value: str) -> str:
    if not value or not all(c.isalnum() or c in "_" for c in value):
        raise ValueError("expected letters, digits and underscores only (it becomes a folder and a stage name)")
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Natural = Annotated[int, Field(ge=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=1e30)]  # single precision ends at 3e38
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Radius = Annotated[Fraction, AfterValidator(_radius)]
NOT_GIVEN = Fraction(0)  # of a StepSize: `default_step` takes its place
StepSize = Annotated[Fraction, AfterValidator(_step_size)]  # pixels in [0, 1]
Name = Annotated[str, AfterValidator(_name)]


class Record(pydantic.BaseModel):
    """Frozen; unknown keys are refused; text is not taken for a number."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """JSON values, fractions as written."""
        return self.model_dump(mode="json")


AnyRecord = TypeVar("AnyRecord", bound=Record)


class Compute(Record):
    """How to compute. Not part of any result's identity, so changing it reruns nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: Annotated[int, Field(ge=0, le=4096)] = 0  # of each process; 0: as many as cores
    processes: Annotated[int, Field(ge=1, le=4096)] = 1  # on this machine, of the trainings of classifiers
    save_every_seconds: Positive = 60.0  # between two checkpoints


class Normalisation(Record):
    """What every network subtracts from each channel of the images, and what it divides by."""

    mean: Annotated[tuple[Share, ...], Field(min_length=1, strict=False)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)]


NORMALISATION = Literal["measured", "cifar10", "cifar100", "svhn", "tinyimagenet"]


def _normalisation(value: Any) -> Any:
    """Which of the two is meant, as the complaints of the other one would only confuse."""
    if isinstance(value, Mapping):
        return Normalisation.model_validate(value)
    if value not in (names := get_args(NORMALISATION)):
        raise ValueError(f"expected one of {', '.join(names)}, or a mapping of mean and std")
    return value


class PrepareData(Record):
    source: Literal["digits", "npz", "cifar10", "cifar100", "folder", "shards"]
    path: str | None = None  # of all but digits
    train: Count  # images
    validation: Count
    test: Count
    validation_split: Literal["stratified", "first"] = "stratified"
    normalisation: Annotated[NORMALISATION | Normalisation, BeforeValidator(_normalisation)] = "measured"
    seed: Seed

    @pydantic.model_validator(mode="after")
    def _files_have_a_path(self) -> Self:
        if self.source == "digits" and self.path is not None:
            raise ValueError(f"source is 'digits' and path is {self.path!r}; expected none: leave it out")
        if self.source in SOURCES_WITH_PATH and not self.path:
            raise ValueError(f"source is {self.source!r} and path is {self.path!r}; expected where its images are")
        return self


class Network(Record):
    name: Literal["wide_resnet", "wide_resnet_symmetric", "preact_resnet"]
    depth: Annotated[int, Field(ge=10, le=10_000)]
    width: Annotated[int, Field(ge=0, le=10_000)] = 0  # not of preact_resnet
    activation: Literal["relu", "silu"]

    @pydantic.model_validator(mode="after")
    def _is_one_of_the_family(self) -> Self:
        if self.name != "preact_resnet" and (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}; expected 6 n + 4, for example 10, 16 or 28")
        if self.name != "preact_resnet" and self.width == 0:
            raise ValueError("width is missing; expected 1 or more, for example 10")
        if self.name == "preact_resnet" and self.depth not in (18, 34):
            raise ValueError(f"depth is {self.depth}; expected 18 or 34 with preact_resnet")
        if self.name == "preact_resnet" and self.width:
            raise ValueError(f"width is {self.width}; preact_resnet has none; leave it out")
        return self


class ClassifierTraining(Record):
    """Satisfies `training.classifier.Settings`. Lengths are in images seen, not steps."""

    network: Network
    loss: Literal["trades", "standard", "pgd_at", "ikl"]
    beta: NotNegative = 0.0
    alpha: NotNegative = 0.0  # of ikl
    temperature: Positive = 4.0  # of ikl: of the predictions that its class means are made of
    label_smoothing: Share = 0.0
    attack_steps: Natural = 0
    attack_step_size: StepSize = NOT_GIVEN
    images: Count
    batch: Count
    learning_rate: Positive  # at the peak
    warm_up: Share = 0.025  # of the run
    start_divisor: Annotated[float, Field(ge=1, le=1e30)] = 25.0  # the rate starts at the peak over this
    end_divisor: Annotated[float, Field(ge=1, le=1e30)] = 1e4  # and ends at the start over this
    schedule_every: Count  # images between two changes of the learning rate
    cycle_momentum: bool = True  # from the highest to the lowest and back, as published; else `momentum`
    momentum: Momentum = 0.9
    momentum_lowest: Momentum = 0.85
    momentum_highest: Momentum = 0.95
    weight_decay: NotNegative = 5e-4
    clip_gradient: NotNegative = 0.0  # 0: off
    average_tau: Share = 0.995
    average_warm_up: Share = 0.025  # of the run, in which the average is a copy
    batch_norm_momentum: Share = 0.01
    first_batch_norm_momentum: Share = 1.0  # of the first step
    synchronise_batch_norm: bool = False  # over all processes; else each has its own statistics, as published
    augmentation: Literal[
        "none",
        "crop1",
        "crop4",
        "crop4_flip",
        "crop4_flip_rotate15",
        "cutout18",
        "autoaugment",
        "autoaugment_pil",
        "randaugment",
        "idbh",
    ]
    cutmix: NotNegative = 0.0  # both parameters of its beta distribution; 0: off
    cutmix_copies: Count = 1  # of each drawn image in a batch, each with a box of its own
    evaluate_every: Count  # images
    selection_steps: Natural  # of PGD on the validation split; 0 selects on clean accuracy
    selection_step_size: StepSize = NOT_GIVEN
    patience: Natural = 0  # evaluations without a new best after which the run ends; 0: never
    on_divergence: Literal["stop", "roll_back"] = "stop"

    @pydantic.model_validator(mode="after")
    def _attacks_are_whole(self) -> Self:
        if self.loss != "standard" and self.attack_steps == 0:
            raise ValueError(
                f"attack_steps is 0 and loss is {self.loss!r}; expected at least 1 step, or loss: standard"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _copies_fill_the_batch(self) -> Self:
        if self.cutmix_copies > 1 and not self.cutmix:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies} and cutmix 0; expected cutmix: 1.0, or 1 copy")
        if self.batch % self.cutmix_copies:
            raise ValueError(f"cutmix_copies is {self.cutmix_copies}; expected a divisor of batch, {self.batch}")
        return self


class TrainScorer(ClassifierTraining):
    loss: Literal["standard"]
    seed: Seed

    @pydantic.model_validator(mode="after")
    def _is_not_attacked(self) -> Self:
        if self.selection_steps:
            raise ValueError(f"selection_steps is {self.selection_steps}; expected 0, as a scorer has no threat")
        return self


class Threat(Record):
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


def step_problem(threat: Threat, step: Fraction) -> str | None:
    """What is wrong with a step that leaves the ball at once; to follow the name of its key."""
    if step <= threat.epsilon:
        return None
    default = "a quarter of epsilon" if threat.norm == "linf" else "2 epsilon / steps"
    return (
        f"is {step.text}, larger than threat.epsilon {threat.epsilon.text}; expected at most epsilon; "
        f"leave it out for {default}"
    )


class TrainRobust(ClassifierTraining):
    threat: Threat
    generated_share: Share = 0.0  # of each batch
    real_sampling: Literal["without_replacement", "reshuffled"] = "without_replacement"
    generated_sampling: Literal["without_replacement", "with_replacement"] = "without_replacement"

    @pydantic.model_validator(mode="after")
    def _steps_stay_inside(self) -> Self:
        for name in ("attack_step_size", "selection_step_size"):
            if (sentence := step_problem(self.threat, getattr(self, name))) is not None:
                raise ValueError(f"{name} {sentence}")
        return self

    def with_step_sizes(self) -> Self:
        """The same, with the step sizes that are not given."""
        found = {
            f"{name}_size": Fraction(default_step(self.threat.norm, self.threat.epsilon, getattr(self, f"{name}s")))
            for name in ("attack_step", "selection_step")
            if not getattr(self, f"{name}_size")
        }
        return self.model_copy(update=found)


class Generator(Record):
    """Satisfies `training.denoiser.Settings`."""

    channels: Annotated[int, Field(ge=8, le=100_000, multiple_of=8)]
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1, strict=False)]
    blocks: Count  # residual blocks per size
    dropout: Annotated[float, Field(ge=0, lt=1)]
    sigma_data: Positive  # standard deviation of the images in [-1, 1]
    p_mean: Annotated[float, Field(ge=-100, le=100)] = -1.2
    p_std: Positive = 1.2
    images: Count
    batch: Count
    learning_rate: Positive
    ramp_up: Annotated[float, Field(gt=0, lt=1)]  # share of the run
    average_half_life: Positive  # images
    log_every: Count  # images
    seed: Seed


class Sampler(Record):
    """Satisfies `diffusion.samplers.SamplerSettings`. Defaults: Karras et al. 2022, deterministic."""

    name: Literal["heun", "euler"] = "heun"
    steps: Count = 18
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    s_churn: NotNegative = 0.0
    s_min: NotNegative = 0.0
    s_max: Positive = 1e9
    s_noise: Positive = 1.0

    @pydantic.model_validator(mode="after")
    def _levels_fall(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}; expected less than sigma_max, {self.sigma_max}")
        return self


class GenerateImages(Record):
    chunk: Count  # images in a chunk
    shard: Count  # images in a file
    block: Count  # images sampled together; fixed, because sums in another order round differently
    seed: Seed
    sampler: Sampler


class ScoreImages(Record):
    batch: Count  # images scored together


class SelectImages(Record):
    keep: Annotated[float, Field(gt=0, le=1)]  # best-scored share of each class; 1 keeps everything


class MeasureImages(Record):
    images: Count  # at most this many kept images are measured
    near: Positive  # an image is near a training image below this share of the median distance of real ones


class MixImages(Record):
    """What an arm trains on; taken from the arm, so that nothing is written twice."""

    images_from: str  # path of a selection, or of the real training images for none
    generated_share: Share
    batch: Count
    images: Count  # training images seen
    with_replacement: bool  # of generated images
    copies: Count  # of each drawn image in a batch
    reshuffle_steps: Natural  # after which real images are shuffled anew; 0: once all were seen

    @classmethod
    def of(cls, arm: TrainRobust, images_from: str) -> Self:
        return cls(
            images_from=images_from,
            generated_share=arm.generated_share,
            batch=arm.batch,
            images=arm.images,
            with_replacement=arm.generated_sampling == "with_replacement",
            copies=arm.cutmix_copies,
            reshuffle_steps=-(-arm.schedule_every // arm.batch) if arm.real_sampling == "reshuffled" else 0,
        )


ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def _attacks(value: Any) -> Any:
    if value in ("standard", "none"):
        return value
    if not isinstance(value, list | tuple) or not value or any(name not in ATTACKS for name in value):
        raise ValueError(f"expected 'standard', 'none' or a list of some of {', '.join(ATTACKS)}")
    if len(set(value)) < len(value):
        raise ValueError("expected each attack once")
    return tuple(value)


class EvaluateRobust(Record):
    """Satisfies `evaluation.evaluate.Settings`."""

    images: Natural = 0  # the first ones of the test split; 0: all
    pgd_steps: Count = 40
    pgd_step_size: StepSize = NOT_GIVEN
    pgd_loss: Literal["ce", "cw", "dlr"] = "cw"
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


class WriteReport(Record):
    title: str
    baseline: Name  # the arm that the others are compared with
    bootstrap: Annotated[int, Field(ge=100, le=10**7)]  # resamples
    seed: Seed


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
NOT_IN_A_SPACE = ("images", "evaluate_every", "threat", "selection_steps", "selection_step_size", "patience")
IMAGE_SET, SELECTION = "image_set", "selection"  # first part of a name in a space that is no parameter of an arm


def _changed(record: AnyRecord, values: Mapping[str, Any]) -> AnyRecord:
    return type(record).model_validate(merge(record.plain(), values))


class Tune(Record):
    """A study: trials are short runs of train_robust that start from an arm and differ in `space` alone."""

    arm: Name
    trials: Count = 40  # in all
    images: Count  # training images that a trial sees, the same for all
    evaluate_every: Count  # images between two reports of validation PGD accuracy
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    startup_trials: Natural = 5  # complete trials before the median prunes
    warm_up_images: Natural = 0  # of a trial before it may be pruned
    retries: Annotated[int, Field(ge=0, le=100)] = 2  # of a trial that ends with an unexpected exception
    rerank: Natural = 3  # best trials that AutoAttack on the validation split puts in their final order
    seed: Seed  # of the sampler, and of every trial's training
    overrides: dict[str, Any] = {}  # of the arm, in every trial: what a short run needs otherwise
    enqueue: tuple[dict[str, Any], ...] = Field(default=(), strict=False)  # known good points, tried first
    space: Annotated[dict[str, Dimension], Field(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a trial computes with. image_set and selection: None for an arm without generated images."""

    arm: TrainRobust
    image_set: GenerateImages | None
    selection: SelectImages | None

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

    def with_values(self, values: Mapping[str, Any]) -> "Trial":
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
            return Trial(
                _changed(self.arm, parts[""]).with_step_sizes(),
                self.image_set and _changed(self.image_set, parts[IMAGE_SET]),
                self.selection and _changed(self.selection, parts[SELECTION]),
            )
        except pydantic.ValidationError as error:
            said = [_sentence("trial", item, TrainRobust) for item in error.errors()]
            raise UnfitError("; ".join(said)) from None

    def plain(self) -> dict[str, Any]:
        """JSON values; the arm's own at the top, as in a space."""
        found = self.arm.plain()
        if self.image_set is not None and self.selection is not None:
            found |= {IMAGE_SET: self.image_set.plain(), SELECTION: self.selection.plain()}
        return found


class Chunk(Record):
    image_set: Name
    generator: Name
    index: Natural


SECTIONS: dict[str, type[Record]] = {
    "compute": Compute,
    "prepare_data": PrepareData,
    "train_scorer": TrainScorer,
    "train_diffusion": Generator,
    "generate_images": GenerateImages,
    "score_images": ScoreImages,
    "select_images": SelectImages,
    "measure_images": MeasureImages,
    "train_robust": TrainRobust,
    "evaluate_robust": EvaluateRobust,
    "write_report": WriteReport,
    "tune": Tune,
}
NOT_NEEDED = ("compute", "tune")  # sections that a file may leave out
_YES_OR_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}  # YAML 1.1
LISTS = ("generators", "image_sets", "chunks", "selections", "arms")


@dataclasses.dataclass(frozen=True)
class Params:
    """The whole file: every list with its overrides merged in."""

    sections: Mapping[str, Any]
    seeds: tuple[int, ...]
    generators: Mapping[str, Generator]
    image_sets: Mapping[str, GenerateImages]
    chunks: Mapping[str, Chunk]
    selections: Mapping[str, SelectImages]
    selected_from: Mapping[str, str]  # selection -> image set
    arms: Mapping[str, TrainRobust]
    arm_images: Mapping[str, str]  # path of a selection, or REAL_ONLY
    trial: Trial | None  # the arm of the study with the study's overrides and length

    def chunks_of(self, image_set: str) -> dict[str, Chunk]:
        """In the order of their index."""
        found = [(name, chunk) for name, chunk in self.chunks.items() if chunk.image_set == image_set]
        return dict(sorted(found, key=lambda item: item[1].index))


def load(path: Path) -> Params:
    """Reads and checks a parameter file. Raises ConfigError with every problem found."""
    try:
        document = yaml_file.read(path)
    except FileNotFoundError:
        raise DmatError(
            f"{path} does not exist; run in the folder of a project, or bring a recipe with `dmat recipes use NAME`"
        ) from None
    except DmatError as error:
        raise ConfigError(str(path), [str(error)]) from None
    if not isinstance(document.value, dict):
        raise ConfigError(str(path), ["expected a mapping of sections; see docs/parameters.md"])
    params, problems = check(document.value)
    if problems or params is None:
        places = [(document.line_of(problem), problem) for problem in problems]
        raise ConfigError(str(path), [f"line {line}: {problem}" if line else problem for line, problem in places])
    return params


def check(values: dict[str, Any]) -> tuple[Params | None, list[str]]:
    """What a parameter file holds as records, or None and every problem found."""
    reader = _Reader(values)
    return reader.read(), reader.problems


def expect_name(option: str, value: str) -> None:
    """Raises DmatError for what cannot be the name of an entry, such as one that YAML reads as something else."""
    try:
        _name(value)
    except ValueError as error:
        raise DmatError(f"{option} is {value!r}; {error}") from None
    if not isinstance(yaml_file.parse(value).value, str):
        raise DmatError(f"{option} is {value!r}, which YAML does not read as text; expected a word; name another")


def threat(norm: Any, epsilon: Any) -> Threat:
    """A threat model that is in no params.yaml. Raises DmatError."""
    return _validated("threat", {"norm": norm, "epsilon": epsilon}, Threat)


def evaluation(values: Mapping[str, Any]) -> EvaluateRobust:
    """Settings of an evaluation that belongs to no project. Raises DmatError."""
    return _validated("evaluate_robust", values, EvaluateRobust)


def _validated(where: str, values: Mapping[str, Any], record: type[AnyRecord]) -> AnyRecord:
    try:
        return record.model_validate(values)
    except pydantic.ValidationError as error:
        raise DmatError("; ".join(_sentence(where, item, record) for item in error.errors())) from None


class _Reader:
    """Collects problems while it builds records; owns the list of them."""

    def __init__(self, raw: dict[str, Any]):
        self.raw, self.problems = raw, list[str]()
        self.sound = set[str]()  # sections that are valid by themselves

    def read(self) -> Params | None:
        known = {*SECTIONS, *LISTS, "seeds"}
        self.problems += [
            f"{key} is not a section; expected one of {', '.join(sorted(known))}"
            for key in self.raw
            if key not in known
        ]
        sections = {}
        for word, record in SECTIONS.items():
            given = self.raw.get(word)
            if given is None and word == "compute":
                given = {}
            if given is not None or word not in NOT_NEEDED:
                sections[word] = self._record(record, word, given)
        self.sound = {word for word, made in sections.items() if made is not None}
        seeds = self.raw.get("seeds")
        if not (
            isinstance(seeds, list)
            and seeds
            and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
            and len(set(seeds)) == len(seeds)
        ):
            self.problems.append(
                f"seeds is {seeds!r}; expected a list of different whole numbers from 0, for example [1, 2, 3]"
            )
            seeds = []
        generators = {
            name: self._merged(Generator, "generators", name, "train_diffusion", entry)
            for name, entry in self._list("generators")
        }
        image_sets = {
            name: self._merged(GenerateImages, "image_sets", name, "generate_images", entry)
            for name, entry in self._list("image_sets")
        }
        chunks = {
            name: self._record(Chunk, f"chunks.{name}", entry)
            for name, entry in self._list("chunks", plain_names=False)
        }
        selections, selected_from = self._merged_list("selections", SelectImages, "select_images", "image_set")
        arms, arm_images = self._merged_list("arms", TrainRobust, "train_robust", "images_from")
        lists = (generators, image_sets, chunks, selections, selected_from, arms, arm_images)
        self.problems += [*_disagreements(sections, *lists), *_steps_outside(sections.get("evaluate_robust"), arms)]
        trial = self._trial(sections.get("tune"), arms)
        if trial is not None:
            selection = Path(str(arm_images[sections["tune"].arm])).name
            of_set = image_sets.get(str(selected_from.get(selection)))
            trial = dataclasses.replace(trial, image_set=of_set, selection=selections.get(selection))
            self.problems += _study_disagreements(sections["tune"], trial)
        if self.problems:
            return None
        arms = {name: arm.with_step_sizes() for name, arm in arms.items()}
        return Params(sections, tuple(seeds), *lists[:-2], arms, arm_images, trial)

    def _trial(self, study: Tune | None, arms: Mapping[str, TrainRobust | None]) -> Trial | None:
        """What all trials of a study have in common."""
        if study is None:
            return None
        if study.arm not in arms:
            self.problems.append(f"tune.arm is {study.arm!r}; expected one of {_names(arms)}")
            return None
        arm = arms[study.arm]
        if arm is None:  # its own problems are told already
            return None
        both = sorted(
            name for name in {*study.space, *NOT_IN_A_SPACE} if _reaches(study.overrides, tuple(name.split(".")))
        )
        if both:
            self.problems.append(
                f"tune.overrides gives {', '.join(both)}, which the study itself or the arm decides; leave it out"
            )
        length = {"images": study.images, "evaluate_every": study.evaluate_every, "patience": 0}
        made: TrainRobust | None = self._record(
            TrainRobust, "tune.overrides", merge(arm.plain(), {**study.overrides, **length})
        )
        return None if made is None else Trial(made, None, None)

    def _merged_list(
        self, key: str, record: type[Record], section: str, source: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Records of a list, and what each entry names under `source`: a key of the entry alone."""
        records, sources = {}, {}
        for name, entry in self._list(key):
            overrides = dict(entry)
            sources[name] = overrides.pop(source, None)
            records[name] = self._merged(record, key, name, section, overrides)
        return records, sources

    def _list(self, key: str, plain_names: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        entries = self.raw.get(key, {})
        if not isinstance(entries, dict) or not entries:
            self.problems.append(f"{key} is {entries!r}; expected named entries, for example {key}: {{NAME: {{}}}}")
            return
        for name, entry in entries.items():
            try:
                _name(str(name) if plain_names else str(name).replace("-", "_"))
            except ValueError as error:
                self.problems.append(f"{key}.{name}: the name {name!r} cannot be used; {error}")
                continue
            if entry is not None and not isinstance(entry, dict):
                self.problems.append(f"{key}.{name} is {entry!r}; expected a mapping of overrides, {{}} for none")
                continue
            yield str(name), entry or {}

    def _merged(self, record: type[Record], key: str, name: str, section: str, overrides: dict[str, Any]) -> Any:
        """A list entry over its section. Of an unsound section only the problems of the entry itself are told again."""
        base, where = self.raw.get(section), f"{key}.{name}"
        merged = merge(base if isinstance(base, dict) else {}, overrides)
        return self._record(record, where, merged, only=None if section in self.sound else overrides)

    def _record(self, record: type[Record], where: str, value: Any, only: dict[str, Any] | None = None) -> Any:
        """A validated record or None. `only`: report no problem but those at the keys of this mapping."""
        if value is None:
            self.problems.append(f"{where} is missing; expected a section with {', '.join(record.model_fields)}")
            return None
        try:
            return record.model_validate(value)
        except pydantic.ValidationError as error:
            for item in error.errors():
                if only is None or _reaches(only, item["loc"]):
                    self.problems.append(_sentence(where, item, record))
            return None


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """base with overrides, mappings merged by key."""
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _reaches(value: Any, location: tuple[Any, ...]) -> bool:
    """Whether `value` itself holds the key at `location`; a location without keys is nobody's own."""
    for key in location:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return bool(location)


def _sentence(where: str, item: Any, record: type[Record]) -> str:
    """Found, expected, from a pydantic error."""
    path = ".".join([where, *(str(part) for part in item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{path} is not known; expected one of {', '.join(record.model_fields)}"
    if item["type"] == "missing":
        return f"{path} is missing; give it a value"
    message, found = item["msg"].removeprefix("Value error, "), item["input"]
    message = message if message.startswith("expected") else message[0].lower() + message[1:]
    message = message.replace("input should be", "expected")
    if item["type"] in ("model_type", "dict_type"):
        message = "expected a mapping of keys"
    if isinstance(found, Mapping):  # a problem between keys; most begin with the one to change
        return f"{path}.{message}" if message.partition(" ")[0] in found else f"{path}: {message}"
    return f"{path} is {found!r}; {message}{_advice(item['type'], found)}"


def _advice(problem: str, found: Any) -> str:
    """What to write instead of a value of the wrong type, where it is clear what was meant."""
    if problem == "bool_type" and isinstance(found, str) and found.lower() in _YES_OR_NO:
        return f" (YAML 1.2 reads {found} as text; write {_YES_OR_NO[found.lower()]})"
    if problem == "string_type" and isinstance(found, bool | int | float):
        return " (put it in quotes)"
    number = _number(found)
    if problem == "int_type" and number is not None and number == int(number):
        return f" (write {int(number)})"
    if problem == "float_type" and number is not None:
        return f" (YAML reads {found} as text; write {number})"
    return ""


def _number(value: Any) -> float | None:
    """A finite number of a usual size, from a number or text."""
    try:
        number = float(value) if isinstance(value, float | str) else math.nan
    except ValueError:
        return None
    return number if abs(number) <= 1e15 else None


def _disagreements(
    sections: Mapping[str, Any],
    generators: Mapping[str, Any],
    image_sets: Mapping[str, Any],
    chunks: Mapping[str, Any],
    selections: Mapping[str, Any],
    selected_from: Mapping[str, Any],
    arms: Mapping[str, Any],
    arm_images: Mapping[str, Any],
) -> Iterator[str]:
    """Problems between sections; entries that are None have been reported already."""
    of_set: dict[str, dict[str, Chunk]] = {}
    for name, chunk in chunks.items():
        if chunk is None:
            continue
        if chunk.image_set not in image_sets:
            yield f"chunks.{name}.image_set is {chunk.image_set!r}; expected one of {_names(image_sets)}"
        if chunk.generator not in generators:
            yield f"chunks.{name}.generator is {chunk.generator!r}; expected one of {_names(generators)}"
        if not name.startswith(f"{chunk.image_set}-"):
            example = f"{chunk.image_set}-{chunk.index:04d}"
            yield f"chunks.{name}: the name should begin with its image set, for example {example}"
        of_set.setdefault(chunk.image_set, {})[name] = chunk
    for name in image_sets:
        mine = of_set.get(name, {})
        if not mine:
            yield f"image_sets.{name} has no chunk; add one to `chunks`, for example {name}-0000"
        if len({chunk.generator for chunk in mine.values()}) > 1:
            yield f"image_sets.{name} mixes generators in its chunks {', '.join(mine)}; name one in all of them"
        if len({chunk.index for chunk in mine.values()}) < len(mine):
            yield f"image_sets.{name}: two of its chunks {', '.join(mine)} have the same index; give each its own"
    for name, image_set in selected_from.items():
        if not isinstance(image_set, str) or image_set not in image_sets:
            yield f"selections.{name}.image_set is {image_set!r}; expected one of {_names(image_sets)}"
    sets = {f"{ARTIFACTS}/select_images/{selection}" for selection in selections}
    for name, path in arm_images.items():
        arm = arms.get(name)
        if not isinstance(path, str) or path not in {REAL_ONLY, *sets}:
            yield f"arms.{name}.images_from is {path!r}; expected {REAL_ONLY} or one of {_names(sets)}"
        elif arm is not None and (path == REAL_ONLY) != (arm.generated_share == 0):
            yield (
                f"arms.{name} has generated_share {arm.generated_share} and images_from {path}; "
                f"expected a share above 0 exactly where a selection is named"
            )
    report = sections.get("write_report")
    if report is not None and arms and report.baseline not in arms:
        yield f"write_report.baseline is {report.baseline!r}; expected one of {_names(arms)}"


def _steps_outside(evaluation: EvaluateRobust | None, arms: Mapping[str, TrainRobust | None]) -> Iterator[str]:
    """Arms whose ball is smaller than the one step that the evaluation of all arms takes."""
    for name, arm in arms.items():
        if evaluation and arm and (sentence := step_problem(arm.threat, evaluation.pgd_step_size)) is not None:
            yield f"evaluate_robust.pgd_step_size {sentence} (arm {name})"


def _study_disagreements(study: Tune, trial: Trial) -> Iterator[str]:
    """Every end of the space, taken alone, must make a valid trial."""
    if trial.arm.selection_steps == 0:
        yield f"arms.{study.arm} has selection_steps 0; expected some, as trials are compared by PGD accuracy"
    if study.evaluate_every > study.images:
        yield (
            f"tune.evaluate_every is {study.evaluate_every} and tune.images {study.images}; expected at least one "
            f"report in a trial"
        )
    for name, wanted in study.space.items():
        where = f"tune.space.{name}"
        if name.partition(".")[0] in NOT_IN_A_SPACE:
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
        yield from _share_disagreements(where, study, trial, wanted) if name == "generated_share" else ()
        for key, value in wanted.ends.items():
            if isinstance(wanted, Range) and type(own) is int and value != int(value):
                yield f"{where}.{key} is {value}; expected a whole number, as {name} is one"
                continue
            try:
                trial.with_values({name: int(value) if type(own) is int and isinstance(wanted, Range) else value})
            except UnfitError as error:
                yield f"{where}.{key} is {value}; {str(error).partition('; ')[2] or error}"
    for k, point in enumerate(study.enqueue):
        yield from _point_disagreements(f"tune.enqueue.{k}", study, trial, point)
    if (trial.selection is None) != (trial.arm.generated_share == 0):
        yield (
            f"tune.overrides makes generated_share {trial.arm.generated_share} of arm {study.arm}; expected a share "
            f"above 0 exactly where the arm has generated images"
        )


def _share_disagreements(where: str, study: Tune, trial: Trial, wanted: Range | Choices) -> Iterator[str]:
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


def _point_disagreements(where: str, study: Tune, trial: Trial, point: Mapping[str, Any]) -> Iterator[str]:
    """A point names some of the space; the others are the arm's own."""
    for name, value in point.items():
        wanted = study.space.get(name)
        if wanted is None:
            yield f"{where}.{name} is not in the space; expected some of {_names(study.space)}"
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


def _is_whole(trial: Trial, name: str) -> bool:
    try:
        return type(trial.value_of(name)) is int
    except DmatError:  # told elsewhere
        return False


def _own_is_inside(trial: Trial, name: str, wanted: Range) -> bool:
    try:
        return wanted.low <= float(Fraction(trial.value_of(name))) <= wanted.high
    except (DmatError, ValueError):  # told elsewhere
        return True


def _is_numeric(value: Any) -> bool:
    """A number, or a fraction as people write it."""
    try:
        Fraction(value)
    except ValueError:
        return False
    return True


def _names(values: Any) -> str:
    return ", ".join(sorted(values)) or "(none defined)"
