"""Reads manifests of image sets that may be of another project: no value is used before it was looked at."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from dmat import files
from dmat.data import shards
from dmat.data.shards import MANIFEST, Manifest
from dmat.errors import DmatError

SetArray = Literal["images", "labels"]
# Arrays of a shard -> the key of its checksum.
ARRAYS: dict[SetArray, Literal["images_sha256", "labels_sha256"]] = {
    "images": "images_sha256",
    "labels": "labels_sha256",
}
_MAX_MANIFEST = 256 << 20  # bytes: a million shards
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE_NAME = re.compile(r"\w[\w.-]*\.npy", re.ASCII)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a set. Raises DmatError if it is missing, or is not one that `shards.write_manifest` wrote.

    Compares no file of the set.
    """
    path = folder / MANIFEST
    if path.is_file() and path.stat().st_size > _MAX_MANIFEST:
        raise DmatError(f"{path} has {path.stat().st_size:,} bytes; expected a manifest; give the folder of a set")
    record = files.read_record(
        path, schema=int, shards=list, count=int, shape=list, class_names=list, class_counts=list
    )
    if record["schema"] != shards.SCHEMA:
        raise DmatError(
            f"{path} has schema {record['schema']}; this dmat reads {shards.SCHEMA}; regenerate the set or use the "
            f"dmat that wrote it"
        )
    if problem := next(_manifest_problems(record), None):
        raise DmatError(f"{path}: {problem}; expected what dmat wrote; restore it or fetch the set again")
    return cast(Manifest, record)


def _manifest_problems(record: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of a manifest, as far as they say it themselves."""
    shape, names, counts = record["shape"], record["class_names"], record["class_counts"]
    if len(shape) != 3 or not all(_is_count(side, 1) for side in shape) or shape[2] not in (1, 3):
        yield f"shape is {str(shape)[:60]}, not [H, W, 1 or 3]"
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        yield "class_names are not texts, all different"
    if len(counts) != len(names) or not all(_is_count(count, 0) for count in counts):
        yield f"class_counts are not {len(names)} counts, one for each of class_names"
    if not record["shards"]:
        yield "it names no shards"
    for number, entry in enumerate(record["shards"]):
        if not isinstance(entry, dict) or entry.get("index") != number or not _is_count(entry.get("count"), 1):
            yield f"shard {number} has no index {number} or no count"
            return
        for name, checksum in ARRAYS.items():
            if not isinstance(entry.get(name), str) or not _FILE_NAME.fullmatch(entry[name]):
                yield f"the {name} of shard {number} are in {str(entry.get(name))[:60]!r}, not in a file of the folder"
            if not isinstance(entry.get(checksum), str) or not _SHA256.fullmatch(entry[checksum]):
                yield f"shard {number} has no SHA-256 of its {name}"
    for key in ("licence", "origin", "generator_sha256"):
        if not isinstance(record.get(key, ""), str):
            yield f"{key} is not text"
    if not isinstance(record.get("sampler", {}), dict):
        yield "sampler is not a record"
    if record["count"] != (count := sum(entry["count"] for entry in record["shards"])):
        yield f"count is {record['count']}, and the shards have {count} images"


def _is_count(value: object, lowest: int) -> bool:
    return type(value) is int and value >= lowest
