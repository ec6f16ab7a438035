"""dmat: does better generated data make classifiers more robust?

The library behind the `dmat` command. Importing it loads neither torch nor mlflow; the subpackages do.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
