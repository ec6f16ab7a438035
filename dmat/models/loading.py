"""From weights and sidecar back to a network, and what people want to know of such a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmat import files
from dmat.errors import DmatError
from dmat.robust.networks import NETWORKS, Classifier, Facts
from dmat.training import weights

SUFFIX = ".safetensors"


def open_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier on the CPU, in evaluation mode and without gradients, and its sidecar. Both files are checked."""
    state, sidecar = weights.read(path, "classifier")
    model = build(sidecar, path)
    weights.fill(model, state, path)
    model.eval().requires_grad_(False)
    return model, sidecar


def load_model(path: str | Path, device: str = "cpu") -> Classifier:
    """What `dmat.load_model` does."""
    path = expect_pair(Path(path))
    model, _ = open_classifier(path)
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise DmatError(
            f"device is {device!r} ({str(error).splitlines()[0]}); expected one that torch finds here; say cpu or cuda"
        ) from None


def build(sidecar: Mapping[str, Any], path: Path) -> Classifier:
    """The network that a sidecar describes, with initial weights."""
    try:
        spec = sidecar["network"]
        facts = Facts(sidecar["classes"], sidecar["channels"], tuple(sidecar["mean"]), tuple(sidecar["std"]))
        name, shape = spec["name"], (spec["depth"], spec["width"], spec["activation"])
        _, _, _ = sidecar["image_shape"]
    except (KeyError, TypeError, ValueError) as error:
        raise DmatError(
            f"{path.with_suffix('.json')} does not describe a network ({type(error).__name__}: {error}); expected "
            f"network, classes, channels, mean, std and image_shape; bring back the sidecar that was written with "
            f"{path.name}"
        ) from None
    if name not in NETWORKS:
        raise DmatError(
            f"{path.with_suffix('.json')} names the network {name!r}; this dmat has {', '.join(NETWORKS)}; "
            f"use the dmat that wrote it"
        )
    return NETWORKS[name](facts, *shape)


def expect_pair(path: Path) -> Path:
    """The path, if weights and sidecar are there. For files that people name; a stage's inputs were checked before."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected the {SUFFIX} file of a classifier; give its path")
    if path.suffix != SUFFIX:
        raise DmatError(
            f"{path} is no {SUFFIX} file; expected one that a training or an import wrote; "
            f"call `dmat models import {path}` first"
        )
    if not path.with_suffix(".json").is_file():
        raise DmatError(
            f"{path} has no sidecar {path.with_suffix('.json').name} beside it; expected the two that were written "
            f"together; bring it, or call `dmat models import {path}` if the file is from elsewhere"
        )
    return path


def describe(path: Path) -> dict[str, Any]:
    """The sidecar of a classifier with `file`, `parameters`, `found_sha256` and `checksum_ok` added."""
    sidecar = weights.read_sidecar(expect_pair(path), "classifier")
    with torch.device("meta"):  # shapes only
        model = build(sidecar, path)
    found = files.sha256(path)
    return {
        **sidecar,
        "file": str(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "found_sha256": found,
        "checksum_ok": found == sidecar["sha256"],
    }
