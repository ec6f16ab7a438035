"""Plans the study that a parameter file defines: settings, checksums of inputs, name, storage. Opens no storage."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import config, files, plugins, redaction
from dmat.config import Params, TrialSettings, Tune
from dmat.errors import DmatError
from dmat.pipeline import STAGES, code_identity
from dmat.workspace import InputRecord, Workspace, sqlite_path, sqlite_url

STAGE_NAME = "tune"
CODE_STAGES = ("mix_images", "train_robust")  # stages whose code a trial computes with
OBJECTIVE = "validation_robust"  # of a trial: accuracy in [0, 1] of the EMA weights
MAX_LOST_WORKERS = 5  # killed workers that a trial survives; with another one it counts as failed
DATABASE = "studies.db"  # all studies of a project, where no other storage is named
STORAGE_VARIABLE = "DMAT_STUDIES"  # environment: URL of the storage; may hold a password, so it is not in a file
# Not part of the identity of a study: they influence which trials there are, not the result of a trial.
_FREE = ("trials", "sampler", "pruner", "startup_trials", "warmup_images", "retries", "rerank", "enqueue")


@dataclasses.dataclass(frozen=True)
class Study:
    """The study that a parameter file defines; `--dry-run` prints it.

    transfer_key: fingerprint of what studies share that differ only in their space, so that one may import trials of
    the other.
    """

    settings: Tune
    trial: TrialSettings  # what all trials have in common
    inputs: dict[str, InputRecord]
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
        """Points that are tried before the sampler proposes any: the values of the arm, then `enqueue`; only those
        inside the space."""
        arm_point = {name: self.own_value(name) for name in self.settings.space}
        valid_points: list[dict[str, Any]] = []
        for point in (arm_point, *(arm_point | dict(point) for point in self.settings.enqueue)):
            if (
                all(self.settings.space[name].contains(value) for name, value in point.items())
                and point not in valid_points
            ):
                valid_points.append(point)
        return valid_points

    def own_value(self, name: str) -> Any:
        """Value of a parameter in the arm, as a number if the space has a range for it."""
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


def plan(params: Params, workspace: Workspace, storage: str | None = None) -> Study:
    """Plans a study. Raises DmatError if the file defines none, or if an input or code.yaml is missing.

    storage: a URL for SQLAlchemy; by default DMAT_STUDIES, else a SQLite file of the project.
    """
    settings = params.tune
    if settings is None:
        raise DmatError(
            "params.yaml has no section `tune`; add one (docs/parameters.md), or bring a recipe that has it"
        )
    trial = params.trial
    assert trial is not None  # as the section is there
    inputs: dict[str, InputRecord] = {
        name: {"path": path, "sha256": files.checksum(workspace.at(path))}
        for name, path in _inputs(settings, params).items()
    }
    identity = {
        "settings": {name: value for name, value in settings.plain().items() if name not in (*_FREE, "space")},
        "trial": trial.plain(),
        "inputs": {name: inputs[name]["sha256"] for name in ("train", "validation", "selection")},
        "code": {stage_name: code_identity.read(workspace.root).identity_of(stage_name) for stage_name in CODE_STAGES},
    }
    if plugin_codes := plugin_identities(settings, trial):
        identity["plugins"] = plugin_codes
    space = {"space": settings.plain()["space"], "inputs": {name: entry["sha256"] for name, entry in inputs.items()}}
    folder = workspace.run_folder(STAGE_NAME, settings.arm, files.fingerprint(identity | {"space": space}))
    url = storage or os.environ.get(STORAGE_VARIABLE) or sqlite_url(folder.parent / DATABASE)
    if (path := sqlite_path(url)) is not None:
        url = sqlite_url(path.resolve())  # workers start in another folder
    return Study(settings, trial, inputs, folder, url, files.fingerprint(identity), plugin_codes)


def plugin_identities(settings: Tune, trial: TrialSettings) -> dict[str, str]:
    """Import path -> present identity of the plugin code that trials may use."""
    return code_identity.of_plugins(plugins.import_paths([trial.plain(), settings.plain()["space"]]), *CODE_STAGES)


def changes_images(names: Mapping[str, Any]) -> bool:
    """Whether trials with these parameters may train on images of their own."""
    return any(name.partition(".")[0] in (config.IMAGE_SET, config.SELECTION) for name in names)


def _inputs(settings: Tune, params: Params) -> dict[str, str]:
    paths = STAGES["mix_images"].inputs(params, settings.arm) | STAGES["train_robust"].inputs(params, settings.arm, 0)
    paths.pop("mix")  # trials make their own
    if changes_images(settings.space):
        image_set = params.selections[params.arms[settings.arm].images].image_set
        paths |= STAGES["generate_images"].inputs(params, image_set) | STAGES["score_images"].inputs(params, image_set)
        paths.pop("images")  # trials make their own
    return paths
