"""Compiled training steps: what decides, what is recorded, and that a resumed run computes what it was begun with.

A stand-in for torch.compile changes the logits a little, as compiled graphs round otherwise. One test traces the steps
with torch itself.
"""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from dmat import compiler, config, devices
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import load_all
from dmat.data.shards import open_shards, write_set
from dmat.errors import DmatError, Interrupted
from dmat.robust.attacks import Ball
from dmat.robust.losses import LOSSES, LossSettings
from dmat.robust.networks import NETWORKS, DataSpec
from dmat.training import classifier, compilation
from dmat.training.long_run import LongRun

DEPTHS = {"wide_resnet": 10, "vit": 2, "ra_wide_resnet": 10}


class _Rounded(nn.Module):
    """A model whose logits differ in the fourth digit."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images) * 1.0003


@pytest.fixture
def rounded(monkeypatch):
    monkeypatch.setattr(compiler, "compiled", lambda model, **options: _Rounded(model))


@pytest.fixture
def train(tmp_path, tiny_params):
    """Trains 10 steps: train(folder, choice, loss, stop_at), which gets a signal before the step `stop_at`.

    changes: of the section train_robust.
    """
    rng = np.random.default_rng(0)
    write_set(tmp_path / "set", rng.integers(0, 256, (48, 8, 8, 1), np.uint8), np.arange(48) % 4,
              class_names=list("abcd"), metadata={})  # fmt: skip
    shards = open_shards(tmp_path / "set")
    section = tiny_params["train_robust"] | {"images_seen": 80, "batch": 8, "evaluate_every": 40, "schedule_every": 8}

    def run_training(folder, choice, loss="trades", stop_at=-1, network="wide_resnet", **changes):
        torch.manual_seed(3)
        settings = config.TrainRobust.model_validate(section | {"loss": loss} | changes)
        compute = dataclasses.replace(devices.resolve("cpu", "fp32", threads=1), compile=choice)
        model = NETWORKS[network](DataSpec(4, 1, (0.4,), (0.3,)), DEPTHS[network], 1, "silu")
        loss_settings = LossSettings(Ball("linf", 0.1), 2, 0.05, 5.0, 0.1, 3.0)
        with _StopAt(tmp_path / folder, compute, 80, quiet=True) as run:
            run.stop_at = stop_at * 8
            batches = MixedBatches(Mix(48, 0, 8, 0.0), 1, shards, None)
            return classifier.train(model, 4, batches, load_all(shards), loss_settings, settings, 1, run, compute)

    return run_training


class _StopAt(LongRun):
    stop_at = -1

    def checkpoint_if_due(self, images_seen, state, stop_requested=None):
        if images_seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().checkpoint_if_due(images_seen, state, stop_requested)


def same(a, b):
    return a.history == b.history and all(torch.equal(a.last[name], b.last[name]) for name in b.last)


def times(monkeypatch, eager, compiled):
    """Sets what auto measures, in seconds, and makes every run long enough."""
    monkeypatch.setattr(compilation, "_LEAST_REMAINING", 0.0)
    monkeypatch.setattr(compilation.Compilation, "_seconds",
                        lambda self, one_pass, module: compiled if isinstance(module, _Rounded) else eager)  # fmt: skip


def test_a_compiled_run_resumes_bit_for_bit(train, rounded):
    whole = train("whole", "on")
    assert whole.compiled
    assert not same(whole, train("eager", "off"))
    for stop_at in (1, compilation.EAGER_STEPS, compilation.EAGER_STEPS + 1, 7):
        with pytest.raises(Interrupted):
            train(f"parts-{stop_at}", "on", stop_at=stop_at)
        assert same(train(f"parts-{stop_at}", "on"), whole)


@pytest.mark.parametrize(("before", "now", "words"), [("on", "off", "with torch.compile.*without it.*compile: on"),
                                                      ("off", "on", "without torch.compile.*with it.*compile: off")])  # fmt: skip # noqa: E501
def test_another_choice_is_refused_once_decided(train, rounded, before, now, words):
    with pytest.raises(Interrupted):
        train("run", before, stop_at=5)
    with pytest.raises(DmatError, match=f"{words}, or start over with --fresh"):
        train("run", now)
    assert train("run", "auto").compiled == (before == "on")


def test_auto_leaves_a_short_run_as_it_is(train, tmp_path):
    automatic = train("auto", "auto")
    assert not automatic.compiled
    assert same(automatic, train("off", "off"))
    record = json.loads((tmp_path / "auto" / "compiled.json").read_text())
    assert record["reason"].startswith("too short")
    assert (record["compiled"], record["compiled_pass"]) == (False, None)


@pytest.mark.parametrize(("seconds", "compiles"), [(1.0, True), (1.9, True), (1.95, False), (3.0, False)])
def test_auto_compiles_a_long_run_that_becomes_faster(train, rounded, monkeypatch, tmp_path, seconds, compiles):
    times(monkeypatch, 2.0, seconds)
    automatic = train("auto", "auto")
    assert automatic.compiled == compiles
    assert same(automatic, train("chosen", "on" if compiles else "off"))
    record = json.loads((tmp_path / "auto" / "compiled.json").read_text())
    assert (record["eager_pass"], record["compiled_pass"], record["remaining"]) == (2.0, seconds, 14.0)


def test_what_auto_decided_stays(train, rounded, monkeypatch):
    times(monkeypatch, 2.0, 1.0)
    whole = train("whole", "auto")
    with pytest.raises(Interrupted):
        train("parts", "auto", stop_at=6)
    times(monkeypatch, 1.0, 2.0)
    assert same(train("parts", "auto"), whole)


def test_a_model_that_does_not_compile(train, rounded, monkeypatch):
    """auto trains it eagerly, on says what to do."""

    def broken(self, images):
        raise torch._dynamo.exc.Unsupported("a call of print")

    times(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(_Rounded, "forward", broken)
    assert same(train("auto", "auto"), train("off", "off"))
    with pytest.raises(DmatError, match=r"compile is on.*a call of print.*it can compile; set compile: off"):
        train("on", "on")


@pytest.fixture
def compilations(monkeypatch):
    """Traces with torch and runs what it traced eagerly. Holds, for each graph, whether `prepare` compiled it."""
    graphs, preparing, prepare = [], [], compilation.Compilation.prepare

    def prepare_and_say_so(self, *arguments):
        preparing.append(True)
        prepare(self, *arguments)
        preparing.clear()

    def backend(graph, inputs):
        graphs.append(bool(preparing))
        return graph.forward

    monkeypatch.setattr(compilation.Compilation, "prepare", prepare_and_say_so)
    monkeypatch.setattr(compiler, "_BACKEND", backend)
    return graphs


AWP = {"awp_gamma": 0.25, "awp_warmup": 0.5}  # begins two steps after compiling


@pytest.mark.parametrize("loss", LOSSES)
def test_every_pass_of_a_loss_is_one_graph(train, compilations, loss):
    """torch raises an error if a pass needs a second graph. No later step compiles, and no number differs."""
    assert same(train("on", "on", loss), train("off", "off", loss))
    assert compilations
    assert all(compilations)


@pytest.mark.parametrize("changes", [{"loss": "trades"} | AWP, {"loss": "mart"} | AWP, {"network": "vit"},
                                     {"network": "ra_wide_resnet"}])  # fmt: skip
def test_every_pass_is_one_graph(train, compilations, changes):
    assert same(train("on", "on", **changes), train("off", "off", **changes))
    assert compilations
    assert all(compilations)


def test_weight_perturbation_resumes_compiled_bit_for_bit(train, rounded):
    whole = train("whole", "on", **AWP)
    assert not same(whole, train("eager", "off", **AWP))
    assert not same(whole, train("unperturbed", "on"))
    for stop_at in (4, 6):  # before the first perturbed step and after it
        with pytest.raises(Interrupted):
            train(f"parts-{stop_at}", "on", stop_at=stop_at, **AWP)
        assert same(train(f"parts-{stop_at}", "on", **AWP), whole)


def test_the_cache_is_in_the_folder_only_inside_the_block(tmp_path, monkeypatch):
    for before in (None, "elsewhere"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        with compiler.cache(tmp_path):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
