"""The stage measure_images: draws, features of a published network, the test split, and what it refuses."""

import json

import numpy as np
import pytest

from dmat import config, devices
from dmat.data import shards
from dmat.data.selections import SelectedImages
from dmat.errors import DmatError
from dmat.job import Job
from dmat.jobs import measure_images
from dmat.metrics import pictures, quality
from dmat.models import feature_networks

NEEDED = {"images": "generate_images/edm18", "selection": "select_images/edm18_best", "scorer": "train_scorer/scorer",
          **{split: f"prepare_data/{split}" for split in ("train", "validation", "test")}}  # fmt: skip


@pytest.fixture
def measure(finished, tmp_path, monkeypatch):
    """Runs the job with some settings; returns its result, its records by name and its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    inputs = {name: finished.folder / "artifacts" / path for name, path in NEEDED.items()}
    compute = devices.resolve("cpu", "fp32", threads=1)

    def run(**settings):
        record = config.MeasureImages(**{"images": 30, "near": 0.5, "features_file": "none", **settings})
        job = Job(inputs, {"selection": "edm18_best"}, finished.folder, tmp_path / "work", compute, 60.0, True)
        result = measure_images.run(record, job)
        records = json.loads((job.result / "measures/measures.json").read_text())
        return result, {entry["measure"]: entry for entry in records}, job

    return run


def test_draws_are_disjoint_and_their_mean_and_spread_are_reported(measure, monkeypatch):
    drawn, take = [], SelectedImages.take
    monkeypatch.setattr(SelectedImages, "take", lambda self, at: drawn.append(at) or take(self, at))
    result, records, _ = measure(draws=3, images=26)
    assert [len(positions) for positions in drawn] == [26, 26, 26]
    assert len(set(np.concatenate(drawn))) == 78
    assert records["precision"] | {"value": 0, "spread": 0} == {
        "measure": "precision", "value": 0, "images": 26, "draws": 3, "network": "scorer",
        "reference": "validation", "references": 26, "spread": 0,
    }  # fmt: skip
    assert result.metrics["measured"] == 26
    assert result.metrics["frechet_distance_scorer_26_spread"] == records["frechet_distance"]["spread"] > 0
    assert records["scorer_accuracy_on_validation"]["spread"] is None
    drawn.clear()
    measure(draws=3, images=30)
    assert [len(positions) for positions in drawn] == [26, 26, 26]  # of 80 images


def test_the_same_settings_measure_the_same(measure):
    assert measure()[1] == measure()[1]
    assert measure()[1]["frechet_distance"]["value"] != measure(seed=2)[1]["frechet_distance"]["value"]


def test_pictures_show_the_nearest_pairs(measure, finished, monkeypatch):
    drawn, draw = {}, pictures.pairs
    monkeypatch.setattr(pictures, "pairs", lambda path, *rest: drawn.update({path.stem: rest}) or draw(path, *rest))
    *_, job = measure()
    assert {path.name for path in job.pictures.iterdir()} == {"kept.png", "nearest_train.png", "nearest_test.png"}
    for split in ("train", "test"):
        images, others, distances, _ = drawn[f"nearest_{split}"]
        assert distances.tolist() == sorted(distances)
        apart = np.sqrt(((images.astype(float) - others) ** 2).sum((1, 2, 3))) / 255
        assert apart.tolist() == pytest.approx(distances.tolist())
        real, _ = shards.open_shards(job.inputs[split]).all()
        assert quality.nearest(others, real).distances.max() == 0


def test_features_of_another_network(measure, monkeypatch):
    """Class agreement stays that of the scorer. The network here is a few sums of pixels."""
    seen = []

    def network(compute):
        def forward(images):
            seen.append(len(images))
            sums = images.float().mean((1, 2))[:, :4]
            return sums, sums
        return feature_networks.FeatureNetwork("efficientnet_lite0", "0" * 64, forward, compute, 20, ("A note.",))

    monkeypatch.setattr(feature_networks, "efficientnet_lite0", network)
    result, records, _ = measure(features="efficientnet_lite0", reference="train")
    assert "frechet_distance_efficientnet_lite0_30_train" in result.metrics
    assert records["inception_score"]["network"] == "efficientnet_lite0"
    assert result.notes == ("A note.",)
    assert records["class_agreement"] == measure()[1]["class_agreement"]
    assert sum(seen) == 30 + 100
    seen.clear()
    measure(features="efficientnet_lite0", reference="train")
    assert sum(seen) == 30 + 20  # of the training images, the first batch alone


def test_a_selection_that_is_too_small_is_refused(measure):
    with pytest.raises(DmatError, match=r"has 80 images for 20 draws; expected at least 6 for each; lower measure_im"):
        measure(draws=20)

