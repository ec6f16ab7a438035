"""Shards of an evaluation: the same flags whichever process computes them, refusals, and conditions of a headline.

Oracles: single attacks called directly, another order and number of workers, direct counts. Commands are in
tests/test_evaluate_command.py; the checks themselves in tests/test_checks.py.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time

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
from tests import forked

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
        indices = torch.randperm(200)[:64]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images[indices]), labels[indices]).backward()
        optimiser.step()
    images, labels = images[:24].clone(), labels[:24].clone()
    labels[[3, 15]] = (labels[[3, 15]] + 1) % 4  # wrong without any attack
    return model.eval().requires_grad_(False), images, labels


@pytest.fixture(scope="module")
def subject(trained):
    model, images, labels = trained
    suite = auto_attack.suite(QUICK.auto_attack, 4)
    return Subject("model", model, 4, images, labels, Ball("linf", 0.09), suite, True)


def _evaluation(folder, subject, compute, settings=QUICK, **identity):
    return Evaluation(folder, subject, settings, compute, {"weights": "w", **identity})


def _done(folder, subject, compute, settings=QUICK):
    evaluation = _evaluation(folder, subject, compute, settings)
    work.compute_all(evaluation.tasks, quiet=True)
    return evaluation


@pytest.fixture(scope="module")
def standard(subject, compute, tmp_path_factory):
    """An evaluation by the standard suite, whose thousands of passes take a while."""
    settings = QUICK.model_copy(update={"auto_attack": "standard"})
    standard_subject = dataclasses.replace(subject, suite=auto_attack.suite("standard", 4))
    return _done(tmp_path_factory.mktemp("standard"), standard_subject, compute, settings)


SOON_BROKEN = Ball("linf", 0.45)  # in which the first attacks of a suite leave no image to the long ones


# --- measures


def test_every_image_is_in_exactly_one_shard():
    parts = [measures.shard_slice(k, 10, 24) for k in range(3)]
    assert [(part.start, part.stop) for part in parts] == [(0, 10), (10, 20), (20, 24)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_columns_match_single_attacks(subject, compute, norm):
    """Recomputed from the saved adversarial images and from single attacks, image by image."""
    ball = Ball(norm, {"linf": 0.09, "l2": 0.7}[norm])
    subject = dataclasses.replace(subject, ball=ball)
    model, x, y = subject.model, subject.images[10:20], subject.labels[10:20]
    columns = {name: torch.from_numpy(v) for name, v in measures.measure_shard(subject, QUICK, 1, compute).items()}
    assert torch.equal(columns["prediction"], model(x).argmax(1))
    clean = model(x).argmax(1) == y
    assert torch.equal(columns["clean"], clean)
    start = ball.random_start(seeds.stream(QUICK.pgd_seed, "evaluation/start/0", 1), tuple(x.shape))
    pgd = attacks.pgd(model, x, attacks.margin(y), ball, start, 8, ball.epsilon / 4)
    assert torch.equal(columns["pgd"], clean & (model(pgd).argmax(1) == y))
    few_steps = attacks.pgd(model, x, attacks.margin(y), ball, start, 2, ball.epsilon / 4)
    assert torch.equal(columns["pgd_few"], clean & (model(few_steps).argmax(1) == y))
    fgsm = attacks.fgsm(model, x, attacks.cross_entropy(y), ball)
    assert torch.equal(columns["fgsm"], clean & (model(fgsm).argmax(1) == y))
    double_ball = Ball(norm, 2 * ball.epsilon)
    start = double_ball.random_start(seeds.stream(QUICK.pgd_seed, "evaluation/start/sweep/0", 1), tuple(x.shape))
    in_double_ball = attacks.pgd(model, x, attacks.margin(y), double_ball, start, 8, double_ball.epsilon / 4)
    assert torch.equal(columns["sweep"][:, 1], clean & (model(in_double_ball).argmax(1) == y))
    assert not columns["grey"].all()
    worst, broken_by = auto_attack.attack(model, x, y, ball, subject.suite, QUICK.auto_attack_seed + 1, 6)
    assert torch.equal(columns["broken_by"], broken_by)
    assert torch.equal(columns["auto_attack"], broken_by == auto_attack.ROBUST)
    expected = torch.where(columns["auto_attack"][:, None, None, None], pgd, worst)
    torch.testing.assert_close(columns["adversarial"], expected, rtol=0, atol=1e-6)
    logits = model(columns["adversarial"])
    assert torch.equal(columns["attacked"], logits.argmax(1))
    torch.testing.assert_close(columns["margin"], logit_margin(logits, y), rtol=0, atol=1e-4)
    torch.testing.assert_close(columns["perturbation"], ball.size(columns["adversarial"] - x))
    assert 0 < int(columns["auto_attack"].sum()) < 10, "the example must have both kinds"


def test_a_subject_without_full_suite_is_attacked_by_pgd_alone(subject, compute):
    columns = measures.measure_shard(dataclasses.replace(subject, suite=None, full_suite=False), QUICK, 0, compute)
    assert set(columns) == {"prediction", "clean", "pgd", "adversarial", "attacked", "margin", "perturbation"}


def test_restarts_only_lower_the_accuracy(subject, compute):
    """One step of the whole radius, so that the random start matters."""
    brief = dataclasses.replace(subject, suite=None, full_suite=False, ball=Ball("linf", 0.1))
    one_restart, eight_restarts = (
        measures.measure_shard(
            brief,
            QUICK.model_copy(update={"pgd_restarts": n, "pgd_steps": 1, "pgd_step_size": 0.1, "shard": 24}),
            0,
            compute,
        )["pgd"]
        for n in (1, 8)
    )
    assert (eight_restarts <= one_restart).all()
    assert eight_restarts.sum() < one_restart.sum()


# --- several processes


@pytest.mark.parametrize("order", [[2, 0, 1], [1]])
def test_flags_do_not_depend_on_order_or_on_existing_shards(tmp_path, subject, compute, order):
    """Some shards computed first and alone, in another order, are those of one undisturbed evaluation."""
    uninterrupted = _done(tmp_path / "whole", subject, compute).columns()
    resumed = _evaluation(tmp_path / "parts", subject, compute)
    for number in order:
        task = resumed.tasks[number]
        task.path.parent.mkdir(parents=True, exist_ok=True)
        task.compute()
    work.compute_all(resumed.tasks, quiet=True)
    resumed_columns = resumed.columns()
    assert all(np.array_equal(resumed_columns[name], uninterrupted[name]) for name in uninterrupted)


class _SlowShards:
    """Shards that take `seconds` each and record the process that computed them."""

    def __init__(self, folder, count, seconds, workers=1):
        self.tasks = [
            ShardTask(
                folder / f"shard-{k}", 1, 1, {"shard": k}, functools.partial(self._make, folder, k, seconds, workers)
            )
            for k in range(count)
        ]

    @staticmethod
    def _make(folder, number, seconds, workers, report):
        (folder / f"begun-{os.getpid()}").touch()
        forked.until(lambda: len(list(folder.glob("begun-*"))) >= workers)  # a slow start leaves no worker without one
        time.sleep(seconds)
        return {"pid": np.array([os.getpid()]), "number": np.array([number])}


def _work(folder, count, seconds, workers):
    work.compute_all(_SlowShards(folder, count, seconds, workers).tasks, quiet=True)


_context = multiprocessing.get_context("forkserver")


def _workers(folder, count, seconds, workers=1):
    processes = [_context.Process(target=_work, args=(folder, count, seconds, workers)) for _ in range(workers)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_share_the_shards_and_compute_each_once(tmp_path, workers):
    started = _workers(tmp_path, 12, 0.1, workers)
    for process in started:
        process.join(forked.LIMIT)
        assert process.exitcode == 0
    results = [task.read() for task in _SlowShards(tmp_path, 12, 0).tasks]
    assert [int(result["number"][0]) for result in results] == list(range(12))
    assert len({int(result["pid"][0]) for result in results}) == workers


def test_the_shard_of_a_killed_worker_is_computed_by_another(tmp_path):
    (killed,) = _workers(tmp_path, 2, 600)
    forked.until(lambda: list(tmp_path.glob("begun-*")))
    (waiting,) = _workers(tmp_path, 2, 0.1)  # takes the other one, then waits for the first
    forked.until(lambda: [task for task in _SlowShards(tmp_path, 2, 0).tasks if task.done])
    assert waiting.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    waiting.join(forked.LIMIT)
    assert waiting.exitcode == 0
    assert {int(task.read()["pid"][0]) for task in _SlowShards(tmp_path, 2, 0).tasks} == {waiting.pid}


def _finished(task, seconds, robust=None, **record):
    """Writes the files of a shard as if it had been computed."""
    task.path.parent.mkdir(exist_ok=True)
    columns = {} if robust is None else {"auto_attack": np.arange(task.images) < robust}
    np.savez(task.path.with_suffix(".npz"), **columns)
    record |= {"identity": dict(task.identity), "seconds": seconds, "images": task.images}
    record["sha256"] = files.sha256(task.path.with_suffix(".npz"))
    task.path.with_suffix(".json").write_text(json.dumps(record))


def test_remaining_time_is_estimated_from_passes(tmp_path):
    """Shards that nobody began: as many passes as their peers took; in a folder without any, as if nothing breaks."""
    tasks = [
        ShardTask(tmp_path / part / f"shard-{k}", 10, 1000, {"shard": k}, dict) for part in "ab" for k in range(3)
    ]
    state = work.Monitor(tasks).estimate()
    assert (state["shards_done"], state["passes_left"], state["seconds_left"]) == (0, 6000, None)
    _finished(tasks[0], 20.0, passes=400)
    _finished(tasks[1], 40.0, passes=800)
    state = work.Monitor(tasks).estimate()
    assert (state["shards"], state["shards_done"], state["passes_done"]) == (6, 2, 1200)
    assert state["passes_left"] == 600 + 3 * 1000
    assert state["seconds_left"] == 3600 * 60 / 1200
    assert state["bounds"] is None
    for task in tasks[2:]:
        _finished(task, 1.0)  # of an earlier version, which counted no passes
    state = work.Monitor(tasks).estimate()
    assert (state["passes_done"], state["passes_left"], state["seconds_left"]) == (1200 + 4 * 1000, 0, 0)


# --- refusals


@pytest.mark.parametrize("damage", ["altered", "cut", "removed"])
def test_a_damaged_shard_is_refused_and_recomputed(tmp_path, subject, compute, damage):
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
    work.compute_all(evaluation.tasks, quiet=True)
    assert {name: values.tolist() for name, values in evaluation.columns().items()} == before


def test_shards_of_another_model_are_refused(tmp_path, subject, compute):
    _done(tmp_path, subject, compute)
    with pytest.raises(DmatError, match=r"belongs to another evaluation \(weights differ\)"):
        _evaluation(tmp_path, subject, compute, weights="other").columns()


def test_nothing_is_computed_beside_shards_of_another_model(tmp_path, subject, compute):
    _done(tmp_path, subject, compute)
    other = _evaluation(tmp_path, subject, compute, weights="other")
    for action in (
        lambda task_list: work.Monitor(task_list).estimate(),
        lambda task_list: work.compute_all(task_list, quiet=True),
    ):
        with pytest.raises(DmatError, match=r"belongs to another evaluation \(weights differ\)"):
            action(other.tasks)


@pytest.mark.parametrize("entry", [[], {}, {"identity": {}, "images": 12, "seconds": "3", "sha256": ""}, {"sha256": 1}])
def test_a_shard_with_an_incomplete_record_is_not_done(tmp_path, subject, compute, entry):
    evaluation = _done(tmp_path, subject, compute)
    before = files.read_json(tmp_path / "shard-00000.json")
    (tmp_path / "shard-00000.json").write_text(json.dumps(entry))
    done = work.Monitor(evaluation.tasks).estimate()
    assert done["shards_done"] == done["shards"] - 1
    work.compute_all(evaluation.tasks, quiet=True)
    assert files.read_json(tmp_path / "shard-00000.json")["sha256"] == before["sha256"]


INVALID_IMAGES = {
    "of 255 levels": (lambda x, y: (255 * x, y), r"expected .*\[0, 1\]"),
    "normalised": (lambda x, y: ((x - 0.5) / 0.2, y), r"expected .*\[0, 1\]"),
    "none": (lambda x, y: (x[:0], y[:0]), "0 images to attack; expected 1 or more"),
    "label too large": (lambda x, y: (x, y + 3), "labels go from 3 to 6; expected 0 to 3 for a model with 4 classes"),
    "label below 0": (lambda x, y: (x, y - 1), "labels go from -1 to 2"),
}


@pytest.mark.parametrize("kind", INVALID_IMAGES)
def test_invalid_images_are_refused(tmp_path, subject, compute, kind):
    change, message = INVALID_IMAGES[kind]
    images, labels = change(subject.images, subject.labels)
    with pytest.raises(DmatError, match=message):
        _evaluation(tmp_path, dataclasses.replace(subject, images=images, labels=labels), compute)


def test_a_loss_that_needs_three_classes_is_refused(tmp_path, subject, compute):
    two = _Small()
    two.logits = torch.nn.Linear(32, 2)
    binary = dataclasses.replace(subject, model=two, classes=2, labels=subject.labels % 2)
    with pytest.raises(DmatError, match="pgd_loss is dlr and the model has 2 classes; expected 3 or more"):
        _evaluation(tmp_path, binary, compute, QUICK.model_copy(update={"pgd_loss": "dlr"}))


def test_epsilon_in_levels_is_refused(tmp_path, subject, compute):
    with pytest.raises(DmatError, match=r"epsilon is 128, larger than the l2 distance .* 8.00; .*128/255"):
        _evaluation(tmp_path, dataclasses.replace(subject, ball=Ball("l2", 128)), compute)


# --- reports


NO_COPIES = {"earlier test images": np.zeros(24, bool)}


def _verdict(evaluation, all_images=24):
    return evaluation.verdict(evaluation.columns(), all_images, NO_COPIES)


def test_only_the_standard_suite_on_all_images_is_a_headline(standard):
    evaluation, columns = standard, standard.columns()
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


def test_training_images_and_unknown_splits_give_no_headline(standard):
    evaluation, columns = standard, standard.columns()
    for split, message in {"train": "of the split train, not of test", "": "pass `--split test`"}.items():
        verdict = evaluation.verdict(columns, 24, NO_COPIES, split)
        assert verdict.measure == "auto_attack_not_test"
        assert message in verdict.reasons[0]
        assert evaluation.summary(columns, verdict)["headline"] is None
    assert evaluation.verdict(columns, 24, NO_COPIES, "test").reasons == ()


def test_few_copies_are_noted_beside_a_headline():
    copies = {"earlier test images": np.arange(200) < 1, "generated training images": np.arange(200) < 2}
    verdict = Verdict("auto_attack", (), (checks.unseen(copies),))
    assert verdict.sentences == verdict.notes
    assert verdict.notes == [
        "of 200 test images these are exact copies: 1 of earlier test images, 2 of generated training images"
    ]


def test_fewer_than_20_images_give_no_headline(tmp_path, subject, compute):
    small = dataclasses.replace(
        subject, images=subject.images[:19], labels=subject.labels[:19], ball=SOON_BROKEN,
        suite=auto_attack.suite("standard", 4),
    )  # fmt: skip
    verdict = _verdict(_done(tmp_path, small, compute), 19)
    assert "Only 19 images; a headline needs 20 or more." in verdict.reasons
    assert verdict.measure == "auto_attack_subset"


def test_checks_use_images_of_every_class_and_at_most_a_batch(tmp_path, subject, compute):
    """Sets may be sorted by class; a batch is what fits into device memory."""
    settings = QUICK.model_copy(update={"check_images": 8, "batch": 5})
    order = subject.labels.argsort(stable=True)
    ordered = dataclasses.replace(subject, images=subject.images[order], labels=subject.labels[order])
    evaluation = _done(tmp_path, ordered, compute, settings)
    x, y = evaluation._check_batch()
    assert len(x) == 5
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert len(evaluation._black_box.read()["robust"]) == 8
    assert evaluation.checks(evaluation.columns(), NO_COPIES)


def test_a_constant_model_is_rescored_equally(tmp_path, subject, compute):
    """Equal logits: the first class is predicted with a margin of 0, the same in any batch."""
    model = _Small().eval().requires_grad_(False)
    model.logits.weight.zero_()
    model.logits.bias.zero_()
    evaluation = _done(tmp_path, dataclasses.replace(subject, model=model, suite=None), compute)
    by_name = {check.name: check for check in evaluation.checks(evaluation.columns(), NO_COPIES)}
    assert by_name["rescored"].passed
    assert not by_name["zero_gradients"].passed


def test_other_attacks_have_a_nonstandard_name(tmp_path, subject, compute):
    evaluation = _done(tmp_path, subject, compute)
    verdict = _verdict(evaluation)
    assert verdict.measure == "auto_attack_nonstandard"
    assert verdict.reasons[0] == ("The attacks are nonstandard (apgd-ce, apgd-dlr), not those of standard AutoAttack.")
    assert "auto_attack_nonstandard" in evaluation.rows(evaluation.columns(), verdict)


def test_the_quick_tier_is_never_a_headline(tmp_path, subject, compute):
    """Its suite has the attacks of the standard one, whose flags may differ."""
    evaluation = _done(tmp_path, dataclasses.replace(subject, suite=auto_attack.suite("quick", 4)), compute)
    verdict, columns = _verdict(evaluation), evaluation.columns()
    assert verdict.measure == "auto_attack_quick"
    assert verdict.reasons[0].startswith("The attacks are the quick tier, which gives up most targets")
    summary = evaluation.summary(columns, verdict)
    assert summary["headline"] is None
    assert summary["auto_attack_quick"]["n"] == len(subject.labels)
    assert "auto_attack" not in summary
    assert evaluation.protocol({"norm": "linf", "epsilon": "8/255"}, len(subject.labels))["auto_attack"] == "quick"
    settings = config.evaluation({"auto_attack": "quick", "auto_attack_code": "pyautoattack"})
    with pytest.raises(DmatError, match="auto_attack_code pyautoattack, which has no quick tier"):
        Evaluation(tmp_path / "other", evaluation.subject, settings, compute, {})


def test_without_auto_attack_there_is_no_headline(tmp_path, subject, compute):
    evaluation = _done(tmp_path, dataclasses.replace(subject, suite=None), compute)
    verdict = _verdict(evaluation)
    assert verdict.reasons == ("AutoAttack was not run.",)
    assert verdict.tags["evaluation.measure"] == "pgd"
    assert evaluation.summary(evaluation.columns(), verdict)["headline"] is None


def test_a_failed_check_removes_the_headline_and_changes_the_name(tmp_path, subject, compute):
    """Logits so large that the cross-entropy has no gradient: a reason says so, the measure is called unchecked."""
    model = _Small()
    model.load_state_dict(subject.model.state_dict())
    model.eval().requires_grad_(False)
    model.logits.weight *= 1e4
    model.logits.bias *= 1e4
    suite = auto_attack.suite("standard", 4)
    steep = dataclasses.replace(subject, model=model, ball=SOON_BROKEN, suite=suite)
    evaluation = _done(tmp_path, steep, compute, QUICK.model_copy(update={"auto_attack": "standard"}))
    verdict = _verdict(evaluation)
    assert verdict.measure == "auto_attack_unchecked"
    assert any("gradient" in reason for reason in verdict.reasons)
    assert "zero_gradients" in verdict.tags["evaluation.checks"]
    assert verdict.sentences[0].startswith("no headline: ")
    assert evaluation.summary(evaluation.columns(), verdict)["headline"] is None


def test_rows_name_the_attack_that_broke_each_image(tmp_path, subject, compute):
    evaluation = _done(tmp_path, subject, compute)
    columns = evaluation.columns()
    rows = evaluation.rows(columns, _verdict(evaluation))
    for k, broken_by in enumerate(rows["broken_by"].tolist()):
        assert (broken_by == "none") == bool(columns["auto_attack"][k])
        assert (broken_by == "misclassified") == (not columns["clean"][k])
        assert broken_by in ("none", "misclassified", "apgd-ce", "apgd-dlr")
    assert len({len(values) for values in rows.values()} | {24}) == 1


def test_pictures_are_drawn_reproducibly(tmp_path, subject, compute):
    evaluation = _done(tmp_path / "work", subject, compute)
    columns = evaluation.columns()
    drawn = []
    for name in ("one", "two"):
        evaluation.draw(tmp_path / name, columns, "9/100", list("abcd"), _verdict(evaluation))
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(drawn[0]) == {"accuracy_against_epsilon.png", "per_class.png", "confusion.png", "perturbations.png"}
    assert drawn[0] == drawn[1]


def test_the_table_is_read_as_written(tmp_path):
    rows = {"flag": np.array([True, False]), "word": np.array(["none", "square"]), "size": np.array([0.5, 0.25], "f4")}
    write_table(tmp_path / "t.parquet", rows)
    actual = read_table(tmp_path / "t.parquet")
    assert {name: values.tolist() for name, values in actual.items()} == {n: v.tolist() for n, v in rows.items()}
    assert actual["flag"].dtype == bool


def test_protocol_holds_everything_needed_to_repeat_it(tmp_path, subject, compute):
    evaluation = _evaluation(tmp_path, subject, compute)
    assert evaluation.protocol({}, 30)["computed"] == []
    evaluation.tasks[0].compute()
    other = dataclasses.replace(evaluation.tasks[1], computed_by={"device": "another"})
    other.compute()
    plain = evaluation.protocol({"norm": "linf", "epsilon": "9/100"}, 30)
    assert (plain["images"], plain["of_images"], plain["shard"], plain["batch"]) == (24, 30, 10, 6)
    assert plain["pgd"] == "PGD-8, loss cw, step 0.0225, restarts 1"
    assert plain["auto_attack"] == "nonstandard (apgd-ce, apgd-dlr)"
    assert plain["precision"] == "fp32"
    another, this_machine = plain["computed"]  # of each shard the machine and versions that computed it
    assert another == {"device": "another", "shards": 1}
    assert this_machine["device"].startswith("cpu")
    assert this_machine["shards"] == 1
    assert set(this_machine["versions"]) == {"dmat", "torch", "pyautoattack"}
