"""Scores of the images of a set: one file per shard, and a manifest with their checksums."""

from pathlib import Path
from typing import TypedDict

import numpy as np

from dmat import files
from dmat.data import shards
from dmat.data.shards import ShardEntry, Shards
from dmat.errors import DmatError


class ScoreEntry(TypedDict):
    """The scores of a shard in the manifest of scores."""

    file: str
    count: int  # number of images
    sha256: str  # of the file


def score_file(entry: ShardEntry) -> str:
    """File name of a shard's scores. It contains the checksums of images and labels in the shard's manifest entry."""
    return f"{entry['images_sha256'][:16]}-{entry['labels_sha256'][:8]}.npy"


def read_scores(folder: Path, images: Shards) -> np.ndarray:
    """The score of each image of a set: float32 [N].

    Raises DmatError if the scores changed after they were written, or belong to other images.
    """
    recorded: list[ScoreEntry] = files.read_record(folder / shards.MANIFEST, shards=list)["shards"]
    expected = [score_file(entry) for entry in images.manifest["shards"]]
    if [entry["file"] for entry in recorded] != expected:
        raise DmatError(
            f"{folder} has scores of {len(recorded)} shards, which are not those of the {len(expected)} shards of the "
            f"image set; run score_images again, or `dvc repro`"
        )
    for entry in recorded:
        if (checksum := files.sha256(folder / entry["file"])) != entry["sha256"]:
            raise DmatError(
                f"{folder / entry['file']} has checksum {checksum[:12]}; its manifest says {entry['sha256'][:12]}; the "
                f"file was altered or cut: restore it (`dvc checkout`) or run score_images again"
            )
    return np.concatenate([files.load_array(folder / name) for name in expected])
