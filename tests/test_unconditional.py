"""Unconditional generators: their images get labels from the scorer, and everything after it takes those."""

import json

import numpy as np
import pytest
import torch

from dmat import devices
from dmat.data import shards
from dmat.data.mixes import open_mix
from dmat.data.pixels import to_float
from dmat.data.scores import read_scores
from dmat.data.selections import open_selection
from dmat.models.classifiers import load_classifier
from dmat.training import weights

CHAIN = ("train_diffusion", "generate_images", "score_images", "select_images", "measure_images", "mix_images")


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory):
    copy = finished.copy_without("train_diffusion", tmp_path_factory.mktemp("unconditional") / "project")
    copy.write({"train_diffusion": {"conditional": False}, "select_images": {"keep": 0.5}})
    copy.texts = {stage_name: copy.run(stage_name) for stage_name in CHAIN}
    return copy


def artifacts(project, *names):
    return project.folder.joinpath("artifacts", *names)


def test_the_images_have_no_labels_of_their_own(project):
    sidecar = json.loads(artifacts(project, "train_diffusion/edm/denoiser.json").read_text())
    assert (sidecar["label_dim"], sidecar["class_names"], len(sidecar["data_class_names"])) == (0, [], 10)
    images = shards.open_shards(artifacts(project, "generate_images/edm18"))
    assert not images.labelled
    assert {label for array in images.labels for label in array.tolist()} == {-1}
    assert images.manifest["class_counts"] == [0] * 10
    assert len(images.manifest["class_names"]) == 10


def test_a_label_is_the_class_that_the_scorer_finds_most_probable(project):
    images = shards.open_shards(artifacts(project, "generate_images/edm18"))
    scores, labels = read_scores(artifacts(project, "score_images/edm18"), images, "probability")
    compute = devices.resolve("cpu", "fp32", threads=1)
    scorer, _ = load_classifier(artifacts(project, "train_scorer/scorer", weights.BEST), images.manifest, compute)
    with torch.no_grad():
        probabilities = scorer(to_float(images.all()[0])).softmax(1)
    assert labels.tolist() == probabilities.argmax(1).tolist()
    assert scores == pytest.approx(probabilities.max(1).values.numpy(), abs=1e-5)
    counts = np.bincount(labels, minlength=10)
    metrics = json.loads(artifacts(project, "metrics/score_images/edm18.json").read_text())
    assert (metrics["fewest_of_a_class"], metrics["most_of_a_class"]) == (counts.min(), counts.max())
    expected = ", ".join(f"{name}: {count}" for name, count in zip(images.manifest["class_names"], counts, strict=True))
    assert f"the labels are the scorer's; images per class: {expected}\n" in project.texts["score_images"]


def test_the_selection_and_the_mix_carry_the_labels(project):
    images = shards.open_shards(artifacts(project, "generate_images/edm18"))
    scores, labels = read_scores(artifacts(project, "score_images/edm18"), images, "probability")
    folders = artifacts(project, "select_images/edm18_best"), artifacts(project, "generate_images/edm18")
    selected = open_selection(*folders)
    assert 0 < len(selected) < len(images)
    assert selected.take(np.arange(len(selected)))[1].tolist() == labels[selected.indices].tolist()
    for label in np.unique(labels):  # the best half of each class
        kept = scores[selected.indices][selected.pseudo_labels == label]
        left = np.delete(scores, selected.indices)[np.delete(labels, selected.indices) == label]
        assert min(kept, default=1) >= max(left, default=0)
    _, generated = open_mix(
        artifacts(project, "mix_images/generated"), shards.open_shards(artifacts(project, "prepare_data/train")),
        project.folder,
    )  # fmt: skip
    assert generated.pseudo_labels.tolist() == selected.pseudo_labels.tolist()


def test_class_agreement_is_left_out(project):
    """The scorer agrees with the labels that it gave itself."""
    records = json.loads(artifacts(project, "measure_images/edm18_best/measures.json").read_text())
    measures = {record["measure"] for record in records}
    assert "class_agreement" not in measures
    assert {"memorised", "frechet_distance", "scorer_accuracy_on_validation"} <= measures


def test_a_classifier_trains_on_them_and_is_evaluated(project, tmp_path):
    copy = project.copy_without("train_robust", tmp_path / "copy")
    copy.run("train_robust")
    copy.run("evaluate_robust")


@pytest.mark.parametrize("file", ["select_images/edm18_best/labels.npy", "score_images/edm18/labels-*.npy"])
def test_changed_labels_are_refused(project, tmp_path, file):
    copy = project.copy_without("train_robust", tmp_path / "copy")
    (path, *_) = artifacts(copy).glob(file)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if "score" in file:
        copy.write({"select_images": {"keep": 0.6}})
        assert "it was altered since; restore it" in copy.run("select_images", code=2)
    else:
        assert "changed after the mix was written" in copy.run("train_robust", code=2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"image_sets": {"edm18": {"classes": list(range(10))}}}, "classes has no effect, as generator edm is not"),
    ({"generate_images": {"sampler": {"guidance": 2.0}}}, "never learns to denoise without labels"),
])  # fmt: skip
def test_options_that_need_classes_are_refused(project, tmp_path, changes, message):
    copy = project.copy_without("generate_images", tmp_path / "copy")
    copy.write(changes)
    assert message in copy.run("generate_images", code=2)
