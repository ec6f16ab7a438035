"""From weights and sidecar back to a network, and what people want to know of such a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dmat import files, plugins
from dmat.errors import DmatError
from dmat.robust.networks import ACTIVATIONS, NETWORKS, Classifier, DataSpec
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
    """The network that a sidecar describes, with initial weights. Raises DmatError: sidecars are edited by hand."""
    try:
        spec = sidecar["network"]
        data_spec = DataSpec(sidecar["classes"], sidecar["channels"], tuple(sidecar["mean"]), tuple(sidecar["std"]))
        name, shape = spec["name"], (spec["depth"], spec["width"], spec["activation"])
        _expect_possible(data_spec, spec, sidecar)
    except (KeyError, TypeError, ValueError) as error:
        raise DmatError(
            f"{path.with_suffix('.json')} does not describe a network ({type(error).__name__}: {error}); expected "
            f"network, classes, channels, mean, std and image_shape; bring back the sidecar that was written with "
            f"{path.name}"
        ) from None
    if not (isinstance(name, str) and plugins.is_path(name)) and name not in NETWORKS:
        raise DmatError(
            f"{path.with_suffix('.json')} names the network {name!r}; this dmat has {', '.join(NETWORKS)}; "
            f"use the dmat that wrote it"
        )
    return plugins.find(NETWORKS, name)(data_spec, *shape)


def _expect_possible(data_spec: DataSpec, spec: Mapping[str, Any], sidecar: Mapping[str, Any]) -> None:
    """Raises ValueError with what is found and expected of the first value that no network can have."""
    names = sidecar.get("class_names")
    for key, value, fits, expected in (
        ("classes", data_spec.classes, _whole(data_spec.classes, 2), "a whole number from 2"),
        ("channels", data_spec.channels, _whole(data_spec.channels, 1), "a whole number from 1"),
        ("depth", spec["depth"], _whole(spec["depth"], 1), "a whole number from 1"),
        ("width", spec["width"], _whole(spec["width"], 0), "a whole number"),
        ("activation", spec["activation"], spec["activation"] in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
        ("mean", data_spec.mean, _numbers(data_spec.mean, data_spec.channels), f"{data_spec.channels} numbers"),
        (
            "std",
            data_spec.std,
            _numbers(data_spec.std, data_spec.channels) and min(data_spec.std) > 0,
            "as many numbers above 0",
        ),
        ("image_shape", sidecar["image_shape"], _shape(sidecar["image_shape"], data_spec.channels), "[H, W, channels]"),
        (
            "class_names",
            names,
            names is None or _list(names, data_spec.classes),
            f"a list of {data_spec.classes} names",
        ),
    ):
        if not fits:
            raise ValueError(f"{key} is {value!r}, not {expected}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _numbers(values: tuple[Any, ...], count: int) -> bool:
    return len(values) == count and all(isinstance(one, int | float) and math.isfinite(one) for one in values)


def _shape(value: Any, channels: int) -> bool:
    return _list(value, 3) and all(_whole(one, 1) for one in value) and value[2] == channels


def _list(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def expect_pair(path: Path) -> Path:
    """The path, if weights and sidecar are there. For files that people name; a stage's inputs were checked before."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DmatError(f"{path} {state}; expected the {SUFFIX} file of a classifier; give its path")
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
