"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are published: the python version, pickles that Python 2 wrote, and
the binary version.

A pickle is a program. Here it may make numbers, text, lists and dictionaries; the four names that an array of numpy
needs lead to stand-ins of this module, and any other name is refused before it is looked up. Nothing of numpy runs
before the bytes of an array have been found to be whole.
"""

import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dmat.errors import DmatError

SIDE, PIXELS = 32, 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class CifarLayout:
    """One version of one data set on disk. names: file of the class names; key: of the names and of the labels in the
    pickles, None in the binary version; label: position of the label among the `label_bytes` before each image."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    key: tuple[str, str] | None
    label: int = 0
    label_bytes: int = 1


_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
LAYOUTS = {
    "cifar10": (
        CifarLayout("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", ("label_names", "labels")),
        CifarLayout(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            "batches.meta.txt",
            None,
        ),
    ),
    "cifar100": (
        CifarLayout("cifar-100-python", ("train",), "test", "meta", ("fine_label_names", "fine_labels")),
        CifarLayout(
            "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", None, label=1, label_bytes=2
        ),
    ),
}
PUBLISHED = {"train": 50_000, "test": 10_000}  # images, in either data set
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


@dataclasses.dataclass(frozen=True)
class Cifar:
    """train, test: images uint8 [N, 32, 32, 3] and labels int64 [N]. names: of the classes, in label order."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    names: tuple[str, ...]
    origin: str


def find(data: str, path: Path) -> tuple[Path, CifarLayout] | None:
    """The folder of a data set ("cifar10", "cifar100"), `path` itself or one in it, and its layout; None: not there.

    A folder is known by its files, whatever its name; where both versions are there the python one is read.
    """
    for layout in LAYOUTS[data]:
        for folder in (path, path / layout.folder):
            if (folder / layout.train[0]).is_file() and (folder / layout.test).is_file():
                return folder, layout
    return None


def located(data: str, path: Path) -> tuple[Path, CifarLayout]:
    """`find`, or DmatError."""
    found = find(data, path)
    if found is None:
        wanted = " or ".join(f"{one.folder} ({one.train[0]}, {one.test}, {one.names})" for one in LAYOUTS[data])
        raise DmatError(
            f"{path} is no {TITLES[data]} folder; expected {wanted}, or the folder that holds it; unpack it"
        )
    return found


def read(data: str, path: Path) -> Cifar:
    """All images of "cifar10" or "cifar100" at `path`. Raises DmatError for what is missing, cut or no CIFAR file."""
    folder, layout = located(data, path)
    names, count = _names(folder, layout)
    pairs = [_file(folder / name, layout, names, count) for name in (*layout.train, layout.test)]
    train = tuple(np.concatenate([pair[k] for pair in pairs[:-1]]) for k in range(2))
    kind = "python" if layout.key else "binary"
    sizes = {"train": len(train[1]), "test": len(pairs[-1][1])}
    whole = "" if sizes == PUBLISHED else f", a part of it: {sizes['train']:,} and {sizes['test']:,} images"
    origin = f"{TITLES[data]} (Krizhevsky 2009), {kind} version{whole}"
    return Cifar((train[0], train[1]), pairs[-1], names, origin)


def _names(folder: Path, layout: CifarLayout) -> tuple[tuple[str, ...], int | None]:
    """Names of the classes, and how many images a file should hold where the data set says so."""
    path = folder / layout.names
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected the names of the classes in it; unpack the archive again")
    if layout.key is None:
        try:
            names = tuple(path.read_text().split())
        except ValueError:
            names = ()
        count = None
    else:
        content = _content(path)
        listed, count = content.get(layout.key[0]), content.get("num_cases_per_batch")
        names = tuple(_text(name) for name in listed) if isinstance(listed, list) else ()
    if not names or not all(names) or len(set(names)) < len(names):
        raise DmatError(f"{path} holds no list of different class names; expected one; unpack the archive again")
    return names, count if isinstance(count, int) else None


def _file(path: Path, layout: CifarLayout, names: tuple[str, ...], count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 32, 32, 3] and labels int64 [n] of one file. count: how many there should be, if known."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected it beside the other batches; unpack the archive again")
    rows, labels = _pickled(path, layout.key[1]) if layout.key else _binary(path, layout)
    if len(rows) == 0 or (count is not None and len(rows) != count):
        raise DmatError(f"{path} holds {len(rows)} images; expected {count or 'some'}; unpack the archive again")
    if labels.min() < 0 or labels.max() >= len(names):
        raise DmatError(
            f"{path} has labels from {labels.min()} to {labels.max()}; expected 0 to {len(names) - 1}, the classes in "
            f"{layout.names}; unpack the archive again"
        )
    images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # stored as a plane of each colour
    return np.ascontiguousarray(images), labels


def _binary(path: Path, layout: CifarLayout) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [n, 3072] and labels int64 [n] of a file of the binary version."""
    content, length = np.fromfile(path, dtype=np.uint8), layout.label_bytes + PIXELS
    if len(content) % length:
        raise DmatError(
            f"{path} has {len(content)} bytes; expected a multiple of {length}: it was cut; unpack the archive again"
        )
    rows = content.reshape(-1, length)
    return rows[:, layout.label_bytes :], rows[:, layout.label].astype(np.int64)


def _pickled(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [n, 3072] and labels int64 [n] of a file of the python version."""
    content = _content(path)
    data, labels = content.get("data"), content.get(key)
    rows = data.value if isinstance(data, _Array) else None
    if rows is None or rows.ndim != 2 or rows.shape[1] != PIXELS:
        found = "nothing" if rows is None else f"uint8 {rows.shape}"
        raise DmatError(f"{path} has {found} under `data`; expected uint8 (n, {PIXELS}); unpack the archive again")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(one) is int for one in labels):
        raise DmatError(f"{path}: `{key}` is no list of {len(rows)} integers, one an image; unpack the archive again")
    return rows, np.array([min(max(one, -1), 2**31) for one in labels], dtype=np.int64)  # out of range stays so


def _content(path: Path) -> dict[str, Any]:
    """The dictionary that a pickle holds, keys as text."""
    try:
        with open(path, "rb") as file:
            content = _CifarUnpickler(file).load()
    except DmatError:
        raise
    except Exception as error:  # hostile bytes may end in any of them, and none is a defect of dmat
        short = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise DmatError(
            f"{path} is no whole file of CIFAR's python version ({short}); expected the pickle of a dictionary; unpack "
            f"the archive again"
        ) from None
    if not isinstance(content, dict):
        raise DmatError(f"{path} holds a {type(content).__name__}; expected a dictionary; unpack the archive again")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> str:
    """Text as Python 2 wrote it; "" for what is no text."""
    return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


class _Array:
    """What stands in for an array while a pickle is read. value: uint8, set once its state is known to be sound."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """state: version, shape, dtype, whether columns come first, bytes; as numpy has written it since 1.0."""
        _, shape, dtype, fortran, content = state
        whole = isinstance(content, bytes) and all(type(n) is int and n >= 0 for n in shape)
        if not isinstance(dtype, _Bytes) or not whole or math.prod(shape) != len(content):
            raise ValueError("an array that is not uint8, or whose bytes do not fill its shape")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Bytes:
    """What stands in for the dtype uint8; there is no other."""

    def __init__(self, name: Any, *_: Any):
        if _text(name) not in ("u1", "|u1"):
            raise ValueError(f"an array of {_text(name)[:20] or 'something else'}, not of uint8")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: nothing that a byte has."""


class _CifarUnpickler(pickle.Unpickler):
    """Knows the names that numpy 1 and 2 write for an array, and makes stand-ins of them."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="bytes")  # text of Python 2 stays what it was
        self.file = file

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        # lambdas of this very call: a pickle may change the attributes of what it was given
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()
        if (module, name) == ("numpy", "ndarray"):
            return lambda *_: None  # only ever an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda *words: _Bytes(*words)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin-1")
        raise DmatError(
            f"{self.file.name} names {module}.{name}, and reading that would run code; expected arrays, numbers and "
            f"text; take CIFAR from where its authors publish it"
        )
