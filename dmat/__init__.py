"""dmat: does better generated data make classifiers more robust?

The library behind the `dmat` command. Importing it loads neither torch nor mlflow; the subpackages do.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dmat.evaluation.library import LibraryResult

__version__ = "0.1.0"

ARTIFACTS = "artifacts"  # folder of all outputs of stages, in the project
SOURCES = "sources"  # folder of external data, or links to it, in the project
NONE = "none"  # in params.yaml: a reference to nothing, as of an arm without generated images


def load_model(path: str | Path, device: str = "cpu") -> "torch.nn.Module":
    """Loads a classifier in evaluation mode without gradients: images [B, C, H, W] in [0, 1] -> logits [B, K].

    path: a .safetensors file that a training or `dmat models import` wrote, with its sidecar beside it. Raises
    DmatError if the two do not belong together.
    """
    loading = importlib.import_module("dmat.models.loading")  # by name, because all modules import this file (layers)
    return loading.load_model(path, device)


def evaluate(
    model: "torch.nn.Module",
    images: "torch.Tensor | np.ndarray",
    labels: "torch.Tensor | np.ndarray",
    norm: str = "linf",
    epsilon: float | str = "8/255",
    *,
    auto_attack: str | tuple[str, ...] = "standard",
    batch: int = 250,
    folder: str | Path | None = None,
    quiet: bool = False,
    **settings: object,
) -> "LibraryResult":
    """Evaluates any torch module: accuracy without attack, under FGSM, PGD and AutoAttack, and checks of the result.

    model: images [B, C, H, W] in [0, 1] -> logits [B, K], float32; normalisation belongs inside. It stays on its device
    and keeps its mode; inside it is in evaluation mode. images: floating-point [N, C, H, W] in [0, 1]. labels: class
    numbers [N]. norm: "linf" or "l2". epsilon: radius in pixels of [0, 1], a number or text such as "8/255".
    auto_attack: "standard", "quick", "none" or names of attacks. batch: images at a time. folder: keeps finished parts,
    so that the same call resumes after an interruption, and receives table, summary, protocol and pictures; None:
    nothing is kept. quiet: no progress bar. settings: others of `evaluate_robust` (docs/parameters.md), such as
    pgd_steps=100.

    Raises DmatError if the model, the images and the settings do not fit together.
    """
    library = importlib.import_module("dmat.evaluation.library")  # by name, as above
    values = {"auto_attack": auto_attack, "batch": batch, **settings}
    return library.evaluate(model, images, labels, norm, epsilon, values, folder and Path(folder), quiet)
