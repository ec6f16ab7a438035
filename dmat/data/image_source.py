"""What a source of real images gives, and what every reader of files expects of them.

Shapes: N images, H height, W width, C channels, K classes.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmat.errors import DmatError

MAX_CLASSES = 100_000  # larger numbers are treated as a mistake
MAX_EXPANSION = 1_100  # decompressed bytes per byte of a file; deflate reaches 1,032

Pair = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C] and labels int64 [N]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """The images of a source: images uint8 [N, H, W, C], labels int64 [N], class names in label order, licence, origin.

    test: images and labels of the test split, in the same form; None if the source has no test split. split: name of
    the split that the images belong to, if the source or the user says so; else "". notes: sentences about what was
    left out or assumed.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    licence: str
    origin: str
    test: Pair | None = None
    split: str = ""
    notes: tuple[str, ...] = ()


def listing(values: Sequence[object], limit: int = 5) -> str:
    """The first `limit` values of a list as text: "1, 2, 3 and 7 more"."""
    shown = ", ".join(map(str, values[:limit]))
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def shape_text(shape: tuple[int, ...]) -> str:
    """Width, height and colour mode as text, from a shape (H, W, C)."""
    return f"{shape[1]}x{shape[0]} in {'colour' if shape[2] == 3 else 'grey'}"


def expect_folder(path: Path | None, expected: str) -> Path:
    """Returns the path. Raises DmatError if it is not a folder. expected: description of the folder."""
    if path is None or not path.is_dir():
        raise DmatError(f"prepare_data.path is {path}; expected {expected}; give its path")
    return path


def expect_plausible_size(path: Path, size: int, stored: int | None = None) -> None:
    """Raises DmatError if a file says that it holds `size` bytes, more than compression can have put there.

    Call it before memory for them is allocated. stored: bytes on disk, if they are not those of the file alone.
    """
    stored = path.stat().st_size if stored is None else stored
    if not 0 <= size <= stored * MAX_EXPANSION:
        raise DmatError(
            f"{path} says that it holds {size:,} bytes of pixels or labels; expected fewer in {stored:,} bytes of "
            f"files: it is damaged or incomplete; bring back a good copy"
        )


def expect_labels(path: Path | str, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises DmatError if a label is not a class. labels: integers [N]."""
    if len(labels) and (labels.min() < 0 or labels.max() >= len(class_names)):
        raise DmatError(
            f"{path} has labels from {labels.min()} to {labels.max()}; expected 0 to {len(class_names) - 1}, one per "
            f"class; bring back a good copy"
        )


def numbered_classes(path: Path, labels: np.ndarray, test_labels: np.ndarray | None) -> tuple[str, ...]:
    """Names "0", "1", ... of classes that nobody named. labels, test_labels: int64 [N].

    Raises DmatError for absurd labels, and if a class has no training image: then the labels probably do not count
    from 0.
    """
    highest = max(int(values.max(initial=0)) for values in (labels, test_labels) if values is not None)
    if highest >= MAX_CLASSES:
        raise DmatError(
            f"{path} has labels up to {highest}; expected classes counted from 0, fewer than {MAX_CLASSES:,}; "
            f"renumber them"
        )
    missing = np.setdiff1d(np.arange(highest + 1), labels)
    if len(missing) and len(labels):
        raise DmatError(
            f"{path}: no image has the label {listing(missing.tolist())}, and labels go up to {highest}; expected "
            f"images of every class from 0 up; number the classes from 0 without gaps, or name all of them in the file"
        )
    return tuple(map(str, range(highest + 1)))


def expect_valid(source: ImageSource, path: Path | str) -> ImageSource:
    """Returns the source. Raises DmatError if its images or labels are not what every job expects."""
    splits = [("", source.images, source.labels), *([("test ", *source.test)] if source.test else [])]
    for prefix, images, labels in splits:
        if len(labels) == 0:
            raise DmatError(f"{path} has no {prefix}images; expected at least one; give another path")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise DmatError(
                f"{path}: the {prefix}images are {images.dtype} {images.shape}; expected uint8 [N, H, W, 1 or 3]; "
                f"convert them"
            )
        if images.shape[1:] != source.images.shape[1:]:
            raise DmatError(
                f"{path}: the test images are {shape_text(images.shape[1:])}, the others "
                f"{shape_text(source.images.shape[1:])}; expected one size and colour mode; convert all images to it"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise DmatError(
                f"{path}: the {prefix}labels are {labels.dtype} {labels.shape}; expected {len(images)} integers; "
                f"convert them"
            )
        expect_labels(path, labels, source.class_names)
    return source
