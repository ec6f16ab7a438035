"""measure_images: selected images against held-out real ones -> quality, class agreement, memorisation, duplicates.

Features and probabilities come from the scorer, not from Inception. Distances therefore compare only sets that were
measured with the same scorer, and their names say so. The test of memorisation needs images that no generator was
trained on: the validation split.
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
    """Measures up to `settings.images` selected images, evenly spaced."""
    expect_selected_from(read_selection(job.inputs["selection"]), job.inputs["images"])
    image_set = shards.open_shards(job.inputs["images"])
    selected = files.load_array(job.inputs["selection"] / INDICES)
    sample = np.unique(np.linspace(0, len(selected) - 1, min(settings.images, len(selected))).astype(np.int64))
    images, labels = image_set.take(selected[sample])
    real, _ = shards.open_shards(job.inputs["train"]).all()
    held_out, held_out_labels = shards.open_shards(job.inputs["validation"]).all()
    scorer, _ = load_classifier(job.inputs["scorer"] / weights.BEST, image_set, job.compute)

    features, probabilities = _features_and_probabilities(scorer, images, job)
    validation_features, validation_probabilities = _features_and_probabilities(scorer, held_out, job)
    train_distances = quality.nearest_distances(images, real)
    usual_distance = float(np.median(quality.nearest_distances(held_out, real)))
    measures = {
        "measured": len(images),
        "scorer_frechet_distance": quality.frechet_distance(features, validation_features),
        "scorer_kernel_distance": quality.kernel_distance(features, validation_features),
        "scorer_inception_score": quality.inception_score(probabilities),
        "class_agreement": float((probabilities.argmax(1) == labels).mean()),
        "scorer_accuracy_on_validation": float((validation_probabilities.argmax(1) == held_out_labels).mean()),
        "median_distance_to_train": float(np.median(train_distances)),
        "median_distance_to_train_of_validation": usual_distance,
        "near_copies_of_train": float((train_distances < settings.near * usual_distance).mean()),
        "duplicates": quality.duplicates(images),
    }
    files.write_json(job.result / "measures" / "measures.json", measures)
    pictures.sheet(job.pictures / "kept.png", images, labels, "Kept generated images, one row per class")
    closest = np.argsort(train_distances, kind="stable")[:200]
    pictures.sheet(
        job.pictures / "closest.png",
        images[closest],
        labels[closest],
        "The 200 kept images nearest to a training image, by class",
    )
    return Result(measures)


def _features_and_probabilities(scorer: Classifier, images: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and class probabilities [N, K] by the scorer. images: uint8 [N, H, W, C]."""
    with torch.no_grad(), job.compute.autocast():
        unit_images = to_float(images)
        features = [
            scorer.features(job.compute.to_device(unit_images[k : k + 1000])).float().cpu()
            for k in range(0, len(unit_images), 1000)
        ]
    return torch.cat(features).numpy(), prediction.logits(scorer, unit_images, job.compute).softmax(1).numpy()
