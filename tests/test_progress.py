"""Progress of an evaluation: passes counted and expected, bounds of the accuracy, files of other processes."""

import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dmat import config, devices, liveness, seeds
from dmat.evaluation import evaluate, measures, progress, work
from dmat.evaluation.measures import Subject
from dmat.evaluation.progress import AttackProgress, Meter
from dmat.evaluation.work import ShardTask
from dmat.metrics.anytime import without_replacement
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.robust.auto_attack import ROBUST

SETTINGS = config.evaluation({"pgd_steps": 8, "sweep": [0.5, 2.0], "shard": 12, "batch": 5})


class _Model(torch.nn.Module):
    """Logits of 1x5x5 images; counts the passes that it makes itself."""

    def __init__(self):
        super().__init__()
        self.weights = torch.randn(10, 25, generator=torch.Generator().manual_seed(0))
        self.passes = 0

    def forward(self, images):
        self.passes += len(images) * (2 if images.requires_grad else 1)
        return images.flatten(1) @ self.weights.T


def _subject(epsilon, attacks):
    model, images = _Model(), 0.3 + 0.4 * torch.rand(12, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(1)
    model.passes = 0
    return Subject("model", model, 10, images, labels, Ball("linf", epsilon), auto_attack.suite(attacks, 10), True)


@pytest.mark.parametrize("attacks", ["standard", ("fab", "apgd-dlr")])
def test_the_passes_of_robust_images_are_those_expected(attacks):
    """With a radius that breaks nothing, the expectation and the count agree but for the passes between parts."""
    subject, states = _subject(1e-6, attacks), []
    columns = measures.measure_shard(subject, SETTINGS, 0, devices.resolve("cpu", "fp32", 1), states.append)
    assert columns["auto_attack"].all()
    expected = len(subject.labels) * measures.passes_per_image(subject, SETTINGS)
    assert states[0].passes_done + states[0].passes_left == expected
    assert states[-1].passes_done == subject.model.passes == pytest.approx(expected, rel=0.015)
    assert states[-1].passes_left == 0
    assert {state.unbroken for state in states} == {12}


def test_after_every_target_the_work_is_counted_anew():
    """Broken images take no more passes; the count of unbroken images falls to that of the robust ones."""
    subject, calls = _subject(0.04, "standard"), []
    _, broken_by = auto_attack.attack(
        subject.model, subject.images, subject.labels, subject.ball, subject.suite, seed=1, batch=5,
        watch=lambda *call: calls.append(call),
    )  # fmt: skip
    robust, (names, left, unbroken) = int((broken_by == ROBUST).sum()), zip(*calls, strict=True)
    assert 0 < robust < 10
    assert (calls[0], calls[-1]) == (("apgd-ce", 12 * subject.suite.passes, 12), ("square", 0, robust))
    assert {f"apgd-t {k}/9" for k in range(10)} | {f"fab-t {k}/9" for k in range(10)} <= set(names)
    assert all(later <= earlier for values in (left, unbroken) for earlier, later in itertools.pairwise(values))
    at_square = next(call for call in calls if call[0] == "square")
    assert at_square == ("square", at_square[2] * sum(subject.suite.parts("square")), at_square[2])


def test_the_standard_suite_counts_backward_passes_too():
    assert auto_attack.suite("standard", 10).passes == 2 * 101 + 9 * 2 * 101 + 9 * 3 * 100 + 5001


def test_a_meter_returns_the_logits_of_its_model():
    subject, states = _subject(0.1, "standard"), []
    meter = Meter(subject.model, 100, 12, states.append)
    assert torch.equal(meter(subject.images), subject.model(subject.images))
    meter(subject.images.clone().requires_grad_())
    assert states == [AttackProgress("", 12, 88, 12), AttackProgress("", 36, 64, 12)]
    meter.expect("fab-t 1/9", 7, 3)
    meter(subject.images[:9])
    assert states[2:] == [AttackProgress("fab-t 1/9", 36, 7, 3), AttackProgress("fab-t 1/9", 45, 0, 3)]


# --- bounds


@pytest.mark.parametrize(("population", "right"), [(40, 0), (40, 13), (150, 108)])
def test_bounds_hold_at_all_draws_at_once(population, right):
    """In 95 of 100 random orders the truth is within the bounds after every draw; never are they impossible."""
    generator, misses, orders = seeds.stream(1, "test/orders"), 0, 300
    bounds = functools.cache(lambda right_so_far, drawn: without_replacement(right_so_far, drawn, population))
    for _ in range(orders):
        drawn_right = np.cumsum(generator.permutation(np.arange(population) < right)).tolist()
        pairs = [bounds(count, drawn) for drawn, count in enumerate(drawn_right, 1)]
        misses += any(not low <= right <= high for low, high in pairs)
        assert pairs[-1] == (right, right)
    assert misses / orders <= 0.05 + 2 * (0.05 * 0.95 / orders) ** 0.5


def test_bounds_narrow_and_have_a_witness():
    """The posterior by its definition: hypergeometric likelihood of every possible number, uniform prior."""
    import math

    population, drawn, right = 60, 20, 14
    likelihood = [
        math.comb(k, right) * math.comb(population - k, drawn - right) / math.comb(population, drawn)
        for k in range(population + 1)
    ]
    possible = [k for k in range(61) if likelihood[k] / sum(likelihood) * (population + 1) > 0.05]
    assert without_replacement(right, drawn, population) == (possible[0], possible[-1])
    assert without_replacement(0, 0, population) == (0, population)


def _task(folder, number, **fields):
    values = {"images": 250, "passes": 1000, "identity": {"shard": number}, "make": dict, "suite": True, "mixed": True}
    return ShardTask(folder / f"shard-{number}", **(values | fields))


def _finish(task, robust, passes=500):
    def make(report):
        report(AttackProgress("square", passes, 0, robust))
        return {"auto_attack": np.arange(task.images) < robust}

    ShardTask(task.path, task.images, task.passes, task.identity, make).compute()


def _begin(task, unbroken, pid=None, **fields):
    values = {"attack": "fab-t 1/9", "passes_done": 300, "passes_left": 100, "unbroken": unbroken, "seconds": 3.0}
    values |= {"pid": pid or os.getpid(), "process": liveness.identity(os.getpid()), "boot": liveness.boot_id()}
    task.path.with_suffix(progress.SUFFIX).write_text(json.dumps(values | fields))


def test_what_is_broken_counts_at_once_and_what_is_open_both_ways(tmp_path):
    tasks = [_task(tmp_path, number) for number in range(4)]
    monitor = work.Monitor(tasks)
    bounds = monitor.estimate()["bounds"]
    assert (bounds["low"], bounds["high"], bounds["likely_low"]) == (0, 1, None)
    assert work.describe(bounds) == "robust 0.0 to 100.0 %"
    _finish(tasks[0], robust=180)
    _begin(tasks[2], unbroken=200)
    state = monitor.estimate()
    bounds = state["bounds"]
    assert (bounds["robust"], bounds["broken"], bounds["images"]) == (180, 70 + 50, 1000)
    assert (bounds["low"], bounds["high"]) == (0.18, 0.88)
    low, high = without_replacement(180, 250, 1000)
    assert (bounds["likely_low"], bounds["likely_high"]) == (low / 1000, high / 1000)
    assert 0.18 < bounds["likely_low"] < 0.72 < bounds["likely_high"] < 0.88
    assert state["passes_done"] == 500 + 300
    assert state["passes_left"] == 100 + 2 * 500  # as many as the finished shard took
    for number, robust in ((1, 150), (2, 190), (3, 170)):
        _finish(tasks[number], robust)
    bounds = monitor.estimate()["bounds"]
    assert {bounds[name] for name in ("low", "high", "likely_low", "likely_high")} == {0.69}


def test_only_shards_without_a_gap_before_them_are_a_sample(tmp_path):
    """Shards with few robust images end first: those behind one that is not finished must not count as random."""
    tasks = [_task(tmp_path, number) for number in range(4)]
    _finish(tasks[1], robust=10)
    monitor = work.Monitor(tasks)
    assert monitor.estimate()["bounds"]["likely_low"] is None
    _finish(tasks[0], robust=200)
    low, _ = without_replacement(210, 500, 1000)
    assert monitor.estimate()["bounds"]["likely_low"] == low / 1000


def test_images_sorted_by_class_get_no_likely_bounds(tmp_path):
    labels = np.arange(2000) % 10
    shuffled = seeds.stream(1, "test/labels").permutation(labels)
    assert evaluate._mixed(shuffled, 250)
    assert not evaluate._mixed(np.sort(labels), 250)
    assert evaluate._mixed(labels[:100], 250), "one shard"
    tasks = [_task(tmp_path, number, mixed=False) for number in range(2)]
    _finish(tasks[0], robust=200)
    assert work.Monitor(tasks).estimate()["bounds"]["likely_low"] is None


def test_a_subject_without_suite_has_no_bounds(tmp_path):
    tasks = [_task(tmp_path, 0, suite=False)]
    assert work.Monitor(tasks).estimate()["bounds"] is None


# --- files of processes


def test_the_file_of_a_killed_process_does_not_count(tmp_path):
    task = _task(tmp_path, 0)
    assert progress.read(task.path) is None
    _begin(task, 200)
    assert progress.read(task.path)["unbroken"] == 200
    _begin(task, 200, boot="of another machine", process="unknown")
    assert progress.read(task.path)["unbroken"] == 200
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    _begin(task, 200, pid=int(ended.stdout))
    assert progress.read(task.path) is None
    for damaged in ("", "[]", '{"attack": 1}'):
        task.path.with_suffix(progress.SUFFIX).write_text(damaged)
        assert progress.read(task.path) is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_shard_leaves_no_file_of_its_progress(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(progress, "_WRITE_SECONDS", 0)
    task, shown = _task(tmp_path, 0, suite=False), []

    def make(report):
        report(AttackProgress("pgd", 5, 995, 250))
        assert progress.read(task.path)["passes_left"] == 995
        if fails:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt) if fails else pytest.MonkeyPatch.context():
        ShardTask(task.path, 250, 1000, task.identity, make).compute(lambda: shown.append(1))
    assert shown == [1]
    assert not task.path.with_suffix(progress.SUFFIX).exists()
    record = task.record()
    assert record is None if fails else record["passes"] == 5


def test_the_bar_counts_passes_and_shows_bounds(tmp_path, capsys):
    tasks = [_task(tmp_path, number) for number in range(2)]
    for task in tasks:
        _finish(task, 200, passes=1500)
    work.compute_all(tasks, quiet=False)
    shown = capsys.readouterr().err
    assert "3.00k/3.00k" in shown
    assert "robust 80.0 to 80.0 %, likely 80.0 to 80.0 %" in shown
    work.compute_all(tasks, quiet=True)
    assert capsys.readouterr().err == ""


def test_programs_get_lines_of_json_on_stderr(tmp_path, capsys, monkeypatch):
    """At first and then again and again, also of shards that another process computes; stdout stays empty."""
    monkeypatch.setattr(work, "_LINE_SECONDS", 0.01)
    tasks = [_task(tmp_path, number) for number in range(2)]
    _finish(tasks[0], 200)
    _begin(tasks[1], 100)
    lines, err = [], ""
    with work.progress_lines(work.Monitor(tasks)):
        while len(lines) < 3:
            err += capsys.readouterr().err
            lines = err.splitlines()
    state = json.loads(lines[0])["progress"]
    assert (state["bounds"]["low"], state["bounds"]["high"]) == (0.4, 0.6)
    assert state["passes_done"] == 500 + 300
    assert json.loads(lines[2])["progress"]["passes_left"] == 100
    assert capsys.readouterr().out == ""
    with work.progress_lines(None):
        pass
    assert capsys.readouterr().err == ""


def test_lines_of_json_leave_shards_of_another_request_to_the_evaluation(tmp_path, capsys):
    _finish(_task(tmp_path, 0), 200)
    with work.progress_lines(work.Monitor([_task(tmp_path, 0, identity={"shard": "of another"})])):
        pass
    assert capsys.readouterr().err == ""
