"""A training step never reads a value from the device: on a GPU each read waits until all queued work is done.

On any machine: the step runs on fake tensors, which raise where a value is needed. On a GPU: CUDA counts the waits.
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

DATA_SPEC = DataSpec(10, 3, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
VALUE_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.mark.parametrize("read_value", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_fake_tensors_raise_when_a_value_is_read(read_value):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(VALUE_NEEDED):
        read_value(torch.ones(3))


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
    """Attack, loss, gradients, clipping, optimiser and EMA: all parts of a step that use the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for make_model in (
            lambda: wide_resnet(DATA_SPEC, 10, 1, "silu"), lambda: preact_resnet(DATA_SPEC, 18, 0, "relu")
        ):  # fmt: skip
            model, ema_model = make_model(), make_model()
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            means = losses.ClassMeans(10, 1.0, torch.device("cpu"))
            images, targets, start = torch.rand(4, 3, 32, 32), torch.randint(10, (4,)), torch.zeros(4, 3, 32, 32)
            loss_settings = LossSettings(Ball(norm, 8 / 255), 2, 2 / 255, 5.0, 0.1, 3.0)
            with modes.mode(model, training=True), torch.autocast("cpu", torch.bfloat16):
                loss_parts = LOSSES[loss](model, images, targets, start, loss_settings, means.means)
            if loss_parts.clean_logits is not None:
                means.add(means.batch_sums(loss_parts.clean_logits, targets))
            loss_parts.total.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            ema.update(ema_model, model, 0.995)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_training_steps_do_not_synchronise_the_gpu(tmp_path, tiny_params, augmentation):
    """A longer run synchronises as often as a shorter one, so its steps do not synchronise."""
    labels = np.arange(64) % 10
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    write_set(tmp_path / "set", images, labels, class_names=list("abcdefghij"), metadata={})
    shards = open_shards(tmp_path / "set")
    compute = devices.resolve("cuda", "bf16", threads=1)

    def count_synchronisations(steps):
        section = tiny_params["train_robust"] | {"images_seen": 16 * steps, "batch": 16, "evaluate_every": 10**6,
                                                 "augmentation": augmentation, "clip_gradient": 1.0}  # fmt: skip
        settings = config.TrainRobust.model_validate(section)
        loss_settings = LossSettings(Ball("linf", 8 / 255), 2, 2 / 255, 5.0, 0.1, 3.0)
        batches = MixedBatches(Mix(64, 0, 16, 0.0), 1, shards, None)
        model = wide_resnet(DATA_SPEC, 10, 1, "silu")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with (
                warnings.catch_warnings(record=True) as caught,
                LongRun(tmp_path / str(steps), compute, 16 * steps, quiet=True) as run,
            ):
                warnings.simplefilter("always")
                classifier.train(model, 10, batches, load_all(shards), loss_settings, settings, 1, run, compute)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchron" in str(warning.message) for warning in caught)

    count_synchronisations(5)  # synchronisations of the first use of each kernel
    assert count_synchronisations(40) == count_synchronisations(10)
