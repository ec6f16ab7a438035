"""Weights that explain themselves: a safetensors file and a JSON sidecar, checked against each other."""

from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dmat import files
from dmat.errors import DmatError

SCHEMA = 1


def save(path: Path, state: dict[str, Tensor], sidecar: dict[str, Any]) -> None:
    """Writes `path` (.safetensors) and then its sidecar (.json), which holds the checksum of the former."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with files.writing(path) as file:
        file.write(save_tensors(tensors))
    files.write_json(path.with_suffix(".json"), {"schema": SCHEMA, "sha256": files.sha256(path), **sidecar})


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and sidecar of a "classifier" or "denoiser". Raises DmatError if they do not belong together."""
    sidecar = files.read_json(path.with_suffix(".json"))
    if sidecar.get("schema") != SCHEMA:
        raise DmatError(
            f"{path.with_suffix('.json')} has schema {sidecar.get('schema')}; this dmat reads {SCHEMA}; "
            f"use the dmat that wrote it"
        )
    if sidecar.get("kind") != kind:
        raise DmatError(f"{path} holds a {sidecar.get('kind')}; expected a {kind}; name another file")
    if (found := files.sha256(path)) != sidecar["sha256"]:
        raise DmatError(
            f"{path} has checksum {found[:12]}; its sidecar says {sidecar['sha256'][:12]}; bring back the "
            f"pair that was written together, or run its stage again"
        )
    return load_tensors(path.read_bytes()), sidecar


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """Loads a state dict strictly, saying which names are too many or too few."""
    wanted, found = set(model.state_dict()), set(state)
    if wanted != found:
        raise DmatError(
            f"{path} does not fit the network its sidecar describes: missing {sorted(wanted - found)[:3]}, "
            f"unexpected {sorted(found - wanted)[:3]}; use the file and sidecar of one run"
        )
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if other := [name for name in state if state[name].shape != shapes[name]]:
        raise DmatError(
            f"{path} does not fit the network its sidecar describes: {other[0]} is {tuple(state[other[0]].shape)}, "
            f"expected {tuple(shapes[other[0]])}; use the file and sidecar of one run"
        )
    model.load_state_dict(state)
    return model
