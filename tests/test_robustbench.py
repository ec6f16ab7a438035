"""RobustBench loads what dmat exports, and dmat imports the models of RobustBench, with the real package.

Skipped where it is not installed: `make test-robustbench` makes an environment that has it. RobustBench 1.1.1 imports
`autoattack`, which its requirement `pyautoattack` installs under its own name.
"""

import importlib
import importlib.util
import sys
import warnings

import pytest
import torch

import dmat
from dmat import config, devices
from dmat.errors import DmatError
from dmat.evaluation import measures
from dmat.evaluation.measures import Subject
from dmat.models import exporting, importing, layouts, leaderboard
from dmat.models.importing import DATA
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.robust.networks import NETWORKS, PREACT_BLOCKS, DataSpec, preact_resnet, wide_resnet
from dmat.training import weights

if importlib.util.find_spec("robustbench") is None:
    pytest.skip("robustbench is not installed: make test-robustbench", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in ("pyautoattack", "pyautoattack.state"):
        sys.modules[_name[2:]] = importlib.import_module(_name)
    from pyautoattack import AutoAttack
    from robustbench.model_zoo.architectures import resnet as other_preact
    from robustbench.model_zoo.architectures import wide_resnet as trades_like
    from robustbench.model_zoo.architectures.dm_wide_resnet import DMPreActResNet, DMWideResNet, Swish
    from robustbench.model_zoo.architectures.robustarch_wide_resnet import get_model
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.model_zoo.models import model_dicts
    from robustbench.utils import load_model

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize(("data", "norm"), [("cifar10", "linf"), ("cifar10", "l2"), ("cifar100", "linf")])
def test_ids_of_published_accuracies_are_names_of_the_model_zoo(data, norm):
    zoo = model_dicts[BenchmarkDataset(data)][ThreatModel(norm.capitalize())]
    assert {entry.id for entry in leaderboard.entries(data, norm)} <= set(zoo)


def randomise_batch_norms(model):
    """Gives batch norms values as after some training."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and ("batchnorm" in name or "bn" in name):
            tensor.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def trained(folder, depth, width, activation="silu", data="cifar10", name="wide_resnet"):
    """A model file of dmat with random weights, and the network itself."""
    torch.manual_seed(0)
    images = DATA[data]
    data_spec = DataSpec(images.classes, 3, images.mean, images.std)
    model = randomise_batch_norms(NETWORKS[name](data_spec, depth, width, activation))
    sidecar = {
        "kind": "classifier",
        "weights": "averaged",
        "network": {"name": name, "depth": depth, "width": width, "activation": activation},
        "classes": data_spec.classes,
        "channels": 3,
        "mean": list(data_spec.mean),
        "std": list(data_spec.std),
        "image_shape": [images.size, images.size, 3],
    }
    weights.save(folder / "best.safetensors", model.state_dict(), sidecar)
    return folder / "best.safetensors", model


@pytest.mark.parametrize(("activation", "activation_class"), [("silu", torch.nn.SiLU), ("relu", torch.nn.ReLU)])
@pytest.mark.parametrize(("depth", "width", "data"), [(10, 1, "cifar10"), (16, 2, "cifar100")])
def test_export_loads_strictly_with_the_same_logits(tmp_path, depth, width, data, activation, activation_class):
    path, model = trained(tmp_path, depth, width, activation, data)
    exporting.export(path, "robustbench", tmp_path / "export.pt")
    images = DATA[data]
    reference = DMWideResNet(images.classes, depth, width, activation_class, images.mean, images.std)
    stored = torch.load(tmp_path / "export.pt", weights_only=True)
    reference.load_state_dict(stored["state_dict"], strict=True)
    assert_same_logits(reference.eval(), model, 8)


def assert_same_logits(reference, model, count, dtype=torch.float32):
    """Logits of random images are equal within TOLERANCE; prints the largest difference."""
    pixels = torch.rand(count, 3, 32, 32).to(dtype)
    reference, model = reference.to(dtype), model.to(dtype)
    with torch.no_grad():
        actual, expected = reference(pixels), model(pixels)
    print(f"largest difference of a logit: {(actual - expected).abs().max():.2e}, of {expected.abs().max():.2f}")
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_robustbench_loads_the_export_as_the_published_model(tmp_path):
    """load_model reads our file in place of its download of Wang2023Better_WRN-28-10."""
    path, model = trained(tmp_path, 28, 10)
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    exporting.export(path, "robustbench", folder / "Wang2023Better_WRN-28-10.pt")
    reference = load_model("Wang2023Better_WRN-28-10", tmp_path / "models", "cifar10", "Linf")
    assert_same_logits(reference, model, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_networks_of_robustbench_are_imported_with_the_same_logits(tmp_path, prefix):
    torch.manual_seed(1)
    images = DATA["cifar10"]
    reference = randomise_batch_norms(DMWideResNet(10, 16, 2, torch.nn.SiLU, images.mean, images.std))
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "theirs.pt")
    result = importing.import_model(tmp_path / "theirs.pt", data="cifar10")
    pixels = torch.rand(8, 3, 32, 32)
    torch.testing.assert_close(dmat.load_model(result.path)(pixels), reference(pixels), **TOLERANCE)


@pytest.mark.parametrize("unused", [False, True])
def test_networks_in_the_manner_of_carmon_are_imported_with_the_same_logits(tmp_path, unused):
    torch.manual_seed(2)
    reference = randomise_batch_norms(trades_like.WideResNet(depth=16, widen_factor=2, sub_block1=unused))
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "theirs.pt")
    result = importing.import_model(tmp_path / "theirs.pt", data="cifar10")
    pixels = torch.rand(8, 3, 32, 32)
    torch.testing.assert_close(dmat.load_model(result.path)(pixels), reference(pixels), **TOLERANCE)


@pytest.mark.parametrize(
    ("depth", "data", "activation", "activation_class", "dtype"),
    [
        (18, "cifar10", "silu", torch.nn.SiLU, torch.float32),
        (18, "cifar100", "relu", torch.nn.ReLU, torch.float32),
        # logits of random weights at this depth are near 30: the last bits of float32 alone come near the tolerance
        (34, "svhn", "silu", Swish, torch.float64),
    ],
)
def test_preact_export_loads_strictly_with_the_same_logits(tmp_path, depth, data, activation, activation_class, dtype):
    path, model = trained(tmp_path, depth, 0, activation, data, "preact_resnet")
    exporting.export(path, "robustbench", tmp_path / "export.pt")
    images = DATA[data]
    reference = DMPreActResNet(images.classes, depth, 0, activation_class, images.mean, images.std)
    stored = torch.load(tmp_path / "export.pt", weights_only=True)
    reference.load_state_dict(stored["state_dict"], strict=True)
    assert_same_logits(reference.eval(), model, 8, dtype)


def test_robustbench_loads_the_preact_export_as_the_published_model(tmp_path):
    path, model = trained(tmp_path, 18, 0, name="preact_resnet")
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    exporting.export(path, "robustbench", folder / "Gowal2021Improving_R18_ddpm_100m.pt")
    assert_same_logits(load_model("Gowal2021Improving_R18_ddpm_100m", tmp_path / "models", "cifar10", "Linf"), model, 8)


def test_the_ra_wrn_70_16_of_robustbench_is_imported_with_the_same_logits(tmp_path):
    """In float64: logits of random weights at this depth are near 1e6."""
    torch.manual_seed(4)
    reference = randomise_batch_norms(get_model("ra_wrn70_16"))
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "theirs.pt")
    result = importing.import_model(tmp_path / "theirs.pt", data="cifar10")
    model = dmat.load_model(result.path)
    assert result.sidecar["network"]["name"] == "ra_wide_resnet"
    assert list(model.state_dict()) == list(reference.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters()) == 267_240_802
    assert_same_logits(reference, model, 2, torch.float64)


@pytest.mark.parametrize(("depth", "prefix"), [(18, ""), (18, "module."), (34, "model.")])
def test_preacts_of_robustbench_are_imported_with_the_same_logits(tmp_path, depth, prefix):
    torch.manual_seed(3)
    images = DATA["cifar100"]
    reference = randomise_batch_norms(DMPreActResNet(100, depth, 0, Swish, images.mean, images.std))
    torch.save({"state_dict": {f"{prefix}{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "theirs.pt")
    result = importing.import_model(tmp_path / "theirs.pt", data="cifar100")
    assert_same_logits(reference, dmat.load_model(result.path), 8)


@pytest.mark.parametrize("block", [other_preact.PreActBlock, other_preact.PreActBlockV2])
@pytest.mark.parametrize("normalised", [False, True])
def test_other_preacts_of_robustbench_are_refused(tmp_path, block, normalised):
    other = other_preact.PreActResNet(block, [2, 2, 2, 2], bn_before_fc=normalised)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "theirs.pt")
    with pytest.raises(DmatError, match=r"holds layer1\.0\.conv1\.weight: a ResNet or PreActResNet that pads"):
        importing.import_model(tmp_path / "theirs.pt", data="cifar10")


def test_tensor_names_are_those_of_robustbench():
    data_spec = DataSpec(10, 3, (0.0,) * 3, (1.0,) * 3)
    for depth in PREACT_BLOCKS:
        state = preact_resnet(data_spec, depth, 0, "silu").state_dict()
        assert list(state) == list(DMPreActResNet(10, depth).state_dict())
    state = wide_resnet(data_spec, 16, 2, "relu").state_dict()
    assert list(state) == list(DMWideResNet(10, 16, 2).state_dict())
    reference = trades_like.WideResNet(depth=16, widen_factor=2).state_dict()
    assert {layouts.LAYOUTS["wide_resnet_symmetric"].name_in_file(name) for name in state} == set(reference)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 1.5 / 255), ("l2", 0.25)])
def test_flags_equal_those_of_autoattack_on_the_robustbench_model(tmp_path, norm, epsilon):
    """200 images in two shards: AutoAttack called directly on RobustBench's class with our exported weights, with the
    seed of each shard, against our evaluation. WRN-10-1, because a larger network takes days here."""
    path, model = trained(tmp_path, 10, 1)
    exporting.export(path, "robustbench", tmp_path / "theirs.pt")
    images = DATA["cifar10"]
    reference = DMWideResNet(10, 10, 1, torch.nn.SiLU, images.mean, images.std)
    reference.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True)["state_dict"], strict=True)
    reference.eval()
    compute = devices.resolve("cpu", "fp32", threads=torch.get_num_threads())
    pixels = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    labels[::20] = (labels[::20] + 1) % 10
    settings = config.evaluation({"pgd_steps": 1, "shard": 100, "batch": 100, "sweep": []})
    suite = auto_attack.suite("standard", 10)
    subject = Subject("model", compute.model_to_device(model), 10, pixels, labels, Ball(norm, epsilon), suite)
    evaluated = [measures.measure_shard(subject, settings, k, compute)["auto_attack"] for k in range(2)]
    direct = []
    for number, part in enumerate((slice(0, 100), slice(100, 200))):
        call = AutoAttack(
            reference, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=settings.auto_attack_seed + number
        )
        _, prediction = call.run_standard_evaluation(pixels[part], labels[part], batch_size=100)
        direct.append((prediction == labels[part]).numpy())
    print(f"robust: {[int(flags.sum()) for flags in evaluated]} of 100 each")
    assert 10 < sum(int(flags.sum()) for flags in direct) < 180
    for actual, expected in zip(evaluated, direct, strict=True):
        assert (actual == expected).all()
