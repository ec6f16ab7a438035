"""A training step never asks the device for a value: on a GPU each such question waits until everything is computed.

On any machine: the step runs on tensors without content, and whatever needs a content raises. On a GPU: CUDA counts.
Run alone: pytest tests/test_no_waiting.py
"""

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F

from dmat import config, devices, modes
from dmat.data.augmentation import AUGMENTATIONS, cutmix
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import load_all
from dmat.data.shards import open_shards, write_set
from dmat.robust import losses
from dmat.robust.attacks import Ball
from dmat.robust.losses import LOSSES, LossSettings
from dmat.robust.networks import DataSpec, preact_resnet, wide_resnet
from dmat.training import classifier, ema
from dmat.training.long_run import LongRun

FACTS = DataSpec(10, 3, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
VALUE_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_tensors_without_content_notice_a_question(ask):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(VALUE_NEEDED):
        ask(torch.ones(3))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_need_no_value(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.rand(8, 3, 32, 32)
        for seed in range(4):
            assert AUGMENTATIONS[name](images, np.random.default_rng(seed)).shape == images.shape


def test_cutmix_needs_no_value():
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, targets = torch.rand(8, 3, 32, 32), F.one_hot(torch.arange(8), 10).float()
        for seed in range(4):
            mixed, soft = cutmix(images, targets, np.random.default_rng(seed), 1.0)
            assert (mixed.shape, soft.shape) == (images.shape, targets.shape)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_needs_no_value(loss, norm):
    """Attack, loss, gradients, clipping, optimiser and average: everything of a step that touches the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for new in (lambda: wide_resnet(FACTS, 10, 1, "silu"), lambda: preact_resnet(FACTS, 18, 0, "relu")):
            model, ema_model = new(), new()
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            means = losses.ClassMeans(10, 1.0, torch.device("cpu"))
            images, targets, start = torch.rand(4, 3, 32, 32), torch.randint(10, (4,)), torch.zeros(4, 3, 32, 32)
            recipe = LossSettings(Ball(norm, 8 / 255), 2, 2 / 255, 5.0, 0.1, 3.0)
            with modes.mode(model, training=True), torch.autocast("cpu", torch.bfloat16):
                found = LOSSES[loss](model, images, targets, start, recipe, means.means)
            if found.clean_logits is not None:
                means.add(means.sums_of(found.clean_logits, targets))
            found.total.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            ema.update(ema_model, model, 0.995)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_gpu_is_not_waited_for(tmp_path, tiny_params, augmentation):
    """What a longer run waits for more often than a shorter one, it waits for in its steps."""
    labels = np.arange(64) % 10
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    write_set(tmp_path / "set", images, labels, class_names=list("abcdefghij"), metadata={})
    shards = open_shards(tmp_path / "set")
    compute = devices.resolve("cuda", "bf16", threads=1)

    def waits(steps):
        section = tiny_params["train_robust"] | {"images_seen": 16 * steps, "batch": 16, "evaluate_every": 10**6,
                                                 "augmentation": augmentation, "clip_gradient": 1.0}  # fmt: skip
        settings = config.TrainRobust.model_validate(section)
        recipe = LossSettings(Ball("linf", 8 / 255), 2, 2 / 255, 5.0, 0.1, 3.0)
        batches = MixedBatches(Mix(64, 0, 16, 0.0), 1, shards, None, None)
        model = wide_resnet(FACTS, 10, 1, "silu")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with (
                warnings.catch_warnings(record=True) as said,
                LongRun(tmp_path / str(steps), compute, 16 * steps, quiet=True) as run,
            ):
                warnings.simplefilter("always")
                classifier.train(model, 10, batches, load_all(shards), recipe, settings, 1, run, compute)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(warning.message) for warning in said)

    waits(5)  # what the first use of a kernel waits for
    assert waits(40) == waits(10)
