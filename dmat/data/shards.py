"""Image shards: fixed-size raw .npy files of images and labels, described by a manifest with one checksum per file.

Real splits and generated sets have the same format. Shards are read by memory map, so memory does not grow with the
set. The hash of the manifest identifies the whole set. Refuses shards that are missing, altered or of another schema.

Shapes: N images, B images of a batch, H height, W width, C channels.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Required, cast

import numpy as np
from typing_extensions import TypedDict

from dmat import files
from dmat.errors import DmatError

SCHEMA = 1
MANIFEST = "manifest.json"
NO_LABEL = -1  # of an image that an unconditional model generated

ArrayName = Literal["images", "labels", "scores"]
CHECKSUM_KEYS: dict[ArrayName, Literal["images_sha256", "labels_sha256", "scores_sha256"]] = {
    "images": "images_sha256",
    "labels": "labels_sha256",
    "scores": "scores_sha256",
}
SetArray = Literal["images", "labels"]
# Arrays of a shard of images -> the key of its checksum.
ARRAYS: dict[SetArray, Literal["images_sha256", "labels_sha256"]] = {
    "images": "images_sha256",
    "labels": "labels_sha256",
}
_IMAGES, _LABELS = np.dtype(np.uint8), np.dtype(np.int64)
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE_NAME = re.compile(r"\w[\w.-]*\.npy", re.ASCII)


class ShardRecord(TypedDict, total=False):
    """Number of rows of a shard; file name and SHA-256 in hex of each of its arrays.

    A shard of images has images and labels; a shard of scores has scores, and labels if the images had none.
    """

    count: Required[int]
    images: str
    labels: str
    scores: str
    images_sha256: str
    labels_sha256: str
    scores_sha256: str


class ShardEntry(TypedDict):
    """A shard in a manifest: number of images, file names and their SHA-256 in hex."""

    index: int
    count: int
    images: str
    labels: str
    images_sha256: str
    labels_sha256: str


class SetMetadata(TypedDict, total=False):
    """What a stage adds to a manifest. Real splits and generated sets have some keys each; `licence` is in both."""

    licence: str  # of the images
    # a split, written by prepare_data
    split: str  # "train", "validation" or "test"
    source: str  # name of the source in params.yaml
    origin: str  # a description of the source, for people
    source_indices: list[int]  # of the images in the source
    source_split: str  # "train" or "test": what the indices count in; only for sources with test images
    mean: list[float]  # per channel, for pixels in [0, 1]
    std: list[float]
    # a generated set, written by generate_images
    generator_sha256: str  # of the denoiser's weights
    sampler: Mapping[str, object]
    seed: int
    block: int  # images that are generated together
    precision: str  # "fp32" or "bf16"
    compiled: bool  # sampled with torch.compile
    levels: list[float]  # of noise, where the sampler's schedule was searched
    unlabelled: bool  # every label is NO_LABEL: the generator is unconditional


class Manifest(SetMetadata):
    """The manifest of an image set."""

    schema: Required[int]
    shards: Required[list[ShardEntry]]
    count: Required[int]  # images of the set
    shape: Required[list[int]]  # H, W, C
    class_names: Required[list[str]]
    class_counts: Required[list[int]]  # images per class


@dataclasses.dataclass(frozen=True)
class Shards:
    """An opened set. images[k], labels[k]: uint8 [N, H, W, C] and int64 [N] of shard k, memory-mapped."""

    manifest: Manifest
    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.manifest["class_names"])

    @property
    def labelled(self) -> bool:
        """Whether the images have labels of their own."""
        return has_labels(self.manifest)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, C] and labels int64 [B] at global indices [B], in the order of the indices."""
        images = np.empty((len(indices), *self.shape), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        self.gather(indices, images, labels, np.arange(len(indices)))
        return images, labels

    def gather(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        """Copies the images at global indices [B], and their labels, to `rows` [B] of the arrays.

        images: uint8 [N, H, W, C]. labels: int64 [N]. Each shard is read once, in the order of its images.
        """
        order = np.argsort(indices, kind="stable")
        indices, rows = indices[order], rows[order]
        if len(indices) and not 0 <= indices[0] <= indices[-1] < len(self):
            raise IndexError(f"images {indices[0]} to {indices[-1]} of a set of {len(self)}")
        ends = np.searchsorted(indices, self._starts)  # where the images of each shard begin among the sorted ones
        for shard in np.flatnonzero(np.diff(ends)):
            part = slice(ends[shard], ends[shard + 1])
            local = indices[part] - self._starts[shard]
            images[rows[part]] = self.images[shard][local]
            labels[rows[part]] = self.labels[shard][local]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Global index of the first image of each of S shards, then the number of images: int64 [S + 1]."""
        return np.cumsum([0, *(len(labels) for labels in self.labels)])

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads the whole set into memory: images uint8 [N, H, W, C] and labels int64 [N]. For small sets."""
        return self.take(np.arange(len(self)))


def entry(index: int, record: ShardRecord) -> ShardEntry:
    """The manifest entry of a shard. record: its `count`, `images_sha256` and `labels_sha256`."""
    return {
        "index": index,
        "count": record["count"],
        "images": _file_name(index, "images"),
        "labels": _file_name(index, "labels"),
        "images_sha256": record["images_sha256"],
        "labels_sha256": record["labels_sha256"],
    }


def write_shard(folder: Path, index: int, images: np.ndarray, labels: np.ndarray) -> ShardEntry:
    """Writes one shard and returns its manifest entry. Equal arrays give equal files.

    images: uint8 [N, H, W, C]. labels: int64 [N].
    """
    record: ShardRecord = {"count": len(labels)}
    arrays: dict[ArrayName, np.ndarray] = {"images": images, "labels": labels}
    for key, array in arrays.items():
        path = folder / _file_name(index, key)
        with files.writing(path) as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        record[CHECKSUM_KEYS[key]] = files.sha256(path)
    return entry(index, record)


def _file_name(index: int, key: str) -> str:
    return f"{key}-{index:05d}.npy"


def write_manifest(
    folder: Path,
    entries: Sequence[ShardEntry],
    *,
    shape: Sequence[int],
    class_names: Sequence[str],
    class_counts: Sequence[int] | np.ndarray,
    metadata: SetMetadata,
) -> None:
    """Writes the manifest of the shards in a folder.

    shape: H, W, C. class_counts: images per class, [K] for K classes. metadata: further JSON values for readers.
    """
    manifest: Manifest = {
        "schema": SCHEMA,
        "shards": list(entries),
        "count": sum(entry["count"] for entry in entries),
        "shape": list(shape),
        "class_names": list(class_names),
        "class_counts": [int(n) for n in class_counts],
        **metadata,
    }
    files.write_json(folder / MANIFEST, manifest)


def write_set(
    folder: Path, images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str], metadata: SetMetadata
) -> None:
    """Writes a small set as one shard with its manifest. images: uint8 [N, H, W, C]; labels: int64 [N]."""
    entry = write_shard(folder, 0, images, labels)
    counts = np.bincount(labels, minlength=len(class_names))
    write_manifest(
        folder, [entry], shape=images.shape[1:], class_names=class_names, class_counts=counts, metadata=metadata
    )


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a set, which may be of another project: no value is used before it was looked at.

    Raises DmatError if it is missing, or is not one that `write_manifest` wrote. Compares no file of the set.
    """
    path = folder / MANIFEST
    if not isinstance(record := files.read_json(path), dict) or (schema := record.get("schema")) != SCHEMA:
        raise DmatError(
            f"{path} has schema {str(schema)[:20] if isinstance(record, dict) else None}; this dmat reads {SCHEMA}; "
            f"regenerate the set or use the dmat that wrote it"
        )
    problem = files.schema_problems(record, Manifest) or next(_manifest_problems(cast(Manifest, record)), "")
    if problem:
        raise DmatError(f"{path}: {problem}; expected what dmat wrote; restore it or fetch the set again")
    return cast(Manifest, record)


def _manifest_problems(manifest: Manifest) -> Iterator[str]:
    """What is wrong with the values of a manifest, as far as they say it themselves."""
    shape, names, counts = manifest["shape"], manifest["class_names"], manifest["class_counts"]
    if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3):
        yield f"shape is {str(shape)[:60]}, not [H, W, 1 or 3]"
    if not all(names) or len(set(names)) < len(names):
        yield "class_names are not texts, all different"
    if len(counts) != len(names) or min(counts, default=0) < 0:
        yield f"class_counts are not {len(names)} counts, one for each of class_names"
    if not manifest["shards"]:
        yield "it names no shards"
    for number, entry in enumerate(manifest["shards"]):
        if entry["index"] != number or entry["count"] < 0:
            yield f"shard {number} has no index {number} or no count"
        for name, checksum in ARRAYS.items():
            if not _FILE_NAME.fullmatch(entry[name]):
                yield f"the {name} of shard {number} are in {entry[name][:60]!r}, not in a file of the folder"
            if not _SHA256.fullmatch(entry[checksum]):
                yield f"shard {number} has no SHA-256 of its {name}"
    if manifest["count"] != (count := sum(entry["count"] for entry in manifest["shards"])):
        yield f"count is {manifest['count']}, and the shards have {count} images"


def has_labels(manifest: Manifest) -> bool:
    """Whether the images of a set have labels of their own."""
    return not manifest.get("unlabelled", False)


def open_shards(folders: Path | Iterable[Path], verify: bool = True) -> Shards:
    """Opens one folder, or several folders as one set in the given order.

    verify: compare every checksum.

    Raises DmatError if a file is missing, altered or of another schema, or if the folders differ in image shape or
    classes.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    manifests, images, labels = list[Manifest](), list[np.ndarray](), list[np.ndarray]()
    for folder in folders:
        manifest = read_manifest(folder)
        manifests.append(manifest)
        for number in range(len(manifest["shards"])):
            for arrays, array in zip((images, labels), open_shard(folder, manifest, number, verify), strict=True):
                arrays.append(array)
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest["shape"], manifest["class_names"]) != (first["shape"], first["class_names"]):
            raise DmatError(
                f"{folder} holds images {manifest['shape']} of {len(manifest['class_names'])} classes; expected "
                f"{first['shape']} of {len(first['class_names'])} as in {folders[0]}; generate both with one image "
                f"size and the same classes"
            )
    return Shards(first, tuple(images), tuple(labels))


def open_shard(folder: Path, manifest: Manifest, number: int, verify: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Opens one shard of the set in a folder, and no other: images uint8 [N, H, W, C] and labels int64 [N], mapped.

    verify: compare its checksums. Raises DmatError if a file is missing, altered or not what the manifest says.
    """
    entry = manifest["shards"][number]
    if verify:
        for name, checksum in ARRAYS.items():
            _expect_checksum(folder / entry[name], entry[checksum])
    return (
        _open(folder / entry["images"], _IMAGES, (entry["count"], *manifest["shape"])),
        _open(folder / entry["labels"], _LABELS, (entry["count"],)),
    )


def _expect_checksum(path: Path, manifest_checksum: str) -> None:
    if (checksum := files.sha256(path)) != manifest_checksum:
        raise DmatError(
            f"{path} has checksum {checksum[:12]}; its manifest says {manifest_checksum[:12]}; the file was "
            f"altered or cut: restore it (`dvc checkout`) or delete the folder and run its stage again"
        )


def _open(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-maps one array of a shard: images uint8 [N, H, W, C] or labels int64 [N]."""
    array = files.load_array(path, mapped=True)
    if (array.dtype, array.shape) != (dtype, shape):
        raise DmatError(
            f"{path} holds {array.dtype} {list(array.shape)}; its manifest says {dtype} {list(shape)}; regenerate the "
            f"set, or restore it (`dvc checkout`)"
        )
    return array
