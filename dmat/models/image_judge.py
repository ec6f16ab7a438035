"""The scorer as a judge of generated images, by comparison with real images that no generator was trained on.

Features and probabilities come from the scorer, not from Inception. Distances therefore compare only images that were
measured with the same scorer, and their names say so.
Shapes: N, M and V images, H height, W width, C channels, D features, K classes.
"""

import functools
from pathlib import Path

import numpy as np
import torch

from dmat.data.pixels import to_float
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.metrics import quality
from dmat.models.classifiers import load_classifier
from dmat.robust import prediction

_NEAREST = 1  # per cent of the validation images: an image nearer to a training image than they are is memorised


class ImageJudge:
    """Measures generated images against the training and the validation split, with the scorer in `path`.

    Raises DmatError if the scorer is for other images, or there are too few to compare with.
    """

    def __init__(self, path: Path, train: Shards, validation: Shards, compute: Compute):
        self._scorer, _ = load_classifier(path, validation, compute)
        self._compute = compute
        self._train, _ = train.all()  # [M, H, W, C]
        self._held_out, self._held_out_labels = validation.all()  # [V, H, W, C], [V]
        _expect_several(len(self._held_out), "the validation split", "prepare_data.validation")

    @functools.cached_property
    def _validation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features [V, D], probabilities [V, K] and distances to the training images [V] of the validation images."""
        features, probabilities = self._features_and_probabilities(self._held_out)
        return features, probabilities, quality.nearest_distances(self._held_out, self._train)

    def distances_to_train(self, images: np.ndarray) -> np.ndarray:
        """Distance of each image to its nearest training image, float64 [N]. images: uint8 [N, H, W, C]."""
        return quality.nearest_distances(images, self._train)

    def measure(
        self, images: np.ndarray, labels: np.ndarray | None, distances: np.ndarray, near: float
    ) -> dict[str, float]:
        """Measures images uint8 [N, H, W, C] with labels int64 [N], or None where they have none of their own.

        distances: those of `distances_to_train`, [N]. near: an image is a near copy of a training image below this
        fraction of the median distance of validation images. Raises DmatError for a single image.
        """
        _expect_several(len(images), "the sample of generated images", "the number of images")
        features, probabilities = self._features_and_probabilities(images)
        validation_features, validation_probabilities, real_distances = self._validation
        usual_distance = float(np.median(real_distances))
        measures: dict[str, float] = {
            "measured": len(images),
            "scorer_frechet_distance": quality.frechet_distance(features, validation_features),
            "scorer_kernel_distance": quality.kernel_distance(features, validation_features),
            "scorer_inception_score": quality.inception_score(probabilities),
        }
        if labels is not None:
            measures["class_agreement"] = float((probabilities.argmax(1) == labels).mean())
        return {
            **measures,
            "scorer_accuracy_on_validation": float(
                (validation_probabilities.argmax(1) == self._held_out_labels).mean()
            ),
            "median_distance_to_train": float(np.median(distances)),
            "median_distance_to_train_of_validation": usual_distance,
            "near_copies_of_train": float((distances < near * usual_distance).mean()),
            "memorised": float((distances < np.percentile(real_distances, _NEAREST)).mean()),
            "duplicates": quality.duplicates(images),
        }

    def _features_and_probabilities(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and class probabilities [N, K] by the scorer. images: uint8 [N, H, W, C]."""
        with torch.no_grad(), self._compute.autocast():
            unit_images = to_float(images)
            features = [
                self._scorer.features(self._compute.to_device(unit_images[k : k + 1000])).float().cpu()
                for k in range(0, len(unit_images), 1000)
            ]
        probabilities = prediction.logits(self._scorer, unit_images, self._compute).softmax(1)
        return torch.cat(features).numpy(), probabilities.numpy()


def _expect_several(count: int, images: str, setting: str) -> None:
    if count < 2:
        raise DmatError(
            f"{images} has {count} image; a Frechet distance compares covariances; expected at least 2; raise {setting}"
        )
