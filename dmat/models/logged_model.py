"""Loads a registered model for `mlflow.pyfunc.load_model`, from safetensors and sidecar. Needs no MLflow itself."""

from pathlib import Path

import numpy as np
import torch

from dmat.devices import Compute, resolve
from dmat.errors import DmatError
from dmat.models.loading import SUFFIX, open_classifier
from dmat.robust.networks import Classifier
from dmat.robust.prediction import logits


class LoggedClassifier:
    """A classifier with the interface of MLflow's python_function. Arithmetic is float32."""

    def __init__(self, model: Classifier, compute: Compute):
        """model: in evaluation mode, on the device of `compute`."""
        self._model, self._compute = model, compute

    def predict(self, images: np.ndarray, params: object = None) -> np.ndarray:
        """Logits, float32 [B, K]. images: float32 [B, C, H, W] in [0, 1]. params: of the interface; not used.

        Raises DmatError if a pixel is outside [0, 1].
        """
        if not ((images >= 0) & (images <= 1)).all():  # NaN is outside too
            raise DmatError(
                f"the images have values from {images.min():g} to {images.max():g}; expected [0, 1]; divide bytes by "
                f"255, and leave normalisation to the model"
            )
        return np.asarray(logits(self._model, torch.from_numpy(np.ascontiguousarray(images)), self._compute))


def _load_pyfunc(path: str) -> LoggedClassifier:
    """MLflow calls this with the folder of a model. Raises DmatError if its files are damaged."""
    weights = sorted(Path(path).glob(f"*{SUFFIX}"))
    if len(weights) != 1:
        raise DmatError(f"{path} holds {len(weights)} files {SUFFIX}; expected one; load a model that dmat registered")
    model, _ = open_classifier(weights[0])
    compute = resolve().exact()
    compute.model_to_device(model)
    return LoggedClassifier(model, compute)
