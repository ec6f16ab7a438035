"""What study a parameter file asks for: settings, pinned inputs, its name, where it is kept. Opens nothing."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import config, files, plugins, redaction
from dmat.config import Params, TrialSettings, Tune
from dmat.errors import DmatError
from dmat.pipeline import STAGES, code_identity
from dmat.workspace import Workspace

WORD = "tune"
CODE = ("mix_images", "train_robust")  # stages whose code a trial computes with
DATABASE = "studies.db"  # all studies of a project, where no other storage is named
VARIABLE = "DMAT_STUDIES"  # environment: URL of the storage, which may hold a password and so stays out of files
# Not part of what a study is: they decide which trials it makes, never what a trial finds.
_FREE = ("trials", "sampler", "pruner", "startup_trials", "warmup_images", "retries", "rerank", "enqueue")


@dataclasses.dataclass(frozen=True)
class Study:
    """A study that a parameter file asks for; `--dry-run` prints it.

    kin: names what trials of studies have in common that differ in their space alone, so that one may know the
    other's trials.
    """

    settings: Tune
    trial: TrialSettings  # what all trials have in common
    inputs: dict[str, dict[str, str]]
    folder: Path
    storage: str
    transfer_key: str
    plugins: dict[str, str] = dataclasses.field(default_factory=dict)  # import path -> identity of that code

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fingerprint(self) -> str:
        return self.name.rpartition("-")[2]

    def trial_folder(self, number: int) -> Path:
        return self.folder / f"trial-{number:04d}"

    @property
    def points(self) -> list[dict[str, Any]]:
        """Values that are tried before anything is proposed: the arm as it is, then `enqueue`, where they lie inside
        the space."""
        own = {name: self.own_value(name) for name in self.settings.space}
        found: list[dict[str, Any]] = []
        for point in (own, *(own | dict(point) for point in self.settings.enqueue)):
            if all(inside(self.settings.space[name], value) for name, value in point.items()) and point not in found:
                found.append(point)
        return found

    def own_value(self, name: str) -> Any:
        """The arm's value of a parameter, as a number where the space wants one."""
        value = self.trial.value_of(name)
        number = isinstance(self.settings.space.get(name), config.Range) and isinstance(value, str)
        return float(config.WrittenNumber(value)) if number else value

    def describe(self) -> dict[str, Any]:
        return {
            "study": self.name,
            "settings": self.settings.plain(),
            "trial": self.trial.plain(),
            "inputs": self.inputs,
            "storage": redaction.address(self.storage),
            "work": str(self.folder),
        }


def inside(wanted: config.Dimension, value: Any) -> bool:
    """Whether a value lies in a dimension of a space."""
    if isinstance(wanted, config.Choices):
        return any(value == choice and type(value) is type(choice) for choice in wanted.choices)
    return isinstance(value, int | float) and wanted.low <= value <= wanted.high


def plan(params: Params, workspace: Workspace, storage: str | None = None) -> Study:
    """Resolves a study. Raises DmatError if the file asks for none, an input is missing, or code.yaml is.

    storage: a URL as SQLAlchemy has it; else DMAT_STUDIES; else a SQLite file of the project.
    """
    settings = params.tune
    if settings is None:
        raise DmatError(
            "params.yaml has no section `tune`; add one (docs/parameters.md), or bring a recipe that has it"
        )
    trial = params.trial
    assert trial is not None  # as the section is there
    inputs = {
        name: {"path": path, "sha256": files.checksum(workspace.at(path))}
        for name, path in _inputs(settings, params).items()
    }
    identity = {
        "settings": {name: value for name, value in settings.plain().items() if name not in (*_FREE, "space")},
        "trial": trial.plain(),
        "inputs": {name: inputs[name]["sha256"] for name in ("train", "validation", "selection")},
        "code": {stage_name: code_identity.read(workspace.root).of(stage_name) for stage_name in CODE},
    }
    if own := own_code(settings, trial):
        identity["plugins"] = own
    space = {"space": settings.plain()["space"], "inputs": {name: one["sha256"] for name, one in inputs.items()}}
    folder = workspace.run_folder(WORD, settings.arm, files.fingerprint(identity | {"space": space}))
    url = storage or os.environ.get(VARIABLE) or f"sqlite:///{folder.parent / DATABASE}"
    if url.startswith("sqlite:///") and not url.startswith("sqlite:////") and url != "sqlite:///":
        url = f"sqlite:///{Path(url.removeprefix('sqlite:///')).resolve()}"  # workers start in another folder
    return Study(settings, trial, inputs, folder, url, files.fingerprint(identity), own)


def own_code(settings: Tune, trial: TrialSettings) -> dict[str, str]:
    """Import path -> identity of the code of the project that trials may use, as it lies there now."""
    return code_identity.of_plugins(plugins.words([trial.plain(), settings.plain()["space"]]), *CODE)


def changes_images(names: Mapping[str, Any]) -> bool:
    """Whether trials with these parameters may train on images of their own."""
    return any(name.partition(".")[0] in (config.IMAGE_SET, config.SELECTION) for name in names)


def _inputs(settings: Tune, params: Params) -> dict[str, str]:
    found = STAGES["mix_images"].inputs(params, settings.arm) | STAGES["train_robust"].inputs(params, settings.arm, 0)
    found.pop("mix")  # trials make their own
    if changes_images(settings.space):
        image_set = params.selections[params.arms[settings.arm].images].image_set
        found |= STAGES["generate_images"].inputs(params, image_set) | STAGES["score_images"].inputs(params, image_set)
        found.pop("images")  # trials make their own
    return found
