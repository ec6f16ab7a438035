"""Results that parameters ask for, and the chain behind each."""

from collections.abc import Mapping
from pathlib import Path

from dmat import ARTIFACTS, checksum_cache
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES
from dmat.report import lineage
from dmat.report.lineage import Chain, LineageStep, Makers
from dmat.workspace import Workspace, provenance_path


def chain(wanted: str, params: Params, workspace: Workspace) -> LineageStep:
    """The verified chain behind "stage/instance", "arm-seed" (its evaluation, else its training), or a path below
    artifacts/. Raises DmatError for anything else, and for what is not there."""
    makers = _makers(params)
    with checksum_cache.reading_anew():
        return Chain(makers, workspace, verify=True).step(*_named(wanted, makers, workspace))


def ancestors_of_inputs(
    inputs: Mapping[str, Mapping[str, str]], params: Params, workspace: Workspace
) -> list[LineageStep]:
    """All steps that inputs come from; nothing is verified. inputs: name -> path, sha256."""
    found = Chain(_makers(params), workspace, verify=False)
    return lineage.ancestors([maker for name, entry in inputs.items() for maker in found.link(name, **entry).makers])


def _makers(params: Params) -> Makers:
    return {
        path: (stage_name, stage.instance_name(instance))
        for stage_name, stage in STAGES.items()
        for instance in stage.choices(params)
        for path in stage.outputs(params, **instance).values()
    }


def _named(wanted: str, makers: Makers, workspace: Workspace) -> tuple[str, str]:
    known = set(makers.values())
    stage, _, instance_name = wanted.partition("/")
    path = Path(wanted)
    below = (
        path.resolve().relative_to(workspace.root).as_posix()
        if path.resolve().is_relative_to(workspace.root)
        else wanted
    )
    owner = next((makers[output] for output in makers if below == output or below.startswith(f"{output}/")), None)
    candidates = [(stage, instance_name), ("evaluate_robust", wanted), ("train_robust", wanted), owner]
    named = [one for one in candidates if one in known]
    there = [one for one in named if one and workspace.at(provenance_path(*one)).exists()]
    if there and there[0]:
        return there[0]
    if named and named[0]:
        raise DmatError(
            f"{workspace.at(provenance_path(*named[0]))} does not exist; expected what {' '.join(named[0])} writes "
            f"when it ends; run it, or `dvc checkout`"
        )
    raise DmatError(
        f"{wanted!r} is nothing that params.yaml makes; expected stage/instance, an arm and seed such as generated-1, "
        f"or a path below {ARTIFACTS}/"
    )
