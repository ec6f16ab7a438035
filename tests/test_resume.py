"""Both trainings, interrupted and resumed, equal an uninterrupted run, bit for bit; what a resume refuses."""

import dataclasses
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from dmat import config, devices
from dmat.data.augmentation import AUGMENTATIONS
from dmat.data.batches import MixedBatches
from dmat.data.mixing import BatchOrder, Mix
from dmat.data.pixels import load_all
from dmat.data.selections import SelectedImages
from dmat.data.shards import open_shards, write_set
from dmat.diffusion import augmentation_pipe
from dmat.diffusion.formulations import EDM, Preconditioned
from dmat.diffusion.unet import UNet
from dmat.errors import Diverged, DmatError, Interrupted, UnfitError
from dmat.processes import World
from dmat.robust.attacks import Ball
from dmat.robust.losses import LOSSES, WITH_TWO_VIEWS, LossSettings
from dmat.robust.networks import DataSpec, wide_resnet
from dmat.training import classifier, denoiser, ema
from dmat.training.long_run import LongRun, MetricsLog
from tests import forked


@pytest.fixture
def compute():
    return devices.resolve("cpu", "fp32", threads=1)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 4
    images = (rng.integers(0, 60, (48, 8, 8, 1)) + 45 * labels[:, None, None, None]).astype(np.uint8)
    write_set(tmp_path / "set", images, labels, class_names=list("abcd"), metadata={})
    return open_shards(tmp_path / "set")


class _StopAt(LongRun):
    """A run that gets a signal at one step, as from a person or a scheduler."""

    stop_at = -1

    def checkpoint_if_due(self, images_seen, state, stop_requested=None):
        if images_seen == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().checkpoint_if_due(images_seen, state, stop_requested)


def _train_classifier(folder, shards, compute, settings, stop_at=-1, mix=None, spoil=None):
    torch.manual_seed(3)
    model = wide_resnet(DataSpec(4, 1, (0.4,), (0.3,)), 10, 1, "silu")
    loss_settings = LossSettings(Ball("linf", 0.1), 2, 0.05, 5.0, 0.1, 3.0)
    mix = mix or Mix(48, 0, 16, 0.0)
    generated = SelectedImages(shards, np.arange(0, 48, 2), None) if mix.generated else None
    batches = (spoil or MixedBatches)(mix, 1, shards, generated)
    with _StopAt(folder, compute, settings.images_seen, quiet=True) as run:
        run.stop_at = stop_at
        return classifier.train(model, 4, batches, load_all(shards), loss_settings, settings, 1, run, compute)


@pytest.fixture
def robust_settings(tiny_params):
    section = tiny_params["train_robust"] | {"images_seen": 160, "batch": 16, "evaluate_every": 48,
                                             "schedule_every": 16, "augmentation": "crop1", "selection_steps": 2}  # fmt: skip # noqa: E501
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
    for actual, expected in ((parts.best, whole.best), (parts.last, whole.last)):
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


TWO_VIEWS = Mix(48, 0, 16, 0.0, copies=2)
# Each option that affects a step, once: (settings, mix)
STEP_VARIANTS = {
    **{f"loss {name}": ({"loss": name}, TWO_VIEWS if name in WITH_TWO_VIEWS else None) for name in LOSSES},
    **{f"schedule {name}": ({"schedule": name}, None) for name in ("cosine", "step")},
    "perturbed weights": ({"awp_gamma": 0.05, "awp_warmup": 0.3}, None),
    "perturbed weights with pgd_at": ({"awp_gamma": 0.05, "loss": "pgd_at"}, None),
    "perturbed weights with ikl": ({"awp_gamma": 0.05, "loss": "ikl"}, None),
    **{f"augmentation {name}": ({"augmentation": name}, None) for name in AUGMENTATIONS},
    "cutmix": ({"cutmix": 1.0}, None),
    "cutmix with ikl": ({"cutmix": 1.0, "loss": "ikl"}, None),
    "cutmix copies": ({"cutmix": 1.0, "cutmix_copies": 4}, Mix(48, 0, 16, 0.0, copies=4)),
    "mixed": ({}, Mix(48, 24, 16, 0.75)),
    "mixed with replacement": ({}, Mix(48, 24, 16, 0.75, generated_sampling="with_replacement")),
    "mixed and reshuffled": ({}, Mix(48, 24, 16, 0.75, reshuffle_steps=3)),
    "rolling back": ({"on_divergence": "roll_back"}, None),
}


@pytest.mark.parametrize("variant", STEP_VARIANTS)
def test_every_variant_of_a_step_resumes_bit_for_bit(tmp_path, shards, compute, robust_settings, variant):
    """Interrupted inside an epoch of 48 images, after 7 steps."""
    changes, mix = STEP_VARIANTS[variant]
    settings = robust_settings.model_copy(update={"schedule_every": 48, **changes})
    whole = _train_classifier(tmp_path / "whole", shards, compute, settings, mix=mix)
    with pytest.raises(Interrupted):
        _train_classifier(tmp_path / "parts", shards, compute, settings, 112, mix)
    parts = _train_classifier(tmp_path / "parts", shards, compute, settings, mix=mix)
    assert parts.history == whole.history
    assert all(torch.equal(parts.last[name], whole.last[name]) for name in whole.last)


def test_the_variants_differ(tmp_path, shards, compute, robust_settings):
    """Guards the test above, which an option without effect would pass."""
    ends = {}
    for variant in (
        "loss trades",
        "loss ikl",
        "loss pgd_at",
        "loss mart",
        "loss lse",
        "loss consistency",
        "schedule cosine",
        "schedule step",
        "perturbed weights",
        "perturbed weights with pgd_at",
        "perturbed weights with ikl",
        "cutmix",
        "cutmix with ikl",
        "cutmix copies",
        "mixed",
        "mixed with replacement",
        "mixed and reshuffled",
    ):
        changes, mix = STEP_VARIANTS[variant]
        settings = robust_settings.model_copy(update={"schedule_every": 48, "images_seen": 96, **changes})
        outcome = _train_classifier(tmp_path / variant.replace(" ", "-"), shards, compute, settings, mix=mix)
        ends[variant] = outcome.last["logits.weight"].flatten()[:8].tolist()
    assert len({tuple(values) for values in ends.values()}) == len(ends)


def test_two_views_of_an_image_stay_in_one_process(tmp_path, shards, compute, robust_settings):
    settings = robust_settings.model_copy(update={"loss": "consistency", "batch": 18})
    with pytest.raises(UnfitError, match="a batch of 18 images in 2 processes splits two views of an image"):
        _train_classifier(tmp_path, shards, dataclasses.replace(compute, world=World(0, 2)), settings)


class _Spoiled(MixedBatches):
    """One step has a NaN image, the first `times` times that it is read."""

    bad_step, times = 7, 1

    def at(self, step, rows=None):
        images, labels = super().at(step, rows)
        if step == self.bad_step and type(self).times > 0:
            type(self).times -= 1
            images = images.float()
            images[3] = torch.nan
        return images, labels


@pytest.fixture
def spoiled():
    return type("Spoiled", (_Spoiled,), {})


def test_a_nan_loss_stops_the_run_and_names_the_images(tmp_path, shards, compute, robust_settings, spoiled):
    mix = Mix(48, 24, 16, 0.75)
    with pytest.raises(Diverged, match=r"the loss is nan after 112 images; .*diverged.json names the images"):
        _train_classifier(tmp_path, shards, compute, robust_settings, mix=mix, spoil=spoiled)
    record = json.loads((tmp_path / "diverged.json").read_text())
    real, generated = BatchOrder(mix, 1).at(7)
    assert (record["step"], record["loss"]) == (7, "nan")
    assert record["real"] == real.tolist()
    assert record["generated"] == (2 * generated).tolist()  # selected: every second image
    assert not (tmp_path / "checkpoint.dmat").exists()  # no spoiled state was saved


def test_no_checkpoint_holds_a_nan_loss(tmp_path, shards, compute, robust_settings, spoiled):
    """The stop is requested after the bad step and before the next check of the loss."""
    settings = robust_settings.model_copy(update={"evaluate_every": 160})
    with pytest.raises(Diverged):
        _train_classifier(tmp_path, shards, compute, settings, stop_at=128, spoil=spoiled)
    assert not (tmp_path / "checkpoint.dmat").exists()


def test_it_rolls_back_once_with_half_the_rate(tmp_path, shards, compute, robust_settings, spoiled):
    settings = robust_settings.model_copy(update={"on_divergence": "roll_back"})
    outcome = _train_classifier(tmp_path / "once", shards, compute, settings, spoil=spoiled)
    assert [record["images_seen"] for record in outcome.history] == [48, 96, 144, 160]
    calm = _train_classifier(tmp_path / "calm", shards, compute, settings)
    rates, calm_rates = (
        [json.loads(line)["learning_rate"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("once", "calm")
    )
    assert rates[:2] == calm_rates[:2]
    assert rates[2:] == pytest.approx([rate / 2 for rate in calm_rates[2:]])
    assert outcome.history[:2] == calm.history[:2]
    assert outcome.history[2:] != calm.history[2:]
    assert all(torch.isfinite(values).all() for values in outcome.last.values())
    spoiled.times = 2
    with pytest.raises(Diverged, match="the loss is nan"):
        _train_classifier(tmp_path / "twice", shards, compute, settings, spoil=spoiled)


def test_it_rolls_back_the_same_way_after_an_interruption(tmp_path, shards, compute, robust_settings, spoiled):
    settings = robust_settings.model_copy(update={"on_divergence": "roll_back"})
    whole = _train_classifier(tmp_path / "whole", shards, compute, settings, spoil=spoiled)
    spoiled.times = 1
    with pytest.raises(Interrupted):  # at 144 for the first time: after the roll-back
        _train_classifier(tmp_path / "parts", shards, compute, settings, stop_at=144, spoil=spoiled)
    parts = _train_classifier(tmp_path / "parts", shards, compute, settings, spoil=spoiled)
    assert parts.history == whole.history
    assert all(torch.equal(parts.last[name], whole.last[name]) for name in whole.last)


def test_patience_ends_a_run_after_evaluations_without_a_new_best(tmp_path, shards, compute, robust_settings):
    often = robust_settings.model_copy(update={"images_seen": 320, "evaluate_every": 16, "learning_rate": 0.5})
    scores = [r["validation_robust"] for r in _train_classifier(tmp_path / "long", shards, compute, often).history]
    since, best, expected = 0, -1.0, len(scores)
    for k, score in enumerate(scores):
        since, best = (0, score) if score >= best else (since + 1, best)
        if since == 3:
            expected = k + 1
            break
    assert expected < len(scores) == 20  # else this shows nothing
    short = _train_classifier(tmp_path / "short", shards, compute, often.model_copy(update={"patience": 3}))
    assert [record["validation_robust"] for record in short.history] == scores[:expected]
    assert short.best_accuracy == best


def _train_denoiser(folder, shards, compute, settings, stop_at=-1, judge=None):
    torch.manual_seed(3)
    augment_dim = augmentation_pipe.LABELS if settings.augment_probability else 0
    network = UNet(1, 4, 8, (1, 2), 1, settings.network.dropout, augment_dim)
    model = Preconditioned(network, EDM(settings.sigma_data))
    with _StopAt(folder, compute, settings.images_seen, quiet=True) as run:
        run.stop_at = stop_at
        return denoiser.train(model, *shards.all(), settings, 1, run, compute, judge)


def _denoiser_settings(tiny_params, **changes):
    section = tiny_params["train_diffusion"] | {"images_seen": 160, "batch": 16, "log_every": 48, **changes}
    section["network"] = section["network"] | {"dropout": changes.get("dropout", 0.3)}
    section.pop("dropout", None)
    return config.DenoiserTraining.model_validate(section)


# Each option that affects a step of a denoiser, once.
DENOISER_VARIANTS = {
    "plain": {},
    "without labels": {"conditional": False},
    "augmented": {"augment_probability": 0.5},
    "in parts": {"accumulation_steps": 4},
    "with a constant rate": {"learning_rate_decay": "none"},
    "without dropout": {"dropout": 0.0},
}


@pytest.mark.parametrize(("variant", "stop_at"), [
    *(("plain", step) for step in (0, 48, 160)), *((variant, 80) for variant in DENOISER_VARIANTS)
])  # fmt: skip
def test_denoiser_resumes_bit_for_bit(tmp_path, shards, compute, tiny_params, variant, stop_at):
    settings = _denoiser_settings(tiny_params, **DENOISER_VARIANTS[variant])
    whole = _train_denoiser(tmp_path / "whole", shards, compute, settings)
    with pytest.raises(Interrupted):
        _train_denoiser(tmp_path / "parts", shards, compute, settings, stop_at)
    resumed = _train_denoiser(tmp_path / "parts", shards, compute, settings)
    assert resumed.history == whole.history
    assert all(torch.equal(resumed.last[name], whole.last[name]) for name in whole.last)
    assert resumed.best is resumed.last


def test_the_variants_of_a_denoiser_differ(tmp_path, shards, compute, tiny_params):
    """Guards the test above, which an option without effect would pass."""
    ends = {
        variant: _train_denoiser(
            tmp_path / variant.replace(" ", "-"), shards, compute,
            _denoiser_settings(tiny_params, images_seen=64, **changes),
        ).last["network.first.weight"]
        for variant, changes in DENOISER_VARIANTS.items()
    }  # fmt: skip
    assert len({tuple(values.flatten().tolist()) for values in ends.values()}) == len(ends)


@pytest.mark.parametrize("augment_probability", [0.0, 0.5])
def test_parts_of_a_batch_compute_what_the_whole_computes(tmp_path, shards, compute, tiny_params, augment_probability):
    """Without dropout, whose masks are drawn part by part. One step is compared, as training amplifies rounding."""
    ends = {}
    for parts in (1, 2, 8):
        settings = _denoiser_settings(
            tiny_params, dropout=0.0, images_seen=16, learning_rate_decay="none", ramp_up=0.5, accumulation_steps=parts,
            augment_probability=augment_probability,
        )  # fmt: skip
        gradients = {}
        real_step = torch.optim.Adam.step

        def record(optimiser, gradients=gradients, real_step=real_step):
            gradients["all"] = [p.grad.clone() for p in optimiser.param_groups[0]["params"]]
            return real_step(optimiser)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", record)
            outcome = _train_denoiser(tmp_path / str(parts), shards, compute, settings)
        ends[parts] = gradients["all"], outcome.history[0]["loss"]
    assert sum(g.abs().sum() for g in ends[1][0]) > 0
    for parts in (2, 8):
        assert ends[parts][1] == pytest.approx(ends[1][1], rel=1e-5)
        for gradient, expected in zip(ends[parts][0], ends[1][0], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_a_batch_that_does_not_divide_into_parts_is_refused(tmp_path, shards, compute, tiny_params):
    settings = _denoiser_settings(tiny_params, accumulation_steps=3)
    with pytest.raises(DmatError, match=r"batch of 16 .* into 3 parts, 3 in each of 1 processes; expected a multiple"):
        _train_denoiser(tmp_path, shards, compute, settings)


def test_no_checkpoint_of_a_denoiser_holds_a_nan_loss(tmp_path, shards, compute, tiny_params, monkeypatch):
    """The loss is looked at every 48 images; a checkpoint is due before that."""
    settings = _denoiser_settings(tiny_params, log_every=160)
    good = _train_denoiser(tmp_path / "good", shards, compute, settings)
    real_loss = denoiser.formulations.loss
    calls = []

    def spoiled(*arguments):
        calls.append(None)
        return real_loss(*arguments) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(denoiser.formulations, "loss", spoiled)
    with pytest.raises(Interrupted):
        _train_denoiser(tmp_path / "run", shards, compute, settings, stop_at=80)
    checkpoint = (tmp_path / "run/checkpoint.dmat").read_bytes()
    calls[:] = [None] * 5
    with pytest.raises(Diverged):
        _train_denoiser(tmp_path / "run", shards, compute, settings, stop_at=112)
    assert (tmp_path / "run/checkpoint.dmat").read_bytes() == checkpoint
    resumed = _train_denoiser(tmp_path / "run", shards, compute, settings)
    assert all(torch.equal(resumed.last[name], good.last[name]) for name in good.last)


class _Judge:
    """A judge that likes the second snapshot best, and remembers the weights that it saw."""

    def __init__(self, distances=(3.0, 1.0, float("nan"), 2.0)):
        self.distances, self.seen = distances, []

    selects = "distance"

    def measure(self, model):
        assert not model.training
        assert not torch.is_grad_enabled()
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        weight = self.seen[-1]["network.first.weight"].sum().item()  # a measure that shows which weights were judged
        return {self.selects: self.distances[len(self.seen) - 1], "weight": weight}


def test_the_best_snapshot_and_the_last_weights_are_kept(tmp_path, shards, compute, tiny_params):
    settings = _denoiser_settings(tiny_params, snapshot_every=48)  # after 48, 96 and 144 images, and at the end
    judge = _Judge()
    outcome = _train_denoiser(tmp_path / "judged", shards, compute, settings, judge=judge)
    assert [record["images_seen"] for record in outcome.snapshots] == [48, 96, 144, 160]
    assert outcome.best_snapshot == outcome.snapshots[1]
    assert all(torch.equal(outcome.best[name], judge.seen[1][name]) for name in outcome.best)
    assert all(torch.equal(outcome.last[name], judge.seen[3][name]) for name in outcome.last)
    alone = _train_denoiser(tmp_path / "alone", shards, compute, settings)
    assert all(torch.equal(outcome.last[name], alone.last[name]) for name in alone.last)
    assert outcome.history == alone.history
    lines = [json.loads(line) for line in (tmp_path / "judged/metrics.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in lines] == [48, 96, 144, 160]
    assert all({"loss", "weight"} <= set(line) for line in lines)


@pytest.mark.parametrize("stop_at", [48, 112, 160])
def test_judged_snapshots_survive_an_interruption(tmp_path, shards, compute, tiny_params, stop_at):
    settings = _denoiser_settings(tiny_params, snapshot_every=48)
    whole = _train_denoiser(tmp_path / "whole", shards, compute, settings, judge=_Judge((1.0, 3.0, 2.0, 4.0)))
    judge = _Judge((1.0, 3.0, 2.0, 4.0))
    with pytest.raises(Interrupted):
        _train_denoiser(tmp_path / "parts", shards, compute, settings, stop_at, judge)
    resumed = _train_denoiser(tmp_path / "parts", shards, compute, settings, judge=judge)
    assert len(judge.seen) == 4  # none twice
    assert resumed.snapshots == whole.snapshots
    for actual, expected in ((resumed.best, whole.best), (resumed.last, whole.last)):
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_denoiser_average_is_that_of_karras_et_al(tmp_path, shards, compute, tiny_params, monkeypatch):
    """The half-life is 5 % of the images seen before each step, up to its full value: the first average is a copy."""
    live_parameters, update = [], ema.update

    def record(ema_model, live, decay):
        live_parameters.append([p.detach().double().clone() for p in live.parameters()])
        update(ema_model, live, decay)

    monkeypatch.setattr(ema, "update", record)
    section = tiny_params["train_diffusion"] | {"images_seen": 160, "batch": 16, "ema_half_life": 5.0}
    settings = config.DenoiserTraining.model_validate(section)
    weights = _train_denoiser(tmp_path, shards, compute, settings).last
    average = live_parameters[0]
    for step, live in enumerate(live_parameters[1:], start=1):
        half_life = min(5.0, 0.05 * 16 * step)
        decay = 0.5 ** (16 / half_life)
        average = [decay * a + (1 - decay) * p for a, p in zip(average, live, strict=True)]
    assert len(live_parameters) == 10
    assert half_life == 5  # both parts of the minimum were used
    model = Preconditioned(UNet(1, 4, 8, (1, 2), 1, settings.network.dropout), EDM(settings.sigma_data))
    for (name, _), expected in zip(model.named_parameters(), average, strict=True):
        torch.testing.assert_close(weights[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_learning_rate_of_a_run_changes_after_whole_batches(tmp_path, shards, compute, robust_settings):
    """40 images in batches of 16 are an epoch of 3 steps; torch's scheduler is stepped once for each."""
    changes = {"batch": 16, "schedule_every": 40, "images_seen": 41 * 48, "evaluate_every": 48, "selection_steps": 0}
    settings = robust_settings.model_copy(update={**changes, "loss": "standard", "augmentation": "none"})
    history = _train_classifier(tmp_path, shards, compute, settings).history
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=41, pct_start=settings.warmup
    )
    expected = []
    for _ in range(41):
        expected.append((optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["momentum"]))
        optimiser.step()
        if len(expected) < 41:
            scheduler.step()
    actual = [(record["learning_rate"], record["momentum"]) for record in history]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_another_precision_is_refused(tmp_path, shards, compute, robust_settings):
    with pytest.raises(Interrupted):
        _train_classifier(tmp_path, shards, compute, robust_settings, stop_at=48)
    with pytest.raises(DmatError, match=r"was computed in fp32, this run would use bf16.*precision: fp32.*--fresh"):
        _train_classifier(tmp_path, shards, devices.resolve("cpu", "bf16", threads=1), robust_settings)


def test_a_diverged_run_says_so(tmp_path, shards, compute, robust_settings):
    wild = robust_settings.model_copy(update={"learning_rate": 1e12})
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) after .* images.*lower the learning rate"):
        _train_classifier(tmp_path, shards, compute, wild)


def test_metrics_are_finite_complete_lines_written_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"loss": 1.0, "bad": float("nan")})
    log.write(10, {"loss": 2.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"images_seen": 20, "lo')  # killed while writing
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(10, {"loss": 3.0})
    log.write(20, {"loss": 4.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"images_seen": 10, "loss": 1.0, "nonfinite": 1}',
        '{"images_seen": 20, "loss": 4.0}',
    ]


def _work_until_stopped(folder):
    with LongRun(folder, devices.resolve("cpu", "fp32", threads=1), 10**9, quiet=True) as run:
        (folder / "begun").touch()
        try:
            for images in range(10**9):
                run.checkpoint_if_due(images, lambda: {"at": images})  # noqa: B023 - called at once
                time.sleep(0.001)
        except Interrupted as stop:
            sys.exit(stop.exit_code)


def test_requeue_signal_has_its_own_exit_code(tmp_path):
    process = forked._context.Process(target=_work_until_stopped, args=(tmp_path,))
    process.start()
    forked.until((tmp_path / "begun").exists)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(forked.LIMIT)
    assert process.exitcode == 75
    assert (tmp_path / "checkpoint.dmat").exists()
