"""Weights with their description: a safetensors file and a JSON sidecar, checked against each other."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, TypeVar, cast, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dmat import files
from dmat.errors import DmatError, first_line

SCHEMA = 1
BEST, LAST = "best.safetensors", "last.safetensors"  # of a classifier; the last also of a denoiser with snapshots
DENOISER = "denoiser.safetensors"

Kind = Literal["classifier", "denoiser"]
Module = TypeVar("Module", bound=nn.Module)
ThreatRecord = dict[str, str]  # a threat model as JSON: norm, and epsilon as written


class NetworkRecord(TypedDict):
    """A network as sidecars describe it."""

    name: str  # in NETWORKS, or an import path
    depth: int
    width: int
    activation: str  # in ACTIVATIONS


class ImportOrigin(TypedDict):
    """Where imported weights are from."""

    file: str
    sha256: str  # of that file
    format: str  # for people
    tensors: str  # key of the dictionary that holds them; "" for the file itself
    args: Mapping[str, object] | None  # args.txt of the training
    notes: list[str]  # what was assumed or left out


class Sidecar(TypedDict):
    """What the sidecars of classifiers and denoisers have in common.

    `read_sidecar` checks schema, sha256 and kind. People edit sidecars: other values are as in the file.
    """

    schema: NotRequired[int]  # added by `save`
    sha256: NotRequired[str]  # of the weights, in hex; added by `save`
    kind: str
    weights: NotRequired[str]  # "averaged" (EMA), "raw" or "unknown"
    image_shape: list[int]  # H, W, C
    licence_of_data: NotRequired[str]
    precision: NotRequired[str]  # of the training: "fp32" or "bf16"; missing in imports
    compiled: NotRequired[bool]  # True if the steps of the training were compiled; else missing


class NetworkSidecar(Sidecar):
    """What the sidecars of all classifiers have in common; `models.loading.build` checks it."""

    network: NetworkRecord
    classes: int
    channels: int
    mean: list[float]  # per channel, for pixels in [0, 1]
    std: list[float]
    class_names: NotRequired[list[str] | None]


class TrainingOrigin(TypedDict, total=False):
    """What train_robust alone writes into a sidecar. Imports and scorers have none of these keys."""

    arm: str
    loss: str
    mix_sha256: str  # of mix.json
    images_seen: int  # until these weights


class TrainingRecord(TrainingOrigin, total=False):
    """How train_robust trained a classifier. A scorer has none of these keys."""

    threat: ThreatRecord
    seed: int
    beta: float


class TrainedSidecar(NetworkSidecar, TrainingRecord):
    """The sidecar of a classifier that a stage trained."""


class ClassifierSidecar(NetworkSidecar, TrainingOrigin, total=False):
    """The sidecar of any classifier, trained or imported."""

    threat: ThreatRecord | None  # None for an import whose args.txt does not say it
    seed: object  # a whole number; for an import, the JSON value in args.txt
    beta: object  # a number; for an import, the JSON value in args.txt
    # of imports alone
    data: str  # name in DATA of `models.importing`
    licence: str  # of the weights
    origin: ImportOrigin


class DenoiserSidecar(Sidecar):
    """The sidecar of a denoiser, trained or imported; `models.denoisers.build` checks it."""

    network: Mapping[str, object]  # `config.DenoiserNetwork` or `config.DiffusersNetwork` as JSON
    label_dim: int  # number of classes; 0: the model is unconditional
    augment_dim: int  # numbers per image that describe its augmentation; 0: none
    formulation: str  # in FORMULATIONS
    sigma_data: float  # of the formulation edm
    sigma_range: list[float | None]  # noise levels that the model accepts, lowest and highest; None: no limit
    class_names: list[str]  # of the model's classes
    data_class_names: NotRequired[list[str]]  # of the data set, where they are not the model's
    # What a training alone writes: its settings, `config.DenoiserTraining` as JSON without the network.
    training: NotRequired[Mapping[str, object]]
    # What an import alone writes.
    noise_process: NotRequired[Mapping[str, object]]  # `config.NoiseProcess` as JSON; missing: that of the formulation
    licence: NotRequired[str]  # of the weights
    origin: NotRequired[ImportOrigin]


def save(path: Path, state: dict[str, Tensor], sidecar: Sidecar) -> None:
    """Writes `path` (.safetensors) and then its sidecar (.json), which holds the checksum of the weights.

    state: names -> tensors of any shape.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with files.writing(path) as file:
        file.write(save_tensors(tensors))
    files.write_json(path.with_suffix(".json"), {"schema": SCHEMA, "sha256": files.sha256(path), **sidecar})


# Tensors of any shape.
@overload
def read(path: Path, kind: Literal["classifier"]) -> tuple[dict[str, Tensor], ClassifierSidecar]: ...
@overload
def read(path: Path, kind: Literal["denoiser"]) -> tuple[dict[str, Tensor], DenoiserSidecar]: ...
def read(path: Path, kind: Kind) -> tuple[dict[str, Tensor], Sidecar]:
    """Reads state dict (tensors of any shape) and sidecar of weights.

    Raises DmatError if the two files do not belong together, or the weights are of another kind.
    """
    sidecar = read_sidecar(path, kind)
    if (checksum := files.sha256(path)) != sidecar["sha256"]:
        raise DmatError(
            f"{path} has checksum {checksum[:12]}; its sidecar says {sidecar['sha256'][:12]}; bring back the "
            f"pair that was written together, or run its stage again"
        )
    try:
        return load_tensors(files.read_bytes(path)), sidecar
    except SafetensorError as error:
        raise DmatError(
            f"{path} is not a .safetensors file ({first_line(error)}); expected the weights that were written with its "
            f"sidecar; bring back the pair, or run its stage again"
        ) from None


@overload
def read_sidecar(path: Path, kind: Literal["classifier"]) -> ClassifierSidecar: ...
@overload
def read_sidecar(path: Path, kind: Literal["denoiser"]) -> DenoiserSidecar: ...
def read_sidecar(path: Path, kind: Kind) -> ClassifierSidecar | DenoiserSidecar:
    """Reads the sidecar of the weights `path`. Raises DmatError if it is of another kind or schema."""
    sidecar = files.read_json(path.with_suffix(".json"))
    if not isinstance(sidecar, dict) or sidecar.get("schema") != SCHEMA:
        schema = sidecar.get("schema") if isinstance(sidecar, dict) else None
        raise DmatError(
            f"{path.with_suffix('.json')} has schema {schema}; this dmat reads {SCHEMA}; use the dmat that wrote it"
        )
    if not isinstance(sidecar.get("sha256"), str):
        raise DmatError(f"{path.with_suffix('.json')} has no sha256; expected the checksum of {path.name}; restore it")
    if sidecar.get("kind") != kind:
        raise DmatError(f"{path} holds a {sidecar.get('kind')}; expected a {kind}; name another file")
    return cast(ClassifierSidecar | DenoiserSidecar, sidecar)


def sidecar_sha256(path: Path, sidecar: Sidecar) -> str:
    """Returns the SHA-256, in hex, of the sidecar file of the weights `path`.

    Raises DmatError if the file no longer holds `sidecar`, which was read from it before.
    """
    file = path.with_suffix(".json")
    data = files.read_bytes(file)
    with contextlib.suppress(ValueError):
        if files.parse_json(data) == sidecar:
            return hashlib.sha256(data).hexdigest()
    raise DmatError(f"{file} changed while it was read; expected it to stay as it is; run the same command again")


def licences(sidecar: Sidecar) -> dict[str, str]:
    """The licences in a sidecar that are not unknown: of imported weights, and of the images that others learned."""
    values = {key: cast(Mapping[str, str | None], sidecar).get(key) for key in ("licence", "licence_of_data")}
    return {key: value for key, value in values.items() if value and value != "unknown"}


def fill(build: Callable[[], Module], state: dict[str, Tensor], path: Path) -> Module:
    """Builds a model, loads a state dict (tensors of any shape) into it and returns it.

    The sizes of a network come from a sidecar, which people edit: no memory is asked for before they are known to fit
    the file. Raises DmatError if names are missing or unexpected, or a shape differs.
    """
    with torch.device("meta"):  # shapes only
        model = build()
    if problem := misfit({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state):
        raise DmatError(
            f"{path} does not fit the network its sidecar describes: {problem}; use the file and sidecar of one run"
        )
    model = build()
    model.load_state_dict(state)
    return model


def misfit(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """Describes how tensors (of any shape) differ from the expected names and shapes; empty if they do not."""
    if expected.keys() != state.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        return f"missing {missing[:3]}, unexpected {extra[:3]}"
    wrong = [name for name in state if tuple(state[name].shape) != expected[name]]
    return f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, expected {expected[wrong[0]]}" if wrong else ""
