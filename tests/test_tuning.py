"""Studies: trials are what training computes, bad ones stop early, a killed study ends as an undisturbed one."""

import csv
import os
import random
import signal
import sqlite3

import optuna
import pytest

from dmat import config, files, tuning
from dmat.errors import DmatError, Interrupted, Pruned
from dmat.jobs import workspace
from dmat.training.long_run import MetricsLog
from tests import forked

TRIALS = 6


def _study(project, trials=TRIALS, code=0, **environment):
    found, text = forked.run(project.folder, "tune", "--trials", str(trials), "--json", **environment)
    assert found == code, text
    return text


def _table(project):
    """Rows of trials.csv without the time they took."""
    rows = csv.DictReader((project.folder / "artifacts/tune/generated/trials.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def studied(finished, tmp_path_factory):
    project = finished.copy_without("nothing", tmp_path_factory.mktemp("studied") / "project")
    _study(project)
    return project


def test_a_study_has_its_trials_its_table_and_its_pictures(studied):
    rows, summary = _table(studied), files.read_json(studied.folder / "artifacts/tune/generated/summary.json")
    assert [int(row["trial"]) for row in rows] == list(range(TRIALS))
    assert summary["trials"] == TRIALS == summary["complete"] + summary["pruned"] + summary["fail"]
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    best = max(complete, key=lambda row: float(row["validation_robust"]))
    assert summary["best"]["trial"] == int(best["trial"])
    assert summary["best"]["beta"] == float(best["beta"])
    space = config.load(studied.folder / "params.yaml").sections["tune"].space
    for row in rows:
        assert all(wanted.low <= float(row[name]) <= wanted.high for name, wanted in space.items())
    pictures = {path.stem for path in (studied.folder / "artifacts/tune/generated").glob("*.png")}
    assert pictures >= {"history", "curves", "slices"}


def test_the_first_trial_is_the_arm_as_it_is_and_equals_a_training_of_that_length(studied, tmp_path):
    first = _table(studied)[0]
    assert (first["beta"], first["learning_rate"], first["generated_share"]) == ("5.0", "0.2", "0.7")
    project = studied.copy_without("train_robust", tmp_path / "project")
    project.write({"arms": {"generated": {"images": 640, "evaluate_every": 128}}})
    for word in ("mix_images", "train_robust"):
        project.run(word)
    metrics = files.read_json(project.folder / "artifacts/metrics/train_robust/generated-1.json")
    assert float(first["validation_robust"]) == metrics["best_validation_robust"]


def test_pruned_trials_stopped_early_below_the_median_and_their_reports_stay(studied):
    rows = _table(studied)
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert pruned, rows
    for row in pruned:
        assert int(row["images_seen"]) < 640
        assert "is below the median" in row["reason"]
        trial = next((studied.folder / "runs/tune").glob(f"generated-*/trial-{int(row['trial']):04d}"))
        lines = (trial / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == int(row["images_seen"]) / 128
        assert not (trial / "checkpoint.dmat").exists()


def test_trials_is_the_total(studied):
    before = _table(studied)
    _study(studied, TRIALS)
    assert _table(studied) == before
    _study(studied, TRIALS + 1)
    assert _table(studied)[:TRIALS] == before
    assert len(_table(studied)) == TRIALS + 1


def test_a_study_killed_at_random_moments_ends_as_if_undisturbed(finished, studied, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "killed")
    rng = random.Random(1)
    killed = 0
    for _ in range(5):
        command = forked.Command(project.folder, "tune", "--trials", str(TRIALS), "--json")
        killed += command.kill_after(rng.uniform(0.3, 2))
    _study(project)
    assert killed >= 3
    assert _table(project) == _table(studied)[:TRIALS]
    curves = [
        sorted((p.folder / "runs/tune").glob("generated-*/trial-*/metrics.jsonl"))[:TRIALS] for p in (project, studied)
    ]
    assert [path.read_text() for path in curves[0]] == [path.read_text() for path in curves[1]]


def test_a_signal_saves_the_trial_and_the_command_goes_on(finished, studied, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "stopped")
    command = forked.Command(project.folder, "tune", "--trials", str(TRIALS), "--json")
    forked.until(lambda: list((project.folder / "runs/tune").glob("generated-*/trial-0001/checkpoint.dmat")))
    command.signal(signal.SIGTERM)
    code, text = command.wait()
    assert code == 143
    assert "the same command goes on from here" in text
    _study(project)
    assert _table(project) == _table(studied)[:TRIALS]


def test_a_diverged_trial_fails_with_its_reason_and_the_study_goes_on(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "wild")
    project.write({"tune": {"space": {"learning_rate": {"low": 1e18, "high": 1e20, "scale": "log"}}}})
    _study(project, 2, DMAT_TRACKING="on")
    assert [row["state"] for row in _table(project)] == ["FAIL", "FAIL"]
    assert all("lower the learning rate" in row["reason"] for row in _table(project))
    assert {run.info.status for run in _runs(project) if "optuna.trial" in run.data.tags} == {"FAILED"}


def _runs(project):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("dmat").experiment_id])


def test_mlflow_has_a_run_for_each_trial_with_its_true_status_below_the_study(finished, studied, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "tracked")
    _study(project, DMAT_TRACKING="on")
    (study,) = [run for run in _runs(project) if run.data.tags["dmat.stage"] == "tune"]
    trials = [run for run in _runs(project) if "optuna.trial" in run.data.tags]
    assert study.info.status == "FINISHED"
    assert study.data.metrics["trials"] == TRIALS
    assert study.data.tags["optuna.storage"].startswith("sqlite:////")
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {study.info.run_id}
    states = {int(row["trial"]): row["state"] for row in _table(project)}
    status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    assert {int(run.data.tags["optuna.trial"]): run.info.status for run in trials} == {
        number: status[state] for number, state in states.items()
    }
    assert {run.data.tags["optuna.state"] for run in trials} == set(states.values())
    assert {"beta", "learning_rate", "generated_share"} <= set(trials[0].data.params)


def test_another_space_is_another_study_and_fresh_keeps_the_old_one(studied, tmp_path):
    project = studied.copy_without("nothing", tmp_path / "other")
    project.write({"tune": {"space": {"beta": {"low": 2.0}}}})
    _study(project, 1)
    assert len(_table(project)) == 1
    forked.run(project.folder, "tune", "--trials", "1", "--fresh", "--json")
    assert len(list((project.folder / "runs/tune").glob("generated-*/study.json"))) == 2
    with sqlite3.connect(project.folder / "runs/tune/studies.db") as database:
        names = [name for (name,) in database.execute("select study_name from studies")]
    assert len(names) == 3
    assert sum("-before-" in name for name in names) == 1


def test_one_study_at_a_time_and_a_file_without_one_are_answered(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "two")
    first = forked.Command(project.folder, "tune", "--trials", "2", "--json")
    forked.until(lambda: list((project.folder / "runs/tune").glob("generated-*/holder.json")))
    assert f"is being computed by process {first.process.pid}" in _study(project, code=2)
    assert first.wait()[0] == 0
    del project.params["tune"]
    project.write({})
    assert "has no section `tune`" in _study(project, code=2)


@pytest.fixture
def small(finished, tmp_path, monkeypatch):
    """A study inside this process whose trials take no time: their value is made of their parameters."""
    project = finished.copy_without("nothing", tmp_path / "small")

    def train(self, folder, record, watcher):
        value = float(record.beta / 10 - abs(record.learning_rate - 0.3) + record.generated_share / 3)
        for seen in (128, 256):
            watcher(seen, {tuning.OBJECTIVE: value * seen / 256})
        return value

    monkeypatch.setattr(tuning._Worker, "train", train)

    def run(trials, fresh=False):
        params = config.load(project.folder / "params.yaml")
        place = workspace.find(project.folder)
        return tuning.run(tuning.plan(params, place), params, place, trials, fresh=fresh, quiet=True)

    run.project = project
    return run


def _curve(project):
    return next((project.folder / "runs/tune").glob("generated-*/metrics.jsonl")).read_text()


@pytest.mark.parametrize("trial", [0, 3, 12], ids=["enqueued", "drawn at random", "drawn by TPE"])
def test_a_trial_killed_between_two_of_its_values_is_the_same_trial(small, monkeypatch, trial):
    small(14)
    undisturbed = _table(small.project), _curve(small.project)
    real, calls = optuna.Trial.suggest_float, []

    def suggest_float(self, name, *rest, **more):
        calls.append(name)
        if len(calls) == 3 * trial + 2:
            raise SystemExit("killed")
        return real(self, name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "suggest_float", suggest_float)
        with pytest.raises(SystemExit):
            small(14, fresh=True)
    small(14)
    assert (_table(small.project), _curve(small.project)) == undisturbed


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_word_that_a_trial_ended_loses_and_doubles_nothing(small, monkeypatch, when):
    small(5)
    undisturbed = _table(small.project), _curve(small.project)
    real, calls = optuna.Study.tell, []

    def tell(self, *words):
        calls.append(words)
        if len(calls) == 3 and when == "before":
            raise SystemExit("killed")
        real(self, *words)
        if len(calls) == 3:
            raise SystemExit("killed")

    monkeypatch.setenv("DMAT_TRACKING", "on")
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", tell)
        with pytest.raises(SystemExit):
            small(5, fresh=True)
    small(5)
    assert (_table(small.project), _curve(small.project)) == undisturbed
    by_trial = {run.data.tags.get("optuna.trial"): run for run in _runs(small.project)}
    assert len(by_trial) == len(_runs(small.project)) == 6  # five trials and their study
    for row in undisturbed[0]:
        assert by_trial[row["trial"]].data.tags["optuna.state"] == row["state"]


def test_a_signal_while_a_trial_is_pruned_ends_the_command_after_it(small, monkeypatch):
    small(2)

    def train(self, folder, record, watcher):
        (folder / "here").touch()
        with tuning.Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
            raise Pruned("below the median")

    monkeypatch.setattr(tuning._Worker, "train", train)
    with pytest.raises(Interrupted, match="SIGTERM"):
        small(4)
    assert len(list((small.project.folder / "runs/tune").glob("generated-*/trial-*/here"))) == 1
    monkeypatch.undo()
    _study(small.project, 3)
    assert [row["state"] for row in _table(small.project)] == ["COMPLETE", "COMPLETE", "PRUNED"]


def test_a_study_with_nothing_left_to_do_is_not_tracked_again(small, monkeypatch):
    monkeypatch.setenv("DMAT_TRACKING", "on")
    small(3)
    before = {run.info.run_id: run.to_dictionary() for run in _runs(small.project)}
    summary = small(2)
    assert summary["trials"] == 3
    assert {run.info.run_id: run.to_dictionary() for run in _runs(small.project)} == before


def test_the_log_of_a_study_is_closed_when_a_trial_fails(small, monkeypatch):
    logs = []
    monkeypatch.setattr(MetricsLog, "__enter__", lambda self: logs.append(self) or self)
    monkeypatch.setattr(tuning._Worker, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(1)
    assert logs[0]._file.closed


def test_a_damaged_storage_is_named_and_left_as_it_is(small):
    small(1)
    path = small.project.folder / "runs/tune/studies.db"
    for damage in (b"not a database, but long enough to be read as one" * 100, path.read_bytes()[:5000]):
        path.write_bytes(damage)
        with pytest.raises(DmatError, match=r"studies.db cannot be used .* bring back a good copy, or move it away"):
            small(2)
        assert path.read_bytes() == damage
