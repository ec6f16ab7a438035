"""What an image set is and whether it is intact, said from its files alone.

`shards.open_shards` refuses a set at its first damaged file. Here every damaged shard is named, and the others are
usable.

Shapes: N images, H height, W width, C channels, K classes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from dmat import checksum_cache, files
from dmat.data import croissant
from dmat.data.shards import (
    ARRAYS,
    MANIFEST,
    NO_LABEL,
    Manifest,
    SetArray,
    ShardEntry,
    Shards,
    open_shards,
    read_manifest,
)
from dmat.errors import DmatError, first_line

_DTYPES = {"images": np.dtype(np.uint8), "labels": np.dtype(np.int64)}
_BLOCK = 1 << 16  # labels at a time


class SetDescription(TypedDict):
    """What `dmat images info` says of a set."""

    path: str
    images: int
    shape: list[int]  # H, W, C
    classes: int
    class_names: list[str]
    class_counts: list[int]  # [K]
    labelled: bool
    shards: int
    bytes: int  # of the files of images and labels
    licence: str
    origin: str | None  # a description, of a set that dmat did not generate
    generator_sha256: str | None
    sampler: Mapping[str, object] | None
    seed: int | None
    manifest_sha256: str  # identifies the set
    croissant: str | None  # name of the Croissant file, if the folder has one


@dataclasses.dataclass(frozen=True)
class ShardCheck:
    """A shard and what is wrong with it; no problems if it is usable."""

    entry: ShardEntry
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SetCheck:
    """The shards of a set, and what is wrong with the set besides them."""

    shards: tuple[ShardCheck, ...]
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not any(shard.problems for shard in self.shards)


def describe(folder: Path) -> SetDescription:
    """What the set in a folder is. Reads its manifest and the sizes of its files, nothing else."""
    manifest = read_manifest(folder)
    paths = [folder / entry[name] for entry in manifest["shards"] for name in ARRAYS]
    return {
        "path": str(folder),
        "images": manifest["count"],
        "shape": manifest["shape"],
        "classes": len(manifest["class_names"]),
        "class_names": manifest["class_names"],
        "class_counts": manifest["class_counts"],
        "labelled": not manifest.get("unlabelled", False),
        "shards": len(manifest["shards"]),
        "bytes": sum(path.stat().st_size for path in paths if path.is_file()),
        "licence": manifest.get("licence", "unknown"),
        "origin": manifest.get("origin"),
        "generator_sha256": manifest.get("generator_sha256"),
        "sampler": manifest.get("sampler"),
        "seed": manifest.get("seed"),
        "manifest_sha256": files.sha256(folder / MANIFEST),
        "croissant": croissant.NAME if (folder / croissant.NAME).is_file() else None,
    }


def verify(folder: Path, progress: Callable[[int], object] = lambda images: None, cached: bool = False) -> SetCheck:
    """Compares every file of a set with its manifest, and every label with its classes; reads every byte.

    progress: called with the number of images of each shard when it is done. cached: trust checksums of files that did
    not change since they were read. Raises DmatError if the manifest itself is not usable.
    """
    manifest = read_manifest(folder)
    names = {entry[ARRAYS[name]]: entry[name] for entry in manifest["shards"] for name in ARRAYS}
    counts, checks = np.zeros(len(manifest["class_names"]), dtype=np.int64), list[ShardCheck]()
    with contextlib.nullcontext() if cached else checksum_cache.bypassed():
        for entry in manifest["shards"]:
            problems = []
            for name in ARRAYS:
                try:
                    array = _open_array(folder, entry, name, manifest["shape"], names)
                    if name == "labels":
                        counts += _class_counts(array, manifest, entry["labels"])
                except _Unfit as problem:
                    problems.append(str(problem))
            checks.append(ShardCheck(entry, tuple(problems)))
            progress(entry["count"])
    problems = []
    if not any(check.problems for check in checks) and counts.tolist() != manifest["class_counts"]:
        wrong = np.flatnonzero(counts != np.array(manifest["class_counts"], dtype=object))
        first = manifest["class_names"][wrong[0]]
        problems.append(
            f"{MANIFEST} counts {manifest['class_counts'][wrong[0]]:,} images of class {first}, and the labels "
            f"{counts[wrong[0]]:,}; {len(wrong)} of {len(counts)} classes differ"
        )
    intact = not any(check.problems for check in checks)  # it names the files too
    if intact and (folder / croissant.NAME).is_file() and not croissant.is_current(folder):
        problems.append(f"{croissant.NAME} does not describe this manifest")
    return SetCheck(tuple(checks), tuple(problems))


def open_verified(folder: Path) -> Shards:
    """Opens a set that may be of another project. Raises DmatError, with its first problem, if `verify` has any."""
    check = verify(folder, cached=True)
    problems = [*(problem for shard in check.shards for problem in shard.problems), *check.problems]
    if problems:
        raise DmatError(
            f"{folder}: {problems[0]}; expected what the manifest says; restore the set; `dmat images verify {folder}` "
            f"lists all problems"
        )
    return open_shards(folder, verify=False)


def open_unverified(folder: Path) -> Shards:
    """Opens a set without reading it: types and shapes are compared with the manifest, checksums are not.

    Raises DmatError if a file is missing or of another type or shape.
    """
    manifest = read_manifest(folder)
    try:
        images, labels = (
            tuple(_open_array(folder, entry, name, manifest["shape"]) for entry in manifest["shards"])
            for name in ARRAYS
        )
    except _Unfit as problem:
        raise DmatError(
            f"{folder}: {problem}; expected what the manifest says; `dmat images verify {folder}` lists all problems"
        ) from None
    return Shards(manifest, images, labels)


def first_of_classes(images: Shards, count: int, max_classes: int) -> np.ndarray:
    """Indices, int64 [N] ascending, of the first `count` images of each class, of the first classes that have images.

    Without labels, of the first images, as many as one class would have in ten rows.
    """
    if not images.labelled:
        return np.arange(min(10 * count, len(images)))
    present = [label for label, number in enumerate(images.manifest["class_counts"]) if number][:max_classes]
    missing = {label: min(count, images.manifest["class_counts"][label]) for label in present}
    taken, start = list[np.ndarray](), 0
    for labels in images.labels:
        for label in [label for label, number in missing.items() if number]:
            positions = np.flatnonzero(labels == label)[: missing[label]]
            missing[label] -= len(positions)
            taken.append(start + positions)
        start += len(labels)
    return np.sort(np.concatenate(taken))


class _Unfit(Exception):
    """A file is not what its manifest says; the message begins with its name."""


def _open_array(
    folder: Path, entry: ShardEntry, name: SetArray, image_shape: list[int], names: Mapping[str, str] | None = None
) -> np.ndarray:
    """Opens an array of a shard: images uint8 [N, H, W, C] or labels int64 [N], memory-mapped.

    names: SHA-256 -> file of the set; None: do not compare checksums. Raises _Unfit if the array is missing, was
    altered, or is of another type or shape.
    """
    path, recorded = folder / entry[name], entry[ARRAYS[name]]
    if not path.is_file():
        raise _Unfit(f"{path.name} is missing")
    if names is not None and (checksum := files.sha256(path)) != recorded:
        if other := names.get(checksum):
            raise _Unfit(f"{path.name} is the content of {other}")
        raise _Unfit(
            f"{path.name} has checksum {checksum[:12]}, and the manifest says {recorded[:12]}: it was altered or cut"
        )
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # np.load would open an archive too
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise _Unfit(f"{path.name} is not an array ({first_line(error)})") from None
    dtype, shape = _DTYPES[name], (entry["count"], *(image_shape if name == "images" else ()))
    if (array.dtype, array.shape) != (dtype, shape) or not array.flags.c_contiguous:
        raise _Unfit(
            f"{path.name} is {array.dtype} {list(array.shape)}, and the manifest says {dtype} {list(shape)}, row by row"
        )
    return array


def _class_counts(labels: np.ndarray, manifest: Manifest, name: str) -> np.ndarray:
    """Images per class, int64 [K]. labels: int64 [N], of the file `name`. Raises _Unfit if they are not classes."""
    classes, counts = len(manifest["class_names"]), np.zeros(len(manifest["class_names"]), dtype=np.int64)
    for start in range(0, len(labels), _BLOCK):
        block = labels[start : start + _BLOCK]
        low, high = int(block.min()), int(block.max())
        if manifest.get("unlabelled"):
            if (low, high) != (NO_LABEL, NO_LABEL):
                raise _Unfit(f"{name} has labels from {low} to {high}, and the manifest says that the images have none")
        elif low < 0 or high >= classes:
            raise _Unfit(f"{name} has labels from {low} to {high}, and the classes are 0 to {classes - 1}")
        else:
            counts += np.bincount(block, minlength=classes)
    return counts
