"""SVHN, cropped digits (Netzer et al. 2011): MATLAB files with `X` uint8 [32, 32, 3, N] and `y` [N, 1], 10 for a zero.

scipy's reader of MATLAB files runs nothing: it makes arrays, text and records. Type and size of both arrays are read
first, and only these two are loaded. Shapes: N images.
"""

from pathlib import Path

import numpy as np

from dmat.data import data_sets
from dmat.data.data_sets import DATA_SETS
from dmat.data.image_source import ImageSource, Pair, expect_plausible_size
from dmat.errors import DmatError, first_line

_NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "double", "single")  # types of MATLAB for labels


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
    train, test = (_read_file(folder / file, name) for file in _files(name))
    origin = data_sets.origin(name, "cropped digits", len(train[1]), len(test[1]))
    return ImageSource(*train, DATA_SETS[name].class_names, DATA_SETS[name].licence, origin, test)


def _read_file(path: Path, name: str) -> Pair:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of one file."""
    from scipy.io import loadmat, whosmat  # type: ignore[import-untyped]

    try:
        contents = whosmat(path, appendmat=False)
        _expect_arrays(path, contents, DATA_SETS[name].size)
        arrays = loadmat(path, appendmat=False, variable_names=["X", "y"])
        stored, labels = arrays["X"], arrays["y"].reshape(-1)
    except DmatError:
        raise
    except Exception as error:  # damaged or hostile bytes may raise any exception; none of them is a bug of dmat
        raise DmatError(
            f"{path} is incomplete or not a MATLAB file ({type(error).__name__}: {first_line(error)}); expected the "
            f"published file; bring back a good copy"
        ) from None
    if not np.isin(labels, range(1, 11)).all():
        raise DmatError(
            f"{path}: `y` holds values from {labels.min()} to {labels.max()}; expected the whole numbers 1 to 10; "
            f"bring back a good copy"
        )
    digits = labels.astype(np.int64) % 10  # 10 is a zero
    return np.ascontiguousarray(stored.transpose(3, 0, 1, 2)), digits


def _expect_arrays(path: Path, contents: list[tuple[str, tuple[int, ...], str]], size: int) -> None:
    """Raises DmatError if a file does not hold the two arrays of SVHN.

    contents: name, shape and type of every array in the file. size: height and width in pixels.
    """
    shapes = {array: shape for array, shape, _ in contents}
    types = {array: kind for array, _, kind in contents}
    count = shapes.get("X", (0,))[-1]
    if (
        [array for array, *_ in contents if array in ("X", "y")] not in (["X", "y"], ["y", "X"])
        or types["X"] != "uint8"
        or shapes["X"] != (size, size, 3, count)
        or types["y"] not in _NUMBERS
        or sorted(shapes["y"]) != sorted((1, count))
    ):
        actual = ", ".join(f"{array} {kind} {shape}" for array, shape, kind in contents) or "nothing"
        raise DmatError(
            f"{path} holds {actual}; expected X uint8 ({size}, {size}, 3, N) and y (N, 1), once each; bring back a "
            f"good copy"
        )
    expect_plausible_size(path, size * size * 3 * count)
