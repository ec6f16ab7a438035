"""dmat: does better generated data make classifiers more robust?

The library behind the `dmat` command. Importing it loads neither torch nor mlflow; the subpackages do.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"

ARTIFACTS = "artifacts"  # folder of everything that stages write, below the project
SOURCES = "sources"  # folder of other people's files, or links to them, below the project
NONE = "none"  # what an entry of params.yaml names that has no parent of a kind


def load_model(path: str | Path, device: str = "cpu") -> "torch.nn.Module":
    """A classifier in evaluation mode without gradients: images [B, C, H, W] in [0, 1] -> logits [B, classes].

    path: a .safetensors file that a training or `dmat models import` wrote, its sidecar beside it. Raises DmatError if
    the two do not belong together.
    """
    loading = importlib.import_module("dmat.models.loading")  # by its name: everything imports this file (layers)
    return loading.load_model(path, device)
