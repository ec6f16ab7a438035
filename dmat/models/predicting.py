"""Images in a .npy file -> logits in a .npy file, read and written piece by piece."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import files
from dmat.data.pixels import to_float
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.models.loading import expect_pair, open_classifier
from dmat.robust.prediction import logits


@dataclasses.dataclass(frozen=True)
class Prediction:
    path: Path
    images: int
    classes: int
    correct: int | None  # None without labels


def predict(
    path: Path,
    images: Path,
    target: Path,
    compute: Compute,
    labels: Path | None = None,
    batch: int = 1000,
    quiet: bool = False,
) -> Prediction:
    """Writes float32 logits [N, classes] of the classifier `path` to `target`, in float32 arithmetic.

    images: uint8 [N, H, W, C], or float32 in [0, 1], [N, C, H, W] or [N, H, W, C], read by memory map. labels: integers
    [N].
    """
    model, sidecar = open_classifier(expect_pair(path))
    given = _open(images, "images")
    first = _channels_first(given, sidecar["image_shape"], images)
    right = _labels(labels, len(given), sidecar["classes"])
    for other in (images, labels, path):
        if other is not None and target.exists() and target.samefile(other):
            raise DmatError(f"{target} is a file to read; expected another name to write; give one with --to")
    compute = compute.exact()
    compute.model_to_device(model)
    n, classes, correct = len(given), sidecar["classes"], 0
    bar = tqdm(total=n, unit=" images", desc="predict", disable=quiet, unit_scale=True)
    with files.writing(target) as file, bar:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, classes)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n, batch):
            rows = logits(model, _unit(given[start : start + batch], first, start, images), compute, batch)
            file.write(rows.numpy().astype("<f4").tobytes())
            if right is not None:
                correct += int((rows.argmax(1).numpy() == right[start : start + batch]).sum())
            bar.update(len(rows))
    return Prediction(target, n, classes, None if right is None else correct)


def _open(path: Path, what: str) -> np.ndarray:
    """A memory map. Object arrays and other pickles are refused unread."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected a .npy file of {what}; give its path")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # hostile bytes may end in any of them
        raise DmatError(
            f"{path} is no whole .npy file of numbers ({str(error).splitlines()[0] if str(error) else 'empty'}); "
            f"expected {what} as numpy.save writes them; save them again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DmatError(f"{path} is an archive of arrays; expected one array of {what}; save it alone by numpy.save")
    return array


def _channels_first(images: np.ndarray, shape: Sequence[int], path: Path) -> bool:
    """Whether images are [N, C, H, W]. Raises DmatError unless they are such as a model for `shape` [H, W, C] takes."""
    height, width, channels = shape
    last, first = (height, width, channels), (channels, height, width)
    kind = images.dtype
    if kind not in (np.dtype(np.uint8), np.dtype(np.float32)):
        raise DmatError(
            f"{path} holds {kind}; expected uint8, or float32 in [0, 1]; convert it, for example by .astype('float32')"
        )
    fits = [last] if kind == np.uint8 else [last, first]
    if images.ndim != 4 or tuple(images.shape[1:]) not in fits or len(images) == 0:
        wanted = " or ".join(f"[N, {', '.join(map(str, each))}]" for each in fits)
        raise DmatError(
            f"{path} holds {kind} {list(images.shape)}; expected {kind} {wanted} with N above 0, the images of this "
            f"model; give such images or another model"
        )
    return tuple(images.shape[1:]) != last


def _unit(piece: np.ndarray, channels_first: bool, start: int, path: Path) -> Tensor:
    """float32 [B, C, H, W] in [0, 1]."""
    if piece.dtype == np.uint8:
        return to_float(np.array(piece))
    low, high = piece.reshape(len(piece), -1).min(1), piece.reshape(len(piece), -1).max(1)
    bad = np.flatnonzero(~((low >= 0) & (high <= 1)))  # NaN is bad too
    if len(bad):
        k = bad[0]
        raise DmatError(
            f"{path}: image {start + k} has values from {low[k]:g} to {high[k]:g}; expected [0, 1]; divide bytes by "
            f"255, and leave normalisation to the model"
        )
    unit = torch.from_numpy(np.array(piece))
    return unit if channels_first else unit.permute(0, 3, 1, 2)


def _labels(path: Path | None, count: int, classes: int) -> np.ndarray | None:
    if path is None:
        return None
    labels = _open(path, "labels")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DmatError(
            f"{path} holds {labels.dtype} {list(labels.shape)}; expected {count} integers, one for each image; give "
            f"the labels of these images"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DmatError(
            f"{path} has labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}, because the model "
            f"has {classes} classes; give the labels or the model of this data set"
        )
    return labels
