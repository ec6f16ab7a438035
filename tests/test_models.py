"""`dmat models`: published weights are imported completely or not at all, run no code, are exported under the published
names, and give the same logits everywhere. Run alone: pytest tests/test_models.py

Files are written here with the names that the publishers use. As the oracle, the network of TRADES and Carmon is
written again from those names. The real RobustBench is tested by tests/test_robustbench.py.
"""

import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import dmat
from dmat import files
from dmat.diffusion.edm_networks import SongUNet
from dmat.errors import DmatError
from dmat.models import foreign, importing
from dmat.models.importing import DATA, import_model
from dmat.robust.networks import PREACT_BLOCKS, DataSpec, Normalise, preact_resnet, wide_resnet
from dmat.tracking import registry, stores
from dmat.training import weights
from tests import edm_files
from tests.projects import Project

ARGS = {  # as the published trainings write them, shortened
    "data": "cifar10s",
    "model": "wrn-10-1-swish",
    "normalize": False,
    "attack": "linf-pgd",
    "attack_eps": 8 / 255,
    "attack_step": 2 / 255,
    "beta": 5.0,
    "tau": 0.995,
    "ls": 0.1,
    "seed": 1,
    "data_dir": "/somewhere/else",
}


def network(seed=0, depth=10, width=1, data="cifar10", activation="silu", make=wide_resnet):
    """Random weights, batch norms as after some training."""
    torch.manual_seed(seed)
    images = DATA[data]
    model = make(DataSpec(images.classes, 3, images.mean, images.std), depth, width, activation)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "batchnorm" in name and tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def published(path, seed=0, args=ARGS, **entries):
    """A checkpoint of Wang et al. 2023 and its args.txt; the averaged network has the seed, the live one seed + 1."""
    options = {key: entries.pop(key) for key in ("depth", "width", "data", "make") if key in entries}
    ema, live = network(seed, **options), network(seed + 1, **options)
    content = {
        "model_state_dict": prefixed(ema.state_dict(), "module.0."),
        "unaveraged_model_state_dict": prefixed(live.state_dict(), "module.0."),
    }
    torch.save(content | entries, path)
    (path.parent / "args.txt").write_text(json.dumps(args, indent=4))
    return ema, live


def carmon(depth=10, width=1, classes=10, unused=True, seed=0):
    """State dict of the network of TRADES and Carmon et al. 2019, with names and shapes written out."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{part}"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name, out, into, size):
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) / math.sqrt(into * size**2)

    conv("conv1", 16, 3, 3)
    groups = [("block1", 16, 16 * width), ("block2", 16 * width, 32 * width), ("block3", 32 * width, 64 * width)]
    for group, into, out in groups + ([("sub_block1", 16, 16 * width)] if unused else []):
        for block in range((depth - 4) // 6):
            base, first = f"{group}.layer.{block}", into if block == 0 else out
            norm(f"{base}.bn1", first)
            conv(f"{base}.conv1", out, first, 3)
            norm(f"{base}.bn2", out)
            conv(f"{base}.conv2", out, out, 3)
            if first != out:
                conv(f"{base}.convShortcut", out, first, 1)
    norm("bn1", 64 * width)
    state["fc.weight"] = torch.randn(classes, 64 * width, generator=generator)
    state["fc.bias"] = torch.randn(classes, generator=generator)
    return state


def carmon_logits(state, images, depth):
    """Forward pass from the tensor names: ReLU, and one pixel of padding on every side of each 3 x 3 convolution."""

    def active(x, name):
        s = {part: state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, s["running_mean"], s["running_var"], s["weight"], s["bias"]).relu()

    x = F.conv2d(images, state["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for block in range((depth - 4) // 6):
            base, stride = f"block{group}.layer.{block}", 2 if group > 1 and block == 0 else 1
            a = active(x, f"{base}.bn1")
            h = F.conv2d(a, state[f"{base}.conv1.weight"], stride=stride, padding=1)
            h = F.conv2d(active(h, f"{base}.bn2"), state[f"{base}.conv2.weight"], padding=1)
            shortcut = state.get(f"{base}.convShortcut.weight")
            x = h + (x if shortcut is None else F.conv2d(a, shortcut, stride=stride))
    return F.linear(active(x, "bn1").mean((2, 3)), state["fc.weight"], state["fc.bias"])


def pixels(count=3, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def imported(tmp_path):
    """A published network that was imported: its path and the network."""
    ema, _ = published(tmp_path / "weights-best.pt")
    return import_model(tmp_path / "weights-best.pt", tmp_path / "args.txt").path, ema


def refused(message, *arguments, **options):
    """import_model refuses with exactly this message."""
    with pytest.raises(DmatError) as error:
        import_model(*arguments, **options)
    assert str(error.value) == message


# --- published checkpoints


def test_published_weights_are_imported_bit_for_bit(tmp_path, call):
    ema, live = published(tmp_path / "weights-best.pt")
    for which, model in (("averaged", ema), ("raw", live)):
        target = tmp_path / f"{which}.safetensors"
        options = ["--args", tmp_path / "args.txt", "--weights", which, "--to", target]
        code, out, err = call("models", "import", tmp_path / "weights-best.pt", *options)
        assert (code, err) == (0, "")
        assert out == f"{target}: WRN-10-1 silu, 10 classes, {which} weights\n"
        loaded = dmat.load_model(target)
        assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
            k: v.tolist() for k, v in model.state_dict().items()
        }
        assert torch.equal(loaded(pixels()), model(pixels()))
        assert json.loads(target.with_suffix(".json").read_text())["weights"] == which


def test_the_sidecar_records_all_that_is_known_of_a_model(tmp_path):
    published(tmp_path / "weights-best.pt")
    result = import_model(tmp_path / "weights-best.pt", tmp_path / "args.txt", licence="MIT")
    assert result.path == tmp_path / "weights-best.safetensors"
    assert result.notes == []
    sidecar = weights.read(result.path, "classifier")[1]
    assert sidecar["network"] == {"name": "wide_resnet", "depth": 10, "width": 1, "activation": "silu"}
    assert (sidecar["classes"], sidecar["channels"], sidecar["image_shape"]) == (10, 3, [32, 32, 3])
    assert (sidecar["mean"], sidecar["std"]) == ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    assert sidecar["threat"] == {"norm": "linf", "epsilon": "8/255"}
    assert (sidecar["weights"], sidecar["licence"], sidecar["licence_of_data"]) == ("averaged", "MIT", "unknown")
    assert (sidecar["seed"], sidecar["beta"], sidecar["data"]) == (1, 5.0, "cifar10")
    origin = sidecar["origin"]
    assert origin["file"] == "weights-best.pt"
    assert origin["sha256"] == files.sha256(tmp_path / "weights-best.pt")
    assert origin["args"] == ARGS


@pytest.mark.parametrize(
    ("attack", "epsilon", "threat"),
    [
        ("linf-pgd", 8 / 255, ("linf", "8/255")),
        ("fgsm", 0.1, ("linf", "0.1")),
        ("l2-pgd", 128 / 255, ("l2", "128/255")),
        ("l2-pgd", 0.5, ("l2", "0.5")),
        (None, 0.5, None),
    ],
)
def test_the_threat_model_is_read_from_the_arguments(attack, epsilon, threat):
    actual = importing._threat({"attack": attack, "attack_eps": epsilon})
    assert actual == (threat and {"norm": threat[0], "epsilon": threat[1]})


@pytest.mark.parametrize(
    ("data", "data_in_args", "classes", "size"),
    [("cifar100", "cifar100s", 100, 32), ("svhn", "svhns", 10, 32), ("tinyimagenet", "tiny-imagenets", 200, 64)],
)
def test_every_data_set_has_its_own_normalisation(tmp_path, data, data_in_args, classes, size):
    ema, _ = published(tmp_path / "w.pt", data=data, args=ARGS | {"data": data_in_args})
    result = import_model(tmp_path / "w.pt", tmp_path / "args.txt")
    assert (result.sidecar["classes"], result.sidecar["image_shape"]) == (classes, [size, size, 3])
    assert torch.equal(dmat.load_model(result.path)(pixels(size=size)), ema(pixels(size=size)))


@pytest.mark.parametrize(("depth", "width"), [(10, 2), (16, 1), (22, 3)])
def test_depth_and_width_are_read_from_shapes(tmp_path, depth, width):
    published(tmp_path / "w.pt", depth=depth, width=width)
    result = import_model(tmp_path / "w.pt", data="cifar10")
    assert (result.sidecar["network"]["depth"], result.sidecar["network"]["width"]) == (depth, width)
    assert result.notes == ["activation silu was assumed, because no tensor shows it: see --activation"]
    assert result.sidecar["origin"]["notes"] == result.notes


def test_importing_a_resume_file_twice_gives_the_same_bytes(tmp_path):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    published(tmp_path / "state-last.pt", optimizer_state_dict=optimiser.state_dict(), epoch=3)
    first = import_model(tmp_path / "state-last.pt", tmp_path / "args.txt").path.read_bytes()
    assert import_model(tmp_path / "state-last.pt", tmp_path / "args.txt").path.read_bytes() == first


@pytest.mark.parametrize("zipped", [True, False])
def test_state_last_of_torch_1_with_a_scheduler_is_imported(tmp_path, call, zipped):
    """The scheduler's state holds a bound method, and with it the scheduler, the optimiser and its parameters."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=9)
    state = {**scheduler.state_dict(), "anneal_func": scheduler.step, "lr": np.float64(0.1)}
    path, model = tmp_path / "state-last.pt", {}
    model["averaged"], model["raw"] = published(path, optimizer_state_dict=optimiser.state_dict())
    content = torch.load(path, weights_only=True) | {"scheduler_state_dict": state, "epoch": 10}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for which in ("averaged", "raw"):
        target = tmp_path / f"{which}.safetensors"
        options = ["--args", tmp_path / "args.txt", "--weights", which, "--to", target]
        code, out, err = call("models", "import", path, *options)
        assert (code, out) == (0, f"{target}: WRN-10-1 silu, 10 classes, {which} weights\n")
        assert "note: the file names code, which was neither run nor read: " in err
        assert "torch.optim.lr_scheduler.OneCycleLR" in err
        assert torch.equal(dmat.load_model(target)(pixels()), model[which](pixels()))


def test_without_averaging_the_weights_are_raw(tmp_path):
    """With --tau 0, or in a script without --tau, a training writes only the live weights, as model_state_dict."""
    path, args = tmp_path / "weights-best.pt", tmp_path / "args.txt"
    live = network(1)
    for arguments in (ARGS | {"tau": 0.0}, without(ARGS, "tau")):
        torch.save({"model_state_dict": prefixed(live.state_dict(), "module.0.")}, path)
        args.write_text(json.dumps(arguments))
        assert import_model(path, args).sidecar["weights"] == "raw"
        assert import_model(path, args, which="raw").sidecar["weights"] == "raw"
        refused(
            f"{path} holds one network, model_state_dict, module.0. (raw); its args name no tau; expected averaged "
            f"weights; omit --weights, or give a file that has them",
            path,
            args,
            which="averaged",
        )
    args.write_text(json.dumps(ARGS))
    assert import_model(path, args).sidecar["weights"] == "averaged"
    result = import_model(path, data="cifar10")
    assert (result.sidecar["weights"], result.notes[0]) == (
        "unknown",
        "nothing in the file says whether its weights are averages: those of Wang et al. 2023 are, unless their "
        "args.txt says tau 0",
    )
    published(path, args=ARGS | {"tau": 0.0})
    refused(
        f"{path} holds unaveraged_model_state_dict, which no training with tau 0 writes, and its args say tau 0; "
        f"expected the same; give the args.txt of this file",
        path,
        args,
        target=tmp_path / "new.safetensors",
    )


FRONT_STD = {
    "cifar10": (0.2023, 0.1994, 0.2010), "svhn": (0.2023, 0.1994, 0.2010), "cifar100": (0.2673, 0.2564, 0.2762)
}  # fmt: skip


@pytest.mark.parametrize("data", FRONT_STD)
def test_normalize_true_is_a_second_normalisation(tmp_path, data):
    """The layer in front and the network both normalise, by constants that no file holds."""
    inner, args = network(data=data), tmp_path / "args.txt"
    mean = (0.5071, 0.4865, 0.4409) if data == "cifar100" else (0.4914, 0.4822, 0.4465)
    whole = torch.nn.Sequential(Normalise(mean, FRONT_STD[data]), inner)
    path = tmp_path / "w.pt"
    torch.save({"model_state_dict": prefixed(whole.state_dict(), "module.")}, path)
    args.write_text(json.dumps(ARGS | {"data": f"{data}s", "normalize": True}))
    result = import_model(path, args)
    torch.testing.assert_close(dmat.load_model(result.path)(pixels()), whole(pixels()), rtol=1e-4, atol=1e-4)
    assert result.notes[-1].startswith(
        "its images are normalised twice and the sidecar has both as one: in front by mean"
    )
    assert not torch.allclose(inner(pixels()), whole(pixels()), atol=0.01)


def normaliser(mean, std, names=("mean", "std")):
    return {name: torch.tensor(value).reshape(1, -1, 1, 1) for name, value in zip(names, (mean, std), strict=True)}


def test_normalisation_stored_among_the_tensors_is_used(tmp_path):
    mean, std, path = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), tmp_path / "w.pt"
    state = network().state_dict()
    inside = wide_resnet(DataSpec(10, 3, mean, std), 10, 1, "silu").eval()
    inside.load_state_dict(state)
    in_front = torch.nn.Sequential(Normalise(mean, std), network())
    buffers = normaliser(mean, std)
    for expected, content in (
        (inside, state | buffers),
        (inside, state | prefixed(normaliser(mean, std, ("mu", "sigma")), "normalize.")),
        (in_front, prefixed(buffers, "normalizer.") | prefixed(state, "model.")),
        (in_front, prefixed(buffers, "module.0.") | prefixed(state, "module.1._orig_mod.")),
        (in_front, buffers | prefixed(state, "net.")),
    ):
        torch.save({"state_dict": content}, path)
        loaded = dmat.load_model(import_model(path, data="cifar10").path)
        torch.testing.assert_close(loaded(pixels()), expected(pixels()), rtol=1e-4, atol=1e-4)
        path.with_suffix(".safetensors").unlink()
        path.with_suffix(".json").unlink()
    torch.save(prefixed(carmon(), "net.") | normaliser(0.5, 0.25), path)  # one number for all channels
    result = import_model(path, data="cifar10")
    assert (result.sidecar["mean"], result.sidecar["std"]) == ([0.5] * 3, [0.25] * 3)


# How others store one network, and which weights these then are
WRAPPED = {
    "torch.compile": (lambda s: prefixed(s, "_orig_mod."), "unknown"),
    "DDP, compile, DDP": (lambda s: {"state_dict": prefixed(s, "module._orig_mod.module.")}, "unknown"),
    "compile inside": (lambda s: {k.replace("layer.0.", "layer.0._orig_mod."): v for k, v in s.items()}, "unknown"),
    "FSDP": (
        lambda s: {
            f"_fsdp_wrapped_module.{k.replace('block.0', 'block.0._checkpoint_wrapped_module')}": v
            for k, v in s.items()
        },
        "unknown",
    ),
    "AveragedModel": (lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.module.")}, "averaged"),
    "AveragedModel, not updated": (lambda s: {"n_averaged": torch.tensor(0), **prefixed(s, "module.")}, "unknown"),
    "Lightning": (
        lambda s: {"epoch": 3, "state_dict": prefixed(s, "net."), "hyper_parameters": {"lr": 0.1}, "loops": {}},
        "unknown",
    ),
    "under model": (lambda s: {"epoch": 3, "best_acc": np.float64(0.5), "model": s}, "unknown"),
    "under checkpoint, net": (lambda s: {"checkpoint": {"net": prefixed(s, "module.")}}, "unknown"),
    "only averages": (lambda s: {"model_ema": {"module": s}}, "averaged"),
    "bare, beside other things": (lambda s: s | {"epoch": 3, "optimizer": {"lr": 1.0}}, "unknown"),
    "no counters": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "unknown"),
    "counters as floats": (lambda s: {k: v.double() for k, v in s.items()}, "unknown"),
    "one storage": (lambda s: in_one_storage(s), "unknown"),
    "not contiguous": (lambda s: {k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in s.items()}, "unknown"),
    "parameters": (lambda s: {k: as_parameter(v) for k, v in s.items()}, "unknown"),
}


def in_one_storage(state):
    """Makes every float tensor a view of one tensor."""
    flat, start, views = torch.cat([t.flatten() for t in state.values() if t.is_floating_point()]), 0, {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    return state | views


def as_parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_one_network_is_imported_whatever_wraps_it(tmp_path, wrapper):
    store, expected_weights = WRAPPED[wrapper]
    state, path = network().state_dict(), tmp_path / "w.pt"
    torch.save(store(state), path)
    result = import_model(path, data="cifar10")
    loaded = weights.read(result.path, "classifier")[0]
    assert [name for name in state if "num_batches" not in name and not torch.equal(loaded[name], state[name])] == []
    assert result.sidecar["weights"] == expected_weights
    if "counters" in wrapper:
        assert "7 counters num_batches_tracked were filled in with 0: logits do not depend on them" in result.notes


@pytest.mark.parametrize(
    "store",
    [
        lambda ema, live: {"state_dict": live, "state_dict_ema": ema},
        lambda ema, live: {"model": live, "ema": {"module": ema}},
        lambda ema, live: {"state_dict": ema, "current_model_state": live},
        lambda ema, live: {"state_dict": prefixed(live, "model.") | prefixed(ema, "ema_model.module.")},
        lambda ema, live: (
            prefixed(live, "net.") | prefixed(ema, "avg.") | {"avg.n_averaged": torch.tensor(1)}
        ),
    ],
    ids=["timm", "ema", "Lightning", "prefixes", "AveragedModel"],
)
def test_of_two_networks_one_must_be_requested(tmp_path, store):
    states, path = {"averaged": network(0).state_dict(), "raw": network(1).state_dict()}, tmp_path / "w.pt"
    torch.save(store(states["averaged"], states["raw"]), path)
    with pytest.raises(DmatError, match=r"holds 2 networks: .*; expected one; say --weights averaged or --weights raw"):
        import_model(path, data="cifar10")
    for which, state in states.items():
        result = import_model(path, data="cifar10", which=which, target=tmp_path / f"{which}.safetensors")
        assert result.sidecar["weights"] == which
        assert torch.equal(weights.read(result.path, "classifier")[0]["logits.weight"], state["logits.weight"])


def test_two_indistinguishable_networks_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"teacher": network(0).state_dict(), "student": network(1).state_dict()}, path)
    refused(
        f"{path} holds 2 networks: teacher (unknown); student (unknown); expected one; save the state_dict of "
        f"one alone",
        path,
        data="cifar10",
        which="averaged",
    )


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "module.0."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_robustbench_files_with_and_without_wrapping(tmp_path, prefix, suffix):
    model, path = network(), tmp_path / f"theirs{suffix}"
    state = prefixed(model.state_dict(), prefix)
    if suffix == ".pt":
        torch.save({"state_dict": state} if prefix else state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    result = import_model(
        path, data="cifar10", which="averaged", activation="silu", target=tmp_path / "ours.safetensors"
    )
    assert (result.sidecar["weights"], result.notes) == ("averaged", [])
    assert torch.equal(dmat.load_model(result.path)(pixels()), model(pixels()))


def test_half_precision_is_stored_as_float32(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in network().state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    result = import_model(tmp_path / "half.pt", data="cifar10", activation="relu")
    assert result.notes == ["float16 tensors are stored as float32"]
    assert result.sidecar["network"]["activation"] == "relu"
    assert dmat.load_model(result.path).init_conv.weight.dtype == torch.float32


# --- networks in the manner of TRADES and Carmon et al. 2019


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_carmon_networks_give_the_logits_of_their_own_layout(tmp_path, depth, width):
    state = carmon(depth, width)
    torch.save(
        {"state_dict": prefixed(state, "module."), "num_classes": 10, "normalize_input": False}, tmp_path / "s.pt"
    )
    result = import_model(tmp_path / "s.pt", data="cifar10")
    unused = sum(name.startswith("sub_block1.") for name in state)
    assert result.notes == [
        f"{unused} tensors of sub_block1 were left out: the network never uses them",
        "its network takes pixels in [0, 1] as they are: mean 0, std 1",
    ]
    model = dmat.load_model(result.path)
    assert result.sidecar["network"] == {
        "name": "wide_resnet_symmetric",
        "depth": depth,
        "width": width,
        "activation": "relu",
    }
    expected = carmon_logits(state, pixels(), depth)
    torch.testing.assert_close(model(pixels()), expected, rtol=1e-5, atol=1e-4)
    assert model.features(pixels()).shape == (3, 64 * width)
    # padding right and bottom only would be another network
    other = wide_resnet(DataSpec(10, 3, (0.0,) * 3, (1.0,) * 3), depth, width, "relu").eval()
    other.load_state_dict(model.state_dict())
    assert (other(pixels()) - expected).abs().max() > 0.01


def test_carmon_networks_keep_their_own_normalisation(tmp_path):
    state, mean, std = carmon(unused=False), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    front = {name: torch.tensor(value).reshape(1, 3, 1, 1) for name, value in (("mean", mean), ("std", std))}
    content = {**prefixed(front, "module.0."), **prefixed(state, "module.1.")}
    torch.save({"state_dict": content, "normalize_input": True}, tmp_path / "s.pt")
    result = import_model(tmp_path / "s.pt", data="cifar10")
    assert result.sidecar["mean"] == pytest.approx(mean)
    assert result.sidecar["std"] == pytest.approx(std)
    expected = carmon_logits(state, (pixels() - front["mean"]) / front["std"], 10)
    torch.testing.assert_close(dmat.load_model(result.path)(pixels()), expected, rtol=1e-5, atol=1e-4)


# --- PreActResNet


@pytest.mark.parametrize("depth", PREACT_BLOCKS)
def test_preact_is_imported_bit_for_bit_with_its_name(tmp_path, call, depth):
    args, path = ARGS | {"model": f"preact-resnet{depth}-swish"}, tmp_path / "weights-best.safetensors"
    ema, _ = published(tmp_path / "weights-best.pt", args=args, depth=depth, width=0, make=preact_resnet)
    code, out, err = call("models", "import", tmp_path / "weights-best.pt", "--args", tmp_path / "args.txt")
    assert (code, err) == (0, "")
    assert out == f"{path}: PreActResNet-{depth} silu, 10 classes, averaged weights\n"
    expected_network = {"name": "preact_resnet", "depth": depth, "width": 0, "activation": "silu"}
    assert json.loads(path.with_suffix(".json").read_text())["network"] == expected_network
    loaded, expected = dmat.load_model(path), ema.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert torch.equal(loaded(pixels()), ema(pixels()))
    code, out, _ = call("models", "info", path)
    assert code == 0
    assert f"network         PreActResNet-{depth} silu (preact_resnet)\n" in out


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.0."])
@pytest.mark.parametrize(("data", "activation"), [("cifar10", None), ("cifar100", "relu")])
def test_preact_of_robustbench_gets_the_normalisation_of_its_data(tmp_path, prefix, data, activation):
    model = network(depth=18, width=0, data=data, activation=activation or "silu", make=preact_resnet)
    torch.save({"state_dict": prefixed(model.state_dict(), prefix)}, tmp_path / "theirs.pt")
    result = import_model(tmp_path / "theirs.pt", data=data, activation=activation)
    expected_notes = [] if activation else ["activation silu was assumed, because no tensor shows it: see --activation"]
    assert result.notes == expected_notes
    assert (result.sidecar["mean"], result.sidecar["std"]) == (list(DATA[data].mean), list(DATA[data].std))
    assert torch.equal(dmat.load_model(result.path)(pixels()), model(pixels()))


@pytest.mark.parametrize("form", ["robustbench", "published"])
def test_preact_export_and_import_is_the_same_model(tmp_path, call, form):
    model = network(depth=18, width=0, make=preact_resnet)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    path = import_model(tmp_path / "w.pt", data="cifar10", which="averaged").path
    code, _, err = call("models", "export", path, "--to", form, tmp_path / "out.pt")
    assert (code, err) == (
        0,
        "note: the tensors fit DMPreActResNet(num_classes=10, depth=18, activation_fn=torch.nn.SiLU, "
        "mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), num_input_channels=3)\n",
    )
    reimported = import_model(tmp_path / "out.pt", data="cifar10", target=tmp_path / "back.safetensors").path
    assert reimported.read_bytes() == path.read_bytes()
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"image_shape": [8, 8, 3]}))
    _, _, err = call("models", "export", path, "--to", form, tmp_path / "small.pt")
    assert err.splitlines()[1:] == [
        "note: that class averages over 4 x 4 positions, which are all positions only for images of 32 x 32 pixels; "
        "this model is for 8 x 8"
    ]


def as_in_torchvision(state):
    """Tensors under the names of the other PreActResNet in public use."""
    names = {"conv_2d.weight": "conv1.weight", "layer_0.0.conv_2d_1.weight": "layer1.0.conv1.weight"}
    return {names[name]: state[name] for name in names}


# Change to the tensors of a PreActResNet-18 for CIFAR-10, and the message after the path
PREACT_TENSORS = {
    "other PreActResNet": (
        lambda s: prefixed(as_in_torchvision(s), "module."),
        " holds module.layer1.0.conv1.weight: a ResNet or PreActResNet that pads stride 2 on all sides and has "
        "shortcuts of 1 x 1, which no network of dmat computes; expected the PreActResNet of Rebuffi et al. 2021, with "
        "conv_2d and layer_0.0.conv_2d_1; import a file of that one",
    ),
    "other depth": (
        lambda s: s | {"layer_2.2.conv_2d_1.weight": torch.ones(1)},
        " has groups of 2, 2, 3 and 2 blocks; expected 2, 2, 2 and 2 (PreActResNet-18) or 3, 4, 6 and 3 "
        "(PreActResNet-34); download the file again, or save the whole state_dict",
    ),
    "small shortcut": (
        lambda s: s | {"layer_1.0.shortcut.weight": torch.ones(128, 64, 1, 1)},
        " does not match PreActResNet-18 (names after ''): layer_1.0.shortcut.weight is (128, 64, 1, 1), expected "
        "(128, 64, 3, 3); expected the state_dict of one network; download the file again",
    ),
    "missing": (
        lambda s: without(s, "batchnorm.running_var"),
        " does not match PreActResNet-18 (names after ''): missing ['batchnorm.running_var'], unexpected []; expected "
        "the state_dict of one network; download the file again",
    ),
    "layer in front": (
        lambda s: prefixed(s, "module.1."),
        " has a layer in front of its network and does not hold its mean and std; expected both, or an args.txt that "
        "says normalize true; give the args.txt of its training with --args",
    ),
}


@pytest.mark.parametrize("case", PREACT_TENSORS)
def test_tensors_that_are_almost_a_preact_are_refused(tmp_path, case):
    change, message = PREACT_TENSORS[case]
    state = change(network(depth=18, width=0, make=preact_resnet).state_dict())
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    refused(f"{tmp_path / 'w.pt'}{message}", tmp_path / "w.pt", data="cifar10")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_args_must_name_the_preact_that_the_file_holds(tmp_path):
    args = ARGS | {"model": "preact-resnet34-swish"}
    published(tmp_path / "w.pt", args=args, depth=18, width=0, make=preact_resnet)
    refused(
        f"{tmp_path / 'w.pt'} holds preact-resnet18-swish; its args say model preact-resnet34-swish; expected the "
        f"same; give the args.txt of this file",
        tmp_path / "w.pt",
        tmp_path / "args.txt",
    )


# --- files that are not what they should be


class TouchOnUnpickle:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("case", ["tensor", "beside", "legacy", "protocol 5"])
def test_code_in_a_file_does_not_run(tmp_path, call, case):
    """The code is left unread and named in a note; the weights are imported."""
    marker, path, model = tmp_path / "marker", tmp_path / "weights.pt", network()
    evil = TouchOnUnpickle(marker)
    content = {"model_state_dict": prefixed(model.state_dict(), "module.0.")}
    content |= {"epoch": evil} if case == "beside" else {"unaveraged_model_state_dict": {"w": evil}}
    protocol = 5 if case == "protocol 5" else 2
    torch.save(content, path, _use_new_zipfile_serialization=case != "legacy", pickle_protocol=protocol)
    code, _, err = call("models", "import", path, "--data", "cifar10")
    assert code == 0
    assert "note: the file names code, which was neither run nor read: posix.system\n" in err
    assert not marker.exists()
    assert torch.equal(dmat.load_model(path.with_suffix(".safetensors"))(pixels()), model(pixels()))
    with path.open("rb") as file:  # the file is armed: whoever unpickles it runs the command
        assert b"touch" in file.read()


def test_code_in_place_of_weights_does_not_run(tmp_path):
    path, marker = tmp_path / "w.pt", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"state_dict": TouchOnUnpickle(marker)}, protocol=2))
    problem = r"is incomplete or not a file of weights \(a pickle that torch.save did not write\)"
    with pytest.raises(DmatError, match=problem):
        import_model(path, data="cifar10")
    torch.save({"state_dict": TouchOnUnpickle(marker)}, path)
    refused(
        f"{path}: state_dict is a posix.system; expected a dictionary of named tensors; save the network's "
        f"state_dict()",
        path,
        data="cifar10",
    )
    torch.save(TouchOnUnpickle(marker), path)
    refused(
        f"{path} holds a posix.system; expected a dictionary of tensors; save the network's state_dict()",
        path,
        data="cifar10",
    )
    assert not marker.exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda path: (published(path), truncate(path)),
            "BadZipFile: File is not a zip file",
        ),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"\x80\x02" + bytes(range(200))), "at position 2, opcode b'\\x00' unknown"),
        (lambda path: np.save(path.open("wb"), np.zeros(9)), "it takes more from its stack than the stack holds"),
    ],
    ids=["cut", "empty", "bytes", "npy"],
)
def test_files_without_weights_are_refused(tmp_path, make, problem):
    path = tmp_path / "w.pt"
    make(path)
    refused(
        f"{path} is incomplete or not a file of weights ({problem}); expected what torch.save wrote; download it again "
        f"and compare its checksum",
        path,
        data="cifar10",
    )


@pytest.mark.parametrize(
    ("head", "description"),
    [(b"<!DOCTYPE html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")],
)
def test_failed_downloads_are_named(tmp_path, head, description):
    (tmp_path / "w.pt").write_bytes(head)
    refused(
        f"{tmp_path / 'w.pt'} is {description}, not weights; expected what torch.save wrote; download the file itself "
        f"and compare its checksum",
        tmp_path / "w.pt",
        data="cifar10",
    )


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "w.safetensors")
    truncate(tmp_path / "w.safetensors")
    with pytest.raises(DmatError, match=r"is incomplete or not a \.safetensors file"):
        import_model(tmp_path / "w.safetensors", data="cifar10", target=tmp_path / "new.safetensors")


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


FIRST, SECOND = "layer.0.block.0.conv_1.weight", "layer.2.block.0.batchnorm_1.running_var"
SHORTCUT, DEEPER = "layer.1.block.0.shortcut.weight", "layer.1.block.1.conv_0.weight"

# Change to the tensors of a WRN-10-1 for CIFAR-10, and the message after the path
TENSORS = {
    "wrong prefix": (
        lambda s: prefixed(s, "backbone."),
        " holds 46 tensors named backbone.batchnorm.bias, backbone.batchnorm.num_batches_tracked, "
        "backbone.batchnorm.running_mean; expected a wide residual network with init_conv and layer.0.block.0 (Wang "
        "et al. 2023), or with conv1 and block1.layer.0 (Carmon et al. 2019), or a PreActResNet with conv_2d and "
        "layer_0.0 (Rebuffi et al. 2021), after module., module.0., model. or nothing; dmat reads no other network",
    ),
    "layer in front": (
        lambda s: prefixed(s, "module.1."),
        " has a layer in front of its network and does not hold its mean and std; expected both, or an args.txt that "
        "says normalize true; give the args.txt of its training with --args",
    ),
    "unknown normalisation": (
        lambda s: prefixed(carmon(), "module.1."),
        " has a layer in front of its network and does not hold its mean and std; expected both, or an args.txt that "
        "says normalize true; give the args.txt of its training with --args",
    ),
    "missing": (
        lambda s: without(s, SECOND, SHORTCUT),
        f" does not match WRN-10-1 (names after ''): missing ['{SHORTCUT}', '{SECOND}'], unexpected []; expected the "
        "state_dict of one network; download the file again",
    ),
    "missing first": (
        lambda s: without(s, FIRST),
        f": {FIRST} is missing; expected a tensor of 4 dimensions; download the file again, or save the whole "
        f"state_dict",
    ),
    "extra": (
        lambda s: s | {"layer.3.weight": torch.ones(2)},
        " does not match WRN-10-1 (names after ''): missing [], unexpected ['layer.3.weight']; expected the "
        "state_dict of one network; download the file again",
    ),
    "stranger": (
        lambda s: prefixed(s, "module.") | {"ema.weight": torch.ones(2)},
        " holds ema.weight beside a network whose names begin with 'module.'; expected the tensors of one network; "
        "save its state_dict alone",
    ),
    "uneven groups": (
        lambda s: s | {DEEPER: torch.ones(32, 32, 3, 3)},
        " has groups of 1, 2 and 1 blocks; expected three equal numbers; download the file again, or save the whole "
        "state_dict",
    ),
    "odd width": (
        lambda s: s | {FIRST: torch.ones(20, 16, 3, 3)},
        ": the first group has 20 channels; expected a multiple of 16, as wide residual networks have; dmat "
        "reads no other width",
    ),
    "other shape": (
        lambda s: s | {SHORTCUT: torch.ones(32, 16, 3, 3)},
        f" does not match WRN-10-1 (names after ''): {SHORTCUT} is (32, 16, 3, 3), expected (32, 16, 1, 1); expected "
        f"the state_dict of one network; download the file again",
    ),
    "not a number": (
        lambda s: s | {SHORTCUT: torch.full((32, 16, 1, 1), math.nan)},
        f": {SHORTCUT} holds numbers that are not finite; expected finite numbers of torch.float32; download the file "
        "again",
    ),
    "whole numbers": (
        lambda s: s | {SHORTCUT: torch.ones(32, 16, 1, 1, dtype=torch.int64)},
        f": {SHORTCUT} holds numbers of type torch.int64; expected finite numbers of torch.float32; download the file "
        "again",
    ),
    "text": (
        lambda s: s | {SHORTCUT: "hello"},
        f" does not match WRN-10-1 (names after ''): missing ['{SHORTCUT}'], unexpected []; expected the state_dict of "
        f"one network; download the file again",
    ),
    "sparse": (
        lambda s: s | {SHORTCUT: s[SHORTCUT].to_sparse()},
        f": {SHORTCUT} is a torch._utils._rebuild_sparse_tensor; expected tensors of plain numbers; save them dense, "
        f"on the CPU and not quantised",
    ),
    "too large for float32": (
        lambda s: s | {SHORTCUT: torch.full((32, 16, 1, 1), 1e300, dtype=torch.float64)},
        f": {SHORTCUT} holds numbers that are not finite; expected finite numbers of torch.float32; download the file "
        "again",
    ),
    "complex": (
        lambda s: s | {SHORTCUT: s[SHORTCUT] + 0j},
        f": {SHORTCUT} holds numbers of type torch.complex64; expected finite numbers of torch.float32; download the "
        "file again",
    ),
    "one tensor twice": (
        lambda s: s | {f"_orig_mod.{SHORTCUT}": s[SHORTCUT]},
        f" holds {SHORTCUT} and _orig_mod.{SHORTCUT}, which are equal without their wrappers; expected one tensor of "
        "this name; save the state_dict of one network alone",
    ),
    "mean of bytes": (
        lambda s: s | {"mean": torch.full((3,), 125.0), "std": torch.full((3,), 60.0)},
        " normalises by mean (125.0, 125.0, 125.0) and std (60.0, 60.0, 60.0); expected 3 numbers each, mean from 0 to "
        "1 as pixels are, std above 0; download the file again, or divide both by 255 if they are for bytes",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_anything_else_are_refused(tmp_path, case):
    change, message = TENSORS[case]
    torch.save({"state_dict": change(network().state_dict())}, tmp_path / "w.pt")
    refused(f"{tmp_path / 'w.pt'}{message}", tmp_path / "w.pt", data="cifar10")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path):
    """torch's reader accepts a view of one number as 4 TB; copying it would kill the process."""
    state = network().state_dict() | {"logits.weight": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DmatError, match=r"claims tensors of 40000\d+ bytes and has \d+; expected a file that holds"):
        import_model(tmp_path / "w.pt", data="cifar10")


def archive(path, program, piece=b"\0" * 64):
    """Writes a file in the format of torch.save: a pickle and one piece of bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", program)
        file.writestr("w/data/0", piece)


def pickled_tensor(length=16, offset=0, shape=(4,), strides=(1,)):
    """A pickle of {"w": a float tensor in the piece "0"} that claims this length, offset, shape and strides."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + number(length) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    arguments = b"(" + storage + number(offset) + sizes + b"t"
    return b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def number(value):
    """The pickle instruction that pushes this number."""
    content = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (pickled_tensor(shape=(17,)), "a tensor ends at number 16 of a storage of 16"),
        (pickled_tensor(offset=16, shape=()), "a tensor without offset, shape and strides"),
        (pickled_tensor(shape=(2,), strides=(16,)), "a tensor ends at number 16 of a storage of 16"),
        (pickled_tensor(length=17), "piece 0 has 64 bytes and claims 68"),
        (pickled_tensor(length=2**60), "a storage without key and length"),
        (pickled_tensor(strides=(-1,)), "a tensor without offset, shape and strides"),
        (b"\x80\2" + b"h\5.", "KeyError: 5"),  # reads a memo entry that was never written
        (b"\x80\2\x8a\xff\xff.", "not enough data in stream to read long1"),
        (b"\x80\2]K\1\x82\1.", "it holds the instruction EXT1"),
        (b"\x80\2K\1K\2R.", "a call of something that is not a name"),
        (b"\x80\2K\1", "pickle exhausted before seeing STOP"),
        (b"\x80\2a.", "it takes more from its stack than the stack holds"),
        (b"\x80\4]]\x93.", "a name that is a list"),  # printing a nested object might never end
    ],
)
def test_a_pickle_program_that_claims_missing_data_is_refused(tmp_path, program, problem):
    path = tmp_path / "w.pt"
    archive(path, program)
    with pytest.raises(DmatError) as error:
        foreign.tensors(foreign.content(path)[0], path)
    assert str(error.value) == (
        f"{path} is incomplete or not a file of weights ({problem}); expected what torch.save wrote; download it again "
        f"and compare its checksum"
    )


def test_a_deep_or_large_pickle_program_does_no_harm(tmp_path):
    """The reader does not recurse, hash what it reads, or allocate memory for what is not there."""
    path, deep = tmp_path / "w.pt", b"\x85" * 50_000  # tuples in tuples
    for program in (
        b"\x80\2}K\1" + deep + b"K\1s.",  # as the key of a dictionary
        b"\x80\2}r\xff\xff\xff\xff.",  # at the last entry of the memo
        b"\x80\2}cbuiltins\nexec\n(X\4\0\0\0" + b"1/0#tR" + b"X\1\0\0\0xs.",
        b"\x80\2}X\1\0\0\0dcos\nsystem\nq\1(h\1tR}bs.",
        b"(lp0\ng0\na0}.",  # a list in itself
    ):
        archive(path, program)
        parsed, _ = foreign.content(path)
        assert isinstance(parsed, dict)
        assert foreign.tensors(parsed, path) == {}
    archive(path, pickled_tensor())
    assert torch.equal(foreign.tensors(foreign.content(path)[0], path)["w"], torch.zeros(4))


def test_pieces_of_a_file_must_not_overlap_nor_be_compressed(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(4096)}, path)
    with zipfile.ZipFile(path) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    with pytest.raises(DmatError, match=r"is incomplete or not a file of weights \(.* is compressed\)"):
        foreign.content(path)


# --- what the file, args.txt and the options say must agree


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (
            {"data": "cifar100s"},
            {},
            "{w} has 10 classes; expected 100, as cifar100 has; give the args.txt or --data of this file",
        ),
        (
            {"data": "mnist"},
            {},
            "{a}: data is 'mnist'; expected one of cifar10, cifar100, svhn, tiny-imagenet, cifar10s, cifar100s, "
            "svhns, tiny-imagenets; dmat knows no other",
        ),
        ({}, {"data": "svhn"}, "{a} says data 'cifar10s' and --data says svhn; expected the same; omit --data"),
        ({}, {"data": "mnist"}, "--data is 'mnist'; expected one of cifar10, cifar100, svhn, tinyimagenet"),
        (
            {"model": "wrn-28-10-swish"},
            {},
            "{w} holds wrn-10-1-swish; its args say model wrn-28-10-swish; expected the same; give the args.txt of "
            "this file",
        ),
        (
            {"model": "wrn-10-1"},
            {},
            "{w} holds wrn-10-1-swish; its args say model wrn-10-1; expected the same; give the args.txt of this file",
        ),
        (
            {"normalize": True},
            {},
            "{w}: its args say normalize true, a layer that the tensors do not show; expected normalize false; give "
            "the args.txt of this file",
        ),
        (
            {},
            {"activation": "relu"},
            "--activation is relu; networks of this kind have silu; expected the same; omit it",
        ),
        ({}, {"activation": "tanh"}, "--activation is 'tanh'; expected one of relu, silu, gelu"),
    ],
)
def test_contradictions_are_refused(tmp_path, args, options, message):
    path = tmp_path / "w.pt"
    published(path, args=ARGS | args)
    refused(message.format(w=path, a=tmp_path / "args.txt"), path, tmp_path / "args.txt", **options)
    assert not (tmp_path / "w.safetensors").exists()


def test_entries_of_a_file_must_agree_with_its_tensors(tmp_path):
    path = tmp_path / "s.pt"
    for entry, actual in (({"num_classes": 100}, 10), ({"normalize_input": True}, False)):
        torch.save({"state_dict": prefixed(carmon(), "module."), **entry}, path)
        ((key, value),) = entry.items()
        refused(
            f"{path} says {key} {value} and its tensors say {actual}; expected the same; download it again",
            path,
            data="cifar10",
        )


def test_missing_inputs_are_named(tmp_path):
    path = tmp_path / "w.pt"
    refused(f"{path} does not exist; expected a .pt, .pth or .safetensors file; give its path", path, data="cifar10")
    torch.save({"model_state_dict": network().state_dict()}, path)
    refused(
        "neither --args nor --data says which images the model is for; it has 10 classes, as cifar10 and svhn; say "
        "--data cifar10",
        path,
    )
    refused(
        f"{path} has no unaveraged_model_state_dict; expected it beside model_state_dict for raw weights; omit "
        f"--weights, get the weights-best.pt that the training wrote, or give its args.txt if that says tau 0",
        path,
        data="cifar10",
        which="raw",
    )
    refused("--weights is 'ema'; expected averaged or raw", path, data="cifar10", which="ema")
    args = tmp_path / "args.txt"
    refused(f"{args} does not exist; expected the args.txt beside the weights; give its path", path, args)
    args.write_text("{")
    with pytest.raises(DmatError, match=r"args.txt is not valid JSON \(.*\); expected one object; download it again"):
        import_model(path, args)
    args.write_text('{"beta": NaN}')
    with pytest.raises(DmatError, match=r"args.txt is not valid JSON \(NaN is not a finite number\)"):
        import_model(path, args)
    args.write_text("[]")
    refused(f"{args} holds a list; expected a JSON object; give the args.txt of the training", path, args)
    torch.save({"epoch": 3, "model": "x"}, path)
    refused(
        f"{path} holds epoch, model; expected model_state_dict, state_dict or tensors; save the state_dict of its "
        f"network",
        path,
        data="cifar10",
    )
    torch.save([1], path)
    refused(
        f"{path} holds a list; expected a dictionary of tensors; save the network's state_dict()", path, data="svhn"
    )


def test_no_existing_file_is_overwritten(tmp_path, imported):
    path, _ = imported
    torch.save(network(9).state_dict(), tmp_path / "other.pt")
    refused(
        f"{path} exists and is not an import of other.pt; expected a new name; give one with --to",
        tmp_path / "other.pt",
        data="cifar10",
        target=path,
    )
    refused(f"{path} is the file to import; expected another name to write; give one with --to", path, data="cifar10")
    refused(
        "--to is new.pt; expected a name that ends in .safetensors; give one such as new.safetensors",
        path,
        data="cifar10",
        target=type(path)("new.pt"),
    )


# --- export


@pytest.mark.parametrize("form", ["robustbench", "published"])
def test_export_and_import_is_the_same_model(tmp_path, call, imported, form):
    path, model = imported
    out = tmp_path / f"{form}.pt"
    code, output, err = call("models", "export", path, "--to", form, out)
    assert (code, output) == (0, f"{out}\n")
    assert err == (
        "note: the tensors fit DMWideResNet(num_classes=10, depth=10, width=1, activation_fn=torch.nn.SiLU, "
        "mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), num_input_channels=3)\n"
    )
    stored = torch.load(out, weights_only=True)
    key, prefix = {"robustbench": ("state_dict", ""), "published": ("model_state_dict", "module.0.")}[form]
    assert list(stored) == [key]
    assert list(stored[key]) == [f"{prefix}{name}" for name in model.state_dict()]
    reimported = import_model(out, data="cifar10", target=tmp_path / "back.safetensors").path
    assert torch.equal(dmat.load_model(reimported)(pixels()), model(pixels()))
    assert reimported.read_bytes() == path.read_bytes()


def test_export_notes_what_its_readers_must_know(tmp_path, call, imported):
    path, _ = imported
    sidecar = json.loads(path.with_suffix(".json").read_text())
    changed = sidecar | {"image_shape": [8, 8, 3], "weights": "raw"}
    path.with_suffix(".json").write_text(json.dumps(changed))
    _, _, err = call("models", "export", path, "--to", "published", tmp_path / "new.pt")
    assert err.splitlines()[1:] == [
        "note: that class averages over 8 x 8 positions, which are all positions only for images of 32 x 32 pixels; "
        "this model is for 8 x 8",
        "note: readers expect averaged weights in model_state_dict; these are raw",
    ]
    code, _, err = call("models", "export", path, "--to", "published", tmp_path / "new.pt")
    assert (code, err) == (
        2,
        f"error: {tmp_path / 'new.pt'} exists; expected a new name; give another or move the file away\n",
    )
    code, _, err = call("models", "export", path, "--to", "onnx", tmp_path / "newer.pt")
    assert (code, err) == (2, "error: --to is 'onnx'; expected one of robustbench, published\n")


def test_export_knows_the_networks_of_its_readers(tmp_path, call):
    torch.save({"state_dict": carmon()}, tmp_path / "s.pt")
    path = import_model(tmp_path / "s.pt", data="cifar10").path
    code, _, err = call("models", "export", path, "--to", "robustbench", tmp_path / "new.pt")
    assert (code, err) == (
        2,
        f"error: {path} is a wide_resnet_symmetric; expected a wide_resnet or preact_resnet, the networks that "
        f"robustbench has; export another model\n",
    )


# --- info and load_model


def test_info_describes_a_model(call, imported):
    path, model = imported
    code, out, _ = call("models", "info", path)
    origin = files.sha256(path.with_name("weights-best.pt"))[:12]
    assert code == 0
    assert out == (
        f"file            {path}\n"
        "network         WRN-10-1 silu (wide_resnet)\n"
        f"parameters      {sum(p.numel() for p in model.parameters()):,}\n"
        "classes         10\n"
        "images          32 x 32 x 3, cifar10\n"
        "normalisation   mean 0.4914 0.4822 0.4465, std 0.2471 0.2435 0.2616\n"
        "threat model    linf 8/255\n"
        "weights         averaged\n"
        "licence         unknown\n"
        "checksum        ok\n"
        f"from            weights-best.pt (Wang et al. 2023), sha256 {origin}\n"
    )
    code, out, _ = call("models", "info", path, "--json")
    info = json.loads(out)
    assert (code, info["checksum_ok"], info["origin"]["args"]) == (0, True, ARGS)


def test_info_reports_a_damaged_file(call, imported):
    path, _ = imported
    expected = files.sha256(path)[:12]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    code, out, _ = call("models", "info", path)
    assert code == 2
    assert f"checksum        {files.sha256(path)[:12]}, the sidecar says {expected}\n" in out
    code, _, err = call("models", "predict", path, path)
    assert code == 2
    assert "its sidecar says" in err


def test_models_that_cannot_be_opened_are_refused(tmp_path, imported):
    path, _ = imported
    messages = {}

    def refusal(file, **options):
        with pytest.raises(DmatError) as error:
            dmat.load_model(file, **options)
        return str(error.value)

    assert refusal(tmp_path / "none.safetensors") == (
        f"{tmp_path / 'none.safetensors'} does not exist; expected the .safetensors file of a classifier; give its path"
    )
    foreign = tmp_path / "weights-best.pt"
    assert refusal(str(foreign)) == (
        f"{foreign} is not a .safetensors file; expected one that a training or an import wrote; call `dmat models "
        f"import {foreign}` first"
    )
    assert refusal(path, device="tpu").startswith("device is 'tpu' (")
    sidecar = json.loads(path.with_suffix(".json").read_text())
    for name, change in (("lacks", {"mean": None}), ("other", {"network": sidecar["network"] | {"name": "convnext"}})):
        path.with_suffix(".json").write_text(json.dumps(sidecar | change))
        messages[name] = refusal(path)
    assert messages["lacks"] == (
        f"{path.with_suffix('.json')} does not describe a network (TypeError: 'NoneType' object is not iterable); "
        f"expected network, classes, channels, mean, std and image_shape; bring back the sidecar that was written with "
        f"{path.name}"
    )
    assert messages["other"] == (
        f"{path.with_suffix('.json')} names the network 'convnext'; this dmat has wide_resnet, "
        f"wide_resnet_symmetric, preact_resnet, ra_wide_resnet, vit; use the dmat that wrote it"
    )
    path.with_suffix(".json").unlink()
    assert refusal(path) == (
        f"{path} has no sidecar weights-best.json beside it; expected the two that were written together; bring it, or "
        f"call `dmat models import {path}` if the file is from elsewhere"
    )


@pytest.mark.parametrize(("change", "words"), [
    ({"network": {"depth": 6_000_004}}, "depth is 6000004, not a whole number from 1 to 10,000"),
    ({"network": {"width": 10**400}}, "is not valid JSON"),
    ({"network": {"width": 9_999}}, "does not fit the network its sidecar describes"),
    ({"classes": 10**8}, "classes is 100000000, not a whole number from 2 to 10,000"),
    ({"channels": 0}, "channels is 0"),
    ({"mean": [10**400, 0, 0]}, "is not valid JSON"),
    ({"image_shape": [10**18, 32, 3]}, "image_shape is"),
])  # fmt: skip
def test_sizes_of_a_sidecar_are_checked_before_memory_is_taken(imported, change, words):
    path, _ = imported
    text = path.with_suffix(".json").read_text()
    sidecar = json.loads(text)
    network = sidecar["network"] | change.get("network", {})
    try:
        path.with_suffix(".json").write_text(json.dumps(sidecar | change | {"network": network}))
        with pytest.raises(DmatError, match=words):
            dmat.load_model(path)
    finally:
        path.with_suffix(".json").write_text(text)


def test_json_that_is_no_json_ends_in_one_sentence(tmp_path):
    path = tmp_path / "file.json"
    for content in (b"[" * 100_000, b"\xff\xfe\x00", b"", b'{"a": 1'):
        path.write_bytes(content)
        with pytest.raises(DmatError, match="is not valid JSON"):
            files.read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DmatError, match="is not a file; expected one"):
        files.read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DmatError, match="is not a file; expected one"):
        files.read_json(path)
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(DmatError, match="cannot be read"):
        files.read_json(loop)


def test_load_model_is_ready_to_use(imported):
    path, model = imported
    threads = torch.get_num_threads()
    loaded = dmat.load_model(str(path))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(pixels()), model(pixels()))
    assert torch.get_num_threads() == threads


def test_import_dmat_loads_no_torch():
    script = "import sys, dmat; dmat.load_model; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False False\n"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, tiny_params_once):
    """The artifacts of a training of dmat, with a classifier of 8 x 8 grey digits."""
    project = Project(tmp_path_factory.mktemp("project"), tiny_params_once)
    for stage_name in ("prepare_data", "train_scorer"):
        project.run(stage_name)
    return project.folder / "artifacts"


def test_models_of_trainings_work_like_imported_ones(tmp_path, call, scorer):
    path, test = scorer / "train_scorer/scorer/best.safetensors", scorer / "prepare_data/test"
    images, labels = test / "images-00000.npy", test / "labels-00000.npy"
    code, out, _ = call("models", "info", path)
    assert code == 0
    assert "images          8 x 8 x 1\n" in out
    assert "from            a training here\n" in out
    options = ["--labels", labels, "--to", tmp_path / "logits.npy", "--quiet"]
    code, out, _ = call("models", "predict", path, images, *options)
    assert code == 0
    pixels = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2) / 255
    expected = dmat.load_model(path)(pixels).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)
    correct = int((expected.argmax(1) == np.load(labels)).sum())
    assert out.splitlines()[1] == f"accuracy: {100 * correct / 40:.2f} % ({correct} of 40)"


# --- predict


@pytest.mark.parametrize("layout", ["uint8 last", "float32 last", "float32 first"])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_logits_of_images_in_every_form(tmp_path, call, imported, layout, batch):
    path, model = imported
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    arrays = {"uint8 last": images, "float32 last": scaled.permute(0, 2, 3, 1).numpy(), "float32 first": scaled.numpy()}
    np.save(tmp_path / "images.npy", arrays[layout])
    code, out, err = call("models", "predict", path, tmp_path / "images.npy", "--batch", batch, "--device", "cpu")
    logits = np.load(tmp_path / "images-logits.npy")
    assert (code, out) == (0, f"{tmp_path / 'images-logits.npy'}: 7 x 10 logits\n")
    assert "7.00/7.00" in err  # the bar
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, model(scaled).numpy(), rtol=0, atol=1e-5)


def images(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            images(2, 3, 32, 32),
            " holds uint8 [2, 3, 32, 32]; expected uint8 [N, 32, 32, 3] with N above 0, the images of this model; "
            "give such images or another model",
        ),
        (
            images(2, 64, 64, 3),
            " holds uint8 [2, 64, 64, 3]; expected uint8 [N, 32, 32, 3] with N above 0, the images of this model; "
            "give such images or another model",
        ),
        (
            images(2, 32, 32, 1, dtype=np.float32),
            " holds float32 [2, 32, 32, 1]; expected float32 [N, 32, 32, 3] or [N, 3, 32, 32] with N above 0, the "
            "images of this model; give such images or another model",
        ),
        (
            images(32, 32, 3),
            " holds uint8 [32, 32, 3]; expected uint8 [N, 32, 32, 3] with N above 0, the images of this model; give "
            "such images or another model",
        ),
        (
            images(0, 32, 32, 3),
            " holds uint8 [0, 32, 32, 3]; expected uint8 [N, 32, 32, 3] with N above 0, the images of this model; "
            "give such images or another model",
        ),
        (
            images(2, 32, 32, 3, dtype=np.float64),
            " holds float64; expected uint8, or float32 in [0, 1]; convert it, for example by .astype('float32')",
        ),
        (
            images(2, 32, 32, 3, dtype=np.int32),
            " holds int32; expected uint8, or float32 in [0, 1]; convert it, for example by .astype('float32')",
        ),
        (
            images(5, 32, 32, 3, dtype=np.float32) + 255,
            ": image 0 has values from 255 to 255; expected [0, 1]; divide bytes by 255, and leave normalisation to "
            "the model",
        ),
        (
            images(5, 3, 32, 32, dtype=np.float32) - np.eye(5, dtype=np.float32)[3, :, None, None, None],
            ": image 3 has values from -1 to -1; expected [0, 1]; divide bytes by 255, and leave normalisation to "
            "the model",
        ),
        (
            images(1, 32, 32, 3, dtype=np.float32) + np.nan,
            ": image 0 has values from nan to nan; expected [0, 1]; divide bytes by 255, and leave normalisation to "
            "the model",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, call, imported, array, message):
    path, file = tmp_path / "images.npy", imported[0]
    np.save(path, array)
    code, out, err = call("models", "predict", file, path, "--batch", 2, "--quiet")
    assert (code, out, err) == (2, "", f"error: {path}{message}\n")
    assert not list(tmp_path.glob("*logits*"))
    assert not list(tmp_path.glob(".*"))


def test_files_that_are_not_arrays_are_refused(tmp_path, call, imported):
    path, marker = imported[0], tmp_path / "marker"
    objects = np.empty(1, object)
    objects[0] = TouchOnUnpickle(marker)
    np.save(tmp_path / "object.npy", objects)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(TouchOnUnpickle(marker)))
    np.save(tmp_path / "cut.npy", images(4, 32, 32, 3))
    truncate(tmp_path / "cut.npy")
    for name in ("object", "pickle", "cut"):
        code, _, err = call("models", "predict", path, tmp_path / f"{name}.npy")
        assert code == 2
        assert err.startswith(f"error: {tmp_path / name}.npy is incomplete or not a .npy file of numbers (")
        assert err.endswith("); expected images as numpy.save writes them; save them again\n")
    np.savez(tmp_path / "images.npz", image=images(4, 32, 32, 3))
    code, _, err = call("models", "predict", path, tmp_path / "images.npz")
    assert (code, err) == (
        2,
        f"error: {tmp_path / 'images.npz'} is an archive of arrays; expected one array of images; save it alone by "
        f"numpy.save\n",
    )
    code, _, err = call("models", "predict", path, tmp_path / "none.npy")
    assert (code, err) == (
        2,
        f"error: {tmp_path / 'none.npy'} does not exist; expected a .npy file of images; give its path\n",
    )
    assert not marker.exists()


def test_labels_must_fit_the_images_and_the_classes(tmp_path, call, imported):
    path, file, labels = imported[0], tmp_path / "images.npy", tmp_path / "labels.npy"
    np.save(file, images(4, 32, 32, 3))
    np.save(labels, np.array([0, 1, 99, 3]))
    code, _, err = call("models", "predict", path, file, "--labels", labels)
    assert (code, err) == (
        2,
        f"error: {labels} has labels from 0 to 99; expected 0 to 9, because the model has 10 classes; give the labels "
        f"or the model of this data set\n",
    )
    np.save(labels, np.array([0, 1, 2]))
    code, _, err = call("models", "predict", path, file, "--labels", labels)
    assert (code, err) == (
        2,
        f"error: {labels} holds int64 [3]; expected 4 integers, one for each image; give the labels of these images\n",
    )


def test_predict_never_overwrites_its_input(tmp_path, call, imported):
    file = tmp_path / "images.npy"
    np.save(file, images(4, 32, 32, 3))
    before = file.read_bytes()
    code, _, err = call("models", "predict", imported[0], file, "--to", file)
    assert (code, err) == (2, f"error: {file} is a file to read; expected another name to write; give one with --to\n")
    assert file.read_bytes() == before


# --- the page of the documentation


def test_the_commands_of_the_page_work(tmp_path, call, root, monkeypatch, put_store):
    """Every command of docs/models.md, in order, in a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "weights-best.pt")
    torch.save({"state_dict": prefixed(carmon(), "module.")}, tmp_path / "cifar10_pseudo.pt")
    torch.save(network(3).state_dict(), tmp_path / "Cui2023Decoupled_WRN-28-10.pt")
    preact = network(4, depth=18, width=0, make=preact_resnet).state_dict()
    torch.save({"state_dict": preact}, tmp_path / "Rade2021Helper_R18_ddpm.pt")
    song = SongUNet(32, 3, 10, 9, 8, (1, 1), 1, (16,))
    arguments = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9,
                 "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}  # fmt: skip
    edm_files.write(tmp_path / "edm-cifar10-32x32-cond-vp.pkl", song, arguments)
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(8,), norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm-cifar10-32")
    np.save(tmp_path / "images.npy", images(4, 32, 32, 3))
    np.save(tmp_path / "labels.npy", np.zeros(4, np.int64))
    put_store(tmp_path)
    client, experiment = stores.connect(tmp_path)
    sidecar = {"kind": "classifier", "image_shape": [8, 8, 1], "classes": 10}
    weights.save(tmp_path / "best.safetensors", network(1).state_dict(), sidecar)
    digests = [files.sha256(tmp_path / f"best.{kind}") for kind in ("safetensors", "json")]
    champion = registry.RegistryCandidate("digits-3f2a91c0-linf-1_5", tmp_path / "best.safetensors", {}, 0.7, *digests)
    registry.register(client, client.create_run(experiment).info.run_id, champion)
    text = (root / "docs" / "models.md").read_text()
    commands = re.findall(r"^dmat (.+?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        code, _, err = call(*shlex.split(command))
        assert code == 0, f"dmat {command}: {err}"
    for script in re.findall(r"```python\n(.+?)```", text, re.DOTALL):
        exec(script, {})
