"""select_images: scores of an image set -> sorted indices of the images that are kept. Images are never copied.

The best `keep` share of each class stays, as Wang et al. 2023 kept the best 20 % of each class of 5M images.
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
    pool = shards.open_shards(job.inputs["images"])
    scores = read_scores(job.inputs["scores"], pool)
    labels = np.concatenate([np.asarray(labels) for labels in pool.labels])
    kept = best_of_each_class(scores, labels, settings.keep)
    if not len(kept):
        raise DmatError(
            f"selection {job.instance['selection']}: keep {settings.keep} of {len(pool)} images leaves none; "
            f"expected at least one of a class; keep more, or generate more images"
        )
    write_selection(
        job.result / "selection",
        kept,
        {
            "image_set": settings.image_set,
            "shape": list(pool.shape),
            "classes": pool.classes,
            "manifest_sha256": files.sha256(job.inputs["images"] / shards.MANIFEST),
            "pool": len(pool),
            "kept": len(kept),
            "keep": settings.keep,
            "class_counts": np.bincount(labels[kept]).tolist(),
        },
    )
    return Result({"pool": len(pool), "kept": len(kept), "lowest_kept_score": float(scores[kept].min())})


def best_of_each_class(scores: np.ndarray, labels: np.ndarray, keep: float) -> np.ndarray:
    """Sorted int64 indices of the round(keep * n) best-scored of each class's n images; ties go to earlier ones."""
    kept = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        kept.append(mine[np.argsort(-scores[mine], kind="stable")[: round(keep * len(mine))]])
    return np.sort(np.concatenate(kept)).astype(np.int64)
