"""Results that parameters ask for, and the chain behind each."""

from collections.abc import Mapping
from pathlib import Path

from dmat import ARTIFACTS, checksum_memory
from dmat.config import Params
from dmat.errors import DmatError
from dmat.pipeline.stages import STAGES
from dmat.report import lineage
from dmat.report.lineage import Chain, Makers, Step
from dmat.workspace import Workspace, provenance_path


def chain(wanted: str, params: Params, place: Workspace) -> Step:
    """The verified chain behind "stage/instance", "arm-seed" (its evaluation, else its training), or a path below
    artifacts/. Raises DmatError for anything else, and for what is not there."""
    makers = _makers(params)
    with checksum_memory.reading_anew():
        return Chain(makers, place, verify=True).step(*_named(wanted, makers, place))


def behind_inputs(inputs: Mapping[str, Mapping[str, str]], params: Params, place: Workspace) -> list[Step]:
    """All steps that inputs come from; nothing is verified. inputs: name -> path, sha256."""
    found = Chain(_makers(params), place, verify=False)
    return lineage.behind([maker for name, entry in inputs.items() for maker in found.link(name, **entry).makers])


def _makers(params: Params) -> Makers:
    return {
        path: (word, stage.instance(chosen))
        for word, stage in STAGES.items()
        for chosen in stage.choices(params)
        for path in stage.outputs(params, **chosen).values()
    }


def _named(wanted: str, makers: Makers, place: Workspace) -> tuple[str, str]:
    known = set(makers.values())
    stage, _, instance = wanted.partition("/")
    path = Path(wanted)
    below = path.resolve().relative_to(place.root).as_posix() if path.resolve().is_relative_to(place.root) else wanted
    owner = next((makers[output] for output in makers if below == output or below.startswith(f"{output}/")), None)
    candidates = [(stage, instance), ("evaluate_robust", wanted), ("train_robust", wanted), owner]
    named = [one for one in candidates if one in known]
    there = [one for one in named if one and place.at(provenance_path(*one)).exists()]
    if there and there[0]:
        return there[0]
    if named and named[0]:
        raise DmatError(
            f"{place.at(provenance_path(*named[0]))} does not exist; expected what {' '.join(named[0])} writes "
            f"when it ends; run it, or `dvc checkout`"
        )
    raise DmatError(
        f"{wanted!r} is nothing that params.yaml makes; expected stage/instance, an arm and seed such as generated-1, "
        f"or a path below {ARTIFACTS}/"
    )
