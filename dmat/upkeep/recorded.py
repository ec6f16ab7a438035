"""What DVC recorded of a stage against what the stage computed with.

DVC reads params.yaml again when a stage has ended. Of an edit in between, dvc.lock and the run cache say the new values
beside a result of the old ones, `dvc status` finds nothing, and the run cache brings the result back for ever.
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
from dmat.workspace import Workspace

_PROVENANCE = f"{ARTIFACTS}/provenance/"
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "": None}


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """differences: "beta is 9.0 there and was 4.5", one for each value."""

    result: DvcResult
    stage: str
    instance_name: str
    differences: tuple[str, ...]

    @property
    def name(self) -> str:
        """As DVC calls the stage instance."""
        return self.stage if self.instance_name == "all" else f"{self.stage}@{self.instance_name}"


def mismatches(workspace: Workspace) -> Iterator[Mismatch]:
    """Of dvc.lock and of the run cache. Entries of other code are left out: DVC does not bring those back."""
    try:
        now = yaml_file.read(workspace.at("params.yaml")).value
        code = code_identity.read(workspace.root).identities
    except (DmatError, FileNotFoundError):
        return
    for result in dvc_files.results(workspace.root):
        provenance = next((path for path in result.outs if path.startswith(_PROVENANCE)), None)
        copy = result.copy_of(provenance) if provenance else None
        if copy is None or not result.code or not result.code.items() <= code.items():
            continue
        try:
            about = files.read_record(copy, stage=str, instance_name=str, settings=dict)
        except DmatError:
            continue
        recorded = _settings(now, result.params, about["stage"], about["instance"])
        if recorded is None:
            continue
        there, was = tracking.parameters(recorded), tracking.parameters(about["settings"])
        differences = tuple(
            f"{name} is {there[name]} there and was {was[name]}"
            for name in sorted(there.keys() & was.keys())  # a later version of dmat may have more of them
            if there[name] != was[name]
        )
        if differences:
            yield Mismatch(result, about["stage"], about["instance"], differences)


def set_aside(workspace: Workspace) -> list[str]:
    """Takes the entries of the run cache away that give wrong results, and keeps them. Returns a sentence for each."""
    done = []
    for one in [one for one in mismatches(workspace) if not one.result.locked]:
        kept = workspace.home / "runs" / f"run-cache-{one.result.file.name}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(one.result.file, kept)
        done.append(f"DVC's run cache had a result of {one.name} under other parameters; its entry is now {kept}")
    return done


def _settings(
    now: Mapping[str, Any], recorded: Mapping[str, Any], stage: str, instance_name: str
) -> dict[str, Any] | None:
    """The settings of an instance by the values that DVC recorded, those of today for all others."""
    values: dict[str, Any] = dict(now)
    for key, value in recorded.items():
        head, _, name = key.partition(".")
        typed = _typed(value)
        values[head] = {**(values.get(head) or {}), name: typed} if name else typed
    params, _ = config.check(values)
    if params is None or stage not in STAGES:
        return None
    row = STAGES[stage]
    instance = next((one for one in row.choices(params) if row.instance_name(one) == instance_name), None)
    return None if instance is None else row.settings(params, **instance).plain()


def _typed(value: Any) -> Any:
    """What DVC wrote, of which every value was read as text."""
    if isinstance(value, dict):
        return {key: _typed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_typed(one) for one in value]
    if value in _WORDS:
        return _WORDS[value]
    if not _NUMBER.fullmatch(value):
        return value
    return int(value) if value.lstrip("+-").isdigit() else float(value)
