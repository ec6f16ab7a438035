"""Image shards: fixed-size raw .npy files of images and labels, described by a manifest with a checksum each.

One format for real splits and generated sets. Shards are read by memory map, so memory does not grow with the set.
The manifest's hash stands for the whole set. Refuses shards that are missing, altered or of another schema.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.errors import DmatError

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shards:
    """An opened set. images[k], labels[k]: uint8 [n, H, W, C] and int64 [n] of shard k, memory-mapped."""

    manifest: dict[str, Any]
    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(labels) for labels in self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @property
    def classes(self) -> int:
        return len(self.manifest["class_names"])

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, C] and labels int64 [B] at global indices, in their order."""
        starts = np.cumsum([0, *(len(labels) for labels in self.labels)])
        owner = np.searchsorted(starts, indices, side="right") - 1
        images = np.empty((len(indices), *self.shape), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        for shard in np.unique(owner):
            here = owner == shard
            local = indices[here] - starts[shard]
            images[here] = self.images[shard][local]
            labels[here] = self.labels[shard][local]
        return images, labels

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything in memory; for sets known to be small."""
        return self.take(np.arange(len(self)))


def entry(index: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's entry of a shard of which `record` has count and checksums."""
    names = {key: _file(index, key) for key in ("images", "labels")}
    return {
        "index": index,
        "count": record["count"],
        **names,
        **{f"{key}_sha256": record[f"{key}_sha256"] for key in names},
    }


def write_shard(folder: Path, index: int, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Writes one shard and returns its manifest entry. Equal arrays are equal files."""
    record: dict[str, Any] = {"count": len(labels)}
    for key, array in (("images", images), ("labels", labels)):
        path = folder / _file(index, key)
        with files.writing(path) as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        record[f"{key}_sha256"] = files.sha256(path)
    return entry(index, record)


def _file(index: int, key: str) -> str:
    return f"{key}-{index:05d}.npy"


def write_manifest(
    folder: Path,
    entries: Sequence[dict[str, Any]],
    *,
    shape: Sequence[int],
    class_names: Sequence[str],
    class_counts: Sequence[int] | np.ndarray,
    metadata: dict[str, Any],
) -> None:
    """Names what the shards of a folder are. `facts`: everything else a reader should know, JSON values."""
    files.write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "shards": list(entries),
            "count": sum(entry["count"] for entry in entries),
            "shape": list(shape),
            "class_names": list(class_names),
            "class_counts": [int(n) for n in class_counts],
            **metadata,
        },
    )


def write_set(
    folder: Path, images: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str], metadata: dict[str, Any]
) -> None:
    """A whole small set as one shard with its manifest."""
    entry = write_shard(folder, 0, images, labels)
    counts = np.bincount(labels, minlength=len(class_names))
    write_manifest(
        folder, [entry], shape=images.shape[1:], class_names=class_names, class_counts=counts, metadata=metadata
    )


def open_shards(folders: Path | Iterable[Path], verify: bool = True) -> Shards:
    """Opens one folder, or several as one set in the order given. `verify` compares every checksum."""
    folders = [folders] if isinstance(folders, Path) else list(folders)
    manifests, images, labels = [], [], []
    for folder in folders:
        manifest = files.read_json(folder / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            raise DmatError(
                f"{folder / MANIFEST} has schema {manifest.get('schema')}; this dmat reads {SCHEMA}; "
                f"make the set again or use the dmat that wrote it"
            )
        manifests.append(manifest)
        for entry in manifest["shards"]:
            images.append(_open(folder, entry, "images", verify))
            labels.append(_open(folder, entry, "labels", verify))
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if (manifest["shape"], manifest["class_names"]) != (first["shape"], first["class_names"]):
            raise DmatError(
                f"{folder} holds images {manifest['shape']} of {len(manifest['class_names'])} classes; expected "
                f"{first['shape']} of {len(first['class_names'])} as in {folders[0]}; generate both alike"
            )
    return Shards(first, tuple(images), tuple(labels))


def _open(folder: Path, entry: dict[str, Any], key: str, verify: bool) -> np.ndarray:
    path = folder / entry[key]
    if not path.is_file():
        raise DmatError(f"{path} does not exist; run the stage that makes it, or `dvc repro`")
    if verify and (found := files.sha256(path)) != entry[f"{key}_sha256"]:
        raise DmatError(
            f"{path} has checksum {found[:12]}; its manifest says {entry[f'{key}_sha256'][:12]}; the file was "
            f"altered or cut: restore it (`dvc checkout`) or delete the folder and run its stage again"
        )
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(array) != entry["count"]:
        raise DmatError(f"{path} holds {len(array)} items; its manifest says {entry['count']}; make the set again")
    return array
