"""score_images: an image set and the scorer -> for each image the probability that the scorer gives to its label.

The rule of Wang et al. 2023 for their 1M set: softmax probability of the target class by a standard classifier.
"""

from typing import Any

import numpy as np
import torch

from dmat import files
from dmat.config import ScoreImages
from dmat.data import shards
from dmat.data.pixels import to_unit
from dmat.jobs.classifiers import load_classifier
from dmat.jobs.execution import Job
from dmat.metrics import pictures
from dmat.robust import prediction


def run(settings: ScoreImages, job: Job) -> dict[str, Any]:
    pool = shards.open_shards(job.inputs["images"])
    model, _ = load_classifier(job.inputs["scorer"] / "best.safetensors", pool, job.compute)
    scores = np.empty(len(pool), dtype=np.float32)
    for start in range(0, len(pool), settings.batch):
        where = np.arange(start, min(start + settings.batch, len(pool)))
        images, labels = pool.take(where)
        probabilities = prediction.logits(model, to_unit(images), job.compute).softmax(1)
        scores[where] = probabilities.gather(1, torch.from_numpy(labels)[:, None])[:, 0].numpy()
    with files.writing(job.result / "scores" / "scores.npy") as file:
        np.save(file, scores)
    title = f"{job.chosen['image_set']}: how sure the scorer is of the labels"
    pictures.histogram(job.pictures / "scores.png", scores, title, "probability of the label")
    return {"images": len(scores), "mean_score": float(scores.mean()), "share_above_half": float((scores > 0.5).mean())}
