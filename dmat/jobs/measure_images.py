"""measure_images: selected images against held-out real ones -> quality, class agreement, memorisation, duplicates.

The measures are those of `models.image_judge`. The test of memorisation needs images that no generator was trained on:
the validation split.
"""

import numpy as np

from dmat import files
from dmat.config import MeasureImages
from dmat.data import shards
from dmat.data.selections import open_selection
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models.image_judge import ImageJudge
from dmat.training import weights


def run(settings: MeasureImages, job: Job) -> Result:
    """Measures up to `settings.images` selected images, evenly spaced."""
    selected = open_selection(job.inputs["selection"], job.inputs["images"])
    sample = np.unique(np.linspace(0, len(selected) - 1, min(settings.images, len(selected))).astype(np.int64))
    images, labels = selected.take(sample)
    judge = ImageJudge(
        job.inputs["scorer"] / weights.BEST,
        shards.open_shards(job.inputs["train"]),
        shards.open_shards(job.inputs["validation"]),
        job.compute,
    )
    distances = judge.distances_to_train(images)
    # The scorer agrees with labels that it gave itself, which says nothing.
    measures = judge.measure(images, None if selected.pseudo_labels is not None else labels, distances, settings.near)
    files.write_json(job.result / "measures" / "measures.json", measures)
    pictures.sheet(job.pictures / "kept.png", images, labels, "Kept generated images")
    closest = np.argsort(distances, kind="stable")[:200]
    pictures.sheet(
        job.pictures / "closest.png",
        images[closest],
        labels[closest],
        "The 200 kept images nearest to a training image",
    )
    return Result(measures)
