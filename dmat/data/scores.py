"""Scores of the images of a set: a file for each shard, and a manifest with their checksums."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.data import shards
from dmat.data.shards import Shards
from dmat.errors import DmatError


def score_file(entry: Mapping[str, Any]) -> str:
    """Where the scores of a shard lie, given its manifest entry: named by the checksums of its images and labels."""
    return f"{entry['images_sha256'][:16]}-{entry['labels_sha256'][:8]}.npy"


def read_scores(folder: Path, images: Shards) -> np.ndarray:
    """float32 [N]: the score of each image of a set. Raises DmatError for scores that are not what was written, or of
    other images."""
    recorded = files.read_record(folder / shards.MANIFEST, shards=list)["shards"]
    expected = [score_file(entry) for entry in images.manifest["shards"]]
    if [entry["file"] for entry in recorded] != expected:
        raise DmatError(
            f"{folder} has scores of {len(recorded)} shards, which are not those of the {len(expected)} shards of the "
            f"image set; run score_images again, or `dvc repro`"
        )
    for entry in recorded:
        if (found := files.sha256(folder / entry["file"])) != entry["sha256"]:
            raise DmatError(
                f"{folder / entry['file']} has checksum {found[:12]}; its manifest says {entry['sha256'][:12]}; the "
                f"file was altered or cut: restore it (`dvc checkout`) or run score_images again"
            )
    return np.concatenate([files.load_array(folder / name) for name in expected])
