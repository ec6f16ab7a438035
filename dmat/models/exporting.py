"""Exports a classifier of dmat to a file that the code of other projects loads with strict=True.

Both forms hold tensors and nothing else.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmat import files
from dmat.errors import DmatError
from dmat.models.loading import expect_pair, open_classifier
from dmat.training.weights import ClassifierSidecar, licences

CLASSES = {"wide_resnet": "DMWideResNet", "preact_resnet": "DMPreActResNet"}  # of RobustBench; they compute the same
_POOLED_SIZE = 32  # height and width in pixels of the images that those classes are for
_POSITIONS = {"wide_resnet": 8, "preact_resnet": 4}  # rows and columns of their final average pooling


def _robustbench(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:  # tensors of any shape
    return {"state_dict": dict(state)}


def _published(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:  # tensors of any shape
    return {"model_state_dict": {f"module.0.{name}": tensor for name, tensor in state.items()}}


FORMS: dict[str, Callable[[Mapping[str, Tensor]], dict[str, dict[str, Tensor]]]] = {
    "robustbench": _robustbench,  # for CLASSES: names as here, under "state_dict"
    "published": _published,  # as Wang et al. 2023 store it: DataParallel around a Sequential
}


def export(path: Path, form: str, target: Path) -> list[str]:
    """Writes the classifier `path` to `target` in one of FORMS. Returns notes for whoever loads the file.

    Raises DmatError if the form is unknown, the network has no counterpart in CLASSES, or `target` exists.
    """
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
    # cloned tensors: no views, and no memory shared with the model
    with files.writing(target) as file:
        torch.save(FORMS[form]({name: tensor.clone() for name, tensor in model.state_dict().items()}), file)
    return [_constructor(sidecar), *_notes(sidecar, form)]


def _constructor(sidecar: ClassifierSidecar) -> str:
    """A note with the constructor call that fits the tensors: activation and normalisation are not among them."""
    network = sidecar["network"]
    activation = {"silu": "torch.nn.SiLU", "relu": "torch.nn.ReLU"}[network["activation"]]
    width = "" if network["name"] == "preact_resnet" else f"width={network['width']}, "
    return (
        f"the tensors fit {CLASSES[network['name']]}(num_classes={sidecar['classes']}, depth={network['depth']}, "
        f"{width}activation_fn={activation}, mean={tuple(sidecar['mean'])}, std={tuple(sidecar['std'])}, "
        f"num_input_channels={sidecar['channels']})"
    )


def _notes(sidecar: ClassifierSidecar, form: str) -> list[str]:
    """Notes on images of another size, on weights that are not averaged, and on licences."""
    height, width, _ = sidecar["image_shape"]
    notes = []
    if (height, width) != (_POOLED_SIZE, _POOLED_SIZE):
        positions = _POSITIONS[sidecar["network"]["name"]]
        notes.append(
            f"that class averages over {positions} x {positions} positions, which are all positions only for images of "
            f"{_POOLED_SIZE} x {_POOLED_SIZE} pixels; this model is for {height} x {width}"
        )
    if form == "published" and sidecar.get("weights") != "averaged":
        notes.append(f"readers expect averaged weights in model_state_dict; these are {sidecar.get('weights')}")
    for key, licence in licences(sidecar).items():
        of = "of the weights" if key == "licence" else "of the images that it learned from"
        notes.append(f"the file says nothing of the licence {of}, {licence}: pass it on with the file")
    return notes
