"""`dmat models average`: the weighted mean of weights, in the format of every other model."""

import json

import numpy as np
import pytest
import torch

from dmat import files
from dmat.errors import DmatError
from dmat.models import averaging
from dmat.models.loading import open_classifier
from dmat.robust.networks import DataSpec, wide_resnet
from dmat.training import weights

SIDECAR = {
    "kind": "classifier", "weights": "averaged", "classes": 3, "channels": 1, "mean": [0.0], "std": [1.0],
    "image_shape": [8, 8, 1], "network": {"name": "wide_resnet", "depth": 10, "width": 1, "activation": "silu"},
    "arm": "a", "seed": 1, "images_seen": 10, "threat": {"norm": "linf", "epsilon": "1/10"}, "beta": 5.0,
}  # fmt: skip


def _save(path, seed, **changes):
    torch.manual_seed(seed)
    sidecar = SIDECAR | changes
    model = wide_resnet(DataSpec(sidecar["classes"], 1, (0.0,), (1.0,)), 10, 1, "silu")
    for name, tensor in model.named_buffers():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed)
    weights.save(path, model.state_dict(), sidecar)
    return path


def test_weights_and_statistics_are_the_weighted_mean(tmp_path):
    paths = [_save(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2, 3)]
    shares = [0.5, 0.3, 0.2]
    averaged = averaging.average(paths, tmp_path / "soup.safetensors", shares)
    soup, sidecar = open_classifier(tmp_path / "soup.safetensors")
    states = [open_classifier(path)[0].state_dict() for path in paths]
    for name, tensor in soup.state_dict().items():
        values = [state[name].numpy().astype(np.float64) for state in states]
        mean = np.einsum("i,i...->...", shares, np.stack(values)) if tensor.is_floating_point() else values[0]
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-8, err_msg=name)
    assert sidecar["soup"] == averaged["soup"]
    assert [part["sha256"] for part in sidecar["soup"]] == [files.sha256(path) for path in paths]
    assert (sidecar["threat"], sidecar["beta"]) == (SIDECAR["threat"], 5.0)
    assert {"seed", "arm", "images_seen"}.isdisjoint(sidecar)


def test_one_model_twice_is_that_model(tmp_path):
    path = _save(tmp_path / "a.safetensors", 1)
    averaging.average([path, path], tmp_path / "soup.safetensors")
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(
        open_classifier(tmp_path / "soup.safetensors")[0](images), open_classifier(path)[0](images)
    )


def test_another_threat_model_is_not_kept(tmp_path):
    first = _save(tmp_path / "a.safetensors", 1)
    second = _save(tmp_path / "b.safetensors", 2, threat={"norm": "l2", "epsilon": "1/2"})
    assert "threat" not in averaging.average([first, second], tmp_path / "soup.safetensors")


@pytest.mark.parametrize(
    ("changes", "shares", "target", "fragment"),
    [
        ({"classes": 4}, [], "soup.safetensors", "has the classes 4"),
        ({"mean": [0.5]}, [], "soup.safetensors", "has the mean [0.5]"),
        ({}, [0.5, 0.6], "soup.safetensors", "0.5, 0.6; expected"),
        ({}, [1.0], "soup.safetensors", "the shares of 2 classifiers are 1;"),
        ({}, [1.5, -0.5], "soup.safetensors", "numbers from 0 on"),
        ({}, [float("nan"), 1.0], "soup.safetensors", "nan"),
        ({}, [], "soup.pt", "ends in .safetensors"),
        ({}, [], "a.safetensors", "exists"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tmp_path, changes, shares, target, fragment):
    paths = [_save(tmp_path / "a.safetensors", 1), _save(tmp_path / "b.safetensors", 2, **changes)]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DmatError, match="expected") as error:
        averaging.average(paths, tmp_path / target, shares)
    assert fragment in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_and_what_info_says(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        _save(tmp_path / f"{seed}.safetensors", seed)
    code, out, err = call(
        "models", "average", "1.safetensors", "2.safetensors", "--shares", "0.7,0.3", "--to", "soup.safetensors"
    )
    assert (code, err) == (0, "")
    assert "0.7 of 1.safetensors" in out
    code, out, _ = call("models", "info", "soup.safetensors")
    assert code == 0
    assert "an average: 0.7 of 1.safetensors" in out
    code, out, _ = call("models", "info", "soup.safetensors", "--json")
    assert json.loads(out)["soup"][1]["share"] == 0.3
    code, _, err = call("models", "average", "1.safetensors", "--to", "x.safetensors")
    assert code == 2
    assert "expected two or more" in err
