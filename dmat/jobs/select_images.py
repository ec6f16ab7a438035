"""select_images: scores of an image set -> sorted indices of the selected images. Images are never copied.

The share `keep` of each class is selected, by default that with the best scores: Wang et al. 2023 kept the best 20 % of
each class of 5M images. The bands "middle" and "hard" are for comparisons. Near copies may be left out before.
"""

import numpy as np

from dmat import files
from dmat.config import Selection
from dmat.data import shards
from dmat.data.near_copies import near_copies
from dmat.data.scores import read_scores
from dmat.data.selections import SelectionRecord, write_selection
from dmat.data.shards import Shards
from dmat.errors import DmatError
from dmat.job import Job, Result


def run(settings: Selection, job: Job) -> Result:
    """Selects the best-scored images of each class. Raises DmatError where none is left."""
    candidates = shards.open_shards(job.inputs["images"])
    scores, labels = read_scores(job.inputs["scores"], candidates, settings.score)
    near_count = 0
    if settings.min_distance:
        distinct = np.flatnonzero(~_near_copies(candidates, labels, settings.min_distance))
        selected = distinct[band_of_each_class(scores[distinct], labels[distinct], settings.keep, settings.band)]
        near_count = len(candidates) - len(distinct)
    else:  # no list of all images, of which there may be 50 million
        selected = band_of_each_class(scores, labels, settings.keep, settings.band)
    if not len(selected):
        raise DmatError(
            f"selection {job.instance['selection']}: keep {settings.keep} of {len(candidates)} images leaves none; "
            f"expected at least one; keep more, or generate more images"
        )
    record: SelectionRecord = {
        "image_set": settings.image_set,
        "shape": list(candidates.shape),
        "classes": candidates.classes,
        "manifest_sha256": files.sha256(job.inputs["images"] / shards.MANIFEST),
        "pool": len(candidates),
        "kept": len(selected),
        "keep": settings.keep,
        "score": settings.score,
        "band": settings.band,
        "class_counts": np.bincount(labels[selected], minlength=candidates.classes).tolist(),
    }
    if settings.min_distance:
        record["min_distance"] = settings.min_distance
    write_selection(
        job.result / "selection",
        selected,
        record,
        None if candidates.labelled else labels[selected].astype(np.int64),
    )
    kept_scores = scores[selected]
    return Result(
        {
            "pool": len(candidates),
            "near_copies": near_count,
            "kept": len(selected),
            "lowest_kept_score": float(kept_scores.min()),
            "highest_kept_score": float(kept_scores.max()),
        }
    )


def _near_copies(candidates: Shards, labels: np.ndarray, distance: float) -> np.ndarray:
    """Whether each image is nearer than `distance` to an earlier image of its class: bool [N]. labels [N].

    Reads one class at a time into memory.
    """
    near = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        class_indices = np.flatnonzero(labels == label)
        near[class_indices] = near_copies(candidates.take(class_indices)[0], distance)
    return near


def band_of_each_class(scores: np.ndarray, labels: np.ndarray, keep: float, band: str = "easy") -> np.ndarray:
    """Sorted indices int64 of round(keep * n) of the n images of each class.

    Images are ranked by their scores, the highest first; among equal ones the earlier image is first. The band "easy"
    is the head of that list, "hard" its tail, "middle" what lies as far from both. scores, labels [N]. keep: share of
    1.
    """
    selected = np.zeros(len(scores), dtype=bool)
    for label in np.unique(labels):
        class_indices = np.flatnonzero(labels == label)
        class_scores = scores[class_indices]
        count = round(keep * len(class_scores))
        skipped = {"easy": 0, "middle": (len(class_scores) - count) // 2, "hard": len(class_scores) - count}[band]
        selected[class_indices[_head(class_scores, skipped + count) & ~_head(class_scores, skipped)]] = True
    return np.flatnonzero(selected)


def _head(scores: np.ndarray, count: int) -> np.ndarray:
    """Which scores [N] are the `count` highest: bool [N]. Among equal ones the earlier one is higher.

    Takes time in proportion to N: 50 million scores are not sorted.
    """
    if count == 0:
        return np.zeros(len(scores), dtype=bool)
    lowest = np.partition(scores, len(scores) - count)[len(scores) - count]
    head = scores > lowest
    head[np.flatnonzero(scores == lowest)[: count - head.sum()]] = True
    return head
