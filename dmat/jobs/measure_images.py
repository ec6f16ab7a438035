"""measure_images: kept images against held-out real ones -> quality, class agreement, memorisation, duplicates.

Features and probabilities are the scorer's, not Inception's: distances compare sets made for the same scorer only,
and their names say so. A test of memorisation needs images that no generator saw: the validation split.
"""

import numpy as np
import torch

from dmat import files
from dmat.config import MeasureImages
from dmat.data import shards
from dmat.data.pixels import to_float
from dmat.data.selections import INDICES, expect_selected_from, read_selection
from dmat.job import Job, Result
from dmat.metrics import pictures, quality
from dmat.models.classifiers import load_classifier
from dmat.robust import prediction
from dmat.robust.networks import Classifier
from dmat.training import weights


def run(settings: MeasureImages, job: Job) -> Result:
    expect_selected_from(read_selection(job.inputs["selection"]), job.inputs["images"])
    pool = shards.open_shards(job.inputs["images"])
    kept = files.load_array(job.inputs["selection"] / INDICES)
    evenly = np.unique(np.linspace(0, len(kept) - 1, min(settings.images, len(kept))).astype(np.int64))
    images, labels = pool.take(kept[evenly])
    real, _ = shards.open_shards(job.inputs["train"]).all()
    held_out, held_out_labels = shards.open_shards(job.inputs["validation"]).all()
    scorer, _ = load_classifier(job.inputs["scorer"] / weights.BEST, pool, job.compute)

    made_features, made = _judge(scorer, images, job)
    real_features, judged = _judge(scorer, held_out, job)
    to_train = quality.nearest_distances(images, real)
    usual = float(np.median(quality.nearest_distances(held_out, real)))
    measures = {
        "measured": len(images),
        "scorer_frechet_distance": quality.frechet_distance(made_features, real_features),
        "scorer_kernel_distance": quality.kernel_distance(made_features, real_features),
        "scorer_inception_score": quality.inception_score(made),
        "class_agreement": float((made.argmax(1) == labels).mean()),
        "scorer_accuracy_on_validation": float((judged.argmax(1) == held_out_labels).mean()),
        "median_distance_to_train": float(np.median(to_train)),
        "median_distance_to_train_of_validation": usual,
        "near_copies_of_train": float((to_train < settings.near * usual).mean()),
        "duplicates": quality.duplicates(images),
    }
    files.write_json(job.result / "measures" / "measures.json", measures)
    pictures.sheet(job.pictures / "kept.png", images, labels, "Kept generated images, one row a class")
    closest = np.argsort(to_train, kind="stable")[:200]
    pictures.sheet(
        job.pictures / "closest.png",
        images[closest],
        labels[closest],
        "The 200 kept images nearest to a training image, by class",
    )
    return Result(measures)


def _judge(scorer: Classifier, images: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] and class probabilities [n, K] of uint8 images."""
    with torch.no_grad(), job.compute.autocast():
        unit = to_float(images)
        features = [
            scorer.features(job.compute.to_device(unit[k : k + 1000])).float().cpu() for k in range(0, len(unit), 1000)
        ]
    return torch.cat(features).numpy(), prediction.logits(scorer, unit, job.compute).softmax(1).numpy()
