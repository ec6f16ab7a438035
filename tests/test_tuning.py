"""Studies: a trial equals a training, bad trials stop early, a killed study ends as an undisturbed one, trials run on
workers, and any number of drivers share one study.

Run alone: pytest tests/test_tuning.py
"""

import contextlib
import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request

import optuna
import psutil
import pytest
import torch
import yaml
from optuna.storages import RDBStorage

from dmat import config, files, tuning
from dmat.errors import DmatError, Interrupted, Pruned
from dmat.pipeline import code_identity
from dmat.training.interruption import Interruption
from dmat.tuning import report, storage, studies, trials
from dmat.tuning.driver import Driver
from dmat.tuning.plan import MAX_LOST_WORKERS
from dmat.workspace import find_workspace
from tests import forked, servers
from tests.databases import STORES, database_url
from tests.servers import free_port

TRIALS = 6


def _start(project, trials=TRIALS, *arguments, output=".output", **environment):
    return forked.Command(
        project.folder, "tune", "start", "--trials", str(trials), "--json", *arguments, output=output, **environment
    )


def _study(project, trials=TRIALS, code=0, arguments=(), output=".output", **environment):
    exit_code, text = _start(project, trials, *arguments, output=output, **environment).wait()
    assert exit_code == code, text
    return text


def _table(project):
    """Rows of trials.csv without the time they took."""
    rows = csv.DictReader((project.folder / "artifacts/tune/generated/trials.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _project_without_study(finished, folder):
    """A project with a radius at which such short trials differ; at the recipe's radius most of them score 0."""
    project = finished.copy_without("nothing", folder)
    project.write({"train_robust": {"threat": {"epsilon": "1/50"}}})
    return project


@pytest.fixture(scope="module")
def studied(finished, tmp_path_factory):
    project = _project_without_study(finished, tmp_path_factory.mktemp("studied") / "project")
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
    space = config.load(studied.folder / "params.yaml").tune.space
    for row in rows:
        assert all(bounds.low <= float(row[name]) <= bounds.high for name, bounds in space.items())
    pictures = {path.stem for path in (studied.folder / "artifacts/tune/generated").glob("*.png")}
    assert pictures >= {"history", "curves", "slices"}


def test_the_first_trial_is_the_arm_as_it_is_and_equals_a_training_of_that_length(studied, tmp_path):
    first = _table(studied)[0]
    assert (first["beta"], first["learning_rate"], first["generated_share"]) == ("5.0", "0.2", "0.7")
    project = studied.copy_without("train_robust", tmp_path / "project")
    project.write({"arms": {"generated": {"images_seen": 640, "evaluate_every": 128}}})
    for stage_name in ("mix_images", "train_robust"):
        project.run(stage_name)
    metrics = files.read_json(project.folder / "artifacts/metrics/train_robust/generated-1.json")
    assert float(first["validation_robust"]) == metrics["best_validation_robust"]


def test_pruned_trials_stopped_early_below_the_median_and_their_reports_stay(studied):
    rows = _table(studied)
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert pruned, rows
    for row in pruned:
        assert int(row["images_seen"]) < 640
        assert "is behind the other trials (median)" in row["reason"]
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
    project = _project_without_study(finished, tmp_path / "killed")
    rng = random.Random(1)
    killed = 0
    for _ in range(5):
        command = _start(project)
        killed += command.kill_after(rng.uniform(0.3, 2))
    _study(project)
    assert killed >= 3
    assert _table(project) == _table(studied)[:TRIALS]
    curves = [
        sorted((p.folder / "runs/tune").glob("generated-*/trial-*/metrics.jsonl"))[:TRIALS] for p in (project, studied)
    ]
    assert [path.read_text() for path in curves[0]] == [path.read_text() for path in curves[1]]


def test_a_signal_saves_the_trial_and_the_command_resumes_it(finished, studied, tmp_path):
    project = _project_without_study(finished, tmp_path / "stopped")
    command = _start(project)
    forked.until(lambda: list((project.folder / "runs/tune").glob("generated-*/trial-0001/checkpoint.dmat")))
    command.signal(signal.SIGTERM)
    code, text = command.wait()
    assert code == 143
    assert "the same command resumes from here" in text
    _study(project)
    assert _table(project) == _table(studied)[:TRIALS]


def test_a_diverged_trial_fails_with_its_reason_and_the_study_continues(finished, tmp_path, put_store):
    project = finished.copy_without("nothing", tmp_path / "wild")
    put_store(project.folder)
    project.write({"tune": {"space": {"learning_rate": {"low": 1e18, "high": 1e20, "scale": "log"}}}})
    _study(project, 2, DMAT_TRACKING="on")
    assert [row["state"] for row in _table(project)] == ["FAIL", "FAIL"]
    assert all("lower the learning rate" in row["reason"] for row in _table(project))
    assert {run.info.status for run in _runs(project) if "optuna.trial" in run.data.tags} == {"FAILED"}


def _runs(project):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("dmat").experiment_id])


def test_mlflow_has_a_run_for_each_trial_with_its_true_status_below_the_study(finished, tmp_path, put_store):
    project = finished.copy_without("nothing", tmp_path / "tracked")
    put_store(project.folder)
    _study(project, DMAT_TRACKING="on")
    (study,) = [run for run in _runs(project) if run.data.tags["dmat.stage"] == "tune"]
    trials = [run for run in _runs(project) if "optuna.trial" in run.data.tags]
    assert study.info.status == "FINISHED"
    assert study.data.tags["constant.trials"] == str(TRIALS)
    assert study.data.tags["optuna.storage"].startswith("sqlite:////")
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {study.info.run_id}
    states = {int(row["trial"]): row["state"] for row in _table(project)}
    status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    assert {int(run.data.tags["optuna.trial"]): run.info.status for run in trials} == {
        number: status[state] for number, state in states.items()
    }
    assert {run.data.tags["optuna.state"] for run in trials} == set(states.values())
    for run in (study, *trials):
        folder = project.folder / run.data.tags["dmat.work"]
        assert files.read_json(folder / "tracking.json")["run"] == run.info.run_id
    assert (project.folder / study.data.tags["dmat.work"]).name.endswith(f"-{study.data.tags['dmat.fingerprint']}")
    assert not any("dmat.fingerprint" in run.data.tags for run in trials), "a trial has none of its own"
    assert {"beta", "learning_rate", "generated_share"} <= set(trials[0].data.params)


def test_another_space_is_another_study_and_fresh_keeps_the_old_one(studied, tmp_path):
    project = studied.copy_without("nothing", tmp_path / "other")
    project.write({"tune": {"space": {"beta": {"low": 2.0}}}})
    _study(project, 1)
    assert len([row for row in _table(project) if not row["imported_from"]]) == 1
    _study(project, 1, arguments=["--fresh"])
    assert len(list((project.folder / "runs/tune").glob("generated-*/study.json"))) == 2
    with sqlite3.connect(project.folder / "runs/tune/studies.db") as database:
        names = [name for (name,) in database.execute("select study_name from studies")]
    assert len(names) == 3
    assert sum("-before-" in name for name in names) == 1


def test_params_without_a_study_are_refused(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "none")
    del project.params["tune"]
    project.write({})
    assert "has no section `tune`" in _study(project, code=2)


def _value(values):
    """What a trial without a training is worth."""
    return float(values["beta"] / 10 - abs(values["learning_rate"] - 0.3) + values["generated_share"] / 3)


def _quick_study(project, monkeypatch):
    """Runs the study of a project in this process; its trials take no time, and its report has no pictures."""
    project.write({"tune": {"pruner": "none"}})

    def compute(context, values, folder, watcher):
        for seen in (128, 256):
            watcher(seen, {tuning.OBJECTIVE: _value(values) * seen / 256})
        return _value(values)

    monkeypatch.setattr(trials, "compute", compute)
    monkeypatch.setattr(report, "_pictures", lambda *_: [])
    monkeypatch.setattr(report, "_page", lambda *_: "")

    def run(total, fresh=False, url=None):
        params = config.load(project.folder / "params.yaml")
        workspace = find_workspace(project.folder)
        options = studies.StudyOptions(total, fresh=fresh, quiet=True)
        return studies.run(tuning.plan(params, workspace, url), params, workspace, options)

    run.project = project
    return run


@pytest.fixture
def small(finished, tmp_path, monkeypatch):
    """A study in this process whose trials take no time: their value is computed from their parameters."""
    return _quick_study(finished.copy_without("nothing", tmp_path / "small"), monkeypatch)


def _curve(project):
    return next((project.folder / "runs/tune").glob("generated-*/metrics.jsonl")).read_text()


@pytest.fixture(scope="module")
def fourteen_trials(finished, tmp_path_factory):
    """Table and curve of an undisturbed study."""
    with pytest.MonkeyPatch.context() as patch:
        project = finished.copy_without("nothing", tmp_path_factory.mktemp("fourteen") / "project")
        _quick_study(project, patch)(14)
    return _table(project), _curve(project)


@pytest.mark.parametrize("trial", [0, 12], ids=["known", "drawn by TPE"])
@pytest.mark.parametrize("call", ["create_new_trial", "record_heartbeat", "set_trial_param"])
def test_a_trial_killed_while_it_is_created_stays_the_same_trial(small, fourteen_trials, monkeypatch, trial, call):
    real, calls = getattr(RDBStorage, call), []

    def killed(*arguments):
        calls.append(arguments)
        result = real(*arguments)
        if len(calls) == (3 * trial + 2 if call == "set_trial_param" else trial + 1):
            raise SystemExit("killed")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(RDBStorage, call, killed)
        with pytest.raises(SystemExit):
            small(14)
    small(14)
    assert (_table(small.project), _curve(small.project)) == fourteen_trials


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_report_that_a_trial_ended_loses_and_doubles_nothing(small, monkeypatch, put_store, when):
    small(5)
    undisturbed = _table(small.project), _curve(small.project)
    real, calls = optuna.Study.tell, []

    def tell(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3 and when == "before":
            raise SystemExit("killed")
        real(*arguments, **options)
        if len(calls) == 3:
            raise SystemExit("killed")

    monkeypatch.setenv("DMAT_TRACKING", "on")
    put_store(small.project.folder)
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

    def compute(context, values, folder, watcher):
        (folder / "here").touch()
        with Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
            raise Pruned("behind the other trials")

    monkeypatch.setattr(trials, "compute", compute)
    with pytest.raises(Interrupted, match="SIGTERM"):
        small(4)
    assert len(list((small.project.folder / "runs/tune").glob("generated-*/trial-*/here"))) == 1
    monkeypatch.undo()
    _study(small.project, 3)
    assert [row["state"] for row in _table(small.project)] == ["COMPLETE", "COMPLETE", "PRUNED"]


def test_a_study_with_nothing_left_to_do_is_not_tracked_again(small, monkeypatch, put_store):
    monkeypatch.setenv("DMAT_TRACKING", "on")
    put_store(small.project.folder)
    small(3)
    before = {run.info.run_id: run.to_dictionary() for run in _runs(small.project)}
    summary = small(2)
    assert summary["trials"] == 3
    assert {run.info.run_id: run.to_dictionary() for run in _runs(small.project)} == before


@pytest.mark.parametrize("stage", ["mix_images", "train_robust"])
def test_a_study_belongs_to_its_code_and_ignores_results_of_other_code(small, monkeypatch, stage):
    small(2)
    before = _table(small.project)
    real, other = code_identity.of_stage, 32 * "0"
    with monkeypatch.context() as patch:  # the code changes while the third trial computes
        patch.setattr(code_identity, "of_stage", lambda name, *_: other if name == stage else real(name))
        with pytest.raises(DmatError, match=f"the code of {stage} is 000000000000; code.yaml says"):
            small(4)
        patch.setattr(code_identity, "_loaded_identity", lambda name: other if name == stage else real(name))
        with pytest.raises(DmatError, match=f"the code of {stage} is 000000000000; code.yaml says"):
            small(4)
        workspace = find_workspace(small.project.folder)
        study_status = tuning.status(tuning.plan(config.load(small.project.folder / "params.yaml"), workspace))
        assert (study_status["complete"], len(study_status["at_work"])) == (2, 1), "status works with any code"
    locked = code_identity.read(small.project.folder)
    same = {stage: [{"code": real(stage), "why": "a test", "compared": "nothing"}]}
    code_identity.write(small.project.folder, code_identity.CodeLock({**locked.identities, stage: other}, same))
    small(1)
    assert len([*(small.project.folder / "runs/tune").glob("generated-*/")]) == 2, "a study of its own"
    code_identity.write(small.project.folder, locked)
    small(4)
    assert _table(small.project)[:2] == before
    assert [row["state"] for row in _table(small.project)] == 4 * ["COMPLETE"]


@pytest.mark.parametrize(
    ("errors", "state", "reason"),
    [
        ([ZeroDivisionError("a")] * 2, "COMPLETE", ""),
        ([ZeroDivisionError("a")] * 3, "FAIL", "ended with an exception 3 times, last ZeroDivisionError: a"),
        ([torch.OutOfMemoryError("CUDA out of memory. Tried")], "FAIL", "out of memory: CUDA out of memory. Tried"),
        ([MemoryError("no")], "FAIL", "out of memory: no"),
    ],
)
def test_an_exception_is_tried_again_up_to_a_limit_and_never_ends_the_study(small, monkeypatch, errors, state, reason):
    real, left = trials.compute, list(errors)

    def compute(context, values, folder, watcher):
        if left and folder.name == "trial-0001":
            raise left.pop()
        return real(context, values, folder, watcher)

    monkeypatch.setattr(trials, "compute", compute)
    small(3)
    rows = _table(small.project)
    assert [row["state"] for row in rows] == ["COMPLETE", state, "COMPLETE"]
    assert rows[1]["reason"] == reason


class _Killed(BaseException):
    """Ends a command as kill -9 does: nothing of the driver runs after it."""


@pytest.fixture
def without_end(monkeypatch):
    monkeypatch.setattr(Driver, "_saving_counts", lambda self: contextlib.nullcontext())


def test_a_trial_that_kills_its_process_fails_with_that_reason(
    small, monkeypatch, without_end
):
    real = trials.compute

    def compute(context, values, folder, watcher):
        if folder.name == "trial-0001":
            raise _Killed
        return real(context, values, folder, watcher)

    monkeypatch.setattr(trials, "compute", compute)
    for _ in range(MAX_LOST_WORKERS + 1):
        with pytest.raises(_Killed):
            small(3)
    small(3)
    assert [row["state"] for row in _table(small.project)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert _table(small.project)[1]["reason"] == "6 workers were killed in it"


def test_a_trial_of_a_driver_that_was_killed_long_ago_keeps_its_number(small, monkeypatch, without_end):
    monkeypatch.setattr(storage, "GRACE", 1)
    real = trials.compute

    def compute(context, values, folder, watcher):
        raise _Killed

    monkeypatch.setattr(trials, "compute", compute)
    with pytest.raises(_Killed):
        small(2)
    monkeypatch.setattr(trials, "compute", real)
    time.sleep(2.5)
    assert small(2)["complete"] == 2
    assert [int(row["trial"]) for row in _table(small.project)] == [0, 1]


def test_a_trial_that_is_stopped_often_is_not_one_that_kills_its_process(small, monkeypatch):
    real, stops = trials.compute, [1] * (MAX_LOST_WORKERS + 2)

    def compute(context, values, folder, watcher):
        if stops:
            stops.pop()
            raise Interrupted(143, "stopped")
        return real(context, values, folder, watcher)

    monkeypatch.setattr(trials, "compute", compute)
    while stops:
        with pytest.raises(Interrupted):
            small(1)
    assert small(1)["complete"] == 1


def test_a_driver_that_slept_leaves_its_trial_to_the_one_that_resumed_it(small, monkeypatch):
    """Its next report is refused, and the trial that repeats the lost one counts in its place."""
    real, lost = trials.compute, []

    def compute(context, values, folder, watcher):
        if folder.name == "trial-0001" and not lost:
            rdb = storage.connect(f"sqlite:///{small.project.folder}/runs/tune/studies.db")
            (study,) = [optuna.load_study(study_name=name, storage=rdb) for name in optuna.get_all_study_names(rdb)]
            lost.append(study.trials[1])
            rdb.set_trial_state_values(lost[0]._trial_id, optuna.trial.TrialState.FAIL)
            rdb.get_heartbeat_stale_trial_callback()(study, lost[0])
        return real(context, values, folder, watcher)

    monkeypatch.setattr(trials, "compute", compute)
    summary = small(3)
    assert lost
    assert (summary["trials"], summary["complete"]) == (3, 3)
    assert [int(row["trial"]) for row in _table(small.project)] == [0, 2, 3]
    rows = {int(row["trial"]): row for row in _table(small.project)}
    assert float(rows[2]["beta"]) == lost[0].params["beta"], "taken before a new one"


@pytest.mark.parametrize("store", STORES)
def test_drivers_of_two_folders_share_a_study_and_one_resumes_what_a_killed_one_left(
    finished, tmp_path, request, monkeypatch, without_end, store
):
    monkeypatch.setattr(storage, "HEARTBEAT", 1)
    monkeypatch.setattr(storage, "GRACE", 1)
    url = database_url(store, request, tmp_path)
    projects = [finished.copy_without("nothing", tmp_path / name) for name in ("here", "there")]
    here, there = (_quick_study(project, monkeypatch) for project in projects)
    real, computed = trials.compute, []

    def compute(context, values, folder, watcher):
        watcher(64, {tuning.OBJECTIVE: 0.25})
        if folder == next((projects[1].folder / "runs/tune").glob("generated-*/trial-0001"), None):
            raise _Killed
        computed.append(folder)
        return real(context, values, folder, watcher)

    monkeypatch.setattr(trials, "compute", compute)
    with pytest.raises(_Killed):
        there(4, url=url)
    summary = here(4, url=url)
    assert (summary["trials"], summary["complete"], summary["fail"]) == (4, 4, 0)
    (name,) = optuna.get_all_study_names(url)
    study = optuna.load_study(study_name=name, storage=url)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "FAIL"}
    lost, repeated = study.trials[1], next(trial for trial in study.trials if trial.system_attrs.get("retry_history"))
    assert (lost.state.name, repeated.system_attrs["retry_history"], repeated.params) == ("FAIL", [1], lost.params)
    assert repeated.intermediate_values.keys() == {64, 128, 256}, "its reports are kept"
    assert [folder.name for folder in computed].count("trial-0001") == 1, "the folder of the first attempt"
    assert here(4, url=url) == summary
    monkeypatch.setattr(trials, "compute", real)
    assert there(5, url=url)["complete"] == 5, "the other driver comes back"


@pytest.mark.parametrize(
    ("space", "point", "message"),
    [
        (
            {"batch": {"choices": [64, 4]}, "generated_share": {"low": 0.1, "high": 0.9}},
            {"batch": 4, "generated_share": 0.1},
            "leaves 0 generated ones; expected some of both kinds",
        ),
        ({"augmentation": {"choices": ["none", "cutout18"]}}, {"augmentation": "cutout18"}, "removes up to 18 pixels"),
    ],
    ids=["each other", "the data"],
)
def test_values_that_do_not_fit_fail_their_trial_alone(small, monkeypatch, space, point, message):
    monkeypatch.undo()
    small.project.params["tune"]["space"] = space
    small.project.write({"tune": {"enqueue": [point]}})
    small(2)
    rows = _table(small.project)
    assert [row["state"] for row in rows] == ["COMPLETE", "FAIL"]
    assert message in rows[1]["reason"]


def test_folders_left_by_a_moved_storage_are_set_aside(small):
    small(2)
    (small.project.folder / "runs/tune/studies.db").unlink()
    small.project.write({"tune": {"enqueue": [{"beta": 3.0}]}})
    small(2)
    aside = {path.parent.name for path in (small.project.folder / "runs/tune").glob("generated-*/trial-*/before-*")}
    assert aside == {"trial-0001"}, "the other trial has the values of the first study, so its folder fits"
    assert float(_table(small.project)[1]["beta"]) == 3.0


def test_a_damaged_storage_is_named_and_left_as_it_is(small):
    small(1)
    path = small.project.folder / "runs/tune/studies.db"
    for damage in (b"not a database, but long enough to be read as one" * 100, path.read_bytes()[:5000]):
        path.write_bytes(damage)
        with pytest.raises(DmatError, match=r"studies.db cannot be used .* bring back a good copy, or move it away"):
            small(2)
        assert path.read_bytes() == damage


def test_a_study_whose_space_changed_imports_the_trials_that_fit(small):
    small(8)
    old = _table(small.project)
    small.project.write({"tune": {"space": {"learning_rate": {"low": 0.1}}}})
    small(2)
    rows = _table(small.project)
    fitting = [row for row in old if float(row["learning_rate"]) >= 0.1]
    assert 0 < len(fitting) < 8
    imported = [row for row in rows if row["imported_from"]]
    assert [row["beta"] for row in imported] == [row["beta"] for row in fitting]
    assert [row["imported_from"].rpartition(" ")[2] for row in imported] == [row["trial"] for row in fitting]
    assert len(rows) == len(imported) + 2, "--trials counts those that the study made itself"
    small.project.write({"tune": {"space": {"learning_rate": {"low": 0.02}}}})
    assert small(8)["trials"] == 8, "the old study is as it was"


def test_without_a_pruner_every_trial_is_complete_and_sees_all_images(studied, tmp_path):
    project = studied.copy_without("nothing", tmp_path / "whole")
    project.write({"tune": {"pruner": "none", "seed": 2}})
    _study(project, 4)
    assert {(row["state"], row["images_seen"]) for row in _table(project)} == {("COMPLETE", "640")}


def _reports(folder, number):
    """Images seen -> accuracy, as the training wrote them; no line twice."""
    lines = (folder / f"trial-{number:04d}/metrics.jsonl").read_text().splitlines()
    reports = {record["images_seen"]: record["validation_robust"] for record in map(json.loads, lines)}
    assert len(reports) == len(lines)
    return reports


def test_a_killed_worker_and_a_killed_driver_lose_no_trial_and_double_none(finished, tmp_path):
    """benchmarks/tune_workers.py does the same at a larger size."""
    project = _project_without_study(finished, tmp_path / "workers")
    project.write({"tune": {"pruner": "none"}})
    command = [sys.executable, "-m", "cli.main", "tune", "start", "--trials", "4", "--workers", "2", "--json"]
    started = subprocess.Popen(
        command, cwd=project.folder, env={**os.environ, "DMAT_TRACKING": "off"}, stderr=subprocess.PIPE, text=True
    )
    runs = project.folder / "runs/tune"
    try:
        forked.until(lambda: list(runs.glob("generated-*/trial-*/checkpoint.dmat")) or started.poll() is not None)
        tree = psutil.Process(started.pid).children(recursive=True)
        holders = [process for process in tree if _has_open(process, "lock")]
        assert len(holders) == 2, (holders, started.poll())
        holders[0].kill()
        url = f"sqlite:///{runs}/studies.db"
        forked.until(lambda: any(trial.user_attrs.get("workers_killed") for trial in _only_study(url).trials))
    finally:
        servers.kill(started)
    forked.until(lambda: not any(process.is_running() and process.status() != "zombie" for process in tree))
    assert "no process; `dmat tune start` resumes it" in forked.run(project.folder, "tune", "status")[1]
    _study(project, 4)
    (folder,) = runs.glob("generated-*")
    trials_of_study = _only_study(url).trials
    assert [(trial.number, trial.state.name) for trial in trials_of_study] == [(k, "COMPLETE") for k in range(4)]
    assert all(trial.intermediate_values == _reports(folder, trial.number) for trial in trials_of_study)
    assert sum(trial.user_attrs["workers_killed"] for trial in trials_of_study) >= 1


def _only_study(url):
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url)


def _has_open(process, name):
    with contextlib.suppress(psutil.Error):
        return any(file.path.endswith(f"/{name}") and "/trial-" in file.path for file in process.open_files())
    return False


def _together(project):
    """Starts the study in two processes, as torchrun would."""
    port = str(free_port())
    return [
        _start(project, TRIALS, output=f".output-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
               LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip


def test_under_torchrun_the_main_process_prunes_and_all_stop_together(finished, tmp_path):
    project = _project_without_study(finished, tmp_path / "together")
    (code, text), silence = (command.wait() for command in _together(project))
    assert (code, silence) == (0, (0, "")), (text, silence)
    rows = _table(project)
    assert len(rows) == TRIALS
    pruned = [row for row in rows if row["state"] == "PRUNED"]
    assert pruned, rows
    assert all(int(row["images_seen"]) < 640 for row in pruned)


def test_a_space_of_images_is_refused_in_several_processes(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "refused")
    project.params["tune"]["space"] = {"selection.keep": {"choices": [0.8, 0.5]}}
    project.write({})
    for code, text in [command.wait() for command in _together(project)]:
        assert code == 2, text
        assert "changes images, which one process makes, and 2 were started" in text


def test_images_that_a_trial_changes_are_made_once_for_each_value(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "images")
    before = {str(p): files.checksum(p) for p in (project.folder / "artifacts").iterdir()}
    sets_before = len(list((project.folder / "runs/generate_images").iterdir()))
    project.params["tune"]["space"] = {"image_set.sampler.steps": {"choices": [3, 2]}, "selection.keep": {"choices": [0.8, 0.5]}}  # fmt: skip # noqa: E501
    points = [
        {"image_set.sampler.steps": 2},
        {"image_set.sampler.steps": 2, "selection.keep": 0.5},
        {"selection.keep": 0.5},
    ]
    project.write({"tune": {"enqueue": points, "images_seen": 128}})
    _study(project, 6)
    rows = _table(project)
    assert [row["state"] for row in rows] == ["COMPLETE"] * 6
    assert len(list((project.folder / "runs/generate_images").iterdir())) == sets_before + 1
    assert len(list((project.folder / "runs/select_images").iterdir())) == 4
    after = {str(p): files.checksum(p) for p in (project.folder / "artifacts").iterdir() if p.name != "tune"}
    assert after == before, "what DVC knows stays as it is"
    _study(project, 8)
    assert len(list((project.folder / "runs/generate_images").iterdir())) == sets_before + 1


def test_the_best_are_ranked_by_autoattack_on_validation_and_the_first_becomes_an_arm(finished, tmp_path, put_store):
    project = finished.copy_without("nothing", tmp_path / "ranked")
    put_store(project.folder)
    project.write({"tune": {"rerank": 2, "pruner": "none"}, "evaluate_robust": {"auto_attack": ["apgd-ce"]}})
    summary = json.loads(_study(project, 4, DMAT_TRACKING="on").splitlines()[-1])
    rows = {int(row["trial"]): row for row in _table(project)}
    by_pgd = sorted(rows, key=lambda number: (-float(rows[number]["validation_robust"]), number))
    assert sorted(by_pgd[:2]) == summary["ranked"]
    ranks = {number: float(rows[number]["auto_attack"]) for number in summary["ranked"]}
    assert summary["best"]["trial"] == max(ranks, key=lambda n: (ranks[n], float(rows[n]["validation_robust"]), -n))
    assert all(value <= float(rows[n]["validation_robust"]) + 1e-9 for n, value in ranks.items())
    shards = list((project.folder / "runs/tune").glob("generated-*/trial-*/auto_attack/shard-*.npz"))
    assert {int(path.parent.parent.name[-4:]) for path in shards} == set(ranks)
    (study,) = [run for run in _runs(project) if run.data.tags["dmat.stage"] == "tune"]
    assert "| trial | beta |" in study.data.tags["mlflow.note.content"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder}/mlruns/mlflow.db")
    names = {entry.path for entry in client.list_artifacts(study.info.run_id)}
    assert names >= {"history.png", "curves.png", "slices.png", "contour.png", "study.html", "trials.csv"}
    page = next((project.folder / "artifacts/tune/generated").glob("study.html")).read_text()
    assert page.count("Plotly.newPlot") >= 5
    assert "cdn" not in page.replace("cdn.plot.ly", "").lower() or 'src="http' not in page
    code, text = forked.run(project.folder, "tune", "best", "--json")
    assert code == 0
    assert json.loads(text)["trial"] == summary["best"]["trial"]
    code, text = forked.run(project.folder, "tune", "apply", "--name", "winner")
    assert code == 0, text
    arm = config.load(project.folder / "params.yaml").arms["winner"]
    assert arm.beta == pytest.approx(summary["best"]["beta"])


def test_a_study_has_one_driver_in_a_folder_which_status_names(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "status")
    code, text = forked.run(project.folder, "tune", "status")
    assert code == 2
    assert "studies.db does not exist; expected the studies that `dmat tune start` writes there" in text
    project.write({"tune": {"images_seen": 64000}})  # so long that the signal below finds a trial at work
    first = _start(project, 40)
    forked.until(lambda: list((project.folder / "runs/tune").glob("generated-*/trial-0000/metrics.jsonl")))
    _, text = forked.run(project.folder, "tune", "status", "--json")
    assert f"process {first.process.pid}" in json.loads(text)["at_work"][0]
    for arguments in ([], ["--fresh"]):
        text = _study(project, 40, code=2, arguments=arguments, output=".second")
        assert f"is being computed by process {first.process.pid}; expected one `dmat tune start` in a folder" in text
        assert "--workers" in text
    first.signal(signal.SIGTERM)
    assert first.wait()[0] == 143
    _, text = forked.run(project.folder, "tune", "status", "--json")
    assert "no process; `dmat tune start` resumes it" in json.loads(text)["at_work"][0]


def test_the_dashboard_shows_the_same_storage_on_this_machine_alone(studied):
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "tune", "dashboard", "--port", str(port)]
    started = subprocess.Popen(command, cwd=studied.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def fetch(path="", **headers):
        try:
            http_request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers=headers)
            with urllib.request.urlopen(http_request, timeout=60) as response:
                return response.read().decode()
        except urllib.error.HTTPError as http_error:
            return str(http_error.code)
        except OSError:
            return ""

    try:
        forked.until(lambda: "api/studies" in fetch() or "Optuna" in fetch())
        names = [summary["study_name"] for summary in json.loads(fetch("api/studies"))["study_summaries"]]
        assert any(name.startswith("generated-") for name in names)
        listening = {
            connection.laddr.ip
            for connection in psutil.Process(started.pid).net_connections()
            if connection.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        assert fetch("api/studies", Host="elsewhere.example") == "403"
        assert not any("sqlite" in argument for argument in psutil.Process(started.pid).cmdline())
    finally:
        servers.kill(started)


def test_the_stage_tune_lies_beside_the_pipeline(root):
    (stage_name,) = yaml.safe_load((root / "tune/dvc.yaml").read_text())["stages"]
    assert stage_name == "tune"
    assert "tune" not in yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert "/tune/" in (root / ".dvcignore").read_text().splitlines()  # or `dvc pull` fails where it never ran
