"""Scores of the images of a set: one file per shard, and a manifest with their checksums.

Each image has several scores, all of them higher where the scorer is surer. A selection chooses one of them. Images
without labels of their own get them here: the scorer's, one more file per shard.
"""

from pathlib import Path
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from dmat import files
from dmat.data import shards
from dmat.data.shards import ShardEntry, Shards
from dmat.errors import DmatError

# Columns of the scores. probability: softmax of the image's own class, the score of Wang et al. 2023. margin: by how
# much that exceeds the largest of the other classes. certainty: minus the entropy of all classes, in nats.
SCORES = ("probability", "margin", "certainty")
PSEUDO_LABELS = "labels"  # what the names of files of labels begin with


class ScoreEntry(TypedDict):
    """The scores of a shard in the manifest of scores."""

    file: str
    count: int  # number of images
    sha256: str  # of the file
    labels: NotRequired[str]  # file of the scorer's labels, where the images have none
    labels_sha256: NotRequired[str]


class ScoreManifest(TypedDict):
    """The manifest of scores, as far as its readers need it."""

    shards: list[ScoreEntry]


def score_file(entry: ShardEntry) -> str:
    """File name of a shard's scores. It contains the checksums of images and labels in the shard's manifest entry."""
    return f"{entry['images_sha256'][:16]}-{entry['labels_sha256'][:8]}.npy"


def label_file(entry: ShardEntry) -> str:
    """File name of the labels that the scorer gave to a shard without labels."""
    return f"{PSEUDO_LABELS}-{score_file(entry)}"


def read_scores(folder: Path, images: Shards, score: str) -> tuple[np.ndarray, np.ndarray]:
    """One of `SCORES` and the label of each image of a set: float32 [N], and the smallest whole numbers that do, [N].

    The labels are those of the set, or the scorer's where it has none. Raises DmatError if the scores changed after
    they were written, or belong to other images.
    """
    recorded = files.read_record(folder / shards.MANIFEST, ScoreManifest)["shards"]
    entries = images.manifest["shards"]
    expected = [(score_file(entry), entry["count"]) for entry in entries]
    if [(entry["file"], entry["count"]) for entry in recorded] != expected or any(
        ("labels" in entry) == images.labelled for entry in recorded
    ):
        raise DmatError(
            f"{folder} has scores of {len(recorded)} shards, which are not those of the {len(expected)} shards of the "
            f"image set; run score_images again, or `dvc repro`"
        )
    column = SCORES.index(score)
    scores, labels = np.empty(len(images), np.float32), np.empty(len(images), np.min_scalar_type(images.classes))
    start = 0
    for entry, own_labels in zip(recorded, images.labels, strict=True):
        rows = slice(start, start + entry["count"])
        scores[rows] = _read(folder / entry["file"], entry["sha256"])[:, column]
        labels[rows] = own_labels if images.labelled else _read(folder / entry["labels"], entry["labels_sha256"])
        start = rows.stop
    return scores, labels


def _read(path: Path, expected: str) -> np.ndarray:
    """The array [N, ...] of a file, mapped into memory. Raises DmatError if its checksum is another."""
    if (checksum := files.sha256(path)) != expected:
        raise DmatError(
            f"{path} has checksum {checksum[:12]}; its manifest says {expected[:12]}; the file was altered or cut: "
            f"restore it (`dvc checkout`) or run score_images again"
        )
    return files.load_array(path, mapped=True)
