"""Builds a network from weights and sidecar, and describes such files for people."""

import math
from pathlib import Path
from typing import TypeGuard, cast

import torch

from dmat import files, plugins
from dmat.errors import DmatError, first_line
from dmat.robust.networks import ACTIVATIONS, NETWORKS, Classifier, DataSpec
from dmat.training import weights
from dmat.training.weights import ClassifierSidecar, Kind, NetworkRecord

SUFFIX = ".safetensors"
_MAX_SIZE = 10_000  # of any length in a sidecar: building a deeper network would take minutes before it is refused


class ModelDescription(ClassifierSidecar):
    """A sidecar and what the files themselves say."""

    file: str  # path of the weights
    parameters: int  # number of parameters
    found_sha256: str  # actual checksum of the weights
    checksum_ok: bool  # whether it is the one in the sidecar


def open_classifier(path: Path) -> tuple[Classifier, ClassifierSidecar]:
    """Loads a classifier on the CPU, in evaluation mode and without gradients, and its sidecar.

    Raises DmatError if one of the two files is missing, damaged or does not fit the other.
    """
    state, sidecar = weights.read(path, "classifier")
    model = weights.fill(lambda: build(sidecar, path), state, path)
    model.eval().requires_grad_(False)
    return model, sidecar


def load_model(path: str | Path, device: str = "cpu") -> Classifier:
    """Loads a classifier for `dmat.load_model`: in evaluation mode, without gradients, on `device`.

    Raises DmatError if a file is missing or damaged, or if torch does not have the device.
    """
    path = expect_pair(Path(path))
    model, _ = open_classifier(path)
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise DmatError(
            f"device is {device!r} ({str(error).splitlines()[0]}); expected one that torch finds here; say cpu or cuda"
        ) from None


def build(sidecar: ClassifierSidecar, path: Path) -> Classifier:
    """Builds the network that a sidecar describes, with initial weights.

    Raises DmatError if the sidecar is incomplete or has impossible values: people edit sidecars.
    """
    try:
        spec = sidecar["network"]
        data_spec = DataSpec(sidecar["classes"], sidecar["channels"], tuple(sidecar["mean"]), tuple(sidecar["std"]))
        name, shape = spec["name"], (spec["depth"], spec["width"], spec["activation"])
        _expect_possible(data_spec, spec, sidecar)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DmatError(
            f"{path.with_suffix('.json')} does not describe a network ({type(error).__name__}: {error}); expected "
            f"network, classes, channels, mean, std and image_shape; bring back the sidecar that was written with "
            f"{path.name}"
        ) from None
    if not (isinstance(name, str) and plugins.is_path(name)) and name not in list(NETWORKS):
        raise DmatError(
            f"{path.with_suffix('.json')} names the network {shown(name)}; this dmat has {', '.join(NETWORKS)}; "
            f"use the dmat that wrote it"
        )
    network = plugins.find(NETWORKS, name)
    if name not in NETWORKS:  # the errors of a plugin are its own
        return network(data_spec, *shape)
    try:
        return network(data_spec, *shape)
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise DmatError(
            f"{path.with_suffix('.json')} describes a network that cannot be built ({first_line(error)}); expected "
            f"depth and width of a {name}; bring back the sidecar that was written with {path.name}"
        ) from None


def _expect_possible(data_spec: DataSpec, spec: NetworkRecord, sidecar: ClassifierSidecar) -> None:
    """Raises ValueError for the first value that no network can have; the message names the value and what is valid."""
    names = sidecar.get("class_names")
    for key, value, valid, expected in (
        (
            "classes",
            data_spec.classes,
            _is_whole_number(data_spec.classes, 2),
            f"a whole number from 2 to {_MAX_SIZE:,}",
        ),
        (
            "channels",
            data_spec.channels,
            _is_whole_number(data_spec.channels, 1),
            f"a whole number from 1 to {_MAX_SIZE:,}",
        ),
        ("depth", spec["depth"], _is_whole_number(spec["depth"], 1), f"a whole number from 1 to {_MAX_SIZE:,}"),
        ("width", spec["width"], _is_whole_number(spec["width"], 0), f"a whole number up to {_MAX_SIZE:,}"),
        ("activation", spec["activation"], spec["activation"] in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
        (
            "mean",
            data_spec.mean,
            _are_finite_numbers(data_spec.mean, data_spec.channels),
            f"{data_spec.channels} numbers",
        ),
        (
            "std",
            data_spec.std,
            _are_finite_numbers(data_spec.std, data_spec.channels) and min(data_spec.std) > 0,
            "as many numbers above 0",
        ),
        (
            "image_shape",
            sidecar["image_shape"],
            _is_image_shape(sidecar["image_shape"], data_spec.channels),
            "[H, W, channels]",
        ),
        (
            "class_names",
            names,
            names is None or _is_list(names, data_spec.classes),
            f"a list of {data_spec.classes} names",
        ),
    ):
        if not valid:
            raise ValueError(f"{key} is {shown(value)}, not {expected}")


def shown(value: object) -> str:
    """A value of a sidecar for a message: its beginning, and of a large number its digits."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_whole_number(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= _MAX_SIZE


def _are_finite_numbers(values: tuple[object, ...], count: int) -> bool:
    return len(values) == count and all(isinstance(number, int | float) and math.isfinite(number) for number in values)


def _is_image_shape(value: object, channels: int) -> bool:
    return _is_list(value, 3) and all(_is_whole_number(length, 1) for length in value) and value[2] == channels


def _is_list(value: object, count: int) -> TypeGuard[list[object]]:
    return isinstance(value, list) and len(value) == count


def expect_pair(path: Path) -> Path:
    """Returns the path. Raises DmatError unless it is a .safetensors file with a sidecar beside it.

    For files that people name; the inputs of a stage were checked before.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DmatError(f"{path} {state}; expected the {SUFFIX} file of a classifier; give its path")
    if path.suffix != SUFFIX:
        raise DmatError(
            f"{path} is not a {SUFFIX} file; expected one that a training or an import wrote; "
            f"call `dmat models import {path}` first"
        )
    if not path.with_suffix(".json").is_file():
        raise DmatError(
            f"{path} has no sidecar {path.with_suffix('.json').name} beside it; expected the two that were written "
            f"together; bring it, or call `dmat models import {path}` if the file is from elsewhere"
        )
    return path


def kind(path: Path) -> Kind:
    """What the sidecar of weights says that they are.

    Raises DmatError unless `path` is a .safetensors file with a sidecar beside it that says one of the two.
    """
    file = expect_pair(path).with_suffix(".json")
    sidecar = files.read_json(file)
    value = sidecar.get("kind") if isinstance(sidecar, dict) else None
    if value not in ("classifier", "denoiser"):
        raise DmatError(
            f"{file} says that {path.name} is a {str(value)[:60]}; expected kind classifier or denoiser; restore the "
            f"sidecar that was written with it"
        )
    return cast(Kind, value)


def describe(path: Path) -> ModelDescription:
    """The sidecar of a classifier with the four keys of `ModelDescription` added, for people and for `--json`."""
    sidecar = weights.read_sidecar(expect_pair(path), "classifier")
    with torch.device("meta"):  # shapes only, no memory
        model = build(sidecar, path)
    checksum = files.sha256(path)
    return {
        **sidecar,
        "file": str(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "found_sha256": checksum,
        "checksum_ok": checksum == sidecar["sha256"],
    }
