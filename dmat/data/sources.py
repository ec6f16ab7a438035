"""Sources of real images. Each source is a function (path) -> ImageSource; no source needs the internet or executes
anything in a file.

A source may have its own test images; otherwise `prepare_data` splits them off. `recognise` detects which source fits a
path. Files of published data sets and of formats are read by `dmat.data.formats`.

Shapes: N images.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from dmat import plugins
from dmat.data import data_sets, shards
from dmat.data.data_sets import DATA_SETS, NOT_STATED
from dmat.data.formats import cifar, idx, svhn, tiny_imagenet
from dmat.data.formats.class_folders import contains_images, folder
from dmat.data.formats.npz_files import SUFFIX as NPZ_SUFFIX
from dmat.data.formats.npz_files import npz
from dmat.data.formats.parquet_files import MAGIC as PARQUET_MAGIC
from dmat.data.formats.parquet_files import SUFFIX as PARQUET_SUFFIX
from dmat.data.formats.parquet_files import parquet
from dmat.data.image_source import ImageSource, expect_folder, expect_valid
from dmat.errors import DmatError

SPLITS = ("train", "test")


class DataSetReader(Protocol):
    """A module of `dmat.data.formats` that reads published data sets, named as in DATA_SETS."""

    def find(self, name: str, path: Path) -> Path | None:
        """The folder of the files at `path`, None if there is none."""

    def read(self, name: str, folder: Path) -> ImageSource:
        """The data set in a folder that `find` returned."""


_READERS: dict[str, DataSetReader] = {
    "cifar10": cifar,
    "cifar100": cifar,
    "svhn": svhn,
    "tinyimagenet": tiny_imagenet,
    "mnist": idx,
    "fashion_mnist": idx,
}


def digits(path: Path | None = None) -> ImageSource:
    """The 1,797 handwritten 8x8 digits that ship inside scikit-learn (UCI Optical Recognition, CC BY 4.0).

    The 17 grey levels v = 0..16 are stored as round(v * 255 / 16).
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # 3 s to import: only where it is used

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # [1797, 8, 8, 1]
    labels, data_set = bunch.target.astype(np.int64), DATA_SETS["digits"]
    origin = "UCI Optical Recognition of Handwritten Digits, test part, from scikit-learn"
    return ImageSource(images, labels, data_set.class_names, data_set.licence, origin)


def published(name: str, path: Path | None) -> ImageSource:
    """Reads a data set of DATA_SETS from its published files: in `path`, or in the sub-folder that they unpack to."""
    return _READERS[name].read(name, _folder_of(name, path))


def _folder_of(name: str, path: Path | None) -> Path:
    """The folder of a published data set. Raises DmatError, which says what to put where, if there is none."""
    located = _READERS[name].find(name, path) if path is not None else None
    if located is None:
        raise DmatError(
            f"{path} is not a {DATA_SETS[name].title} folder; expected {data_sets.expected_files(name)}, or the folder "
            f"that holds it; {data_sets.how_to_get(name)}"
        )
    return located


def sharded(path: Path | None) -> ImageSource:
    """Reads a folder of shards with their manifest that dmat wrote. Compares every checksum."""
    root = expect_folder(path, f"a folder of shards with its {shards.MANIFEST}")
    opened = shards.open_shards(root)
    images, labels = opened.all()
    names = tuple(opened.manifest["class_names"])
    split = opened.manifest.get("split")
    origin = str(opened.manifest.get("origin", root.name)) + (f", split {split}" if split else "")
    licence = str(opened.manifest.get("licence", NOT_STATED))
    return ImageSource(images, labels, names, licence, origin, split=str(split or ""))


SOURCES: dict[str, Callable[[Path | None], ImageSource]] = {
    "digits": digits,
    **{name: functools.partial(published, name) for name in _READERS},
    "folder": folder,
    "npz": npz,
    "parquet": parquet,
    "shards": sharded,
}


def load(name: str, path: Path | None) -> ImageSource:
    """Loads a source by its name. Raises DmatError also if the set is empty or has the wrong types or shapes."""
    return expect_valid(plugins.find(SOURCES, name)(path), path or name)


def location(name: str, path: Path) -> Path:
    """The file or folder that a source reads, given its path.

    For a published data set this is the folder of its files, even if `path` is its parent.
    """
    if not path.exists():
        advice = f"; {data_sets.how_to_get(name)}" if name in _READERS else ""
        raise DmatError(
            f"prepare_data.path is {path}, which does not exist; expected the images of source {name}{advice}"
        )
    return _folder_of(name, path) if name in _READERS else path


def recognise(path_or_name: str | Path, split: str | None = None) -> ImageSource:
    """Detects which source fits a path and loads one split of it, "test" or "train". `digits` is also accepted.

    split: None means the test images. A source without a test split gives all images, and the origin says so; `split`
    is then the caller's statement about these images. Raises DmatError if the source states another split, or if no
    source fits.
    """
    if split not in (None, *SPLITS):
        raise DmatError(f"the split is {split!r}; expected test or train; name one of them")
    source = load(_source_name(path_or_name), None if path_or_name == "digits" else Path(path_or_name))
    if split and source.split not in ("", split):
        raise DmatError(f"{path_or_name} holds the split {source.split}, not {split}; name other images")
    if source.test is None:
        description, images, labels = "all images, as it has no test images of its own", source.images, source.labels
        description += f"; said to be of the split {split}" if split and not source.split else ""
        actual_split = source.split or split or ""
    elif split in (None, "test"):
        actual_split = "test"
        description, (images, labels) = "its test images", source.test
    else:
        actual_split = "train"
        description, images, labels = "its training images", source.images, source.labels
    origin = f"{source.origin}: {description}"
    return dataclasses.replace(source, images=images, labels=labels, origin=origin, test=None, split=actual_split)


def _source_name(path_or_name: str | Path) -> str:
    """Name in SOURCES of the source that fits a path. Raises DmatError if none or several do."""
    path = Path(path_or_name)
    if path_or_name == "digits":
        return "digits"
    if path.is_file() and zipfile.is_zipfile(path):
        return "npz"
    if path.is_file() and _starts_with(path, PARQUET_MAGIC):
        return "parquet"
    if path.is_dir():
        names = [name for name, reader in _READERS.items() if reader.find(name, path)]
        if len(names) > 1:
            raise DmatError(
                f"{path} holds {' and '.join(DATA_SETS[name].title for name in names)}, or files with the names of "
                f"both; expected one of them; give the folder of that data set, or the shards that prepare_data made "
                f"of it"
            )
        if names:
            return names[0]
        if (path / shards.MANIFEST).is_file():
            return "shards"
        suffixes = {file.suffix.lower() for file in path.iterdir()}
        for name, suffix in (("npz", NPZ_SUFFIX), ("parquet", PARQUET_SUFFIX)):
            if suffix in suffixes:
                return name
        if contains_images(path):
            return "folder"
    state = "is not a format that dmat reads" if path.exists() else "does not exist"
    titles = ", ".join(DATA_SETS[name].title for name in _READERS)
    raise DmatError(
        f"{path} {state}; looked for the name digits, an {NPZ_SUFFIX} or {PARQUET_SUFFIX} file or a folder of them, "
        f"the published files of {titles}, a folder of shards ({shards.MANIFEST}) and a folder with one sub-folder of "
        f"images per class; give one of these"
    )


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def stratified(labels: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws `count` items whose class shares match those of `labels` as closely as whole numbers allow.

    labels: [N]. Returns sorted indices, int64 [count]. The largest remainders get the items that are left over; ties go
    to the lower class. Raises DmatError if `count` exceeds N.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 <= count <= len(labels):
        raise DmatError(f"a split of {count} images was requested, but there are {len(labels)}; ask for fewer")
    counts, remainders = np.divmod(sizes * count, max(len(labels), 1))  # whole numbers: ties are exact
    for index in np.argsort(-remainders, kind="stable")[: count - counts.sum()]:
        counts[index] += 1
    drawn = [generator.permutation(np.flatnonzero(labels == c))[:take] for c, take in zip(classes, counts, strict=True)]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, dtype=np.int64)
