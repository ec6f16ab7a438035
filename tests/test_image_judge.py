"""Generated images judged by the scorer: each measure against its definition, and how few images it takes."""

import numpy as np
import pytest
import torch

from dmat import devices
from dmat.data import shards
from dmat.data.pixels import to_float
from dmat.errors import DmatError
from dmat.metrics import quality
from dmat.models.classifiers import load_classifier
from dmat.models.image_judge import ImageJudge
from dmat.training import weights

COMPUTE = devices.resolve("cpu", "fp32", threads=1)


@pytest.fixture(scope="module")
def splits(finished):
    return {name: shards.open_shards(finished.folder / "artifacts/prepare_data" / name) for name in
            ("train", "validation", "test")}  # fmt: skip


@pytest.fixture(scope="module")
def scorer_path(finished):
    return finished.folder / "artifacts/train_scorer/scorer" / weights.BEST


@pytest.fixture(scope="module")
def judge(splits, scorer_path):
    return ImageJudge(scorer_path, splits["train"], splits["validation"], COMPUTE)


def measured(judge, images, labels):
    return judge.measure(images, labels, judge.distances_to_train(images), 0.5)


def test_the_validation_images_themselves(judge, splits):
    """Their distance is 0, 1 % of them are memorised by definition, and the scorer agrees as often as it is right."""
    images, labels = splits["validation"].all()
    measures = measured(judge, images, labels)
    assert measures["scorer_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert measures["class_agreement"] == measures["scorer_accuracy_on_validation"]
    assert measures["median_distance_to_train"] == measures["median_distance_to_train_of_validation"]
    assert measures["memorised"] == pytest.approx(1 / len(images))  # of 50 images one is below the first percentile


def test_copies_of_training_images_are_memorised(judge, splits):
    copies, labels = splits["train"].all()
    unseen, unseen_labels = splits["test"].all()
    half = np.concatenate([copies[:20], unseen[:20]]), np.concatenate([labels[:20], unseen_labels[:20]])
    assert measured(judge, copies, labels)["memorised"] == 1
    alone = measured(judge, unseen[:20], unseen_labels[:20])["memorised"]
    assert measured(judge, *half)["memorised"] == pytest.approx(0.5 + alone / 2)
    assert measured(judge, *half)["near_copies_of_train"] >= 0.5


def test_agreement_and_distance_are_those_of_the_scorer(judge, splits, scorer_path):
    images, labels = splits["test"].all()
    scorer, _ = load_classifier(scorer_path, splits["test"], COMPUTE)
    with torch.no_grad():
        predicted = scorer(to_float(images)).argmax(1).numpy()
        features = [scorer.features(to_float(x)).numpy() for x in (images, splits["validation"].all()[0])]
    measures = measured(judge, images, labels)
    assert measures["class_agreement"] == pytest.approx((predicted == labels).mean())
    assert measures["scorer_frechet_distance"] == pytest.approx(quality.frechet_distance(*features), rel=1e-3)
    wrong = measured(judge, images, (labels + 1) % 10)
    assert wrong["class_agreement"] == pytest.approx((predicted == (labels + 1) % 10).mean())
    assert "class_agreement" not in measured(judge, images, None)


@pytest.mark.parametrize("count", [2, 5])
def test_few_images_have_finite_measures(judge, splits, count):
    images, labels = (array[:count] for array in splits["test"].all())
    assert all(np.isfinite(value) for value in measured(judge, images, labels).values())


def test_a_single_image_is_refused(judge, splits, scorer_path, tmp_path):
    images, labels = (array[:1] for array in splits["test"].all())
    with pytest.raises(DmatError, match=r"sample of generated images has 1 image; .* expected at least 2"):
        measured(judge, images, labels)
    names = splits["test"].manifest["class_names"]
    shards.write_set(tmp_path, images, labels, class_names=names, metadata={})
    with pytest.raises(DmatError, match=r"the validation split has 1 image; .* raise prepare_data\.validation"):
        ImageJudge(scorer_path, splits["train"], shards.open_shards(tmp_path), COMPUTE)
