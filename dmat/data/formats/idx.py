"""MNIST and Fashion-MNIST: IDX files (LeCun et al. 1998), plain or compressed by gzip.

An IDX file is a magic number (two zero bytes, the type 8 for uint8, the number of dimensions), the dimensions as
32-bit big-endian numbers, and the values. Shapes: N images, H height, W width.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.data.image_source import ImageSource, Pair, expect_labels, expect_plausible_size
from dmat.errors import DmatError

_UINT8 = 8
_GZIP = b"\x1f\x8b"


def find(name: str, path: Path) -> Path | None:
    """Returns the folder of "mnist" or "fashion_mnist", or None: `path`, or the sub-folders that torchvision makes."""
    (names,) = DATA_SETS[name].layouts
    for folder in (path, path / DATA_SETS[name].torchvision / "raw"):
        if any(_stored(folder, file) for file in names):
            return folder
    return None


def read(name: str, folder: Path) -> ImageSource:
    """Reads both splits. Raises DmatError if one of the four files is missing, incomplete or not an IDX file."""
    (names,) = DATA_SETS[name].layouts
    paths = [_stored(folder, file) for file in names]
    for path, file in zip(paths, names, strict=True):
        if path is None:
            raise DmatError(
                f"{folder / file} does not exist, nor {file}.gz; expected it beside the other files; "
                f"{data_sets.how_to_get(name)}"
            )
    train, test = (_read_pair(name, *(path for path in pair if path)) for pair in (paths[:2], paths[2:]))
    origin = data_sets.origin(name, "IDX files", len(train[1]), len(test[1]))
    return ImageSource(*train, DATA_SETS[name].class_names, DATA_SETS[name].licence, origin, test)


def _stored(folder: Path, name: str) -> Path | None:
    """The file of this name, as it is or compressed."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_pair(name: str, image_path: Path, label_path: Path) -> Pair:
    """Images uint8 [N, H, W, 1] and labels int64 [N] of one split."""
    images, labels = _read_array(image_path, 3), _read_array(label_path, 1).astype(np.int64)
    if len(images) != len(labels):
        raise DmatError(
            f"{label_path} holds {len(labels):,} labels, {image_path.name} {len(images):,} images; expected as many of "
            f"both; bring back good copies"
        )
    expect_labels(label_path, labels, DATA_SETS[name].class_names)
    return images[..., None], labels


def _read_array(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file, uint8 [N, H, W] for three dimensions and [N] for one."""
    with open(path, "rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as content:
            magic = content.read(4)
            if magic != bytes((0, 0, _UINT8, dimensions)):
                raise DmatError(
                    f"{path} begins with {magic.hex(' ') or 'nothing'}; expected 00 00 08 {dimensions:02x}, an IDX "
                    f"file of bytes with {dimensions} dimension{'s' if dimensions > 1 else ''}; bring back a good copy"
                )
            shape = struct.unpack(f">{dimensions}I", content.read(4 * dimensions))
            expect_plausible_size(path, math.prod(shape))
            values = np.empty(shape, dtype=np.uint8)
            length = content.readinto(values.reshape(-1).data) if values.size else 0
            surplus = len(content.read(1))
    except (EOFError, struct.error, zlib.error, gzip.BadGzipFile) as error:
        raise _incomplete(path, str(error)) from None
    if length != values.size or surplus:
        raise _incomplete(path, f"{'more' if surplus else 'fewer'} bytes than its header says, {values.size:,}")
    return values


def _incomplete(path: Path, cause: str) -> DmatError:
    return DmatError(f"{path} is damaged ({cause}); expected a complete IDX file; bring back a good copy")
