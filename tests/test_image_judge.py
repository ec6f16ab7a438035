"""Generated images judged by the scorer: each measure against its definition, and how few images it takes."""

import functools

import numpy as np
import pytest
import torch

from dmat import devices
from dmat.data import shards
from dmat.data.pixels import to_float
from dmat.errors import DmatError
from dmat.metrics import image_measures, quality
from dmat.metrics.image_measures import Measure
from dmat.models import real_features
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
    return ImageJudge(scorer_path, splits["train"], splits["validation"], COMPUTE, test=splits["test"])


def measured(judge, images, labels):
    return image_measures.metrics([*judge.measure(images, labels, 0.5).measures, *judge.of_real_images()])


def test_the_validation_images_themselves(judge, splits):
    """Their distance is 0, 1 % of them are memorised by definition, and the scorer agrees as often as it is right."""
    images, labels = splits["validation"].all()
    measures = measured(judge, images, labels)
    assert measures["frechet_distance_scorer_50"] == pytest.approx(0, abs=1e-4)
    for measure in ("precision", "recall", "density", "coverage"):
        assert measures[f"{measure}_scorer_50"] == pytest.approx(1)
    assert measures["class_agreement"] == measures["scorer_accuracy_on_validation"]
    assert measures["median_distance_to_train"] == measures["median_distance_to_train_of_validation"]
    for split in ("", "_test"):  # of 50 images one is below the first percentile
        assert measures[f"memorised{split}"] == pytest.approx(1 / len(images))


def test_copies_of_training_images_are_memorised(judge, splits):
    copies, labels = splits["train"].all()
    unseen, unseen_labels = splits["validation"].all()
    half = np.concatenate([copies[:20], unseen[:20]]), np.concatenate([labels[:20], unseen_labels[:20]])
    assert measured(judge, copies, labels)["memorised"] == 1
    alone = measured(judge, unseen[:20], unseen_labels[:20])["memorised"]
    assert measured(judge, *half)["memorised"] == pytest.approx(0.5 + alone / 2)
    assert measured(judge, *half)["near_copies_of_train"] >= 0.5


def test_copies_of_test_images_are_told_from_copies_of_training_images(judge, splits, scorer_path):
    images, labels = splits["test"].all()
    judgement = judge.measure(images, labels, 0.5)
    measures = image_measures.metrics(judgement.measures)
    assert (measures["memorised_test"], measures["near_copies_of_test"]) == (1, 1)
    assert measures["memorised"] < 0.5
    assert judgement.to_test.distances.max() == 0
    assert np.array_equal(judge.counterparts("test", judgement.to_test.indices), images)
    without = ImageJudge(scorer_path, splits["train"], splits["validation"], COMPUTE).measure(images, labels, 0.5)
    assert without.to_test is None
    assert "memorised_test" not in image_measures.metrics(without.measures)


def test_planted_duplicates_are_counted(judge, splits):
    images, labels = (array.copy() for array in splits["test"].all())
    before = measured(judge, images, labels)
    images[10] = images[11] = images[3]
    images[11, 4, 4, 0] ^= 1  # one grey level
    after = measured(judge, images, labels)
    assert after["duplicates"] - before["duplicates"] == 1
    assert after["near_duplicates"] - before["near_duplicates"] == 2


def test_agreement_and_distance_are_those_of_the_scorer(judge, splits, scorer_path):
    images, labels = splits["test"].all()
    scorer, _ = load_classifier(scorer_path, splits["test"].manifest, COMPUTE)
    with torch.no_grad():
        logits = scorer(to_float(images)).numpy()
        features = [scorer.features(to_float(x)).numpy() for x in (images, splits["validation"].all()[0])]
    predicted = logits.argmax(1)
    measures = measured(judge, images, labels)
    assert measures["class_agreement"] == pytest.approx((predicted == labels).mean())
    expected = quality.frechet_distance(*map(quality.moments, features))
    assert measures["frechet_distance_scorer_40"] == pytest.approx(expected, rel=1e-3)
    assert measures["inception_score_scorer_40"] == pytest.approx(quality.inception_score(logits), rel=1e-3)
    wrong = measured(judge, images, (labels + 1) % 10)
    assert wrong["class_agreement"] == pytest.approx((predicted == (labels + 1) % 10).mean())
    assert "class_agreement" not in measured(judge, images, None)


def test_a_measure_names_network_images_and_reference(judge, splits, scorer_path):
    images, labels = splits["test"].all()
    by_train = ImageJudge(scorer_path, splits["train"], splits["validation"], COMPUTE, reference="train")
    records = {m.measure: m.plain() for m in by_train.measure(images, labels, 0.5).measures}
    assert "frechet_distance_scorer_40_train" in measured(by_train, images, labels)
    expected = {"network": "scorer", "images": 40, "reference": "train", "references": 100, "draws": 1, "spread": None}
    assert expected.items() <= records["frechet_distance"].items()
    assert records["recall"]["references"] == records["recall"]["images"] == 40  # equal numbers
    assert (records["memorised"]["network"], records["memorised"]["reference"]) == (None, None)
    assert records["frechet_distance"]["value"] != measured(judge, images, labels)["frechet_distance_scorer_40"]


def test_mean_and_spread_over_draws():
    measure = functools.partial(Measure, "precision", images=30, network="scorer", reference="validation")
    (mean,) = image_measures.over_draws([[measure(0.5)], [measure(0.7)], [measure(0.9)]])
    assert (mean.value, mean.spread, mean.draws) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    metrics = {"precision_scorer_30": pytest.approx(0.7), "precision_scorer_30_spread": pytest.approx(0.2)}
    assert image_measures.metrics([mean]) == metrics
    assert image_measures.over_draws([[measure(0.5)]]) == [measure(0.5)]


@pytest.mark.parametrize("count", [6, 7])
def test_few_images_have_finite_measures(judge, splits, count):
    images, labels = (array[:count] for array in splits["test"].all())
    assert all(np.isfinite(value) for value in measured(judge, images, labels).values())


def test_too_few_images_are_refused(judge, splits, scorer_path, tmp_path):
    images, labels = (array[:5] for array in splits["test"].all())
    with pytest.raises(DmatError, match=r"sample of generated images has 5 images; .* expected at least 6"):
        measured(judge, images, labels)
    names = splits["test"].manifest["class_names"]
    shards.write_set(tmp_path, images[:1], labels[:1], class_names=names, metadata={})
    with pytest.raises(DmatError, match=r"the validation split has 1 image; .* raise prepare_data\.validation"):
        ImageJudge(scorer_path, splits["train"], shards.open_shards(tmp_path), COMPUTE)


class _Features:
    """A network of three features that counts the images that it saw."""

    name, sha256, batch, compute = "test", "0" * 64, 4, COMPUTE

    def __init__(self):
        self.seen, self.scale = 0, 1.0

    def __call__(self, images, quiet=True):
        self.seen += len(images)
        values = images.reshape(len(images), -1)[:, :3].astype(np.float32) * np.float32(self.scale)
        return values, values


def test_features_of_real_images_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.random.default_rng(1).integers(0, 256, (10, 2, 2, 1), dtype=np.uint8)
    network = _Features()
    first = real_features.of_images(network, images)
    again = real_features.of_images(network, images)
    assert network.seen == 10 + 4  # the first batch is compared
    for actual, expected in ((again.features, first.features), *zip(again.moments, first.moments, strict=True)):
        assert np.array_equal(actual, expected)
    real_features.of_images(network, images[::-1])  # other images
    assert (network.seen, len(list(real_features.folder().iterdir()))) == (24, 2)
    real_features.of_images(network, images[:4])  # a single batch is never kept
    assert (network.seen, len(list(real_features.folder().iterdir()))) == (28, 2)
    network.scale = 2.0  # as after a change of the code
    assert np.array_equal(real_features.of_images(network, images).features, 2 * first.features)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], lambda b: b""])
def test_a_damaged_record_of_features_is_computed_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.random.default_rng(1).integers(0, 256, (10, 2, 2, 1), dtype=np.uint8)
    expected = real_features.of_images(_Features(), images)
    (record,) = real_features.folder().iterdir()
    content = record.read_bytes()
    record.write_bytes(damage(content))
    actual = real_features.of_images(_Features(), images)
    assert np.array_equal(actual.features, expected.features)
    assert np.array_equal(actual.moments.covariance, expected.moments.covariance)
    assert record.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "dmat").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = np.zeros((10, 2, 2, 1), dtype=np.uint8)
    assert real_features.of_images(_Features(), images).features.shape == (10, 3)
