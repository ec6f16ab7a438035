"""Compares the parameters that DVC recorded of a stage with those that the stage used.

DVC reads params.yaml again when a stage has ended. After an edit in between, dvc.lock and the run cache have the new
values beside a result of the old ones. `dvc status` then finds no difference, and the run cache restores the wrong
result again and again.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dmat import ARTIFACTS, config, files, tracking, yaml_file
from dmat.errors import DmatError
from dmat.pipeline import code_identity
from dmat.pipeline.stages import STAGES
from dmat.upkeep import dvc_files
from dmat.upkeep.dvc_files import DvcResult
from dmat.workspace import Provenance, Workspace

_PROVENANCE = f"{ARTIFACTS}/provenance/"
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "": None}


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A result recorded with wrong parameters. differences: such as "beta is 9.0 there and was 4.5", one per value."""

    result: DvcResult
    stage_name: str
    instance_name: str
    differences: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the stage instance in DVC."""
        return self.stage_name if self.instance_name == "all" else f"{self.stage_name}@{self.instance_name}"


def mismatches(workspace: Workspace) -> Iterator[Mismatch]:
    """Wrong entries of dvc.lock and of the run cache. Entries of other code do not count: DVC never restores them."""
    try:
        current_params = yaml_file.read(workspace.at("params.yaml")).value
        code = code_identity.read(workspace.root).identities
    except (DmatError, FileNotFoundError):
        return
    for result in dvc_files.results(workspace.root):
        provenance = next((path for path in result.outs if path.startswith(_PROVENANCE)), None)
        cached = result.cached_copy(provenance) if provenance else None
        if cached is None or not result.code or not result.code.items() <= code.items():
            continue
        try:
            provenance_record = files.read_record(cached, Provenance)
        except DmatError:
            continue
        dvc_settings = _recorded_settings(
            current_params, result.params, provenance_record["stage"], provenance_record["instance"]
        )
        if dvc_settings is None:
            continue
        recorded_parameters, actual_parameters = (
            tracking.parameters(dvc_settings),
            tracking.parameters(provenance_record["settings"]),
        )
        # Only the common ones: a later version of dmat may have more parameters.
        differences = tuple(
            f"{name} is {recorded_parameters[name]} there and was {actual_parameters[name]}"
            for name in sorted(recorded_parameters.keys() & actual_parameters.keys())
            if recorded_parameters[name] != actual_parameters[name]
        )
        if differences:
            yield Mismatch(result, provenance_record["stage"], provenance_record["instance"], differences)


def set_aside(workspace: Workspace) -> list[str]:
    """Moves wrong entries out of the run cache into `runs/`. Returns a sentence for each."""
    sentences = []
    for mismatch in [mismatch for mismatch in mismatches(workspace) if not mismatch.result.locked]:
        target = workspace.home / "runs" / f"run-cache-{mismatch.result.file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(mismatch.result.file, target)
        sentences.append(
            f"DVC's run cache had a result of {mismatch.name} with wrong parameters; its entry was moved to {target}"
        )
    return sentences


def _recorded_settings(
    current_params: Mapping[str, Any], recorded: Mapping[str, Any], stage_name: str, instance_name: str
) -> dict[str, Any] | None:
    """Settings of an instance with the values that DVC recorded, and the present values of all others.

    None if these values are invalid, or if no such stage or instance exists now.
    """
    values: dict[str, Any] = dict(current_params)
    for key, value in recorded.items():
        head, _, name = key.partition(".")
        typed = _parse_value(value)
        values[head] = {**(values.get(head) or {}), name: typed} if name else typed
    params, _ = config.check(values)
    if params is None or stage_name not in STAGES:
        return None
    stage = STAGES[stage_name]
    instance = next(
        (candidate for candidate in stage.all_instances(params) if stage.instance_name(candidate) == instance_name),
        None,
    )
    return None if instance is None else stage.settings(params, **instance).plain()


def _parse_value(value: Any) -> Any:
    """A value of a file of DVC, which was read as text, with its type: bool, None, int, float or str; also nested."""
    if isinstance(value, dict):
        return {key: _parse_value(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_parse_value(element) for element in value]
    if value in _CONSTANTS:
        return _CONSTANTS[value]
    if not _NUMBER.fullmatch(value):
        return value
    return int(value) if value.lstrip("+-").isdigit() else float(value)
