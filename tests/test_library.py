"""`dmat.evaluate`: any torch module on any images, without a project."""

import json

import numpy as np
import pytest
import torch

import dmat
from dmat.errors import DmatError

QUICK = {
    "pgd_steps": 5, "sweep": (2.0,), "auto_attack": ("apgd-ce", "square"), "shard": 16, "batch": 16, "check_images": 10,
    "check_queries": 20, "quiet": True,
}  # fmt: skip


class Flattening(torch.nn.Module):
    """A module that flattens its images by `view`, which channels-last images do not allow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = torch.nn.BatchNorm2d(3), torch.nn.Linear(48, 4)

    def forward(self, images):
        return self.last(self.norm(images).view(len(images), -1))


@pytest.fixture
def model():
    return Flattening().train()


@pytest.fixture
def images(model):
    return torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(model, images):
    model.eval()
    labels = model(images).argmax(1).detach()
    model.train()
    labels[:3] = (labels[:3] + 1) % 4
    return labels


def test_accuracies_are_those_of_the_closed_form(model, images, labels):
    result = dmat.evaluate(model, images, labels, "linf", 0.03, **QUICK | {"auto_attack": "standard"})
    assert (result.clean["right"], result.clean["n"]) == (21, 24)
    model.eval()
    scale = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).repeat_interleave(16)
    weights = model.last.weight * scale
    logits = model(images)
    gaps = logits.gather(1, labels[:, None]) - logits
    reach = 0.03 * (weights[labels][:, None] - weights[None]).abs().sum(2)
    robust = ((gaps - reach > 0) | (torch.arange(4)[None] == labels[:, None])).all(1)
    assert 0 < int(robust.sum()) < 21
    name = result.verdict.measure
    assert result.table[name].tolist() == robust.tolist()
    assert result.auto_attack["right"] == int(robust.sum())
    assert np.abs(result.adversarial - images.numpy()).max() <= 0.03 + 1e-6


def test_the_model_is_left_as_it_was(model, images, labels):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dmat.evaluate(model, images, labels, epsilon=0.01, **QUICK)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_numpy_arrays_and_text_are_taken(model, images, labels):
    by_tensor = dmat.evaluate(model, images, labels, epsilon=8 / 255, **QUICK)
    by_array = dmat.evaluate(model, images.double().numpy(), labels.numpy().astype(np.int32), epsilon="8/255", **QUICK)
    assert by_tensor.table["pgd"].tolist() == by_array.table["pgd"].tolist()
    assert by_array.protocol["threat"] == {"norm": "linf", "epsilon": "8/255"}


def test_a_result_says_whether_it_may_be_quoted(model, images, labels):
    result = dmat.evaluate(model, images, labels, epsilon=0.01, **QUICK)
    assert not result.quotable
    assert result.verdict.measure == "auto_attack_nonstandard"
    text = str(result)
    assert text.startswith("clean                    87.50 %  [")
    assert "no headline: " in text
    assert result.table["broken_by"].tolist().count("misclassified") == 3


def test_a_folder_keeps_shards_and_results(model, images, labels, tmp_path):
    first = dmat.evaluate(model, images, labels, epsilon=0.01, folder=tmp_path, **QUICK)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*.npz")}
    assert len(times) == 3  # two shards, and Square of the checks
    again = dmat.evaluate(model, images, labels, epsilon=0.01, folder=tmp_path, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert str(again) == str(first)
    assert json.loads((tmp_path / "summary.json").read_text())["pgd"] == first.pgd
    assert {path.name for path in tmp_path.iterdir()} >= {"per_image.parquet", "protocol.json", "perturbations.png"}
    with torch.no_grad():
        model.last.bias += 1
    with pytest.raises(DmatError, match=r"belongs to another evaluation \(weights differ\)"):
        dmat.evaluate(model, images, labels, epsilon=0.01, folder=tmp_path, **QUICK)


@pytest.mark.parametrize(("change", "message"), [
    ({"images": torch.zeros(24, 4, 4, 3, dtype=torch.uint8)}, r"images are uint8 \[24, 4, 4, 3\]; expected floating"),
    ({"images": torch.full((24, 3, 4, 4), 2.0)}, "they look like bytes that were not scaled"),
    ({"images": torch.zeros(0, 3, 4, 4), "labels": torch.zeros(0, dtype=torch.long)}, "there are 0 images"),
    ({"labels": torch.zeros(24, 4)}, r"labels are float32 \[24, 4\]; expected one class number"),
    ({"labels": torch.full((24,), 4)}, "labels go from 4 to 4; expected 0 to 3"),
    ({"model": Flattening().double()}, "the model has tensors of torch.float64; expected float32"),
    ({"model": torch.nn.Flatten(0)}, r"the model returned a tensor \[96\] for 2 images; expected logits \[N, K\]"),
    ({"norm": "l1"}, "norm"),
    ({"epsilon": 8}, "larger than the pixel range"),
    ({"steps": 5}, "steps"),
    ({"auto_attack": "fast"}, "expected 'standard', 'quick', 'none' or a list"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(model, images, labels, change, message):
    arguments = {"model": model, "images": images, "labels": labels, "epsilon": 0.01, **QUICK, **change}
    with pytest.raises(DmatError, match=message):
        dmat.evaluate(**arguments)


def test_fewer_labels_than_images_are_refused(model, images, labels):
    with pytest.raises(DmatError, match="24 images and 23 labels"):
        dmat.evaluate(model, images, labels[1:], epsilon=0.01, **QUICK)
