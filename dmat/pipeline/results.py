"""Finds the results that parameters ask for, and the chain of steps that each result comes from."""

from collections.abc import Mapping
from pathlib import Path

from dmat import ARTIFACTS, checksum_cache
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES
from dmat.report import lineage
from dmat.report.lineage import Chain, LineageStep, Makers
from dmat.workspace import InputRecord, Workspace, provenance_path


def chain(result: str, params: Params, workspace: Workspace) -> LineageStep:
    """The verified chain of steps that a result comes from.

    result: "stage/instance", "arm-seed" (its evaluation, else its training), or a path below artifacts/.
    Raises DmatError for anything else, and for a result that does not exist.
    """
    makers = _makers(params)
    with checksum_cache.bypassed():
        return Chain(makers, workspace, verify=True).step(*_resolve_result(result, makers, workspace))


def ancestors_of_inputs(inputs: Mapping[str, InputRecord], params: Params, workspace: Workspace) -> list[LineageStep]:
    """All steps that inputs come from, without verifying checksums. inputs: by name."""
    lineage_chain = Chain(_makers(params), workspace, verify=False)
    return lineage.ancestors(
        [maker for name, entry in inputs.items() for maker in lineage_chain.link(name, **entry).makers]
    )


def _makers(params: Params) -> Makers:
    """Path of an output below the project -> stage and instance that write it."""
    return {
        path: (stage_name, stage.instance_name(instance))
        for stage_name, stage in STAGES.items()
        for instance in stage.all_instances(params)
        for path in stage.outputs(params, **instance).values()
    }


def _resolve_result(result: str, makers: Makers, workspace: Workspace) -> tuple[str, str]:
    """Stage and name of the instance that `result` means. Raises DmatError as `chain` does."""
    pairs = set(makers.values())
    stage_name, _, instance_name = result.partition("/")
    path = Path(result)
    relative = (
        path.resolve().relative_to(workspace.root).as_posix()
        if path.resolve().is_relative_to(workspace.root)
        else result
    )
    maker = next((makers[output] for output in makers if relative == output or relative.startswith(f"{output}/")), None)
    candidates = [(stage_name, instance_name), ("evaluate_robust", result), ("train_robust", result), maker]
    matches = [pair for pair in candidates if pair in pairs]
    existing = [pair for pair in matches if pair and workspace.at(provenance_path(*pair)).exists()]
    if existing and existing[0]:
        return existing[0]
    if matches and matches[0]:
        raise DmatError(
            f"{workspace.at(provenance_path(*matches[0]))} does not exist; expected what {' '.join(matches[0])} writes "
            f"when it ends; run it, or `dvc checkout`"
        )
    raise DmatError(
        f"{result!r} is not a result of params.yaml; expected stage/instance, an arm and seed such as generated-1, "
        f"or a path below {ARTIFACTS}/"
    )
