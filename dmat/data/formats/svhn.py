"""SVHN, cropped digits (Netzer et al. 2011): MATLAB files with `X` uint8 [32, 32, 3, N] and `y` [N, 1], 10 for a zero.

Such a file of level 5 is a header and one element per array: a tag (type and length), then flags, dimensions, name and
values, each with a tag of its own; an element may be compressed by zlib. This module reads no other arrays than these
two, and checks every length first. scipy's reader is not used: on damaged files it reads outside its buffers and ends
the process. Shapes: N images.
"""

import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.data.image_source import ImageSource, Pair, expect_plausible_size
from dmat.errors import DmatError

_HEADER, _MAGIC = 128, b"\0\1IM"  # length; its end: level 5, little-endian
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_VALUES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_CLASSES = {6: "double", 7: "single", 8: "int8", 9: "uint8", 10: "int16", 11: "uint16", 12: "int32", 13: "uint32"}
_MAX_PART = 256  # bytes of flags, dimensions or a name
_CHUNK = 2**20  # bytes that are decompressed at once


def find(name: str, path: Path) -> Path | None:
    """Returns `path` if it is the folder of the files, else None."""
    return path if any((path / file).is_file() for file in _files(name)) else None


def _files(name: str) -> tuple[str, ...]:
    (names,) = DATA_SETS[name].layouts
    return names


def read(name: str, folder: Path) -> ImageSource:
    """Reads both splits. Raises DmatError if a file is missing, incomplete or not a file of SVHN."""
    for file in _files(name):
        if not (folder / file).is_file():
            raise DmatError(
                f"{folder / file} does not exist; expected it beside the other file; {data_sets.how_to_get(name)}"
            )
    train, test = (_read_file(folder / file, DATA_SETS[name].size) for file in _files(name))
    origin = data_sets.origin(name, "cropped digits", len(train[1]), len(test[1]))
    return ImageSource(*train, DATA_SETS[name].class_names, DATA_SETS[name].licence, origin, test)


def _read_file(path: Path, size: int) -> Pair:
    """Images uint8 [N, size, size, 3] and labels int64 [N] of one file."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with open(path, "rb") as file:
            if file.read(_HEADER)[-len(_MAGIC) :] != _MAGIC:
                raise ValueError("it does not begin as one of level 5")
            while tag := file.read(8):
                kind, length = struct.unpack("<2I", tag)
                end = file.tell() + length
                if kind not in (_MATRIX, _COMPRESSED) or end > path.stat().st_size:
                    raise ValueError("it ends inside an array")
                name, array = _read_array(path, _Element(file, length, kind == _COMPRESSED), size)
                if name in arrays:
                    raise ValueError(f"it holds {name} twice")
                arrays |= {} if array is None else {name: array}
                file.seek(end)
    except (ValueError, EOFError, struct.error, zlib.error) as error:
        raise DmatError(
            f"{path} is not a complete MATLAB file ({error}); expected the published file; bring back a good copy"
        ) from None
    if set(arrays) != {"X", "y"} or arrays["X"].shape[-1] != arrays["y"].size:
        actual = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "neither"
        raise DmatError(
            f"{path} holds {actual}; expected X ({size}, {size}, 3, N) and y (N, 1); bring back a good copy"
        )
    labels = arrays["y"].reshape(-1)
    if not np.isin(labels, range(1, 11)).all():
        raise DmatError(
            f"{path}: `y` holds values from {labels.min()} to {labels.max()}; expected the whole numbers 1 to 10; "
            f"bring back a good copy"
        )
    digits = labels.astype(np.int64) % 10  # 10 is a zero
    return np.ascontiguousarray(arrays["X"].transpose(3, 0, 1, 2)), digits


class _Element:
    """The bytes of one element, decompressed where necessary; never more than `length` bytes of the file are read."""

    def __init__(self, file: BinaryIO, length: int, compressed: bool):
        self._file, self._left, self._pending = file, length, b""
        self._inflater = zlib.decompressobj() if compressed else None
        if compressed:
            kind, _ = struct.unpack("<2I", self.take(8))
            if kind != _MATRIX:
                raise ValueError("a compressed element is not an array")

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises EOFError if there are fewer."""
        pieces = []
        while count > 0:
            if not self._pending:
                self._pending = self._file.read(min(_CHUNK, self._left))
                self._left -= len(self._pending)
            if not self._pending:
                raise EOFError("an array is shorter than its header says")
            if self._inflater is None:
                piece, self._pending = self._pending[:count], self._pending[count:]
            else:
                piece = self._inflater.decompress(self._pending, count)
                self._pending = self._inflater.unconsumed_tail
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def tag(self) -> tuple[int, int, bytes]:
        """Type and length of the next part, and its bytes if the tag holds them: at most four."""
        kind, length = struct.unpack("<2I", content := self.take(8))
        if kind >> 16:
            return kind & 0xFFFF, kind >> 16, content[4 : 4 + (kind >> 16)]
        return kind, length, b""

    def part(self) -> bytes:
        """The bytes of the next part, which is short: flags, dimensions or a name."""
        _, length, content = self.tag()
        if length > _MAX_PART:
            raise ValueError("flags, dimensions or name of an array are too long")
        return content if content else self.take(length + -length % 8)[:length]


def _read_array(path: Path, element: _Element, size: int) -> tuple[str, np.ndarray | None]:
    """Name and values of an array: `X` uint8 [size, size, 3, N] or `y` [N, 1]; None for arrays of other names."""
    flags, dimensions, name = element.part(), element.part(), element.part().decode("ascii")
    if name not in ("X", "y"):
        return name, None
    matlab_class = _CLASSES.get(flags[0] if flags else 0, "another type")
    shape = struct.unpack(f"<{len(dimensions) // 4}i", dimensions)
    fits = (
        matlab_class == "uint8" and len(shape) == 4 and shape[:3] == (size, size, 3)
        if name == "X"
        else matlab_class in _CLASSES.values() and len(shape) == 2 and 1 in shape
    )
    if not fits or min(shape) < 0:
        raise DmatError(
            f"{path}: `{name}` is {matlab_class} {shape}; expected X uint8 ({size}, {size}, 3, N) and y, numbers "
            f"(N, 1); bring back a good copy"
        )
    kind, length, content = element.tag()
    dtype = np.dtype(_VALUES.get(kind, "V1"))
    if (name == "X" and dtype != np.uint8) or dtype.kind == "V" or length != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"`{name}` has other values than its type and dimensions say")
    expect_plausible_size(path, length)
    return name, np.frombuffer(content or element.take(length), dtype).reshape(shape, order="F")
