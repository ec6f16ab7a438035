"""Generated images measured against real ones: quality by features, class agreement, memorisation, duplicates.

Features come from one network of `feature_networks`. A measure by features says which network it was and how many
images there were: values compare only where both are equal, and those of the scorer only for one scorer. Memorisation
needs real images that no generator was trained on: the validation split.
Shapes: N, M, V and T images, H height, W width, C channels, D features, K classes.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmat.data import overlap
from dmat.data.near_copies import near_copies
from dmat.data.permutation import Permutation
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.errors import DmatError
from dmat.metrics import quality
from dmat.metrics.image_measures import Measure
from dmat.metrics.quality import Nearest
from dmat.models import feature_networks, real_features
from dmat.models.classifiers import load_classifier
from dmat.models.feature_networks import SCORER, FeatureNetwork
from dmat.models.real_features import RealFeatures

_NEAREST = 1  # per cent of the validation images: an image nearer to a training image than they are is memorised
_MAX_REFERENCES = 50_000  # real images whose features are compared, as many as publications take for FID


class Judgement(NamedTuple):
    """The measures of N images, and the nearest training and test image of each; None without a test split."""

    measures: list[Measure]
    to_train: Nearest
    to_test: Nearest | None


class ImageJudge:
    """Measures generated images against real ones, with the scorer in `path` and with features.

    features: a network of `config.MeasureImages`; features_file: of its weights. reference: the split that features are
    compared with. test: measures also how near the images are to its images. seed: of samples of the real images.
    Raises DmatError if the scorer is for other images, the network has no weights or takes no such images, or there are
    too few images to compare with.
    """

    def __init__(
        self,
        path: Path,
        train: Shards,
        validation: Shards,
        compute: Compute,
        *,
        features: str = SCORER,
        features_file: Path | None = None,
        reference: str = "validation",
        test: Shards | None = None,
        seed: int = 1,
        quiet: bool = True,
    ):
        scorer, _ = load_classifier(path, validation.manifest, compute)
        self._scorer = feature_networks.of_scorer(scorer, path, compute)
        self.network = _network(features, self._scorer, features_file, compute)
        self._train, _ = train.all()  # [M, H, W, C]
        self._held_out, self._held_out_labels = validation.all()  # [V, H, W, C], [V]
        self._test = None if test is None else test.all()[0]  # [T, H, W, C]
        self._reference, self._seed, self._quiet = reference, seed, quiet
        references = self._train if reference == "train" else self._held_out
        _expect_enough(len(self._held_out), "the validation split", "prepare_data.validation")
        _expect_enough(len(references), f"the {reference} split", f"prepare_data.{reference}")
        self._references = references[self._sample(len(references), _MAX_REFERENCES)]

    @functools.cached_property
    def _real(self) -> RealFeatures:
        return real_features.of_images(self.network, self._references, self._quiet)

    @functools.cached_property
    def _held_out_to_train(self) -> np.ndarray:
        """Distance of each validation image to its nearest training image, float64 [V]."""
        return quality.nearest(self._held_out, self._train).distances

    @functools.cached_property
    def _held_out_to_test(self) -> np.ndarray:
        """Distance of each validation image to its nearest test image, float64 [V]."""
        assert self._test is not None
        return quality.nearest(self._held_out, self._test).distances

    def measure(self, images: np.ndarray, labels: np.ndarray | None, near: float) -> Judgement:
        """Measures images uint8 [N, H, W, C] with labels int64 [N], or None where they have none of their own.

        near: an image is a near copy of another below this fraction of the median distance of the validation images to
        the training images (or test images, for copies of those). Raises DmatError for too few images.
        """
        _expect_enough(len(images), "the sample of generated images", "the number of images")
        features, logits = self.network(images, self._quiet)
        pixels = functools.partial(Measure, images=len(images))
        measures = self._by_features(features, logits)
        if labels is not None:
            scorer_logits = logits if self.network is self._scorer else self._scorer(images)[1]
            measures.append(pixels("class_agreement", float((scorer_logits.argmax(1) == labels).mean())))
        to_train = quality.nearest(images, self._train)
        is_near = near * float(np.median(self._held_out_to_train))
        measures += [
            pixels("median_distance_to_train", float(np.median(to_train.distances))),
            pixels("near_copies_of_train", float((to_train.distances < is_near).mean())),
            pixels("memorised", _nearer(to_train, self._held_out_to_train)),
            pixels("duplicates", int(overlap.repeated(overlap.digests(images)).sum())),
            pixels("near_duplicates", int(near_copies(images, is_near).sum())),
        ]
        if self._test is None:
            return Judgement(measures, to_train, None)
        to_test = quality.nearest(images, self._test)
        is_near = near * float(np.median(self._held_out_to_test))
        measures += [
            pixels("near_copies_of_test", float((to_test.distances < is_near).mean())),
            pixels("memorised_test", _nearer(to_test, self._held_out_to_test)),
        ]
        return Judgement(measures, to_train, to_test)

    def of_real_images(self) -> list[Measure]:
        """What the validation images reach, to compare with."""
        measure = functools.partial(Measure, images=len(self._held_out))
        _, logits = self._scorer(self._held_out)
        accuracy = float((logits.argmax(1) == self._held_out_labels).mean())
        return [
            measure("scorer_accuracy_on_validation", accuracy),
            measure("median_distance_to_train_of_validation", float(np.median(self._held_out_to_train))),
        ]

    def counterparts(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, C] of the split "train" or "test" at indices [B]."""
        images = self._train if split == "train" else self._test
        assert images is not None
        return images[indices]

    def _by_features(self, features: np.ndarray, logits: np.ndarray) -> list[Measure]:
        """Measures of features [N, D] and logits [N, K].

        Precision, recall, density and coverage depend on the numbers of images, so they take as many generated as real
        ones: the first of the generated, and a sample of the real.
        """
        real, network = self._real, self.network.name
        compared = functools.partial(
            Measure, images=len(features), network=network, reference=self._reference, references=len(real.features)
        )
        distance, deviation = quality.kernel_distance(features, real.features)
        equal = min(len(features), len(real.features))
        neighbourhoods = quality.neighbourhoods(
            features[:equal], real.features[self._sample(len(real.features), equal)]
        )
        return [
            compared("frechet_distance", quality.frechet_distance(quality.moments(features), real.moments)),
            compared("kernel_distance", distance),
            compared("kernel_distance_deviation", deviation),
            Measure("inception_score", quality.inception_score(logits), len(features), network),
            *(compared(name, value, images=equal, references=equal) for name, value in neighbourhoods.items()),
        ]

    def _sample(self, count: int, limit: int) -> np.ndarray:
        """Sorted positions int64 [B] of at most `limit` of `count` real images; which, depends on the seed."""
        if count <= limit:
            return np.arange(count)
        return np.sort(Permutation(count, self._seed, "real images").items(np.arange(limit)))


def _network(name: str, scorer: FeatureNetwork, file: Path | None, compute: Compute) -> FeatureNetwork:
    if name == SCORER:
        return scorer
    if name == "inception":
        assert file is not None  # as the settings say
        return feature_networks.inception(file, compute)
    return feature_networks.efficientnet_lite0(compute)


def _nearer(generated: Nearest, held_out: np.ndarray) -> float:
    """Fraction of N generated images nearer to a real one than all but the nearest of validation images, [V], are."""
    return float((generated.distances < np.percentile(held_out, _NEAREST)).mean())


def _expect_enough(count: int, images: str, setting: str) -> None:
    if count < quality.FEWEST_IMAGES:
        raise DmatError(
            f"{images} has {count} image{'s' if count != 1 else ''}; density compares each with its "
            f"{quality.DENSITY_NEIGHBOUR} nearest; expected at least {quality.FEWEST_IMAGES}; raise {setting}"
        )
