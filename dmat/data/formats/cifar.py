"""Reads CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as published: the python version (pickles written by Python 2) and the
binary version.

A pickle is a program. Here it may make numbers, text, lists and dictionaries. The four names that a numpy array needs
resolve to stand-ins of this module; any other name is refused before it is looked up. numpy code runs only after the
bytes of an array were checked to be complete.

Shapes: N images.
"""

import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.data.image_source import ImageSource, Pair
from dmat.errors import DmatError

SIDE = DATA_SETS["cifar10"].size  # pixels; the same in CIFAR-100
PIXELS = 3 * SIDE * SIDE


@dataclasses.dataclass(frozen=True)
class CifarLayout:
    """One version of one data set on disk. Its folder has the same position in `DataSet.layouts`.

    names: file of the class names. key: keys of the class names and of the labels in the pickles; None in the binary
    version. label: position of the label among the `label_bytes` before each image.
    """

    train: tuple[str, ...]
    test: str
    names: str
    key: tuple[str, str] | None
    label: int = 0
    label_bytes: int = 1


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
LAYOUTS = {
    "cifar10": (
        CifarLayout(_BATCHES, "test_batch", "batches.meta", ("label_names", "labels")),
        CifarLayout(
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            "batches.meta.txt",
            None,
        ),
    ),
    "cifar100": (
        CifarLayout(("train",), "test", "meta", ("fine_label_names", "fine_labels")),
        CifarLayout(
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
            None,
            label=1,
            label_bytes=2,
        ),
    ),
}


def find(name: str, path: Path) -> Path | None:
    """Returns the folder of a data set ("cifar10", "cifar100"), or None if there is none.

    The folder is `path` itself or a sub-folder with the published name. A folder is recognised by its files, whatever
    its name. If both versions exist, the python version is returned.
    """
    for layout, (published,) in zip(LAYOUTS[name], DATA_SETS[name].layouts, strict=True):
        for folder in (path, path / published):
            if _fits(layout, folder):
                return folder
    return None


def _fits(layout: CifarLayout, folder: Path) -> bool:
    return (folder / layout.train[0]).is_file() and (folder / layout.test).is_file()


def read(name: str, folder: Path) -> ImageSource:
    """Reads all images of "cifar10" or "cifar100" in a folder that `find` returned.

    Raises DmatError if a file is missing, incomplete or not a CIFAR file.
    """
    layout = next(layout for layout in LAYOUTS[name] if _fits(layout, folder))
    names, count = _read_class_names(folder, layout)
    pairs = [_read_file(folder / file, layout, names, count) for file in (*layout.train, layout.test)]
    images, labels = (np.concatenate([pair[k] for pair in pairs[:-1]]) for k in range(2))
    version = f"{'python' if layout.key else 'binary'} version"
    origin = data_sets.origin(name, version, len(labels), len(pairs[-1][1]))
    return ImageSource(images, labels, names, DATA_SETS[name].licence, origin, pairs[-1])


def _read_class_names(folder: Path, layout: CifarLayout) -> tuple[tuple[str, ...], int | None]:
    """Names of the classes, and the number of images per file (None if the data set does not say it)."""
    path = folder / layout.names
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected the names of the classes in it; unpack the archive again")
    if layout.key is None:
        try:
            names = tuple(path.read_text(encoding="utf-8").split())
        except ValueError:
            names = ()
        count = None
    else:
        content = _read_pickle(path)
        listed, count = content.get(layout.key[0]), content.get("num_cases_per_batch")
        names = tuple(_text(name) for name in listed) if isinstance(listed, list) else ()
    if not names or not all(names) or len(set(names)) < len(names):
        raise DmatError(
            f"{path} does not hold a list of distinct class names; expected one name per class; unpack the archive "
            f"again"
        )
    return names, count if isinstance(count, int) else None


def _read_file(path: Path, layout: CifarLayout, names: tuple[str, ...], count: int | None) -> Pair:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of one file. count: expected number of images, if known."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected it beside the other batches; unpack the archive again")
    rows, labels = _read_pickled(path, layout.key[1]) if layout.key else _read_binary(path, layout)
    if len(rows) == 0 or (count is not None and len(rows) != count):
        raise DmatError(f"{path} holds {len(rows)} images; expected {count or 'some'}; unpack the archive again")
    if labels.min() < 0 or labels.max() >= len(names):
        raise DmatError(
            f"{path} has labels from {labels.min()} to {labels.max()}; expected 0 to {len(names) - 1}, the classes in "
            f"{layout.names}; unpack the archive again"
        )
    images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # stored as one plane per colour
    return np.ascontiguousarray(images), labels


def _read_binary(path: Path, layout: CifarLayout) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [N, 3072] and labels int64 [N] of a file of the binary version."""
    content, length = np.fromfile(path, dtype=np.uint8), layout.label_bytes + PIXELS
    if len(content) % length:
        raise DmatError(
            f"{path} has {len(content)} bytes; expected a multiple of {length}: the file is incomplete; unpack the "
            f"archive again"
        )
    rows = content.reshape(-1, length)
    return rows[:, layout.label_bytes :], rows[:, layout.label].astype(np.int64)


def _read_pickled(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [N, 3072] and labels int64 [N] of a file of the python version."""
    content = _read_pickle(path)
    data, labels = content.get("data"), content.get(key)
    rows = data.value if isinstance(data, _ArrayStandIn) else None
    if rows is None or rows.ndim != 2 or rows.shape[1] != PIXELS:
        actual = "nothing" if rows is None else f"uint8 {rows.shape}"
        raise DmatError(f"{path} has {actual} under `data`; expected uint8 (n, {PIXELS}); unpack the archive again")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(label) is int for label in labels):
        raise DmatError(
            f"{path}: `{key}` is not a list of {len(rows)} integers, one per image; unpack the archive again"
        )
    # An integer out of range stays out of range.
    return rows, np.array([min(max(label, -1), 2**31) for label in labels], dtype=np.int64)


def _read_pickle(path: Path) -> dict[str, object]:
    """The dictionary in a pickle, with its keys as text. Raises DmatError for anything else."""
    try:
        content = _CifarUnpickler(path).load()
    except DmatError:
        raise
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        short = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise DmatError(
            f"{path} is incomplete or not a file of CIFAR's python version ({short}); expected the pickle of a "
            f"dictionary; unpack the archive again"
        ) from None
    if not isinstance(content, dict):
        raise DmatError(f"{path} holds a {type(content).__name__}; expected a dictionary; unpack the archive again")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> str:
    """Text as Python 2 wrote it; "" for anything that is not text."""
    return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


class _ArrayStandIn:
    """Stands in for an array while a pickle is read. value: uint8, any shape; set once its state was checked."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Sets `value`. state: (version, shape, dtype, Fortran order, bytes), as numpy writes it since 1.0."""
        _, shape, dtype, fortran, content = state
        plausible = isinstance(content, bytes) and all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(dtype, _Uint8Dtype) or not plausible or math.prod(shape) != len(content):
            raise ValueError("an array that is not uint8, or whose bytes do not fill its shape")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Uint8Dtype:
    """Stands in for the dtype uint8. Any other dtype is refused."""

    def __init__(self, name: object, *_: object):
        if _text(name) not in ("u1", "|u1"):
            raise ValueError(f"an array of {_text(name)[:20] or 'something else'}, not of uint8")

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and alignment: single bytes have neither."""


class _CifarUnpickler(pickle._Unpickler):
    """Resolves the names that numpy 1 and 2 write for an array to stand-ins, and refuses all others.

    The unpickler in C asks for memory by the numbers that a file gives its objects; this one keeps a dictionary.
    """

    def __init__(self, path: Path):
        # from memory, so that no declared length asks for more than the file has
        super().__init__(io.BytesIO(path.read_bytes()), encoding="bytes")  # keeps text of Python 2 as bytes
        self.path = path

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """Returns a stand-in for a name that a numpy array needs. Raises DmatError for any other name."""
        # new lambdas at each call: a pickle may change the attributes of the objects that it gets
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _ArrayStandIn()
        if (module, name) == ("numpy", "ndarray"):
            return lambda *_: None  # used only as an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda *arguments: _Uint8Dtype(*arguments)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin-1")
        raise DmatError(
            f"{self.path} names {module}.{name}, and reading that would run code; expected arrays, numbers and "
            f"text; download CIFAR from the page of its authors"
        )
