"""Predicts logits for images in a .npy file and writes them to a .npy file, both in batches.

Shapes: N images, B batch, C channels, H height, W width, K classes.
"""

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
    """Result of `predict`: the file of logits, the numbers of images and classes, and of correct predictions."""

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
    """Writes the logits of the classifier `path`, float32 [N, K], to `target`. Arithmetic is float32.

    images: .npy file, read by memory map: uint8 [N, H, W, C], or float32 in [0, 1], [N, C, H, W] or [N, H, W, C].
    labels: .npy file of integers [N], to count correct predictions. batch: images at a time. Raises DmatError if a file
    is damaged or does not fit the model, or if `target` is one of the files to read.
    """
    model, sidecar = open_classifier(expect_pair(path))
    pixels = _open_array(images, "images")
    channels_first = _channels_first(pixels, sidecar["image_shape"], images)
    targets = _open_labels(labels, len(pixels), sidecar["classes"])
    for other in (images, labels, path):
        if other is not None and target.exists() and target.samefile(other):
            raise DmatError(f"{target} is a file to read; expected another name to write; give one with --to")
    compute = compute.exact()
    compute.model_to_device(model)
    n, classes, correct = len(pixels), sidecar["classes"], 0
    progress_bar = tqdm(total=n, unit=" images", desc="predict", disable=quiet, unit_scale=True)
    with files.writing(target) as file, progress_bar:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, classes)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, n, batch):
            rows = logits(
                model, _to_float_batch(pixels[start : start + batch], channels_first, start, images), compute, batch
            )
            file.write(rows.numpy().astype("<f4").tobytes())
            if targets is not None:
                correct += int((rows.argmax(1).numpy() == targets[start : start + batch]).sum())
            progress_bar.update(len(rows))
    return Prediction(target, n, classes, None if targets is None else correct)


def _open_array(path: Path, content: str) -> np.ndarray:
    """Memory-maps an array of any shape. Refuses object arrays and other pickles without reading them.

    content: "images" or "labels", for messages.
    """
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected a .npy file of {content}; give its path")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # hostile bytes may raise any exception
        raise DmatError(
            f"{path} is incomplete or not a .npy file of numbers "
            f"({str(error).splitlines()[0] if str(error) else 'empty'}); expected {content} as "
            f"numpy.save writes them; save them again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DmatError(f"{path} is an archive of arrays; expected one array of {content}; save it alone by numpy.save")
    return array


def _channels_first(images: np.ndarray, shape: Sequence[int], path: Path) -> bool:
    """Whether images are [N, C, H, W] and not [N, H, W, C].

    shape: (H, W, C) of the images that the model takes. Raises DmatError if the images have another type or shape.
    """
    height, width, channels = shape
    last, first = (height, width, channels), (channels, height, width)
    kind = images.dtype
    if kind not in (np.dtype(np.uint8), np.dtype(np.float32)):
        raise DmatError(
            f"{path} holds {kind}; expected uint8, or float32 in [0, 1]; convert it, for example by .astype('float32')"
        )
    fits = [last] if kind == np.uint8 else [last, first]
    if images.ndim != 4 or tuple(images.shape[1:]) not in fits or len(images) == 0:
        expected = " or ".join(f"[N, {', '.join(map(str, layout))}]" for layout in fits)
        raise DmatError(
            f"{path} holds {kind} {list(images.shape)}; expected {kind} {expected} with N above 0, the images of this "
            f"model; give such images or another model"
        )
    return tuple(images.shape[1:]) != last


def _to_float_batch(piece: np.ndarray, channels_first: bool, start: int, path: Path) -> Tensor:
    """Converts a batch to float32 [B, C, H, W] in [0, 1].

    piece: [B, C, H, W] if `channels_first`, otherwise [B, H, W, C]. start: position of its first image in the file, for
    messages. Raises DmatError if floats are outside [0, 1].
    """
    if piece.dtype == np.uint8:
        return to_float(np.array(piece))
    low, high = piece.reshape(len(piece), -1).min(1), piece.reshape(len(piece), -1).max(1)
    invalid = np.flatnonzero(~((low >= 0) & (high <= 1)))  # NaN is invalid too
    if len(invalid):
        index = invalid[0]
        raise DmatError(
            f"{path}: image {start + index} has values from {low[index]:g} to {high[index]:g}; expected [0, 1]; "
            f"divide bytes by 255, and leave normalisation to the model"
        )
    floats = torch.from_numpy(np.array(piece))
    return floats if channels_first else floats.permute(0, 3, 1, 2)


def _open_labels(path: Path | None, count: int, classes: int) -> np.ndarray | None:
    """Memory-maps the labels: integers [N] with N = `count`, from 0 to classes - 1; None without a path."""
    if path is None:
        return None
    labels = _open_array(path, "labels")
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
