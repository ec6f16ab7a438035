"""Weights that explain themselves: a safetensors file and a JSON sidecar, checked against each other."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dmat import files
from dmat.errors import DmatError

SCHEMA = 1
BEST, LAST = "best.safetensors", "last.safetensors"  # of a classifier
DENOISER = "denoiser.safetensors"


def save(path: Path, state: dict[str, Tensor], sidecar: dict[str, Any]) -> None:
    """Writes `path` (.safetensors) and then its sidecar (.json), which holds the checksum of the former."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with files.writing(path) as file:
        file.write(save_tensors(tensors))
    files.write_json(path.with_suffix(".json"), {"schema": SCHEMA, "sha256": files.sha256(path), **sidecar})


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and sidecar of a "classifier" or "denoiser". Raises DmatError if they do not belong together."""
    sidecar = read_sidecar(path, kind)
    if (found := files.sha256(path)) != sidecar["sha256"]:
        raise DmatError(
            f"{path} has checksum {found[:12]}; its sidecar says {sidecar['sha256'][:12]}; bring back the "
            f"pair that was written together, or run its stage again"
        )
    return load_tensors(path.read_bytes()), sidecar


def read_sidecar(path: Path, kind: str) -> dict[str, Any]:
    """The sidecar of the weights `path`, if it is one of this kind that this dmat can read."""
    sidecar = files.read_json(path.with_suffix(".json"))
    if not isinstance(sidecar, dict) or sidecar.get("schema") != SCHEMA:
        found = sidecar.get("schema") if isinstance(sidecar, dict) else None
        raise DmatError(
            f"{path.with_suffix('.json')} has schema {found}; this dmat reads {SCHEMA}; use the dmat that wrote it"
        )
    if not isinstance(sidecar.get("sha256"), str):
        raise DmatError(f"{path.with_suffix('.json')} has no sha256; expected the checksum of {path.name}; restore it")
    if sidecar.get("kind") != kind:
        raise DmatError(f"{path} holds a {sidecar.get('kind')}; expected a {kind}; name another file")
    return sidecar


def sidecar_sha256(path: Path, sidecar: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the sidecar's file of the weights `path`. Raises DmatError if it no longer holds `sidecar`, which
    was read from it before."""
    file = path.with_suffix(".json")
    data = file.read_bytes()
    with contextlib.suppress(ValueError):
        if json.dumps(json.loads(data), sort_keys=True) == json.dumps(sidecar, sort_keys=True):
            return hashlib.sha256(data).hexdigest()
    raise DmatError(f"{file} changed while it was read; expected it to stay as it is; run the same command again")


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Loads a state dict strictly, saying which names are too many or too few."""
    if problem := misfit({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, state):
        raise DmatError(
            f"{path} does not fit the network its sidecar describes: {problem}; use the file and sidecar of one run"
        )
    model.load_state_dict(state)
    return model


def misfit(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being those with the `wanted` names and shapes; empty if nothing does."""
    if wanted.keys() != state.keys():
        missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        return f"missing {missing[:3]}, unexpected {extra[:3]}"
    other = [name for name in state if tuple(state[name].shape) != wanted[name]]
    return f"{other[0]} is {tuple(state[other[0]].shape)}, expected {wanted[other[0]]}" if other else ""
