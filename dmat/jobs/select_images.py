"""select_images: scores of an image set -> sorted indices of the selected images. Images are never copied.

The share `keep` of each class with the best scores is selected. Wang et al. 2023 kept the best 20 % of each class of 5M
images.
"""

import numpy as np

from dmat import files
from dmat.config import Selection
from dmat.data import shards
from dmat.data.scores import read_scores
from dmat.data.selections import write_selection
from dmat.errors import DmatError
from dmat.job import Job, Result


def run(settings: Selection, job: Job) -> Result:
    """Selects the best-scored images of each class. Raises DmatError where none is left."""
    candidates = shards.open_shards(job.inputs["images"])
    scores, labels = read_scores(job.inputs["scores"], candidates)
    selected = best_of_each_class(scores, labels, settings.keep)
    if not len(selected):
        raise DmatError(
            f"selection {job.instance['selection']}: keep {settings.keep} of {len(candidates)} images leaves none; "
            f"expected at least one; keep more, or generate more images"
        )
    write_selection(
        job.result / "selection",
        selected,
        {
            "image_set": settings.image_set,
            "shape": list(candidates.shape),
            "classes": candidates.classes,
            "manifest_sha256": files.sha256(job.inputs["images"] / shards.MANIFEST),
            "pool": len(candidates),
            "kept": len(selected),
            "keep": settings.keep,
            "class_counts": np.bincount(labels[selected], minlength=candidates.classes).tolist(),
        },
        None if candidates.labelled else labels[selected],
    )
    return Result({"pool": len(candidates), "kept": len(selected), "lowest_kept_score": float(scores[selected].min())})


def best_of_each_class(scores: np.ndarray, labels: np.ndarray, keep: float) -> np.ndarray:
    """Sorted indices int64 of the round(keep * n) best-scored of the n images of each class; ties go to earlier images.

    scores, labels [N]. keep: share of 1.
    """
    selected = []
    for label in np.unique(labels):
        class_indices = np.flatnonzero(labels == label)
        selected.append(
            class_indices[np.argsort(-scores[class_indices], kind="stable")[: round(keep * len(class_indices))]]
        )
    return np.sort(np.concatenate(selected)).astype(np.int64)
