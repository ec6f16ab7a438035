"""The parts of a long run: schedules, averages, checkpoints, weight files, named randomness, modes.

Oracles: torch's OneCycleLR, the formulas of the papers written out, round trips, and the exact text of every refusal.
Run alone: pytest tests/test_training_parts.py
"""

import hashlib
import json
import math
import os
import pickle
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from dmat import config, devices, files, modes, seeds
from dmat.diffusion.formulations import EDM
from dmat.diffusion.networks import DenoiserSpec
from dmat.errors import DmatError, Interrupted
from dmat.models import denoisers
from dmat.training import checkpoints, ema, schedules, weights
from dmat.training.interruption import Interruption
from dmat.training.prefetcher import Prefetcher
from tests import forked

# --- schedules


def torch_one_cycle(steps, peak, **settings):
    """Learning rate and momentum of every step, from torch."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, **settings)
    values = []
    for _ in range(steps):
        values.append((optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["momentum"]))
        optimiser.step()
        if len(values) < steps:
            scheduler.step()
    return values


@pytest.mark.parametrize("steps", [41, 60, 80, 100, 400, 1601, 2000])
def test_one_cycle_equals_torch_at_every_step(steps):
    expected = torch_one_cycle(steps, 0.2, pct_start=0.025)
    actual = [schedules.one_cycle(step, steps, 0.2) for step in range(steps)]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("warmup", "start", "end"), [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0), (1.0, 25.0, 1e4)])
def test_one_cycle_takes_other_numbers(warmup, start, end):
    expected = torch_one_cycle(
        50, 0.4, pct_start=warmup, div_factor=start, final_div_factor=end, base_momentum=0.8, max_momentum=0.9
    )
    actual = [
        schedules.one_cycle(step, 50, 0.4, warmup=warmup, start_divisor=start, end_divisor=end, momentum=(0.8, 0.9))
        for step in range(50)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


def test_one_cycle_works_where_torch_divides_by_zero():
    """40 steps with a warmup of 0.025 have one warmup step. Our schedule starts at the peak and falls from there."""
    with pytest.raises(ZeroDivisionError):
        torch_one_cycle(40, 0.2, pct_start=0.025)
    actual = [schedules.one_cycle(step, 40, 0.2) for step in range(40)]
    assert actual[0] == pytest.approx((0.2, 0.85))
    assert actual[-1] == pytest.approx((0.2 / 25 / 1e4, 0.95))
    for step, (rate, momentum) in enumerate(actual):
        cosine = (1 + math.cos(math.pi * step / 39)) / 2
        assert rate == pytest.approx(8e-7 + (0.2 - 8e-7) * cosine)
        assert momentum == pytest.approx(0.95 - 0.1 * cosine)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 39])
def test_one_cycle_of_a_short_run_starts_at_the_peak_and_ends_at_the_end(steps):
    rates = [schedules.one_cycle(step, steps, 0.2)[0] for step in range(steps)]
    assert rates[0] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    if steps > 1:
        assert rates[-1] == pytest.approx(8e-7)


def test_one_cycle_without_cycled_momentum_keeps_nine_tenths():
    momenta = {schedules.one_cycle(step, 100, 0.2, momentum=(0.9, 0.9))[1] for step in range(100)}
    assert momenta == {0.9}
    rates = [schedules.one_cycle(step, 100, 0.2, momentum=(0.9, 0.9))[0] for step in range(100)]
    assert rates == [schedules.one_cycle(step, 100, 0.2)[0] for step in range(100)]


@pytest.mark.parametrize(("batch", "epoch_steps"), [(512, 98), (2048, 25), (500, 100), (50_000, 1), (65_536, 1)])
def test_an_epoch_is_rounded_up_to_whole_batches(batch, epoch_steps):
    """Wang et al.'s code: the scheduler steps once after each ceil(50,000 / batch) batches, for 60 epochs."""
    expected = torch_one_cycle(60, 0.2, pct_start=0.025)
    steps = 60 * math.ceil(50_000 / batch)
    steps_per_epoch, count = schedules.epochs(50_000, batch, steps)
    assert (steps_per_epoch, count) == (epoch_steps, 60)
    for step in range(steps):
        rate_and_momentum = schedules.one_cycle(step // steps_per_epoch, count, 0.2)
        assert rate_and_momentum == pytest.approx(expected[step // math.ceil(50_000 / batch)])


def torch_rates(scheduler_of, steps, peak):
    """Learning rate of every step of a scheduler of torch."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, rates = scheduler_of(optimiser), []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


def test_the_published_cyclic_schedule_is_one_cycle_at_every_batch():
    """OneCycleLR with pct_start 0.25, stepped after each of 98 batches of 3 epochs."""
    expected = torch_one_cycle(3 * 98, 0.2, pct_start=0.25)
    assert schedules.epochs(512, 512, 3 * 98) == (1, 3 * 98)
    actual = [schedules.one_cycle(step, 3 * 98, 0.2, warmup=0.25) for step in range(3 * 98)]
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 40, 400])
def test_half_cosine_equals_torch(steps):
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps), steps, 0.2)
    actual = [schedules.half_cosine(step, steps, 0.2) for step in range(steps)]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "milestones", "epochs"), [(200, (0.5, 0.75), [100, 150]), (110, (100 / 110, 105 / 110), [100, 105])]
)
def test_step_decay_equals_torch(steps, milestones, epochs):
    """Rice et al. 2020's epochs, and those of Wang et al.'s code in a run of 110."""
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, epochs, 0.1), steps, 0.2)
    actual = [schedules.step_decay(step, steps, 0.2, milestones, 0.1) for step in range(steps)]
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    assert len(set(actual)) == 3


def test_an_epoch_shorter_than_a_batch_is_one_batch():
    assert schedules.epochs(1, 128, 10) == (1, 10)
    assert schedules.epochs(256, 128, 9) == (2, 5)  # the last epoch is cut short


def test_ramp_then_cosine_rises_in_a_line_and_falls_in_half_a_cosine():
    for progress, expected in [(0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.5), (1, 0), (0.325, (1 + math.sqrt(0.5)) / 2)]:
        assert schedules.ramp_then_cosine(progress, 3.0, 0.1) == pytest.approx(3 * expected, abs=1e-12)
    # the two halves meet, and without a ramp the start is the peak
    assert schedules.ramp_then_cosine(0.1 - 1e-9, 3.0, 0.1) == pytest.approx(3)
    assert schedules.ramp_then_cosine(0, 3.0, 0.0) == 3


# --- averages


@pytest.mark.parametrize("steps", [39, 40, 200, 1000])
def test_classifier_decay_copies_first_and_then_forgets_ever_slower(steps):
    """decay = 0 during the first 2.5 % of the steps, then min(tau, (1 + k) / (10 + k)) with k steps since then."""
    first = math.ceil(0.025 * steps) - 1  # the step that is number `first + 1` of those made
    for step in range(steps):
        k = step + 1 - 0.025 * steps
        expected = 0.0 if k < 0 else min(0.995, (1 + k) / (10 + k))
        assert ema.warmup_decay(step, steps, 0.995) == pytest.approx(expected)
    if steps % 40 == 0:
        assert ema.warmup_decay(first, steps, 0.995) == pytest.approx(0.1)  # the first averaged step
    if first:
        assert ema.warmup_decay(first - 1, steps, 0.995) == 0
    assert ema.warmup_decay(99_999, 100_000, 0.995) == 0.995
    assert ema.warmup_decay(30, 100, 0.995, warmup=0.5) == 0


@pytest.mark.parametrize("batch", [64, 256])
def test_denoiser_half_life_is_the_images_after_which_half_is_forgotten(batch):
    half_life, seen, remaining = 100 * 256, 10_000_000, 1.0
    for step in range(half_life // batch):
        remaining *= ema.half_life_decay(seen + step * batch, batch, half_life)
    assert remaining == pytest.approx(0.5)


def test_denoiser_half_life_grows_with_the_images_seen():
    """At most 5 % of the images seen before the step: the first averages forget fast."""
    assert ema.half_life_decay(2000, 50, 1e9) == pytest.approx(0.5 ** (50 / 100))
    assert ema.half_life_decay(2000, 50, 1e9, ramp=0.5) == pytest.approx(0.5 ** (50 / 1000))
    assert ema.half_life_decay(0, 50, 1e9) == 0
    assert ema.half_life_decay(10**9, 50, 1000) == pytest.approx(0.5 ** (50 / 1000))


def two_models():
    torch.manual_seed(1)
    return [nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(2)) for _ in range(2)]


def ready_models():
    models = two_models()
    for model in models:
        model(torch.randn(4, 1, 5, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    return models


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.995, 1.0])
def test_update_mixes_parameters_and_nothing_else(decay):
    ema_model, live = ready_models()
    ema_before, live_before = ([p.detach().clone() for p in model.parameters()] for model in (ema_model, live))
    buffers = [b.clone() for b in ema_model.buffers()]
    ema.update(ema_model, live, decay)
    for parameter, a, b in zip(ema_model.parameters(), ema_before, live_before, strict=True):
        torch.testing.assert_close(parameter.detach(), decay * a + (1 - decay) * b)
        assert parameter.grad is None
        assert parameter.requires_grad
    assert all(torch.equal(p, b) for p, b in zip(live.parameters(), live_before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ema_model.buffers(), buffers, strict=True))
    if decay == 0:  # a plain copy, bit for bit
        assert all(torch.equal(a, b) for a, b in zip(ema_model.parameters(), live_before, strict=True))


def test_buffers_are_copied_and_not_shared():
    ema_model, live = ready_models()
    parameters, expected = ([t.detach().clone() for t in of()] for of in (ema_model.parameters, live.buffers))
    assert not torch.equal(ema_model[1].running_mean, live[1].running_mean)
    ema.copy_buffers(ema_model, live)
    assert len(expected) == 3  # mean, variance and count of one batch norm
    for ema_buffer, live_buffer, value in zip(ema_model.buffers(), live.buffers(), expected, strict=True):
        assert torch.equal(ema_buffer, value)
        assert torch.equal(live_buffer, value)
        assert ema_buffer.data_ptr() != live_buffer.data_ptr()
    before = ema_model[1].running_mean.clone()
    live(torch.randn(4, 1, 5, 5) + 3)
    assert torch.equal(ema_model[1].running_mean, before)
    assert not torch.equal(live[1].running_mean, before)
    assert all(torch.equal(p, b) for p, b in zip(ema_model.parameters(), parameters, strict=True))


# --- checkpoints

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimiser": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "progress": {"step": 7, "best": {}, "history": [{"images_seen": 10, "loss": 0.25}], "name": "x", "none": None},
}
ADVICE = "delete it to start this run over, or bring back a good copy"


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "run" / "checkpoint.dmat"
    checkpoints.save(path, {"images_seen": 70, "precision": "fp32", "threads": 1}, STATE)
    return path


def refusal(path):
    with pytest.raises(DmatError) as refused:
        checkpoints.load(path)
    return str(refused.value)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_checkpoint_gives_back_header_and_state(checkpoint):
    header, state = checkpoints.load(checkpoint)
    assert same(state, STATE)
    assert (header["images_seen"], header["precision"], header["schema"]) == (70, "fp32", checkpoints.SCHEMA)
    assert json.loads(checkpoint.read_bytes().split(b"\n")[0]) == header  # `head -1` shows it to people
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.dmat"]  # nothing temporary is left


def test_checkpoint_that_cannot_be_written_leaves_the_last_one(checkpoint):
    before = checkpoint.read_bytes()
    with pytest.raises(TypeError):
        checkpoints.save(checkpoint, {"images_seen": object()}, STATE)
    with pytest.raises(ZeroDivisionError), files.writing(checkpoint) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert checkpoint.read_bytes() == before
    assert len(list(checkpoint.parent.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "one bit", "longer", "no state"])
def test_damaged_checkpoint_is_refused(checkpoint, damage):
    content = checkpoint.read_bytes()
    first, payload = content.split(b"\n", 1)
    changed = bytearray(payload)
    changed[len(changed) // 2] ^= 1
    payload = {"cut": payload[:-1], "one bit": bytes(changed), "longer": payload + b"\0", "no state": b""}[damage]
    checkpoint.write_bytes(first + b"\n" + payload)
    actual, expected = hashlib.sha256(payload).hexdigest()[:12], json.loads(first)["sha256"][:12]
    assert actual != expected
    assert refusal(checkpoint) == (
        f"{checkpoint} was cut or altered (checksum {actual}, expected {expected}); {ADVICE}"
    )


@pytest.mark.parametrize("schema", [0, 2, None])
def test_checkpoint_of_another_schema_is_refused(checkpoint, schema):
    first, payload = checkpoint.read_bytes().split(b"\n", 1)
    checkpoint.write_bytes(json.dumps(json.loads(first) | {"schema": schema}).encode() + b"\n" + payload)
    assert refusal(checkpoint) == (
        f"{checkpoint} has checkpoint schema {schema}; this dmat reads {checkpoints.SCHEMA}; use the dmat that wrote "
        f"it, or {ADVICE}"
    )


NO_CHECKPOINT = [b"", b"\x80\x02}q\x00.", b"PK\x03\x04 zip\n", b'{"schema": 1', b"a text\nof two lines\n"]
OTHER_JSON = [b"7\nx", b"[]\n", b'{"schema": 1}\nx']


@pytest.mark.parametrize("content", [*NO_CHECKPOINT, *OTHER_JSON])
def test_file_that_is_not_a_checkpoint_is_refused(checkpoint, content):
    checkpoint.write_bytes(content)
    text = refusal(checkpoint)
    assert text.startswith(f"{checkpoint} is not a checkpoint of dmat (its first line is not ")
    assert text.endswith(f"; {ADVICE}")


def test_weights_of_another_shape_are_refused(tmp_path):
    model = torch.nn.Linear(3, 2)
    state = {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}
    with pytest.raises(DmatError, match=r"weight is \(2, 4\), expected \(2, 3\); use the file and sidecar of one run"):
        weights.fill(lambda: model, state, tmp_path / "w.safetensors")


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_loading_executes_nothing(checkpoint, capsys):
    payload = pickle.dumps(Harmful(), protocol=2)
    header = {"schema": checkpoints.SCHEMA, "sha256": hashlib.sha256(payload).hexdigest()}
    header |= {"images_seen": 1, "precision": "fp32", "threads": 1}
    checkpoint.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    with pytest.raises(DmatError, match="Weights only load failed"):
        checkpoints.load(checkpoint)
    assert "executed" not in capsys.readouterr().out


# --- weights


@pytest.fixture
def stored(tmp_path):
    path, model = tmp_path / "best.safetensors", ready_models()[0]
    weights.save(path, model.state_dict(), {"kind": "classifier", "network": {"depth": 10}})
    return path, model


def refused_weights(path, kind="classifier"):
    with pytest.raises(DmatError) as refused:
        weights.read(path, kind)
    return str(refused.value)


def test_weights_give_back_tensors_and_sidecar(stored):
    path, model = stored
    state, sidecar = weights.read(path, "classifier")
    assert same(state, dict(model.state_dict()))
    assert sidecar["network"] == {"depth": 10}
    assert sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    other = ready_models()[1]
    assert weights.fill(lambda: other, state, path) is other
    assert same(dict(other.state_dict()), state)


def test_weights_are_written_byte_for_byte_alike_and_from_any_layout(tmp_path):
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    for name, value in (("1", tensor), ("2", tensor.to(memory_format=torch.channels_last).requires_grad_(True))):
        weights.save(tmp_path / f"{name}.safetensors", {"w": value}, {"kind": "denoiser"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_denoiser_of_an_earlier_version_still_opens(tmp_path, tiny_params):
    """Its sidecar has the old names of settings, all in one mapping."""
    settings = config.DenoiserTraining.model_validate(tiny_params["train_diffusion"])
    formulation = EDM(settings.sigma_data)
    state = denoisers.new_denoiser(settings.network, DenoiserSpec(8, 8, 1, 10), formulation, 1).state_dict()
    plain = settings.plain()
    network = plain.pop("network")
    generator = {"average_half_life" if name == "ema_half_life" else name: value for name, value in plain.items()}
    generator |= {name: network[name] for name in ("channels", "multipliers", "blocks", "dropout")}
    sidecar = {"kind": "denoiser", "generator": generator, "image_shape": [8, 8, 1], "class_names": list("0123456789")}
    weights.save(tmp_path / "denoiser.safetensors", state, sidecar)
    compute = devices.resolve("cpu", "fp32", threads=1)
    model, today = denoisers.load_denoiser(tmp_path / "denoiser.safetensors", compute)
    assert (today["network"]["name"], today["label_dim"], today["sigma_data"]) == ("unet", 10, 0.7)
    assert today["training"] == {name: value for name, value in plain.items() if name != "sigma_data"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_weights_beside_a_foreign_sidecar_are_refused(stored):
    path, _ = stored
    expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    actual = hashlib.sha256(content).hexdigest()
    assert refused_weights(path) == (
        f"{path} has checksum {actual[:12]}; its sidecar says {expected[:12]}; bring back the pair that was written "
        f"together, or run its stage again"
    )


def test_weights_of_another_kind_are_refused(stored):
    path, _ = stored
    assert refused_weights(path, "denoiser") == f"{path} holds a classifier; expected a denoiser; name another file"


def test_weights_of_another_schema_are_refused(stored):
    path, _ = stored
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"schema": 7}))
    assert refused_weights(path) == (
        f"{sidecar} has schema 7; this dmat reads {weights.SCHEMA}; use the dmat that wrote it"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_half_a_pair_is_refused(stored, suffix):
    path, _ = stored
    path.with_suffix(suffix).rename(path.with_name("elsewhere"))
    assert refused_weights(path) == (
        f"{path.with_suffix(suffix)} does not exist; run the stage that makes it, or `dvc repro`"
    )


def test_sidecar_that_is_not_json_is_refused(stored):
    path, _ = stored
    path.with_suffix(".json").write_text("{")
    assert refused_weights(path).startswith(f"{path.with_suffix('.json')} is not valid JSON (")


def test_tensors_of_another_network_are_refused(stored):
    path, model = stored
    state = {("logits" + name[1:] if name[0] == "3" else name): tensor for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DmatError) as refused:
        weights.fill(lambda: model, state, path)
    assert str(refused.value) == (
        f"{path} does not fit the network its sidecar describes: missing ['3.bias', '3.weight'], unexpected "
        f"['logits.bias', 'logits.weight']; use the file and sidecar of one run"
    )
    assert same(dict(model.state_dict()), before)


# --- named randomness


def numbers(*name):
    return tuple(seeds.stream(*name).integers(0, 2**62, 4).tolist())


def test_a_name_gives_its_numbers_and_no_other():
    names = [
        (1, "a", 0),
        (1, "a", 1),
        (1, "a", 10),
        (11, "a", 0),
        (2, "a", 0),
        (-1, "a", 0),
        (1, "b", 0),
        (1, "a/0", 0),
    ]
    assert len({numbers(*name) for name in names}) == len(names)
    assert numbers(1, "a", 3) == numbers(1, "a", 3)
    assert numbers(1, "a") == numbers(1, "a", 0)


def test_names_keep_their_numbers_across_versions():
    """Recorded once: other numbers would change every published result."""
    assert seeds.stream(1, "order/real", 0).bit_generator.random_raw(2).tolist() == GOLDEN
    key = int.from_bytes(hashlib.blake2b(b"1/order/real/0", digest_size=16).digest(), "little")
    assert np.random.Philox(key=key).random_raw(2).tolist() == GOLDEN


GOLDEN = [2315741443593738710, 15784012463774073843]


def test_normal_and_uniform_numbers():
    normal = seeds.normal(seeds.stream(1, "n"), (50_000,))
    assert normal.dtype == torch.float32
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.015)
    uniform = seeds.uniform(seeds.stream(1, "u"), (50_000,), -3.0, 1.0)
    assert uniform.dtype == torch.float32
    assert -3 <= uniform.min() < -2.99
    assert 0.99 < uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(-1, abs=0.025)
    assert uniform.std().item() == pytest.approx(4 / math.sqrt(12), abs=0.02)
    assert seeds.uniform(seeds.stream(1, "u"), (2, 3)).shape == (2, 3)


def test_reseeding_torch_repeats_its_numbers():
    with torch.random.fork_rng(devices=[]):
        drawn = []
        for name in [(1, "dropout", 4), (1, "dropout", 4), (1, "dropout", 5), (2, "dropout", 4), (1, "other", 4)]:
            seeds.reseed_torch(*name)
            drawn.append(tuple(torch.rand(4).tolist()))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


# --- modes


class Broken(Exception):
    pass


def described(model):
    training, required = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return training, required, model[1].track_running_stats


BLOCKS = {
    "train": lambda model: modes.mode(model, training=True),
    "eval": lambda model: modes.mode(model, training=False),
    "frozen": modes.frozen,
    "untracked": modes.untracked_batch_norm,
}


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_mode_ends_with_its_block(name, raising):
    model = ready_models()[0].train()
    model[1].eval()  # mixed modes, as a caller may have left them
    model[0].weight.requires_grad_(False)
    before = described(model)
    try:
        with BLOCKS[name](model):
            inside = described(model)
            if raising:
                raise Broken
    except Broken:
        assert raising
    assert described(model) == before
    training, required, tracked = inside
    assert set(training) == {"train": {True}, "eval": {False}}.get(name, {True, False})
    assert any(required) == (name != "frozen")
    assert tracked == (name != "untracked")


def test_untracked_batch_norm_uses_the_batch_and_remembers_nothing():
    layer = nn.BatchNorm2d(3, momentum=0.5).train()
    layer.running_mean.fill_(5.0)
    images = torch.randn(8, 3, 4, 4) + 1
    expected = (images - images.mean((0, 2, 3), keepdim=True)) / (
        images.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    with modes.untracked_batch_norm(layer):
        torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-5)
    assert (layer.running_mean == 5).all()
    assert (layer.running_var == 1).all()
    assert layer.num_batches_tracked == 0
    layer(images)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 2.5 + 0.5 * images.mean((0, 2, 3)))


def test_batch_norm_momentum_is_the_share_of_the_newest_batch():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    modes.set_batch_norm_momentum(model, 1.0)
    assert [model[0].momentum, model[1][0].momentum] == [1.0, 1.0]
    images = torch.randn(8, 3, 4, 4) + 1
    model(images)
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)))


# --- signals


def test_a_signal_that_a_library_turned_into_another_error_still_interrupts():
    """numpy.fromfile turns an exception inside its read into a TypeError."""
    with pytest.raises(Interrupted) as stopped, Interruption(at_once=True):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Interrupted as error:
            raise TypeError("expected a path") from error
    assert stopped.value.exit_code == 130
    with pytest.raises(TypeError), Interruption(at_once=True):
        raise TypeError("without a signal")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_was_lost_is_noticed_by_an_inner_block():
    """Python drops what a handler raises inside a destructor or a callback of a library."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped, Interruption(at_once=True):
        thing = Dropped()
        del thing  # the handler raises Interrupted in there, and Python drops it
        with Interruption() as inner:
            inner.raise_if_received()
    assert stopped.value.exit_code == 128 + signal.SIGTERM


# --- inputs of the next steps


class _Maker:
    """Returns 10 x step and records the steps that were requested; the step `bad` fails."""

    def __init__(self, bad=None):
        self.bad, self.requested, self.threads = bad, [], set()

    def __call__(self, step):
        self.requested.append(step)
        self.threads.add(threading.get_ident())
        if step == self.bad:
            raise OSError(f"no step {step}")
        return 10 * step


def test_steps_come_in_order_and_are_made_once_by_another_thread():
    make = _Maker()
    steps = Prefetcher(make, 6)
    assert [steps.at(step) for step in range(6)] == [0, 10, 20, 30, 40, 50]
    assert make.requested == [0, 1, 2, 3, 4, 5], "each step once, none past the end"
    assert threading.get_ident() not in make.threads


def test_the_next_steps_are_made_before_they_are_asked_for():
    make = _Maker()
    steps = Prefetcher(make, 100)
    assert steps.at(0) == 0
    forked.until(lambda: len(make.requested) == 3)
    assert make.requested == [0, 1, 2]


@pytest.mark.parametrize("target", [0, 2, 7, 9])
def test_after_a_jump_prefetched_steps_are_dropped(target):
    """As by a roll-back: to an earlier step, the same step or a later one."""
    steps = Prefetcher(_Maker(), 10)
    assert [steps.at(step) for step in range(3)] == [0, 10, 20]
    assert [steps.at(step) for step in range(target, 10)] == [10 * step for step in range(target, 10)]


def test_an_error_is_raised_where_its_step_is_asked_for():
    steps = Prefetcher(_Maker(bad=2), 10)
    assert [steps.at(step) for step in range(2)] == [0, 10]
    with pytest.raises(OSError, match="no step 2"):
        steps.at(2)
    assert steps.at(3) == 30


def test_a_step_past_the_end_is_made_when_asked_for():
    make = _Maker()
    assert Prefetcher(make, 2).at(5) == 50
    assert make.requested == [5]
