"""A classifier of dmat -> a file that the code of others loads strictly. Both forms hold tensors and nothing else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmat import files
from dmat.errors import DmatError
from dmat.models.loading import expect_pair, open_classifier

CLASSES = {"wide_resnet": "DMWideResNet", "preact_resnet": "DMPreActResNet"}  # RobustBench's, which compute the same
_POOLED = 32  # height and width of the images that those classes are for:
_POSITIONS = {"wide_resnet": 8, "preact_resnet": 4}  # they end with a mean over so many rows and columns


def _robustbench(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": dict(state)}


def _published(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"model_state_dict": {f"module.0.{name}": tensor for name, tensor in state.items()}}


FORMS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Any]]] = {
    "robustbench": _robustbench,  # for CLASSES: names as here, under "state_dict"
    "published": _published,  # as Wang et al. 2023 store it: DataParallel around a Sequential
}


def export(path: Path, form: str, target: Path) -> list[str]:
    """Writes the classifier `path` to `target` in one of FORMS. Returns what its reader must know."""
    if form not in FORMS:
        raise DmatError(f"--to is {form!r}; expected one of {', '.join(FORMS)}")
    model, sidecar = open_classifier(expect_pair(path))
    network = sidecar["network"]
    if network["name"] not in CLASSES:
        raise DmatError(
            f"{path} is a {network['name']}; expected a {' or '.join(CLASSES)}, the networks that {form} has; export "
            f"another model"
        )
    if target.exists():
        raise DmatError(f"{target} exists; expected a new name; give another or move the file away")
    # plain tensors of their own: no memory shared with the model, no views
    with files.writing(target) as file:
        torch.save(FORMS[form]({name: tensor.clone() for name, tensor in model.state_dict().items()}), file)
    return [_constructor(sidecar), *_notes(sidecar, form)]


def _constructor(sidecar: Mapping[str, Any]) -> str:
    """What these tensors fit: neither activation nor normalisation is among them."""
    network = sidecar["network"]
    activation = {"silu": "torch.nn.SiLU", "relu": "torch.nn.ReLU"}[network["activation"]]
    width = "" if network["name"] == "preact_resnet" else f"width={network['width']}, "
    return (
        f"they fit {CLASSES[network['name']]}(num_classes={sidecar['classes']}, depth={network['depth']}, {width}"
        f"activation_fn={activation}, mean={tuple(sidecar['mean'])}, std={tuple(sidecar['std'])}, "
        f"num_input_channels={sidecar['channels']})"
    )


def _notes(sidecar: Mapping[str, Any], form: str) -> list[str]:
    height, width, _ = sidecar["image_shape"]
    notes = []
    if (height, width) != (_POOLED, _POOLED):
        rows = _POSITIONS[sidecar["network"]["name"]]
        notes.append(
            f"that class takes means over {rows} x {rows} positions, which is all of them for {_POOLED} x {_POOLED} "
            f"images only; this model is for {height} x {width}"
        )
    if form == "published" and sidecar.get("weights") != "averaged":
        notes.append(f"readers take model_state_dict for averaged weights; these are {sidecar.get('weights')}")
    return notes
