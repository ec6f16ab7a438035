"""Interrupted and resumed equals undisturbed, bit for bit, for both trainings; what a resume refuses."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from dmat import config, devices
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import everything
from dmat.data.shards import open_shards, write_set
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.unet import UNet
from dmat.errors import Diverged, DmatError, Interrupted
from dmat.robust.attacks import Ball
from dmat.robust.losses import Recipe
from dmat.robust.networks import Facts, wide_resnet
from dmat.training import classifier, denoiser
from dmat.training.long_run import LongRun, MetricsLog


@pytest.fixture
def compute():
    return devices.resolve("cpu", "fp32", threads=1)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    images = (rng.integers(0, 60, (48, 8, 8, 1)) + 45 * labels[:, None, None, None]).astype(np.uint8)
    write_set(tmp_path / "set", images, labels, class_names=list("abcd"), facts={})
    return open_shards(tmp_path / "set")


class _StopAt(LongRun):
    """Interrupted by a signal at one step, as a person or a scheduler would."""

    stop_at = -1

    def turn(self, images_seen, state):
        if images_seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().turn(images_seen, state)


def _train_classifier(folder, shards, compute, settings, stop_at=-1):
    torch.manual_seed(3)
    model = wide_resnet(Facts(4, 1, (0.4,), (0.3,)), 10, 1, "silu")
    recipe = Recipe(Ball("linf", 0.1), 2, 0.05, 5.0, 0.1)
    batches = MixedBatches(Mix(48, 0, 16, 0.0), 1, shards, None, None)
    with _StopAt(folder, compute, settings.images, quiet=True) as run:
        run.stop_at = stop_at
        return classifier.train(model, batches, everything(shards), recipe, settings, 1, run, compute)


@pytest.fixture
def robust_settings(tiny_params):
    section = tiny_params["train_robust"] | {"images": 160, "batch": 16, "evaluate_every": 48, "schedule_every": 16,
                                             "augmentation": "crop1", "selection_steps": 2}  # fmt: skip
    return config.TrainRobust.model_validate(section)


@pytest.mark.parametrize("stop_at", [0, 16, 48, 96, 160])
def test_classifier_resumes_bit_for_bit(tmp_path, shards, compute, robust_settings, stop_at):
    whole = _train_classifier(tmp_path / "whole", shards, compute, robust_settings)
    with pytest.raises(Interrupted) as stopped:
        _train_classifier(tmp_path / "parts", shards, compute, robust_settings, stop_at)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    parts = _train_classifier(tmp_path / "parts", shards, compute, robust_settings)
    assert parts.history == whole.history
    assert len(whole.history) == 4
    assert parts.best_images_seen == whole.best_images_seen
    for ours, theirs in ((parts.best, whole.best), (parts.last, whole.last)):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def _train_denoiser(folder, shards, compute, settings, stop_at=-1):
    torch.manual_seed(3)
    model = Preconditioned(UNet(1, 4, 8, (1, 2), 1, settings.dropout), settings.sigma_data)
    with _StopAt(folder, compute, settings.images, quiet=True) as run:
        run.stop_at = stop_at
        return denoiser.train(model, *shards.all(), settings, 1, run, compute)


@pytest.mark.parametrize("stop_at", [0, 32, 48, 160])
def test_denoiser_resumes_bit_for_bit(tmp_path, shards, compute, tiny_params, stop_at):
    section = tiny_params["train_diffusion"] | {"images": 160, "batch": 16, "log_every": 48, "dropout": 0.3}
    settings = config.Generator.model_validate(section)
    weights, history = _train_denoiser(tmp_path / "whole", shards, compute, settings)
    with pytest.raises(Interrupted):
        _train_denoiser(tmp_path / "parts", shards, compute, settings, stop_at)
    again, again_history = _train_denoiser(tmp_path / "parts", shards, compute, settings)
    assert again_history == history
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_another_precision_is_refused(tmp_path, shards, compute, robust_settings):
    with pytest.raises(Interrupted):
        _train_classifier(tmp_path, shards, compute, robust_settings, stop_at=48)
    with pytest.raises(DmatError, match=r"was computed in fp32, this run would use bf16.*precision: fp32.*--fresh"):
        _train_classifier(tmp_path, shards, devices.resolve("cpu", "bf16", threads=1), robust_settings)


def test_a_diverged_run_says_so(tmp_path, shards, compute, robust_settings):
    wild = robust_settings.model_copy(update={"learning_rate": 1e12})
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) after .* images.*lower the learning rate"):
        _train_classifier(tmp_path, shards, compute, wild)


def test_metrics_are_finite_whole_lines_written_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"loss": 1.0, "bad": float("nan")})
    log.write(10, {"loss": 2.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images_seen": 20, "lo')  # killed while writing
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"loss": 3.0})
    log.write(20, {"loss": 4.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"images_seen": 10, "loss": 1.0, "nonfinite": 1}',
        '{"images_seen": 20, "loss": 4.0}',
    ]


def test_requeue_signal_has_its_own_exit_code(tmp_path, compute):
    script = f"""
import sys, time
from pathlib import Path
from dmat import devices
from dmat.errors import Interrupted
from dmat.training.long_run import LongRun
with LongRun(Path({str(tmp_path)!r}), devices.resolve("cpu", "fp32", 1), 10**9, quiet=True) as run:
    print("ready", flush=True)
    try:
        for images in range(10**9):
            run.turn(images, lambda: {{"at": images}})
            time.sleep(0.001)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "checkpoint.dmat").exists()
