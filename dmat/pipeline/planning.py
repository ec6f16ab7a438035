"""What a command would do: settings, checked inputs, and the fingerprint that names the work folder of an instance."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dmat import ARTIFACTS, NONE, SOURCES, files, plugins
from dmat.config import Params, Record
from dmat.errors import DmatError
from dmat.pipeline import code_identity, work_folder
from dmat.pipeline.stages import STAGES, Stage
from dmat.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command would do; `--dry-run` prints it."""

    stage: Stage
    instance: Mapping[str, Any]
    settings: Record
    inputs: dict[str, dict[str, str]]  # name -> path, sha256
    outputs: dict[str, str]
    code: str  # identity, as code.yaml names it
    plugins: dict[str, str]  # import path -> identity of that code of the project
    fingerprint: str
    work: Path

    @property
    def finished(self) -> dict[str, Any] | None:
        """The record of a complete result."""
        return work_folder.finished(self.work)

    @property
    def state(self) -> str:
        if self.finished:
            return "finished: the result is published again"
        return "resumes" if work_folder.kept(self.work) else "starts"

    def describe(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "instance": self.stage.instance_name(self.instance),
            "state": self.state,
            "code": self.code,
            "plugins": self.plugins,
            "settings": self.settings.plain(),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "work": str(self.work),
        }


def plan(
    stage: Stage, instance: Mapping[str, Any], params: Params, workspace: Workspace, code: str | None = None
) -> Plan:
    """Resolves settings and inputs. Raises DmatError for an unknown instance, a missing input, or code that is not that
    of the project's code.yaml.

    code: an identity to plan with, whatever the loaded code is.
    """
    valid = stage.choices(params)
    if dict(instance) not in valid:
        known = ", ".join(stage.instance_name(one) for one in valid) or "(none)"
        raise DmatError(
            f"{stage.name} has no instance {stage.instance_name(instance)!r} in params.yaml; expected one of {known}"
        )
    code = code_identity.expect(stage.name, workspace.root) if code is None else code
    settings = stage.settings(params, **instance)
    inputs = {
        name: {"path": path, "sha256": _checksum(stage.name, settings, workspace.at(path))}
        for name, path in stage.inputs(params, **instance).items()
    }
    if any(entry["path"].startswith(f"{ARTIFACTS}/prepare_data/") for entry in inputs.values()):
        _expect_known_source(params, workspace)
    _expect_unaltered({entry["path"] for entry in inputs.values()}, params, workspace)
    identity = {
        "stage": stage.name,
        "code": code,
        "chosen": dict(instance),
        "settings": settings.plain(),
        "inputs": {name: entry["sha256"] for name, entry in inputs.items()},
    }
    named = plugins.words([one.plain() for one in (settings, *stage.opens(params, **instance))])
    own = code_identity.of_plugins(named, stage.name)
    fingerprint = files.fingerprint(identity | ({"plugins": own} if own else {}))
    work = workspace.run_folder(stage.name, stage.instance_name(instance), fingerprint)
    return Plan(stage, instance, settings, inputs, stage.outputs(params, **instance), code, own, fingerprint, work)


def _checksum(stage_name: str, settings: Record, path: Path) -> str:
    """Of an input; of a source of real images the files that are read count, not what lies beside them."""
    if stage_name == "prepare_data":
        path = STAGES[stage_name].job.location(settings, path)
    return files.checksum(path)


def _expect_known_source(params: Params, workspace: Workspace) -> None:
    """Raises DmatError if the splits were made of other bytes than their source holds now: a stage that is started
    directly has nobody else who would look.

    A source that is not on this machine, or of which it is not known what was read, is nobody's concern here.
    """
    settings = params.prepare_data
    stage = STAGES["prepare_data"]
    note = workspace.at(stage.provenance_path({}))
    if settings.path == NONE or not note.exists():
        return
    known = files.read_json(note).get("inputs", {}).get("source")
    try:
        found = _checksum(stage.name, settings, workspace.at(f"{SOURCES}/{settings.path}"))
    except DmatError:
        return
    if known and known["path"] == f"{SOURCES}/{settings.path}" and known["sha256"] != found:
        raise DmatError(
            f"{SOURCES}/{settings.path} has checksum {found[:12]}; the splits in {ARTIFACTS}/prepare_data were made "
            f"when it had {known['sha256'][:12]}; bring the old files back, or run `dvc repro` (without DVC: `dmat "
            f"{stage.command}` and the rest after it)"
        )


def _expect_unaltered(read: Collection[str], params: Params, workspace: Workspace) -> None:
    """Raises DmatError if what a stage published at or below one of these paths is not what it published.

    DVC compares before it starts a stage; a stage that is started directly has nobody else who would.
    """
    for stage_name, stage in STAGES.items():
        for instance in stage.choices(params):
            below = [
                path
                for path in published_paths(stage, params, instance)
                if any(path == one or path.startswith(f"{one}/") for one in read)
            ]
            record = workspace.at(stage.provenance_path(instance))
            recorded = files.read_record(record).get("outputs", {}) if below and record.exists() else {}
            for path in below:
                if path in recorded and (found := files.checksum(workspace.at(path))) != recorded[path]:
                    raise DmatError(
                        f"{path} has checksum {found[:12]}; {stage_name} wrote {recorded[path][:12]}: it was altered since; "
                        f"restore it (`dvc checkout`) or run that stage again"
                    )


def published_paths(stage: Stage, params: Params, instance: Mapping[str, Any]) -> list[str]:
    """Where an instance publishes what others read; its provenance says the checksum of each."""
    return [
        *stage.outputs(params, **instance).values(),
        stage.pictures_path(instance),
        stage.metrics_path(instance),
    ]
