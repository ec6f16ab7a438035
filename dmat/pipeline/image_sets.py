"""Image sets by name or folder, and what their project knows of them: generator, measures, card."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dmat import ARTIFACTS, config, files
from dmat.config import Params
from dmat.data import selections, set_inspection
from dmat.data.shards import MANIFEST
from dmat.errors import DmatError, did_you_mean
from dmat.pipeline.stages import STAGES
from dmat.report import data_card
from dmat.workspace import Workspace

if TYPE_CHECKING:
    from dmat.training.weights import DenoiserSidecar


@dataclasses.dataclass(frozen=True)
class LocatedSet:
    """The folder of a set. name: in params.yaml, or of the folder. params: of the project; None for a folder."""

    folder: Path
    name: str
    params: Params | None = None


def find(path_or_set: str, workspace: Workspace) -> LocatedSet:
    """The set that a user names: a folder with a manifest, or a name of `image_sets` in params.yaml.

    Raises DmatError if it is neither, or the set was not generated yet.
    """
    path = Path(path_or_set)
    # A name without a slash is a set of the project, if it has one: `./edm18` is the folder beside params.yaml.
    if path.name == path_or_set and workspace.at("params.yaml").is_file():
        params = config.load(workspace.at("params.yaml"))
        if path_or_set in params.image_sets or not path.exists():
            folder = output_folder(path_or_set, params, workspace)
            if not (folder / MANIFEST).is_file():
                raise files.missing(folder / MANIFEST)
            return LocatedSet(folder, path_or_set, params)
    if (path / MANIFEST).is_file():
        return LocatedSet(path, path.resolve().name)
    state = f"has no {MANIFEST}" if path.exists() else "does not exist"
    raise DmatError(
        f"{path} {state}; expected the folder of an image set, or a set of params.yaml here; give one of them"
    )


def output_folder(name: str, params: Params, workspace: Workspace) -> Path:
    """The folder of a set of params.yaml, which may not exist yet. Raises DmatError if it names no such set."""
    if name not in params.image_sets:
        raise DmatError(
            f"{name} is not an image set of params.yaml; expected one of {', '.join(params.image_sets) or '(none)'}; "
            f"name one of them; `info`, `verify`, `sheet`, `export` and `card` take the folder of a set too"
            f"{did_you_mean(name, params.image_sets)}"
        )
    return workspace.at(STAGES["generate_images"].outputs(params, image_set=name)["images"])


def card(located: LocatedSet, workspace: Workspace, images: int | None = None, layout: str = data_card.SHARDS) -> str:
    """The card of a set, with its generator and measures where the project has them.

    images: how many of the set are published; None: all. layout: as in `data_card.text`.
    """
    description = set_inspection.describe(located.folder)
    return data_card.text(
        located.name,
        description,
        min(images or description["images"], description["images"]),
        layout,
        _generator(located.params, description["generator_sha256"], workspace),
        _measures(located, description["manifest_sha256"], workspace),
    )


def _generator(params: Params | None, sha256: str | None, workspace: Workspace) -> "DenoiserSidecar | None":
    """The sidecar of the project's generator with these weights; None without one."""
    from dmat.models import denoisers  # not above: they load torch, which only a card needs
    from dmat.training import weights

    for name in params.generators if params else ():
        path = workspace.at(f"{ARTIFACTS}/train_diffusion/{name}") / weights.DENOISER
        if path.with_suffix(".json").is_file() and (sidecar := denoisers.read_sidecar(path))["sha256"] == sha256:
            return sidecar
    return None


def _measures(located: LocatedSet, manifest_sha256: str, workspace: Workspace) -> Mapping[str, Mapping[str, object]]:
    """Selection -> its measures, of the selections of exactly this set that were measured."""
    measures: dict[str, Mapping[str, object]] = {}
    for name, selection in (located.params.selections if located.params else {}).items():
        path = workspace.at(STAGES["measure_images"].metrics_path({"selection": name}))
        selected = workspace.at(f"{ARTIFACTS}/select_images/{name}")
        if selection.image_set != located.name or not path.is_file() or not (selected / selections.SELECTION).is_file():
            continue
        if selections.read_selection(selected)["manifest_sha256"] == manifest_sha256:
            measures[name] = files.read_record(path, dict[str, object])
    return measures
