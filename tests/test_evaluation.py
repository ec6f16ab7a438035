"""Shards of an evaluation: the same flags whoever computes them, what is refused, what may be called a headline.

Oracles: single attacks by hand, another order and number of workers, counting by hand. Commands are in
tests/test_evaluate_command.py; the checks themselves in tests/test_checks.py.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import time

import filelock
import numpy as np
import pytest
import torch

from dmat import config, devices, files, seeds
from dmat.errors import DmatError
from dmat.evaluation import checks, measures, work
from dmat.evaluation.evaluate import Evaluation, Verdict
from dmat.evaluation.measures import Subject
from dmat.evaluation.table import read_table, write_table
from dmat.evaluation.work import ShardTask
from dmat.metrics.intervals import wilson
from dmat.robust import attacks, auto_attack
from dmat.robust.attacks import Ball, logit_margin
from dmat.robust.networks import Classifier

QUICK = config.evaluation(
    {"pgd_steps": 8, "shard": 10, "batch": 6, "check_images": 12, "check_queries": 30, "sweep": [0.5, 2.0],
     "auto_attack": ["apgd-ce", "apgd-dlr"]}
)  # fmt: skip


@pytest.fixture(scope="module")
def compute():
    return devices.resolve("cpu", "fp32", threads=1)


class _Small(Classifier):
    """Two layers: AutoAttack asks a model some ten thousand times."""

    def __init__(self):
        super().__init__()
        self.first, self.logits = torch.nn.Linear(64, 32), torch.nn.Linear(32, 4)

    def features(self, images):
        return torch.nn.functional.silu(self.first(images.flatten(1) - 0.4))


@pytest.fixture(scope="module")
def trained():
    """A small network that learned four levels of grey, and 24 of its images, some hard."""
    torch.manual_seed(0)
    model = _Small()
    labels = torch.arange(200) % 4
    images = (0.25 * labels[:, None, None, None] + 0.15 + 0.12 * torch.randn(200, 1, 8, 8)).clamp(0, 1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        chosen = torch.randperm(200)[:64]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimiser.step()
    images, labels = images[:24].clone(), labels[:24].clone()
    labels[[3, 15]] = (labels[[3, 15]] + 1) % 4  # wrong without any attack
    return model.eval().requires_grad_(False), images, labels


@pytest.fixture
def subject(trained):
    model, images, labels = trained
    return Subject("model", model, images, labels, Ball("linf", 0.09), auto_attack.suite(QUICK.auto_attack, 4), True)


def _evaluation(folder, subject, compute, settings=QUICK, **identity):
    return Evaluation(folder, subject, settings, compute, {"weights": "w", **identity})


def _done(folder, subject, compute, settings=QUICK):
    evaluation = _evaluation(folder, subject, compute, settings)
    work.compute_all(evaluation.units, wait=True, quiet=True)
    return evaluation


# --- what is measured


def test_every_image_is_in_one_shard():
    parts = [measures.shard_of(k, 10, 24) for k in range(3)]
    assert [(part.start, part.stop) for part in parts] == [(0, 10), (10, 20), (20, 24)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_columns_are_what_they_say(subject, compute, norm):
    """Recomputed from the saved adversarial images and from single attacks, image by image."""
    ball = Ball(norm, {"linf": 0.09, "l2": 0.7}[norm])
    subject = dataclasses.replace(subject, ball=ball)
    model, x, y = subject.model, subject.images[10:20], subject.labels[10:20]
    found = {name: torch.from_numpy(v) for name, v in measures.of_shard(subject, QUICK, 1, compute).items()}
    assert torch.equal(found["prediction"], model(x).argmax(1))
    clean = model(x).argmax(1) == y
    assert torch.equal(found["clean"], clean)
    start = ball.random_start(seeds.stream(QUICK.pgd_seed, "evaluation/start/0", 1), tuple(x.shape))
    pgd = attacks.pgd(model, x, attacks.margin(y), ball, start, 8, ball.epsilon / 4)
    assert torch.equal(found["pgd"], clean & (model(pgd).argmax(1) == y))
    few = attacks.pgd(model, x, attacks.margin(y), ball, start, 2, ball.epsilon / 4)
    assert torch.equal(found["pgd_few"], clean & (model(few).argmax(1) == y))
    fgsm = attacks.fgsm(model, x, attacks.cross_entropy(y), ball)
    assert torch.equal(found["fgsm"], clean & (model(fgsm).argmax(1) == y))
    wide = Ball(norm, 2 * ball.epsilon)
    start = wide.random_start(seeds.stream(QUICK.pgd_seed, "evaluation/start/sweep/0", 1), tuple(x.shape))
    twice = attacks.pgd(model, x, attacks.margin(y), wide, start, 8, wide.epsilon / 4)
    assert torch.equal(found["sweep"][:, 1], clean & (model(twice).argmax(1) == y))
    assert not found["grey"].all()
    worst, broken_by = auto_attack.attack(model, x, y, ball, subject.suite, QUICK.auto_attack_seed + 1, 6)
    assert torch.equal(found["broken_by"], broken_by)
    assert torch.equal(found["auto_attack"], broken_by == auto_attack.ROBUST)
    expected = torch.where(found["auto_attack"][:, None, None, None], pgd, worst)
    torch.testing.assert_close(found["adversarial"], expected, rtol=0, atol=1e-6)
    logits = model(found["adversarial"])
    assert torch.equal(found["attacked"], logits.argmax(1))
    torch.testing.assert_close(found["margin"], logit_margin(logits, y), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["perturbation"], ball.size(found["adversarial"] - x))
    assert 0 < int(found["auto_attack"].sum()) < 10, "the example must have both kinds"


def test_a_brief_subject_is_attacked_by_pgd_alone(subject, compute):
    found = measures.of_shard(dataclasses.replace(subject, suite=None, full_suite=False), QUICK, 0, compute)
    assert set(found) == {"prediction", "clean", "pgd", "adversarial", "attacked", "margin", "perturbation"}


def test_restarts_only_lower_the_accuracy(subject, compute):
    """One step of the whole radius: the random start decides much."""
    brief = dataclasses.replace(subject, suite=None, full_suite=False, ball=Ball("linf", 0.1))
    one, five = (
        measures.of_shard(
            brief,
            QUICK.model_copy(update={"pgd_restarts": n, "pgd_steps": 1, "pgd_step_size": 0.1, "shard": 24}),
            0,
            compute,
        )["pgd"]
        for n in (1, 8)
    )
    assert (five <= one).all()
    assert five.sum() < one.sum()


# --- who computes


@pytest.mark.parametrize("order", [[2, 0, 1], [1]])
def test_flags_do_not_depend_on_order_or_on_what_was_there(tmp_path, subject, compute, order):
    """Some shards computed first and alone, in another order, are those of one undisturbed evaluation."""
    whole = _done(tmp_path / "whole", subject, compute).columns()
    parts = _evaluation(tmp_path / "parts", subject, compute)
    for number in order:
        unit = parts.units[number]
        unit.path.parent.mkdir(parents=True, exist_ok=True)
        unit.compute()
    work.compute_all(parts.units, wait=True, quiet=True)
    found = parts.columns()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


class _Units:
    """Shards that take a while and say who computed them."""

    def __init__(self, folder, count, seconds):
        self.units = [
            ShardTask(folder / f"shard-{k}", 1, {"shard": k}, lambda k=k: self._make(k, seconds)) for k in range(count)
        ]

    @staticmethod
    def _make(number, seconds):
        time.sleep(seconds)
        return {"who": np.array([os.getpid()]), "number": np.array([number])}


def _work(folder, count, seconds, wait):
    work.compute_all(_Units(folder, count, seconds).units, wait=wait, quiet=True)


_context = multiprocessing.get_context("forkserver")


def _workers(folder, count, seconds, waits):
    found = [_context.Process(target=_work, args=(folder, count, seconds, wait)) for wait in waits]
    for process in found:
        process.start()
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_divide_the_shards_and_none_is_computed_twice(tmp_path, workers):
    started = _workers(tmp_path, 12, 0.1, [True] + [False] * (workers - 1))
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    made = [unit.read() for unit in _Units(tmp_path, 12, 0).units]
    assert [int(one["number"][0]) for one in made] == list(range(12))
    assert len({int(one["who"][0]) for one in made}) == workers


def test_the_shard_of_a_killed_worker_is_computed_by_another(tmp_path):
    (killed,) = _workers(tmp_path, 2, 30, [False])
    while not list(tmp_path.glob("*.lock")):
        time.sleep(0.02)
    (waiting,) = _workers(tmp_path, 2, 0.1, [True])  # takes the other one, then waits for the first
    time.sleep(1.5)
    assert waiting.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    waiting.join(30)
    assert waiting.exitcode == 0
    assert {int(unit.read()["who"][0]) for unit in _Units(tmp_path, 2, 0).units} == {waiting.pid}


def test_a_helper_leaves_when_nothing_is_left_to_claim(tmp_path):
    with filelock.FileLock(tmp_path / "shard-0.lock"):
        (helper,) = _workers(tmp_path, 2, 0.01, [False])
        helper.join(20)
        assert helper.exitcode == 0
    assert not _Units(tmp_path, 2, 0).units[0].done
    assert _Units(tmp_path, 2, 0).units[1].done


def test_time_left_is_counted_from_what_was_done(tmp_path):
    units = [ShardTask(tmp_path / part / f"shard-{k}", 10, {"shard": k}, dict) for part in ("a", "b") for k in range(4)]
    assert work.estimate(units) == {"shards": 8, "shards_done": 0, "seconds_left": None}
    for unit, seconds in ((units[0], 20.0), (units[1], 40.0), (units[2], 30.0)):
        unit.path.parent.mkdir(exist_ok=True)
        unit.path.with_suffix(".npz").write_bytes(b"")
        digest = hashlib.sha256(b"").hexdigest()
        unit.path.with_suffix(".json").write_text(
            json.dumps({"identity": dict(unit.identity), "seconds": seconds, "images": 10, "sha256": digest})
        )
    assert work.estimate(units) == {"shards": 8, "shards_done": 3, "seconds_left": None}
    assert work.estimate(units[:4]) == {"shards": 4, "shards_done": 3, "seconds_left": 30.0}


# --- what is refused


@pytest.mark.parametrize("damage", ["altered", "cut", "removed"])
def test_a_damaged_shard_is_refused_and_made_again(tmp_path, subject, compute, damage):
    evaluation = _done(tmp_path, subject, compute)
    before = {name: values.tolist() for name, values in evaluation.columns().items()}
    path = tmp_path / "shard-00001.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "altered" else bytes(data[:100]))
    with pytest.raises(DmatError, match=r"shard-00001.npz is missing or was altered.*run the same command again"):
        evaluation.columns()
    work.compute_all(evaluation.units, wait=True, quiet=True)
    assert {name: values.tolist() for name, values in evaluation.columns().items()} == before


def test_shards_of_another_model_are_refused(tmp_path, subject, compute):
    _done(tmp_path, subject, compute)
    with pytest.raises(DmatError, match=r"belongs to another evaluation \(weights differ\)"):
        _evaluation(tmp_path, subject, compute, weights="other").columns()


def test_nobody_computes_beside_shards_of_another_model(tmp_path, subject, compute):
    _done(tmp_path, subject, compute)
    other = _evaluation(tmp_path, subject, compute, weights="other")
    for ask in (work.estimate, lambda units: work.compute_all(units, wait=False, quiet=True)):
        with pytest.raises(DmatError, match=r"belongs to another evaluation \(weights differ\)"):
            ask(other.units)


@pytest.mark.parametrize("note", [[], {}, {"identity": {}, "images": 12, "seconds": "3", "sha256": ""}, {"sha256": 1}])
def test_a_shard_without_a_whole_record_is_not_done(tmp_path, subject, compute, note):
    evaluation = _done(tmp_path, subject, compute)
    before = files.read_json(tmp_path / "shard-00000.json")
    (tmp_path / "shard-00000.json").write_text(json.dumps(note))
    done = work.estimate(evaluation.units)
    assert done["shards_done"] == done["shards"] - 1
    work.compute_all(evaluation.units, wait=True, quiet=True)
    assert files.read_json(tmp_path / "shard-00000.json")["sha256"] == before["sha256"]


BAD_IMAGES = {
    "of 255 levels": (lambda x, y: (255 * x, y), r"expected .*\[0, 1\]"),
    "normalised": (lambda x, y: ((x - 0.5) / 0.2, y), r"expected .*\[0, 1\]"),
    "none": (lambda x, y: (x[:0], y[:0]), "0 images to attack; expected 1 or more"),
    "label too large": (lambda x, y: (x, y + 3), "labels go from 3 to 6; expected 0 to 3 for a model with 4 classes"),
    "label below 0": (lambda x, y: (x, y - 1), "labels go from -1 to 2"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused(tmp_path, subject, compute, kind):
    change, words = BAD_IMAGES[kind]
    images, labels = change(subject.images, subject.labels)
    with pytest.raises(DmatError, match=words):
        _evaluation(tmp_path, dataclasses.replace(subject, images=images, labels=labels), compute)


def test_a_loss_that_needs_three_classes_is_refused(tmp_path, subject, compute):
    two = _Small()
    two.logits = torch.nn.Linear(32, 2)
    few = dataclasses.replace(subject, model=two, labels=subject.labels % 2)
    with pytest.raises(DmatError, match="pgd_loss is dlr and the model has 2 classes; expected 3 or more"):
        _evaluation(tmp_path, few, compute, QUICK.model_copy(update={"pgd_loss": "dlr"}))


def test_epsilon_in_levels_is_refused(tmp_path, subject, compute):
    with pytest.raises(DmatError, match=r"epsilon is 128, larger than the l2 distance .* 8.00; .*128/255"):
        _evaluation(tmp_path, dataclasses.replace(subject, ball=Ball("l2", 128)), compute)


# --- what is said


NO_COPIES = {"earlier test images": np.zeros(24, bool)}


def _verdict(evaluation, all_images=24):
    return evaluation.verdict(evaluation.columns(), all_images, NO_COPIES)


def test_only_the_whole_standard_suite_on_all_images_is_a_headline(tmp_path, subject, compute):
    standard = dataclasses.replace(subject, suite=auto_attack.suite("standard", 4))
    settings = QUICK.model_copy(update={"auto_attack": "standard"})
    evaluation = _done(tmp_path / "standard", standard, compute, settings)
    columns = evaluation.columns()
    verdict = evaluation.verdict(columns, 24, NO_COPIES)
    assert verdict.reasons == (), [check for check in verdict.checks if not check.passed]
    assert verdict.measure == "auto_attack"
    assert len(verdict.checks) == 14
    assert verdict.tags["evaluation.headline"] == "yes"
    summary = evaluation.summary(columns, verdict)
    assert summary["headline"] == {"measure": "auto_attack", **wilson(columns["auto_attack"]).plain()}
    assert sum(summary["broken_by"].values()) == 24
    assert [point["epsilon"] for point in summary["sweep"]] == pytest.approx([0, 0.045, 0.09, 0.18])
    assert summary["sweep"][2]["right"] == summary["pgd"]["right"]
    subset = evaluation.verdict(columns, 25, NO_COPIES)
    assert (subset.measure, subset.tags["evaluation.headline"]) == ("auto_attack_subset", "no")
    assert subset.reasons == ("Only 24 of 25 images were attacked.",)
    assert evaluation.summary(columns, subset)["headline"] is None
    assert "auto_attack" not in evaluation.summary(columns, subset)
    copied = evaluation.verdict(columns, 24, {"real training images": np.arange(24) == 3})
    assert (copied.measure, copied.tags["evaluation.checks"]) == ("auto_attack_unchecked", "failed: unseen")
    assert "of 24 test images these are exact copies: 1 of real training images; expected" in copied.reasons[0]


def test_training_images_and_unknown_ones_are_no_headline(tmp_path, subject, compute):
    evaluation = _done(tmp_path, dataclasses.replace(subject, suite=auto_attack.suite("standard", 4)), compute)
    columns = evaluation.columns()
    for split, said in {"train": "of the split train, not of test", "": "say `--split test`"}.items():
        verdict = evaluation.verdict(columns, 24, NO_COPIES, split)
        assert verdict.measure == "auto_attack_not_test"
        assert said in verdict.reasons[0]
        assert evaluation.summary(columns, verdict)["headline"] is None
    assert evaluation.verdict(columns, 24, NO_COPIES, "test").reasons == ()


def test_few_copies_are_told_beside_a_headline():
    copies = {"earlier test images": np.arange(200) < 1, "generated training images": np.arange(200) < 2}
    verdict = Verdict("auto_attack", (), (checks.unseen(copies),))
    assert verdict.sentences == verdict.notes
    assert verdict.notes == [
        "of 200 test images these are exact copies: 1 of earlier test images, 2 of generated training images"
    ]


def test_a_handful_of_images_is_no_headline(tmp_path, subject, compute):
    few = dataclasses.replace(
        subject, images=subject.images[:19], labels=subject.labels[:19], suite=auto_attack.suite("standard", 4)
    )
    verdict = _verdict(_done(tmp_path, few, compute), 19)
    assert "Only 19 images; a headline takes 20 or more." in verdict.reasons
    assert verdict.measure == "auto_attack_subset"


def test_checks_look_at_images_of_every_part_and_no_more_than_a_batch(tmp_path, subject, compute):
    """Sets may be sorted by class; a batch is what fits on the device."""
    settings = QUICK.model_copy(update={"check_images": 8, "batch": 5})
    order = subject.labels.argsort(stable=True)
    ordered = dataclasses.replace(subject, images=subject.images[order], labels=subject.labels[order])
    evaluation = _done(tmp_path, ordered, compute, settings)
    x, y = evaluation._few()
    assert len(x) == 5
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert len(evaluation._black_box.read()["robust"]) == 8
    assert evaluation.checks(evaluation.columns(), NO_COPIES)


def test_a_model_that_says_one_thing_is_scored_alike(tmp_path, subject, compute):
    """Equal logits: the first class is predicted with a margin of 0, the same in any batch."""
    model = _Small().eval().requires_grad_(False)
    model.logits.weight.zero_()
    model.logits.bias.zero_()
    evaluation = _done(tmp_path, dataclasses.replace(subject, model=model, suite=None), compute)
    found = {check.name: check for check in evaluation.checks(evaluation.columns(), NO_COPIES)}
    assert found["rescored"].passed
    assert not found["zero_gradients"].passed


def test_other_attacks_are_nonstandard_by_name(tmp_path, subject, compute):
    evaluation = _done(tmp_path, subject, compute)
    verdict = _verdict(evaluation)
    assert verdict.measure == "auto_attack_nonstandard"
    assert verdict.reasons[0] == ("The attacks are nonstandard (apgd-ce, apgd-dlr), not those of standard AutoAttack.")
    assert "auto_attack_nonstandard" in evaluation.rows(evaluation.columns(), verdict)


def test_without_auto_attack_there_is_no_headline(tmp_path, subject, compute):
    evaluation = _done(tmp_path, dataclasses.replace(subject, suite=None), compute)
    verdict = _verdict(evaluation)
    assert verdict.reasons == ("AutoAttack was not run.",)
    assert verdict.tags["evaluation.measure"] == "pgd"
    assert evaluation.summary(evaluation.columns(), verdict)["headline"] is None


def test_a_failed_check_takes_the_headline_and_the_name(tmp_path, subject, compute):
    """Logits so large that the cross-entropy has no gradient: the sentence says so, the measure is called unchecked."""
    model = _Small()
    model.load_state_dict(subject.model.state_dict())
    model.eval().requires_grad_(False)
    model.logits.weight *= 1e4
    model.logits.bias *= 1e4
    standard = dataclasses.replace(subject, model=model, suite=auto_attack.suite("standard", 4))
    evaluation = _done(tmp_path, standard, compute, QUICK.model_copy(update={"auto_attack": "standard"}))
    verdict = _verdict(evaluation)
    assert verdict.measure == "auto_attack_unchecked"
    assert any("gradient" in reason for reason in verdict.reasons)
    assert "zero_gradients" in verdict.tags["evaluation.checks"]
    assert verdict.sentences[0].startswith("no headline: ")
    assert evaluation.summary(evaluation.columns(), verdict)["headline"] is None


def test_rows_name_who_broke_each_image(tmp_path, subject, compute):
    evaluation = _done(tmp_path, subject, compute)
    columns = evaluation.columns()
    rows = evaluation.rows(columns, _verdict(evaluation))
    for k, word in enumerate(rows["broken_by"].tolist()):
        assert (word == "none") == bool(columns["auto_attack"][k])
        assert (word == "misclassified") == (not columns["clean"][k])
        assert word in ("none", "misclassified", "apgd-ce", "apgd-dlr")
    assert len({len(values) for values in rows.values()} | {24}) == 1


def test_pictures_are_drawn_and_the_same_again(tmp_path, subject, compute):
    evaluation = _done(tmp_path / "work", subject, compute)
    columns = evaluation.columns()
    drawn = []
    for name in ("one", "two"):
        evaluation.draw(tmp_path / name, columns, "9/100", list("abcd"), _verdict(evaluation))
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(drawn[0]) == {"accuracy_against_epsilon.png", "per_class.png", "confusion.png", "perturbations.png"}
    assert drawn[0] == drawn[1]


def test_the_table_comes_back_as_it_was(tmp_path):
    rows = {"flag": np.array([True, False]), "word": np.array(["none", "square"]), "size": np.array([0.5, 0.25], "f4")}
    write_table(tmp_path / "t.parquet", rows)
    found = read_table(tmp_path / "t.parquet")
    assert {name: values.tolist() for name, values in found.items()} == {n: v.tolist() for n, v in rows.items()}
    assert found["flag"].dtype == bool


def test_protocol_says_what_is_needed_to_repeat_it(tmp_path, subject, compute):
    evaluation = _evaluation(tmp_path, subject, compute)
    assert evaluation.protocol({}, 30)["computed"] == []
    evaluation.units[0].compute()
    other = dataclasses.replace(evaluation.units[1], by={"device": "another"})
    other.compute()
    said = evaluation.protocol({"norm": "linf", "epsilon": "9/100"}, 30)
    assert (said["images"], said["of_images"], said["shard"], said["batch"]) == (24, 30, 10, 6)
    assert said["pgd"] == "PGD-8, loss cw, step 0.0225, restarts 1"
    assert said["auto_attack"] == "nonstandard (apgd-ce, apgd-dlr)"
    assert said["precision"] == "fp32"
    another, here = said["computed"]  # of each shard the machine and versions that computed it
    assert another == {"device": "another", "shards": 1}
    assert here["device"].startswith("cpu")
    assert here["shards"] == 1
    assert set(here["versions"]) == {"dmat", "torch", "pyautoattack"}
