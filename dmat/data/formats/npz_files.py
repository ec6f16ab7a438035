"""Arrays of images and labels in an .npz file, or in several of them in one folder.

Shapes: N images, H height, W width, C channels, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dmat.data import npz_arrays
from dmat.data.data_sets import NOT_STATED
from dmat.data.formats.split_files import files_of_splits
from dmat.data.image_source import (
    MAX_CLASSES,
    ImageSource,
    Pair,
    expect_labels,
    expect_plausible_size,
    numbered_classes,
    shape_text,
)
from dmat.data.npz_arrays import ArrayHeader
from dmat.errors import DmatError

SUFFIX = ".npz"
_ARRAYS = ("image", "label", "test_image", "test_label", "class_names")


def npz(path: Path | None) -> ImageSource:
    """Reads an uncompressed or compressed .npz with `image` uint8 [N, H, W, C] and `label` integers [N] from 0.

    Optional arrays: `test_image` and `test_label` in the same form, and `class_names`, text [K]. Without `class_names`
    every class must have an image. A folder of such files is one set in the order of their names; files whose names
    begin with train and test are the splits.
    """
    if path is None or not path.exists():
        raise DmatError(
            f"prepare_data.path is {path}; expected an .npz file with `image` and `label`, or a folder of them; give "
            f"its path"
        )
    splits, notes = ({"train": [path]}, []) if path.is_file() else files_of_splits(path, SUFFIX)
    (images, labels), test, names = read_parts(splits["train"])
    if "test" in splits:
        if test is not None:
            raise DmatError(
                f"{path} has {splits['test'][0].name} and `test_image` in another file; expected test images in one "
                f"place; remove one of them"
            )
        test, _, test_names = read_parts(splits["test"])
        names = names or test_names
    class_names = names or numbered_classes(path, labels, test[1] if test else None)
    return ImageSource(images, labels, class_names, NOT_STATED, path.name, test, notes=tuple(notes))


def read_parts(paths: Sequence[Path]) -> tuple[Pair, Pair | None, tuple[str, ...]]:
    """Images uint8 [N, H, W, C] and labels int64 [N] of all files, the test images of a single file or None, and
    class names, () if no file has any.

    The pixels are copied part by part into one array, whose size the headers of all parts give.
    """
    if len(paths) == 1:
        return _read_file(paths[0])
    shapes = [_image_shape(path) for path in paths]
    for path, shape in zip(paths, shapes, strict=True):
        if shape[1:] != shapes[0][1:]:
            raise DmatError(
                f"{path} holds images {shape_text(shape[1:])}; expected {shape_text(shapes[0][1:])} as in "
                f"{paths[0].name}; convert all parts to one size and colour mode"
            )
    images = np.empty((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype=np.uint8)
    all_labels, names, filled = list[np.ndarray](), dict[tuple[str, ...], Path](), 0
    for path in paths:
        (part, labels), test, part_names = _read_file(path)
        if test is not None:
            raise DmatError(
                f"{path} is one of several parts and holds `test_image`; expected test images in a file whose name "
                f"begins with test; save them there"
            )
        names.setdefault(part_names, path)
        images[filled : filled + len(part)] = part
        all_labels.append(labels)
        filled += len(part)
    if len(names) > 1:
        first, other = list(names.values())[:2]
        raise DmatError(f"{other} has other `class_names` than {first.name}; expected the same; save them again")
    return (images, np.concatenate(all_labels)), None, next(iter(names))


def _image_shape(path: Path) -> tuple[int, ...]:
    """The shape (N, H, W, C) of the images of a file; reads no pixels."""
    if (header := _headers(path).get("image")) is None:
        raise DmatError(f"{path} lacks image; expected arrays `image` and `label`; save it again by numpy.savez")
    _expect_images(path, "image", header.dtype, header.shape)
    return header.shape


def _expect_images(path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Raises DmatError if an array of this type and shape is not images uint8 [N, H, W, 1 or 3]."""
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise DmatError(f"{path}: `{name}` is {dtype} {shape}; expected uint8 [N, H, W, 1 or 3]")


def _headers(path: Path) -> dict[str, ArrayHeader]:
    """The headers of the arrays that `npz` reads, by name.

    Raises DmatError if the file is not an .npz, or cannot hold what its headers say.
    """
    headers = npz_arrays.read_headers(path, _ARRAYS)
    expect_plausible_size(path, sum(header.nbytes for header in headers.values()))
    return headers


def _read_file(path: Path) -> tuple[Pair, Pair | None, tuple[str, ...]]:
    """Images and labels of one file, its test images or None, and its class names or ()."""
    _headers(path)
    arrays = npz_arrays.read_arrays(path, _ARRAYS)
    pair = _split(path, arrays, "")
    test = _split(path, arrays, "test_") if {"test_image", "test_label"} & set(arrays) else None
    if "class_names" not in arrays:
        return pair, test, ()
    names = _class_names(path, arrays["class_names"])
    expect_labels(path, pair[1], names)
    return pair, test, names


def _class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    """The class names of an .npz as a tuple. names: text [K], distinct. Raises DmatError for anything else."""
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        raise DmatError(
            f"{path}: `class_names` is {names.dtype} {names.shape}; expected one line of text per class, all "
            f"different, in label order; save them again or leave them out"
        )
    return tuple(names.tolist())


def _split(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> Pair:
    """Images uint8 [N, H, W, C] and labels int64 [N] of one split of an .npz. prefix: "" or "test_"."""
    image, label = f"{prefix}image", f"{prefix}label"
    missing = {image, label} - set(arrays)
    if missing:
        raise DmatError(
            f"{path} lacks {', '.join(sorted(missing))}; expected arrays `{image}` and `{label}`; save it again"
        )
    images, labels = arrays[image], arrays[label]
    _expect_images(path, image, images.dtype, images.shape)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise DmatError(f"{path}: `{label}` is {labels.dtype} {labels.shape}; expected {len(images)} integers from 0")
    if labels.max(initial=0) >= MAX_CLASSES:
        raise DmatError(
            f"{path}: `{label}` goes up to {labels.max()}; expected classes counted from 0, fewer than "
            f"{MAX_CLASSES:,}; renumber them"
        )
    return images, labels.astype(np.int64)
