"""Reads the whole of params.yaml: sections and lists become records, and all problems are reported at once.

Entries of the lists refer to each other: an arm names a selection or a mixture of selections, a selection an image
set, an image set a generator. An entry overrides the section of its stage; its record is the section with the
overrides merged in.
"""

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from dmat import NONE, plugins, yaml_file
from dmat.config.combine_selections import Mixture
from dmat.config.compute import ComputeSettings
from dmat.config.diffusers_network import DiffusersNetwork, NoiseProcess
from dmat.config.evaluate_robust import EvaluateRobust
from dmat.config.fields import AnyRecord, Record, name_problem
from dmat.config.generate_images import GenerateImages, ImageSet
from dmat.config.measure_images import MeasureImages
from dmat.config.merging import contains, merge
from dmat.config.messages import name_list, sentence
from dmat.config.prepare_data import PrepareData
from dmat.config.renamed import renamed
from dmat.config.sampling import sampling_problems
from dmat.config.score_images import ScoreImages
from dmat.config.select_images import SelectImages, Selection
from dmat.config.train_diffusion import DenoiserNetwork, DenoiserTraining, Generator
from dmat.config.train_robust import Arm, Threat, TrainRobust, step_problem
from dmat.config.train_scorer import TrainScorer
from dmat.config.tune import NOT_IN_A_SPACE, TrialSettings, Tune, study_problems
from dmat.config.write_report import WriteReport
from dmat.errors import ConfigError, DmatError, did_you_mean


class EntryKind(NamedTuple):
    """The kind of the entries of a list.

    record: of an entry. section: that an entry overrides, "" for none. base: record of that section. parent: the key by
    which an entry names an entry of the lists `parents`. may_have_none: whether that key may be `none`. may_be_empty:
    whether the list may have no entry.
    """

    record: type[Record]
    section: str
    base: type[Record]
    parent: str | None = None
    parents: tuple[str, ...] = ()
    may_have_none: bool = False
    may_be_empty: bool = False


LISTS = {  # a parent's list comes before its children's
    "generators": EntryKind(Generator, "train_diffusion", DenoiserTraining, may_be_empty=True),
    "image_sets": EntryKind(ImageSet, "generate_images", GenerateImages, "generator", ("generators",), True),
    "selections": EntryKind(Selection, "select_images", SelectImages, "image_set", ("image_sets",)),
    "mixtures": EntryKind(Mixture, "", Mixture, may_be_empty=True),
    "arms": EntryKind(Arm, "train_robust", TrainRobust, "images", ("selections", "mixtures"), may_have_none=True),
}


@dataclasses.dataclass(frozen=True)
class Params:
    """The whole file. Lists hold each entry with its section merged in.

    tune: the study; None without one. trial: what all trials of the study have in common; None without a study.
    """

    compute: ComputeSettings
    seeds: tuple[int, ...]
    prepare_data: PrepareData
    train_scorer: TrainScorer
    score_images: ScoreImages
    measure_images: MeasureImages
    evaluate_robust: EvaluateRobust
    write_report: WriteReport
    tune: Tune | None
    generators: Mapping[str, Generator]
    image_sets: Mapping[str, ImageSet]
    selections: Mapping[str, Selection]
    mixtures: Mapping[str, Mixture]
    arms: Mapping[str, Arm]
    # The study's arm with the study's overrides and length, and its image set and selection.
    trial: TrialSettings | None

    def selections_of(self, arm: str) -> tuple[str, ...]:
        """Names of the selections that an arm trains on: one, those of a mixture, or none."""
        name = self.arms[arm].images
        if name == NONE:
            return ()
        return tuple(self.mixtures[name].of) if name in self.mixtures else (name,)


SECTIONS: dict[str, type[Record]] = {  # sections of a file: those in Params, and those that only entries of lists use
    **{name: kind for name, kind in typing.get_type_hints(Params).items() if isinstance(kind, type(Record))},
    "tune": Tune,
    **{kind.section: kind.base for kind in LISTS.values() if kind.section},
}
_OVERRIDDEN = {kind.section for kind in LISTS.values() if kind.section}


def load(path: Path, project: Path | None = None) -> Params:
    """Reads and checks a parameter file. Raises ConfigError with all problems, and DmatError if there is no file.

    project: the folder whose plugins/ the file may name; None: the folder of the file.
    """
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
    with plugins.of_project(project or path.resolve().parent):
        params, problems = check(document.value)
    if problems or params is None:
        located = [(document.line_of(problem), problem) for problem in problems]
        raise ConfigError(str(path), [f"line {line}: {problem}" if line else problem for line, problem in located])
    return params


def check(values: dict[str, object]) -> tuple[Params | None, list[str]]:
    """Converts the content of a parameter file to records. Returns None and all problems if there are any."""
    if problems := renamed(values, LISTS):  # for a file of an earlier version, only the new keys are reported at first
        return None, problems
    reader = _Reader(values)
    return reader.read(), reader.problems


def expect_name(option: str, value: str) -> None:
    """Raises DmatError if the value of an option cannot be the name of an entry.

    A name has letters, digits and underscores only, and YAML reads it as text. option: its name, for the message.
    """
    if problem := name_problem(value):
        raise DmatError(f"{option} is {value!r}; {problem}")
    if not isinstance(yaml_file.parse(value).value, str):
        raise DmatError(f"{option} is {value!r}, which YAML does not read as text; expected a word; name another")


def threat(norm: object, epsilon: object) -> Threat:
    """Validates a threat model that is not from a params.yaml. Raises DmatError."""
    return _validated("threat", {"norm": norm, "epsilon": epsilon}, Threat)


def evaluation(values: Mapping[str, object]) -> EvaluateRobust:
    """Validates settings of evaluate_robust that are not from a params.yaml. Raises DmatError."""
    return _validated("evaluate_robust", values, EvaluateRobust)


def denoiser_network(values: Mapping[str, object]) -> DenoiserNetwork:
    """Validates the architecture of a denoiser that is not from a params.yaml. Raises DmatError."""
    return _validated("network", values, DenoiserNetwork)


def diffusers_network(values: Mapping[str, object]) -> DiffusersNetwork:
    """Validates the architecture of a denoiser in the format of diffusers. Raises DmatError."""
    return _validated("network", values, DiffusersNetwork)


def noise_process(values: Mapping[str, object]) -> NoiseProcess:
    """Validates the noise process of an imported denoiser. Raises DmatError."""
    return _validated("noise_process", values, NoiseProcess)


def _validated(name: str, values: Mapping[str, object], record: type[AnyRecord]) -> AnyRecord:
    try:
        return record.model_validate(values)
    except pydantic.ValidationError as error:
        raise DmatError("; ".join(sentence(name, error_details, record) for error_details in error.errors())) from None


class _Reader:
    """Builds the records of a file and collects all problems in `problems`."""

    def __init__(self, raw: dict[str, object]):
        self.raw, self.problems = raw, list[str]()
        self.valid_sections = set[str]()

    def read(self) -> Params | None:
        """The records of the file; None if there are problems."""
        known_keys = {*SECTIONS, *LISTS, "seeds"}
        self.problems += [
            f"{key} is not a section; expected one of {', '.join(sorted(known_keys))}{did_you_mean(key, known_keys)}"
            for key in self.raw
            if key not in known_keys
        ]
        sections = {name: self._section(name, record) for name, record in SECTIONS.items()}
        self.valid_sections = {name for name, record in sections.items() if record is not None}
        seeds = self._seeds()
        lists: dict[str, dict[str, Any]] = {}
        entries = {key: dict(self._named_entries(key)) for key in LISTS}
        for key, kind in LISTS.items():
            lists[key] = {
                name: self._entry(key, kind, name, entry, [name for parent in kind.parents for name in lists[parent]])
                for name, entry in entries[key].items()
            }
        self.problems += _mixture_problems(lists["mixtures"], lists["selections"])
        arms, report, evaluation = lists["arms"], sections["write_report"], sections["evaluate_robust"]
        for name, arm in arms.items():
            if arm is not None:
                self.problems += _share_problems(name, arm)
                self.problems += _step_problems(name, arm, evaluation)
        if report is not None and arms and report.baseline not in arms:
            self.problems.append(
                f"write_report.baseline is {report.baseline!r}; expected one of {name_list(arms)}"
                f"{did_you_mean(report.baseline, arms)}"
            )
        self.problems += _import_problems(lists["generators"], entries["generators"])
        self.problems += [
            f"image_sets.{name}.generator is {NONE}, and source too; expected a generator or a source"
            for name, image_set in lists["image_sets"].items()
            if image_set is not None
            and image_set.generator == image_set.source == NONE
            and entries["image_sets"][name].get("generator") == NONE
        ]
        for name, image_set in lists["image_sets"].items():
            if image_set is not None and (generator := lists["generators"].get(image_set.generator)) is not None:
                self.problems += sampling_problems(name, image_set, generator)
        trial = self._trial(sections["tune"], lists)
        if self.problems:
            return None
        lists["arms"] = {name: arm.with_step_sizes() for name, arm in arms.items()}
        fields: dict[str, Any] = {name: record for name, record in sections.items() if name not in _OVERRIDDEN}
        fields |= lists
        return Params(seeds=seeds, trial=trial, **fields)

    def _section(self, name: str, record: type[Record]) -> Any:
        """The validated record of a section; None for one with problems, and if the file has no study."""
        value = self.raw.get(name)
        if value is None and name == "tune":
            return None
        return self._record(record, name, {} if value is None and name == "compute" else value)

    def _seeds(self) -> tuple[int, ...]:
        seeds = self.raw.get("seeds")
        if (
            isinstance(seeds, list)
            and seeds
            and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
            and len(set(seeds)) == len(seeds)
        ):
            return tuple(seeds)
        self.problems.append(
            f"seeds is {seeds!r}; expected a list of different whole numbers from 0, for example [1, 2, 3]"
        )
        return ()

    def _named_entries(self, key: str) -> Iterator[tuple[str, dict[str, object]]]:
        entries = self.raw.get(key)
        empty = LISTS[key].may_be_empty
        if not isinstance(entries, dict) or not (entries or empty):
            state = "is missing" if entries is None else f"is {entries!r}"
            example = f"{key}: {{}}" if empty else f"{key}: {{NAME: {{}}}}"
            self.problems.append(f"{key} {state}; expected named entries, for example {example}")
            return
        for name, entry in entries.items():
            if problem := name_problem(str(name)):
                self.problems.append(f"{key}.{name}: the name {name!r} cannot be used; {problem}")
            elif entry is not None and not isinstance(entry, dict):
                self.problems.append(f"{key}.{name} is {entry!r}; expected a mapping of overrides, {{}} for none")
            else:
                yield str(name), entry or {}

    def _entry(
        self, key: str, kind: EntryKind, name: str, overrides: dict[str, object], parents: Iterable[str]
    ) -> Record | None:
        """The record of an entry, merged into its section.

        If the section itself has problems, only problems at keys of the entry are reported.
        """
        path = f"{key}.{name}"
        if kind.parent is not None:
            choices = [*parents, *([NONE] if kind.may_have_none else [])]
            parent = overrides.get(kind.parent)
            if not isinstance(parent, str) or parent not in choices:
                state = "is missing" if parent is None else f"is {parent!r}"
                none = f", or {NONE}" if kind.may_have_none else ""
                self.problems.append(
                    f"{path}.{kind.parent} {state}; expected one of {name_list(parents)}{none}"
                    f"{did_you_mean(parent or '', choices)}"
                )
                overrides = {**overrides, kind.parent: NONE}  # so that its other problems are reported too
        base = self.raw.get(kind.section)
        merged = merge(base if isinstance(base, dict) else {}, overrides)
        return self._record(
            kind.record, path, merged, reported=None if kind.section in {"", *self.valid_sections} else overrides
        )

    def _record(
        self, record: type[AnyRecord], path: str, value: object, reported: Mapping[str, object] | None = None
    ) -> AnyRecord | None:
        """A validated record, or None if there are problems. path: dotted name, for messages.

        reported: report only problems at keys of this mapping; None: all problems.
        """
        if value is None:
            self.problems.append(f"{path} is missing; expected a section with {', '.join(record.model_fields)}")
            return None
        try:
            return record.model_validate(value)
        except pydantic.ValidationError as error:
            for error_details in error.errors():
                if reported is None or contains(reported, error_details["loc"]):
                    self.problems.append(sentence(path, error_details, record))
            return None

    def _trial(self, study: Tune | None, lists: Mapping[str, Mapping[str, Any]]) -> TrialSettings | None:
        """What all trials of a study have in common."""
        if study is None:
            return None
        if study.arm not in lists["arms"]:
            self.problems.append(
                f"tune.arm is {study.arm!r}; expected one of {name_list(lists['arms'])}"
                f"{did_you_mean(study.arm, lists['arms'])}"
            )
            return None
        arm = lists["arms"][study.arm]
        if arm is None:  # its problems are reported already
            return None
        for names, owner in (
            (NOT_IN_A_SPACE, "the study itself or the arm decides"),
            (study.space, "tune.space varies"),
        ):
            fixed = sorted(name for name in names if contains(study.overrides, tuple(name.split("."))))
            if fixed:
                self.problems.append(f"tune.overrides gives {', '.join(fixed)}, which {owner}; leave it out")
        if dotted := [name for name in study.overrides if "." in name]:
            first, _, rest = dotted[0].partition(".")
            self.problems.append(
                f"tune.overrides.{dotted[0]} has a dot; expected keys inside of keys; write {first}: {{{rest}: ...}}"
            )
            return None
        length = {"images_seen": study.images_seen, "evaluate_every": study.evaluate_every, "patience": 0}
        arm_record: Arm | None = self._record(Arm, "tune.overrides", merge(arm.plain(), {**study.overrides, **length}))
        if arm_record is None:
            return None
        selection = lists["selections"].get(arm.images)
        trial = TrialSettings(arm_record, selection and lists["image_sets"].get(selection.image_set), selection)
        self.problems += study_problems(study, trial)
        return trial


def _import_problems(
    generators: Mapping[str, Generator | None], entries: Mapping[str, Mapping[str, object]]
) -> Iterator[str]:
    """Settings of a training, given to a generator that is imported."""
    for name, entry in entries.items():
        generator = generators.get(name)
        if generator is not None and generator.source != NONE and (others := sorted(entry.keys() - {"source"})):
            yield (
                f"generators.{name}.{others[0]} has no effect, as source {generator.source} is imported and not "
                f"trained; expected source alone; leave out {', '.join(others)}"
            )


def _mixture_problems(
    mixtures: Mapping[str, Mixture | None], selections: Mapping[str, Selection | None]
) -> Iterator[str]:
    """A mixture is named where a selection could be, and its folder lies beside theirs."""
    for name, mixture in mixtures.items():
        if name in selections:
            yield f"mixtures.{name} has the name of a selection; expected another name; rename it"
        for selection in mixture.of if mixture is not None else ():
            if selection not in selections:
                yield f"mixtures.{name}.of names {selection}; expected some of {name_list(selections)}"


def _share_problems(name: str, arm: Arm) -> Iterator[str]:
    if (arm.images == NONE) != (arm.generated_share == 0):
        yield (
            f"arms.{name} has generated_share {arm.generated_share} and images: {arm.images}; expected a share above "
            f"0 exactly where a selection is named"
        )


def _step_problems(name: str, arm: Arm, evaluation: EvaluateRobust | None) -> Iterator[str]:
    """The epsilon of an arm may be smaller than the step size, which is the same for the evaluation of all arms."""
    if evaluation is not None and (problem := step_problem(arm.threat, evaluation.pgd_step_size)) is not None:
        yield f"evaluate_robust.pgd_step_size {problem} (arm {name})"
