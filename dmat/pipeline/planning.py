"""Plans one instance of a stage: its settings, its checked inputs, and the fingerprint that names its work folder."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dmat import ARTIFACTS, NONE, SOURCES, files, plugins
from dmat.config import Params, Record
from dmat.errors import DmatError, did_you_mean
from dmat.pipeline import code_identity, work_folder
from dmat.pipeline.stages import STAGES, Stage
from dmat.pipeline.work_folder import Finished
from dmat.workspace import InputRecord, Instance, Provenance, Workspace


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command of one instance would do; `--dry-run` prints it. Paths in inputs and outputs are below the
    project."""

    stage: Stage
    instance: Instance
    settings: Record
    inputs: dict[str, InputRecord]  # by name
    outputs: dict[str, str]  # name -> path
    code: str  # identity of the stage's code, as in code.yaml
    plugins: dict[str, str]  # import path -> identity of that code of the project
    fingerprint: str  # of stage, code, instance, settings, inputs and plugins
    work: Path  # the work folder

    @property
    def finished(self) -> Finished | None:
        """The record of a complete result; None without one."""
        return work_folder.read_finished(self.work)

    @property
    def state(self) -> str:
        """For people: whether the result is finished, or the computation resumes or starts."""
        if self.finished:
            return "finished: the result is published again"
        return "resumes" if work_folder.resumable_paths(self.work) else "starts"

    def describe(self) -> dict[str, object]:
        """The plan as JSON values."""
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


def plan(stage: Stage, instance: Instance, params: Params, workspace: Workspace, code: str | None = None) -> Plan:
    """Resolves the settings of an instance and checks its inputs.

    code: an identity to plan with, whatever the loaded code is; None: that of the project's code.yaml.
    Raises DmatError for an unknown instance, a missing or altered input, and code that code.yaml does not accept.
    """
    instances = stage.all_instances(params)
    if dict(instance) not in instances:
        names = [stage.instance_name(valid) for valid in instances]
        name = stage.instance_name(instance)
        raise DmatError(
            f"{stage.name} has no instance {name!r} in params.yaml; expected one of {', '.join(names) or '(none)'}"
            f"{did_you_mean(name, names)}"
        )
    code = code_identity.expect(stage.name, workspace.root) if code is None else code
    settings = stage.settings(params, **instance)
    inputs: dict[str, InputRecord] = {
        name: {"path": path, "sha256": _checksum(stage.name, settings, workspace.at(path))}
        for name, path in stage.inputs(params, **instance).items()
    }
    if any(entry["path"].startswith(f"{ARTIFACTS}/prepare_data/") for entry in inputs.values()):
        _expect_known_source(params, workspace)
    _expect_unaltered({entry["path"] for entry in inputs.values()}, params, workspace)
    paths = plugins.import_paths([record.plain() for record in (settings, *stage.model_settings(params, **instance))])
    plugin_identities = code_identity.of_plugins(paths, stage.name)
    planned = Plan(
        stage, instance, settings, inputs, stage.outputs(params, **instance), code, plugin_identities, "", Path()
    )
    return with_fingerprint(planned, settings.plain(), workspace)


def with_fingerprint(plan: Plan, settings: Mapping[str, Any], workspace: Workspace) -> Plan:
    """The plan with the fingerprint, and so the work folder, that it has with these settings as JSON values."""
    identity = {
        "stage": plan.stage.name,
        "code": plan.code,
        "chosen": dict(plan.instance),  # key of earlier versions: a new name would change every fingerprint
        "settings": settings,
        "inputs": {name: entry["sha256"] for name, entry in plan.inputs.items()},
    }
    fingerprint = files.fingerprint(identity | ({"plugins": plan.plugins} if plan.plugins else {}))
    work = workspace.run_folder(plan.stage.name, plan.stage.instance_name(plan.instance), fingerprint)
    return dataclasses.replace(plan, fingerprint=fingerprint, work=work)


def as_published(plan: Plan, workspace: Workspace) -> Plan | None:
    """The plan with the settings and the fingerprint of the published result; None without one that it would give.

    The settings of an older result lack keys that were added since; it counts if these have their defaults now. Raises
    DmatError for a damaged record.
    """
    path = workspace.at(plan.stage.provenance_path(plan.instance))
    if not path.exists():
        return None
    recorded = files.read_record(path, Provenance)
    if plan.settings.are_those_of(recorded["settings"]):
        plan = with_fingerprint(plan, recorded["settings"], workspace)
    return plan if plan.fingerprint == recorded["fingerprint"] else None


def _checksum(stage_name: str, settings: Record, path: Path) -> str:
    """Checksum of an input. Of a source of real images only the files that are read count, not others beside them."""
    if stage_name == "prepare_data":
        path = STAGES[stage_name].job.location(settings, path)
    return files.checksum(path)


def _expect_known_source(params: Params, workspace: Workspace) -> None:
    """Raises DmatError if the splits were made of other bytes than their source holds now.

    DVC checks this before it starts a stage; a stage that is started directly is checked here. Nothing is checked if
    the source is not on this machine, or if it was not recorded what was read.
    """
    settings = params.prepare_data
    stage = STAGES["prepare_data"]
    record_path = workspace.at(stage.provenance_path({}))
    if settings.path == NONE or not record_path.exists():
        return
    recorded = files.read_record(record_path, Provenance)["inputs"].get("source")
    try:
        current = _checksum(stage.name, settings, workspace.at(f"{SOURCES}/{settings.path}"))
    except DmatError:
        return
    if recorded and recorded["path"] == f"{SOURCES}/{settings.path}" and recorded["sha256"] != current:
        raise DmatError(
            f"{SOURCES}/{settings.path} has checksum {current[:12]}; the splits in {ARTIFACTS}/prepare_data were made "
            f"when it had {recorded['sha256'][:12]}; bring the old files back, or run `dvc repro` (without DVC: `dmat "
            f"{stage.command}` and the rest after it)"
        )


def _expect_unaltered(input_paths: Collection[str], params: Params, workspace: Workspace) -> None:
    """Raises DmatError if a stage's output at or below one of the input paths changed after it was published.

    DVC checks this before it starts a stage; a stage that is started directly is checked here.
    """
    for stage_name, stage in STAGES.items():
        for instance in stage.all_instances(params):
            published = [
                path
                for path in published_paths(stage, params, instance)
                if any(path == input_path or path.startswith(f"{input_path}/") for input_path in input_paths)
            ]
            record = workspace.at(stage.provenance_path(instance))
            recorded = files.read_record(record, Provenance)["outputs"] if published and record.exists() else {}
            for path in published:
                if path in recorded and (current := files.checksum(workspace.at(path))) != recorded[path]:
                    raise DmatError(
                        f"{path} has checksum {current[:12]}; {stage_name} wrote {recorded[path][:12]}: it was altered "
                        f"since; restore it (`dvc checkout`) or run that stage again"
                    )


def published_paths(stage: Stage, params: Params, instance: Instance) -> list[str]:
    """Paths at which an instance publishes what others read. Its provenance holds the checksum of each."""
    return [
        *stage.outputs(params, **instance).values(),
        stage.pictures_path(instance),
        stage.metrics_path(instance),
    ]
