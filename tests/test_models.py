"""`dmat models`: published weights come in whole or not at all and run nothing, go out under the published names, and
give the same logits everywhere. Run alone: pytest tests/test_models.py

Files are written here with the names that the publishers use; the network in the manner of TRADES and Carmon is stated
again from those names as the oracle. The real RobustBench is tested by tests/test_robustbench.py.
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
from cli.main import main
from dmat import files
from dmat.errors import DmatError
from dmat.models import foreign, importing
from dmat.models.importing import DATA, import_model
from dmat.robust.networks import PREACT_BLOCKS, DataSpec, Normalise, preact_resnet, wide_resnet
from dmat.tracking import registry, stores
from dmat.training import weights
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


def published(path, seed=0, args=ARGS, **more):
    """A checkpoint of Wang et al. 2023 and its args.txt; the averaged network has the seed, the live one seed + 1."""
    kind = {key: more.pop(key) for key in ("depth", "width", "data", "make") if key in more}
    averaged, live = network(seed, **kind), network(seed + 1, **kind)
    content = {
        "model_state_dict": prefixed(averaged.state_dict(), "module.0."),
        "unaveraged_model_state_dict": prefixed(live.state_dict(), "module.0."),
    }
    torch.save(content | more, path)
    (path.parent / "args.txt").write_text(json.dumps(args, indent=4))
    return averaged, live


def carmon(depth=10, width=1, classes=10, unused=True, seed=0):
    """State dict of the network of TRADES and Carmon et al. 2019, names and shapes written out again."""
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
    """Its forward pass from the names: ReLU, and one pixel of padding on every side of each 3 x 3 convolution."""

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
def call(monkeypatch, capsys):
    """`dmat <words>` in this process -> exit code, standard output, standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["dmat", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def imported(tmp_path):
    """A published network that was imported: its path and the network."""
    averaged, _ = published(tmp_path / "weights-best.pt")
    return import_model(tmp_path / "weights-best.pt", tmp_path / "args.txt").path, averaged


def refused(words, *given, **named):
    """import_model refuses with exactly this sentence."""
    with pytest.raises(DmatError) as error:
        import_model(*given, **named)
    assert str(error.value) == words


# --- published checkpoints


def test_published_weights_come_in_bit_for_bit(tmp_path, call):
    averaged, live = published(tmp_path / "weights-best.pt")
    for which, model in (("averaged", averaged), ("raw", live)):
        to = tmp_path / f"{which}.safetensors"
        words = ["--args", tmp_path / "args.txt", "--weights", which, "--to", to]
        code, out, err = call("models", "import", tmp_path / "weights-best.pt", *words)
        assert (code, err) == (0, "")
        assert out == f"{to}: WRN-10-1 silu, 10 classes, {which} weights\n"
        found = dmat.load_model(to)
        assert {k: v.tolist() for k, v in found.state_dict().items()} == {
            k: v.tolist() for k, v in model.state_dict().items()
        }
        assert torch.equal(found(pixels()), model(pixels()))
        assert json.loads(to.with_suffix(".json").read_text())["weights"] == which


def test_sidecar_says_all_that_is_known(tmp_path):
    published(tmp_path / "weights-best.pt")
    done = import_model(tmp_path / "weights-best.pt", tmp_path / "args.txt", licence="MIT")
    assert done.path == tmp_path / "weights-best.safetensors"
    assert done.notes == []
    sidecar = weights.read(done.path, "classifier")[1]
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
def test_threat_model_is_that_of_the_arguments(attack, epsilon, threat):
    found = importing._threat({"attack": attack, "attack_eps": epsilon})
    assert found == (threat and {"norm": threat[0], "epsilon": threat[1]})


@pytest.mark.parametrize(
    ("data", "written", "classes", "size"),
    [("cifar100", "cifar100s", 100, 32), ("svhn", "svhns", 10, 32), ("tinyimagenet", "tiny-imagenets", 200, 64)],
)
def test_every_data_set_brings_its_normalisation(tmp_path, data, written, classes, size):
    averaged, _ = published(tmp_path / "w.pt", data=data, args=ARGS | {"data": written})
    done = import_model(tmp_path / "w.pt", tmp_path / "args.txt")
    assert (done.sidecar["classes"], done.sidecar["image_shape"]) == (classes, [size, size, 3])
    assert torch.equal(dmat.load_model(done.path)(pixels(size=size)), averaged(pixels(size=size)))


@pytest.mark.parametrize(("depth", "width"), [(10, 2), (16, 1), (22, 3)])
def test_depth_and_width_are_read_from_shapes(tmp_path, depth, width):
    published(tmp_path / "w.pt", depth=depth, width=width)
    done = import_model(tmp_path / "w.pt", data="cifar10")
    assert (done.sidecar["network"]["depth"], done.sidecar["network"]["width"]) == (depth, width)
    assert done.notes == ["activation silu was assumed, because no tensor shows it: see --activation"]
    assert done.sidecar["origin"]["notes"] == done.notes


def test_resume_files_and_the_same_import_again(tmp_path):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    published(tmp_path / "state-last.pt", optimizer_state_dict=optimiser.state_dict(), epoch=3)
    first = import_model(tmp_path / "state-last.pt", tmp_path / "args.txt").path.read_bytes()
    assert import_model(tmp_path / "state-last.pt", tmp_path / "args.txt").path.read_bytes() == first


@pytest.mark.parametrize("zipped", [True, False])
def test_state_last_of_torch_1_holds_a_scheduler_and_comes_in(tmp_path, call, zipped):
    """Its scheduler's state has a bound method, and with it the scheduler, the optimiser and its parameters."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=9)
    state = {**scheduler.state_dict(), "anneal_func": scheduler.step, "lr": np.float64(0.1)}
    path, model = tmp_path / "state-last.pt", {}
    model["averaged"], model["raw"] = published(path, optimizer_state_dict=optimiser.state_dict())
    content = torch.load(path, weights_only=True) | {"scheduler_state_dict": state, "epoch": 10}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for which in ("averaged", "raw"):
        to = tmp_path / f"{which}.safetensors"
        words = ["--args", tmp_path / "args.txt", "--weights", which, "--to", to]
        code, out, err = call("models", "import", path, *words)
        assert (code, out) == (0, f"{to}: WRN-10-1 silu, 10 classes, {which} weights\n")
        assert "note: the file names code, which was neither run nor read: " in err
        assert "torch.optim.lr_scheduler.OneCycleLR" in err
        assert torch.equal(dmat.load_model(to)(pixels()), model[which](pixels()))


def test_without_averaging_the_weights_are_live(tmp_path):
    """--tau 0, or a training script that has no --tau, writes the live weights as model_state_dict, and them alone."""
    path, args = tmp_path / "weights-best.pt", tmp_path / "args.txt"
    live = network(1)
    for said in (ARGS | {"tau": 0.0}, without(ARGS, "tau")):
        torch.save({"model_state_dict": prefixed(live.state_dict(), "module.0.")}, path)
        args.write_text(json.dumps(said))
        assert import_model(path, args).sidecar["weights"] == "raw"
        assert import_model(path, args, which="raw").sidecar["weights"] == "raw"
        refused(
            f"{path} holds one network, model_state_dict, module.0. (raw); its args name no tau; expected averaged "
            f"weights; leave --weights away, or give a file that has them",
            path,
            args,
            which="averaged",
        )
    args.write_text(json.dumps(ARGS))
    assert import_model(path, args).sidecar["weights"] == "averaged"
    done = import_model(path, data="cifar10")
    assert (done.sidecar["weights"], done.notes[0]) == (
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


FRONT = {"cifar10": (0.2023, 0.1994, 0.2010), "svhn": (0.2023, 0.1994, 0.2010), "cifar100": (0.2673, 0.2564, 0.2762)}


@pytest.mark.parametrize("data", FRONT)
def test_normalize_true_is_a_second_normalisation(tmp_path, data):
    """The layer in front and the network normalise, each by constants that are in no file."""
    inner, args = network(data=data), tmp_path / "args.txt"
    mean = (0.5071, 0.4865, 0.4409) if data == "cifar100" else (0.4914, 0.4822, 0.4465)
    whole = torch.nn.Sequential(Normalise(mean, FRONT[data]), inner)
    path = tmp_path / "w.pt"
    torch.save({"model_state_dict": prefixed(whole.state_dict(), "module.")}, path)
    args.write_text(json.dumps(ARGS | {"data": f"{data}s", "normalize": True}))
    done = import_model(path, args)
    torch.testing.assert_close(dmat.load_model(done.path)(pixels()), whole(pixels()), rtol=1e-4, atol=1e-4)
    assert done.notes[-1].startswith(
        "its images are normalised twice and the sidecar has both as one: in front by mean"
    )
    assert not torch.allclose(inner(pixels()), whole(pixels()), atol=0.01)


def normaliser(mean, std, names=("mean", "std")):
    return {name: torch.tensor(value).reshape(1, -1, 1, 1) for name, value in zip(names, (mean, std), strict=True)}


def test_normalisation_among_the_tensors_is_used(tmp_path):
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
        found = dmat.load_model(import_model(path, data="cifar10").path)
        torch.testing.assert_close(found(pixels()), expected(pixels()), rtol=1e-4, atol=1e-4)
        path.with_suffix(".safetensors").unlink()
        path.with_suffix(".json").unlink()
    torch.save(prefixed(carmon(), "net.") | normaliser(0.5, 0.25), path)  # one number for all channels
    done = import_model(path, data="cifar10")
    assert (done.sidecar["mean"], done.sidecar["std"]) == ([0.5] * 3, [0.25] * 3)


# ways in which others store one network, and what its weights are then
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
    """Every float tensor as a view of one."""
    flat, start, found = torch.cat([t.flatten() for t in state.values() if t.is_floating_point()]), 0, {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            found[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
    return state | found


def as_parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("way", WRAPPED)
def test_one_network_comes_in_whatever_is_around_it(tmp_path, way):
    store, weights_are = WRAPPED[way]
    state, path = network().state_dict(), tmp_path / "w.pt"
    torch.save(store(state), path)
    done = import_model(path, data="cifar10")
    found = weights.read(done.path, "classifier")[0]
    assert [name for name in state if "num_batches" not in name and not torch.equal(found[name], state[name])] == []
    assert done.sidecar["weights"] == weights_are
    if "counters" in way:
        assert "7 counters num_batches_tracked were filled in with 0: logits do not depend on them" in done.notes


@pytest.mark.parametrize(
    "store",
    [
        lambda averaged, live: {"state_dict": live, "state_dict_ema": averaged},
        lambda averaged, live: {"model": live, "ema": {"module": averaged}},
        lambda averaged, live: {"state_dict": averaged, "current_model_state": live},
        lambda averaged, live: {"state_dict": prefixed(live, "model.") | prefixed(averaged, "ema_model.module.")},
        lambda averaged, live: (
            prefixed(live, "net.") | prefixed(averaged, "avg.") | {"avg.n_averaged": torch.tensor(1)}
        ),
    ],
    ids=["timm", "ema", "Lightning", "prefixes", "AveragedModel"],
)
def test_of_two_networks_one_must_be_named(tmp_path, store):
    states, path = {"averaged": network(0).state_dict(), "raw": network(1).state_dict()}, tmp_path / "w.pt"
    torch.save(store(states["averaged"], states["raw"]), path)
    with pytest.raises(DmatError, match=r"holds 2 networks: .*; expected one; say --weights averaged or --weights raw"):
        import_model(path, data="cifar10")
    for which, state in states.items():
        done = import_model(path, data="cifar10", which=which, target=tmp_path / f"{which}.safetensors")
        assert done.sidecar["weights"] == which
        assert torch.equal(weights.read(done.path, "classifier")[0]["logits.weight"], state["logits.weight"])


def test_two_networks_that_nothing_tells_apart_are_refused(tmp_path):
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
    done = import_model(path, data="cifar10", which="averaged", activation="silu", target=tmp_path / "ours.safetensors")
    assert (done.sidecar["weights"], done.notes) == ("averaged", [])
    assert torch.equal(dmat.load_model(done.path)(pixels()), model(pixels()))


def test_half_precision_is_stored_as_float32(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in network().state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    done = import_model(tmp_path / "half.pt", data="cifar10", activation="relu")
    assert done.notes == ["float16 tensors are stored as float32"]
    assert done.sidecar["network"]["activation"] == "relu"
    assert dmat.load_model(done.path).init_conv.weight.dtype == torch.float32


# --- networks in the manner of TRADES and Carmon et al. 2019


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_scorers_give_the_logits_of_their_own_layout(tmp_path, depth, width):
    state = carmon(depth, width)
    torch.save(
        {"state_dict": prefixed(state, "module."), "num_classes": 10, "normalize_input": False}, tmp_path / "s.pt"
    )
    done = import_model(tmp_path / "s.pt", data="cifar10")
    unused = sum(name.startswith("sub_block1.") for name in state)
    assert done.notes == [
        f"{unused} tensors of sub_block1 were left out: the network never uses them",
        "its network takes pixels in [0, 1] as they are: mean 0, std 1",
    ]
    model = dmat.load_model(done.path)
    assert done.sidecar["network"] == {
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


def test_scorers_bring_their_own_normalisation(tmp_path):
    state, mean, std = carmon(unused=False), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    front = {name: torch.tensor(value).reshape(1, 3, 1, 1) for name, value in (("mean", mean), ("std", std))}
    content = {**prefixed(front, "module.0."), **prefixed(state, "module.1.")}
    torch.save({"state_dict": content, "normalize_input": True}, tmp_path / "s.pt")
    done = import_model(tmp_path / "s.pt", data="cifar10")
    assert done.sidecar["mean"] == pytest.approx(mean)
    assert done.sidecar["std"] == pytest.approx(std)
    expected = carmon_logits(state, (pixels() - front["mean"]) / front["std"], 10)
    torch.testing.assert_close(dmat.load_model(done.path)(pixels()), expected, rtol=1e-5, atol=1e-4)


# --- PreActResNet


@pytest.mark.parametrize("depth", PREACT_BLOCKS)
def test_preact_comes_in_bit_for_bit_and_is_named(tmp_path, call, depth):
    args, path = ARGS | {"model": f"preact-resnet{depth}-swish"}, tmp_path / "weights-best.safetensors"
    averaged, _ = published(tmp_path / "weights-best.pt", args=args, depth=depth, width=0, make=preact_resnet)
    code, out, err = call("models", "import", tmp_path / "weights-best.pt", "--args", tmp_path / "args.txt")
    assert (code, err) == (0, "")
    assert out == f"{path}: PreActResNet-{depth} silu, 10 classes, averaged weights\n"
    named = {"name": "preact_resnet", "depth": depth, "width": 0, "activation": "silu"}
    assert json.loads(path.with_suffix(".json").read_text())["network"] == named
    found, expected = dmat.load_model(path), averaged.state_dict()
    assert list(found.state_dict()) == list(expected)
    assert [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert torch.equal(found(pixels()), averaged(pixels()))
    code, out, _ = call("models", "info", path)
    assert code == 0
    assert f"network         PreActResNet-{depth} silu (preact_resnet)\n" in out


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.0."])
@pytest.mark.parametrize(("data", "activation"), [("cifar10", None), ("cifar100", "relu")])
def test_preact_of_robustbench_brings_the_normalisation_of_its_data(tmp_path, prefix, data, activation):
    model = network(depth=18, width=0, data=data, activation=activation or "silu", make=preact_resnet)
    torch.save({"state_dict": prefixed(model.state_dict(), prefix)}, tmp_path / "theirs.pt")
    done = import_model(tmp_path / "theirs.pt", data=data, activation=activation)
    assumed = [] if activation else ["activation silu was assumed, because no tensor shows it: see --activation"]
    assert done.notes == assumed
    assert (done.sidecar["mean"], done.sidecar["std"]) == (list(DATA[data].mean), list(DATA[data].std))
    assert torch.equal(dmat.load_model(done.path)(pixels()), model(pixels()))


@pytest.mark.parametrize("form", ["robustbench", "published"])
def test_preact_export_and_import_is_the_same_model(tmp_path, call, form):
    model = network(depth=18, width=0, make=preact_resnet)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    path = import_model(tmp_path / "w.pt", data="cifar10", which="averaged").path
    code, _, err = call("models", "export", path, "--to", form, tmp_path / "out.pt")
    assert (code, err) == (
        0,
        "note: they fit DMPreActResNet(num_classes=10, depth=18, activation_fn=torch.nn.SiLU, "
        "mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), num_input_channels=3)\n",
    )
    back = import_model(tmp_path / "out.pt", data="cifar10", target=tmp_path / "back.safetensors").path
    assert back.read_bytes() == path.read_bytes()
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"image_shape": [8, 8, 3]}))
    _, _, err = call("models", "export", path, "--to", form, tmp_path / "small.pt")
    assert err.splitlines()[1:] == [
        "note: that class takes means over 4 x 4 positions, which is all of them for 32 x 32 images only; this model "
        "is for 8 x 8"
    ]


def as_in_torchvision(state):
    """Names of the other PreActResNet in public use."""
    names = {"conv_2d.weight": "conv1.weight", "layer_0.0.conv_2d_1.weight": "layer1.0.conv1.weight"}
    return {names[name]: state[name] for name in names}


# what is done to the tensors of a PreActResNet-18 for CIFAR-10, and the answer after the path
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
        " is not a whole PreActResNet-18 (names after ''): layer_1.0.shortcut.weight is (128, 64, 1, 1), expected "
        "(128, 64, 3, 3); expected the state_dict of one network; download the file again",
    ),
    "missing": (
        lambda s: without(s, "batchnorm.running_var"),
        " is not a whole PreActResNet-18 (names after ''): missing ['batchnorm.running_var'], unexpected []; expected "
        "the state_dict of one network; download the file again",
    ),
    "layer in front": (
        lambda s: prefixed(s, "module.1."),
        " has a layer in front of its network and does not hold its mean and std; expected both, or an args.txt that "
        "says normalize true; give the args.txt of its training with --args",
    ),
}


@pytest.mark.parametrize("how", PREACT_TENSORS)
def test_tensors_that_are_almost_a_preact_are_refused(tmp_path, how):
    change, answer = PREACT_TENSORS[how]
    state = change(network(depth=18, width=0, make=preact_resnet).state_dict())
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    refused(f"{tmp_path / 'w.pt'}{answer}", tmp_path / "w.pt", data="cifar10")
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


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["tensor", "beside", "legacy", "protocol 5"])
def test_code_in_a_file_does_not_run(tmp_path, call, how):
    """It is left unread beside the weights, and named."""
    marker, path, model = tmp_path / "marker", tmp_path / "weights.pt", network()
    evil = Runs(marker)
    content = {"model_state_dict": prefixed(model.state_dict(), "module.0.")}
    content |= {"epoch": evil} if how == "beside" else {"unaveraged_model_state_dict": {"w": evil}}
    protocol = 5 if how == "protocol 5" else 2
    torch.save(content, path, _use_new_zipfile_serialization=how != "legacy", pickle_protocol=protocol)
    code, _, err = call("models", "import", path, "--data", "cifar10")
    assert code == 0
    assert "note: the file names code, which was neither run nor read: posix.system\n" in err
    assert not marker.exists()
    assert torch.equal(dmat.load_model(path.with_suffix(".safetensors"))(pixels()), model(pixels()))
    with path.open("rb") as file:  # the file is armed: whoever unpickles it runs the command
        assert b"touch" in file.read()


def test_code_in_place_of_weights_does_not_run(tmp_path):
    path, marker = tmp_path / "w.pt", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"state_dict": Runs(marker)}, protocol=2))
    with pytest.raises(DmatError, match=r"no whole file of weights \(a pickle that torch.save did not write\)"):
        import_model(path, data="cifar10")
    torch.save({"state_dict": Runs(marker)}, path)
    refused(
        f"{path}: state_dict is a posix.system; expected a dictionary of named tensors; save the network's "
        f"state_dict()",
        path,
        data="cifar10",
    )
    torch.save(Runs(marker), path)
    refused(
        f"{path} holds a posix.system; expected a dictionary of tensors; save the network's state_dict()",
        path,
        data="cifar10",
    )
    assert not marker.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (
            lambda path: (published(path), cut(path)),
            "BadZipFile: File is not a zip file",
        ),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"\x80\x02" + bytes(range(200))), "at position 2, opcode b'\\x00' unknown"),
        (lambda path: np.save(path.open("wb"), np.zeros(9)), "it takes more from its stack than is there"),
    ],
    ids=["cut", "empty", "bytes", "npy"],
)
def test_files_that_are_no_weights(tmp_path, make, problem):
    path = tmp_path / "w.pt"
    make(path)
    refused(
        f"{path} is no whole file of weights ({problem}); expected what torch.save wrote; download it again and "
        f"compare its checksum",
        path,
        data="cifar10",
    )


@pytest.mark.parametrize(
    ("head", "what"),
    [(b"<!DOCTYPE html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer")],
)
def test_downloads_that_failed_are_named(tmp_path, head, what):
    (tmp_path / "w.pt").write_bytes(head)
    refused(
        f"{tmp_path / 'w.pt'} is {what}, not weights; expected what torch.save wrote; download the file itself and "
        f"compare its checksum",
        tmp_path / "w.pt",
        data="cifar10",
    )


def test_cut_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(network().state_dict(), tmp_path / "w.safetensors")
    cut(tmp_path / "w.safetensors")
    with pytest.raises(DmatError, match=r"is not a whole \.safetensors file"):
        import_model(tmp_path / "w.safetensors", data="cifar10", target=tmp_path / "new.safetensors")


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


FIRST, SECOND = "layer.0.block.0.conv_1.weight", "layer.2.block.0.batchnorm_1.running_var"
SHORTCUT, DEEPER = "layer.1.block.0.shortcut.weight", "layer.1.block.1.conv_0.weight"

# what is done to the tensors of a WRN-10-1 for CIFAR-10, and the answer after the path
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
        f" is not a whole WRN-10-1 (names after ''): missing ['{SHORTCUT}', '{SECOND}'], unexpected []; expected the "
        "state_dict of one network; download the file again",
    ),
    "missing first": (
        lambda s: without(s, FIRST),
        f": {FIRST} is missing; expected a tensor of 4 dimensions; download the file again, or save the whole "
        f"state_dict",
    ),
    "extra": (
        lambda s: s | {"layer.3.weight": torch.ones(2)},
        " is not a whole WRN-10-1 (names after ''): missing [], unexpected ['layer.3.weight']; expected the "
        "state_dict of one network; download the file again",
    ),
    "stranger": (
        lambda s: prefixed(s, "module.") | {"ema.weight": torch.ones(2)},
        " holds ema.weight beside a network whose names begin with 'module.'; expected the tensors of one network; "
        "save its state_dict alone",
    ),
    "uneven groups": (
        lambda s: s | {DEEPER: torch.ones(32, 32, 3, 3)},
        " has groups of 1, 2 and 1 blocks; expected three alike; download the file again, or save the whole state_dict",
    ),
    "odd width": (
        lambda s: s | {FIRST: torch.ones(20, 16, 3, 3)},
        ": the first group has 20 channels; expected a multiple of 16, as wide residual networks have; dmat "
        "reads no other width",
    ),
    "other shape": (
        lambda s: s | {SHORTCUT: torch.ones(32, 16, 3, 3)},
        f" is not a whole WRN-10-1 (names after ''): {SHORTCUT} is (32, 16, 3, 3), expected (32, 16, 1, 1); expected "
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
        f" is not a whole WRN-10-1 (names after ''): missing ['{SHORTCUT}'], unexpected []; expected the state_dict of "
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
        f" holds {SHORTCUT} and _orig_mod.{SHORTCUT}; expected one tensor of this name beside its wrappers; save the "
        "state_dict of one network alone",
    ),
    "mean of bytes": (
        lambda s: s | {"mean": torch.full((3,), 125.0), "std": torch.full((3,), 60.0)},
        " normalises by mean (125.0, 125.0, 125.0) and std (60.0, 60.0, 60.0); expected 3 numbers each, mean from 0 to "
        "1 as pixels are, std above 0; download the file again, or divide both by 255 if they are for bytes",
    ),
}


@pytest.mark.parametrize("how", TENSORS)
def test_tensors_of_anything_else_are_refused(tmp_path, how):
    change, answer = TENSORS[how]
    torch.save({"state_dict": change(network().state_dict())}, tmp_path / "w.pt")
    refused(f"{tmp_path / 'w.pt'}{answer}", tmp_path / "w.pt", data="cifar10")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_a_tensor_that_claims_more_than_its_file_holds(tmp_path):
    """A view of one number as 4 TB passes torch's reader; copying it would end the process."""
    state = network().state_dict() | {"logits.weight": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(DmatError, match=r"claims tensors of 40000\d+ bytes and has \d+; expected a file that holds"):
        import_model(tmp_path / "w.pt", data="cifar10")


def archive(path, program, piece=b"\0" * 64):
    """A file in the format of torch.save: a pickle and one piece of bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", program)
        file.writestr("w/data/0", piece)


def pickled_tensor(length=16, offset=0, shape=(4,), strides=(1,)):
    """A pickle of {"w": a float tensor in the piece "0"}, with these claims."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + number(length) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    arguments = b"(" + storage + number(offset) + sizes + b"t"
    return b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def number(value):
    """The instruction for it."""
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
        (b"\x80\2" + b"h\5.", "KeyError: 5"),  # of a memory that nothing was put into
        (b"\x80\2\x8a\xff\xff.", "not enough data in stream to read long1"),
        (b"\x80\2]K\1\x82\1.", "it holds the instruction EXT1"),
        (b"\x80\2K\1K\2R.", "a call of what is no name"),
        (b"\x80\2K\1", "pickle exhausted before seeing STOP"),
        (b"\x80\2a.", "it takes more from its stack than is there"),
        (b"\x80\4]]\x93.", "a name that is a list"),  # writing out what may be nested would never end
    ],
)
def test_a_program_that_claims_what_is_not_there_is_refused(tmp_path, program, problem):
    path = tmp_path / "w.pt"
    archive(path, program)
    with pytest.raises(DmatError) as error:
        foreign.tensors(foreign.content(path)[0], path)
    assert str(error.value) == (
        f"{path} is no whole file of weights ({problem}); expected what torch.save wrote; download it again and "
        f"compare its checksum"
    )


def test_a_program_can_be_deep_or_large_without_harm(tmp_path):
    """Nothing recurs, hashes what it is given, or keeps room for what is not there."""
    path, deep = tmp_path / "w.pt", b"\x85" * 50_000  # tuples in tuples
    for program in (
        b"\x80\2}K\1" + deep + b"K\1s.",  # as the key of a dictionary
        b"\x80\2}r\xff\xff\xff\xff.",  # at the last place of the memory
        b"\x80\2}cbuiltins\nexec\n(X\4\0\0\0" + b"1/0#tR" + b"X\1\0\0\0xs.",
        b"\x80\2}X\1\0\0\0dcos\nsystem\nq\1(h\1tR}bs.",
        b"(lp0\ng0\na0}.",  # a list in itself
    ):
        archive(path, program)
        found, _ = foreign.content(path)
        assert isinstance(found, dict)
        assert foreign.tensors(found, path) == {}
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
    with pytest.raises(DmatError, match=r"no whole file of weights \(.* is compressed\)"):
        foreign.content(path)


# --- what the file, args.txt and the options say must agree


@pytest.mark.parametrize(
    ("args", "named", "answer"),
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
        ({}, {"data": "svhn"}, "{a} says data 'cifar10s' and --data says svhn; expected the same; leave --data away"),
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
            "--activation is relu; networks of this kind have silu; expected the same; leave it away",
        ),
        ({}, {"activation": "gelu"}, "--activation is 'gelu'; expected one of relu, silu"),
    ],
)
def test_contradictions_are_refused(tmp_path, args, named, answer):
    path = tmp_path / "w.pt"
    published(path, args=ARGS | args)
    refused(answer.format(w=path, a=tmp_path / "args.txt"), path, tmp_path / "args.txt", **named)
    assert not (tmp_path / "w.safetensors").exists()


def test_the_files_own_entries_must_agree(tmp_path):
    path = tmp_path / "s.pt"
    for entry, there in (({"num_classes": 100}, 10), ({"normalize_input": True}, False)):
        torch.save({"state_dict": prefixed(carmon(), "module."), **entry}, path)
        ((key, value),) = entry.items()
        refused(
            f"{path} says {key} {value} and its tensors say {there}; expected the same; download it again",
            path,
            data="cifar10",
        )


def test_what_is_needed_and_not_there(tmp_path):
    path = tmp_path / "w.pt"
    refused(f"{path} does not exist; expected a .pt, .pth or .safetensors file; give its path", path, data="cifar10")
    torch.save({"model_state_dict": network().state_dict()}, path)
    refused(
        "neither --args nor --data says which images the model is for; it has 10 classes, as cifar10 and svhn; say "
        "--data cifar10",
        path,
    )
    refused(
        f"{path} has no unaveraged_model_state_dict; expected it beside model_state_dict for raw weights; leave "
        f"--weights away, get the weights-best.pt that the training wrote, or give its args.txt if that says tau 0",
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
    with pytest.raises(DmatError, match=r"args.txt is not valid JSON \(NaN is no JSON number\)"):
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


def test_nothing_is_written_over(tmp_path, imported):
    path, _ = imported
    torch.save(network(9).state_dict(), tmp_path / "other.pt")
    refused(
        f"{path} exists and is no import of other.pt; expected a new name; give one with --to",
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


# --- out again


@pytest.mark.parametrize("form", ["robustbench", "published"])
def test_export_and_import_is_the_same_model(tmp_path, call, imported, form):
    path, model = imported
    out = tmp_path / f"{form}.pt"
    code, said, err = call("models", "export", path, "--to", form, out)
    assert (code, said) == (0, f"{out}\n")
    assert err == (
        "note: they fit DMWideResNet(num_classes=10, depth=10, width=1, activation_fn=torch.nn.SiLU, "
        "mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), num_input_channels=3)\n"
    )
    stored = torch.load(out, weights_only=True)
    key, prefix = {"robustbench": ("state_dict", ""), "published": ("model_state_dict", "module.0.")}[form]
    assert list(stored) == [key]
    assert list(stored[key]) == [f"{prefix}{name}" for name in model.state_dict()]
    back = import_model(out, data="cifar10", target=tmp_path / "back.safetensors").path
    assert torch.equal(dmat.load_model(back)(pixels()), model(pixels()))
    assert back.read_bytes() == path.read_bytes()


def test_export_says_what_its_reader_must_know(tmp_path, call, imported):
    path, _ = imported
    sidecar = json.loads(path.with_suffix(".json").read_text())
    changed = sidecar | {"image_shape": [8, 8, 3], "weights": "raw"}
    path.with_suffix(".json").write_text(json.dumps(changed))
    _, _, err = call("models", "export", path, "--to", "published", tmp_path / "new.pt")
    assert err.splitlines()[1:] == [
        "note: that class takes means over 8 x 8 positions, which is all of them for 32 x 32 images only; this model "
        "is for 8 x 8",
        "note: readers take model_state_dict for averaged weights; these are raw",
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


def test_info_says_what_it_is(call, imported):
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
    found = json.loads(out)
    assert (code, found["checksum_ok"], found["origin"]["args"]) == (0, True, ARGS)


def test_info_of_a_damaged_file(call, imported):
    path, _ = imported
    expected = files.sha256(path)[:12]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    code, out, _ = call("models", "info", path)
    assert code == 2
    assert f"checksum        {files.sha256(path)[:12]}, the sidecar says {expected}\n" in out
    code, _, err = call("models", "predict", path, path)
    assert code == 2
    assert "its sidecar says" in err


def test_models_that_cannot_be_opened(tmp_path, imported):
    path, _ = imported
    answers = {}

    def answer(file, **more):
        with pytest.raises(DmatError) as error:
            dmat.load_model(file, **more)
        return str(error.value)

    assert answer(tmp_path / "none.safetensors") == (
        f"{tmp_path / 'none.safetensors'} does not exist; expected the .safetensors file of a classifier; give its path"
    )
    foreign = tmp_path / "weights-best.pt"
    assert answer(str(foreign)) == (
        f"{foreign} is no .safetensors file; expected one that a training or an import wrote; call `dmat models import "
        f"{foreign}` first"
    )
    assert answer(path, device="tpu").startswith("device is 'tpu' (")
    sidecar = json.loads(path.with_suffix(".json").read_text())
    for name, change in (("lacks", {"mean": None}), ("other", {"network": sidecar["network"] | {"name": "vit"}})):
        path.with_suffix(".json").write_text(json.dumps(sidecar | change))
        answers[name] = answer(path)
    assert answers["lacks"] == (
        f"{path.with_suffix('.json')} does not describe a network (TypeError: 'NoneType' object is not iterable); "
        f"expected network, classes, channels, mean, std and image_shape; bring back the sidecar that was written with "
        f"{path.name}"
    )
    assert answers["other"] == (
        f"{path.with_suffix('.json')} names the network 'vit'; this dmat has wide_resnet, wide_resnet_symmetric, "
        f"preact_resnet; use the dmat that wrote it"
    )
    path.with_suffix(".json").unlink()
    assert answer(path) == (
        f"{path} has no sidecar weights-best.json beside it; expected the two that were written together; bring it, or "
        f"call `dmat models import {path}` if the file is from elsewhere"
    )


def test_load_model_is_ready_to_use(imported):
    path, model = imported
    threads = torch.get_num_threads()
    found = dmat.load_model(str(path))
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert torch.equal(found(pixels()), model(pixels()))
    assert torch.get_num_threads() == threads


def test_import_dmat_loads_no_torch():
    script = "import sys, dmat; dmat.load_model; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False False\n"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, tiny_params_once):
    """A classifier that a training of dmat left: 8 x 8 grey digits."""
    project = Project(tmp_path_factory.mktemp("project"), tiny_params_once)
    for word in ("prepare_data", "train_scorer"):
        project.run(word)
    return project.folder / "artifacts"


def test_models_of_trainings_are_models_too(tmp_path, call, scorer):
    path, test = scorer / "train_scorer/scorer/best.safetensors", scorer / "prepare_data/test"
    images, labels = test / "images-00000.npy", test / "labels-00000.npy"
    code, out, _ = call("models", "info", path)
    assert code == 0
    assert "images          8 x 8 x 1\n" in out
    assert "from            a training here\n" in out
    words = ["--labels", labels, "--to", tmp_path / "logits.npy", "--quiet"]
    code, out, _ = call("models", "predict", path, images, *words)
    assert code == 0
    pixels = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2) / 255
    expected = dmat.load_model(path)(pixels).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-5)
    right = int((expected.argmax(1) == np.load(labels)).sum())
    assert out.splitlines()[1] == f"accuracy: {100 * right / 40:.2f} % ({right} of 40)"


# --- predict


@pytest.mark.parametrize("kind", ["uint8 last", "float32 last", "float32 first"])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_logits_of_images_in_every_form(tmp_path, call, imported, kind, batch):
    path, model = imported
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    unit = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    stored = {"uint8 last": images, "float32 last": unit.permute(0, 2, 3, 1).numpy(), "float32 first": unit.numpy()}
    np.save(tmp_path / "images.npy", stored[kind])
    code, out, err = call("models", "predict", path, tmp_path / "images.npy", "--batch", batch, "--device", "cpu")
    found = np.load(tmp_path / "images-logits.npy")
    assert (code, out) == (0, f"{tmp_path / 'images-logits.npy'}: 7 x 10 logits\n")
    assert "7.00/7.00" in err  # the bar
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model(unit).numpy(), rtol=0, atol=1e-5)


def images(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("array", "answer"),
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
def test_images_that_do_not_fit_are_refused(tmp_path, call, imported, array, answer):
    path, file = tmp_path / "images.npy", imported[0]
    np.save(path, array)
    code, out, err = call("models", "predict", file, path, "--batch", 2, "--quiet")
    assert (code, out, err) == (2, "", f"error: {path}{answer}\n")
    assert not list(tmp_path.glob("*logits*"))
    assert not list(tmp_path.glob(".*"))


def test_arrays_that_are_none(tmp_path, call, imported):
    path, marker = imported[0], tmp_path / "marker"
    odd = np.empty(1, object)
    odd[0] = Runs(marker)
    np.save(tmp_path / "object.npy", odd)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Runs(marker)))
    np.save(tmp_path / "cut.npy", images(4, 32, 32, 3))
    cut(tmp_path / "cut.npy")
    for name in ("object", "pickle", "cut"):
        code, _, err = call("models", "predict", path, tmp_path / f"{name}.npy")
        assert code == 2
        assert err.startswith(f"error: {tmp_path / name}.npy is no whole .npy file of numbers (")
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


def test_labels_must_be_those_of_the_images(tmp_path, call, imported):
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


def test_predict_never_writes_over_what_it_reads(tmp_path, call, imported):
    file = tmp_path / "images.npy"
    np.save(file, images(4, 32, 32, 3))
    before = file.read_bytes()
    code, _, err = call("models", "predict", imported[0], file, "--to", file)
    assert (code, err) == (2, f"error: {file} is a file to read; expected another name to write; give one with --to\n")
    assert file.read_bytes() == before


# --- the page that people follow


def test_the_page_can_be_followed(tmp_path, call, root, monkeypatch):
    """Every command of docs/models.md, in order, in a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "weights-best.pt")
    torch.save({"state_dict": prefixed(carmon(), "module.")}, tmp_path / "cifar10_pseudo.pt")
    torch.save(network(3).state_dict(), tmp_path / "Cui2023Decoupled_WRN-28-10.pt")
    preact = network(4, depth=18, width=0, make=preact_resnet).state_dict()
    torch.save({"state_dict": preact}, tmp_path / "Rade2021Helper_R18_ddpm.pt")
    np.save(tmp_path / "images.npy", images(4, 32, 32, 3))
    np.save(tmp_path / "labels.npy", np.zeros(4, np.int64))
    client, experiment = stores.connect(tmp_path)
    weights.save(tmp_path / "best.safetensors", network(1).state_dict(), {"kind": "classifier"})
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
