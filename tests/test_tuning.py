"""Studies: a trial equals a training, bad trials stop early, a killed study ends as an undisturbed one, and any number
of workers share one study.

Run alone: pytest tests/test_tuning.py
"""

import csv
import functools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import urllib.request

import optuna
import psutil
import pytest
import sqlalchemy
import torch
import yaml

from dmat import config, files, tuning
from dmat.errors import DmatError, Interrupted, Pruned
from dmat.pipeline import code_identity
from dmat.tuning import leading, trials, worker
from dmat.workspace import find_workspace
from tests import forked
from tests.databases import STORES, database_url
from tests.servers import free_port

TRIALS = 6


def _start(project, trials=TRIALS, *arguments, output=".output", **environment):
    return forked.Command(
        project.folder, "tune", "start", "--trials", str(trials), "--json", *arguments, output=output, **environment
    )


def _study(project, trials=TRIALS, code=0, arguments=(), **environment):
    exit_code, text = _start(project, trials, *arguments, **environment).wait()
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


def test_a_diverged_trial_fails_with_its_reason_and_the_study_continues(finished, tmp_path):
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


@pytest.fixture
def small(finished, tmp_path, monkeypatch):
    """A study in this process whose trials take no time: their value is computed from their parameters."""
    project = finished.copy_without("nothing", tmp_path / "small")
    project.write({"tune": {"pruner": "none"}})

    def compute(context, values, folder, watcher):
        value = float(values["beta"] / 10 - abs(values["learning_rate"] - 0.3) + values["generated_share"] / 3)
        for seen in (128, 256):
            watcher(seen, {tuning.OBJECTIVE: value * seen / 256})
        return value

    monkeypatch.setattr(trials, "compute", compute)

    def run(total, fresh=False):
        params = config.load(project.folder / "params.yaml")
        workspace = find_workspace(project.folder)
        options = tuning.StudyOptions(total, fresh=fresh, quiet=True)
        return tuning.run(tuning.plan(params, workspace), params, workspace, options)

    run.project = project
    return run


def _curve(project):
    return next((project.folder / "runs/tune").glob("generated-*/metrics.jsonl")).read_text()


@pytest.mark.parametrize("trial", [0, 3, 12], ids=["known", "drawn at random", "drawn by TPE"])
@pytest.mark.parametrize("call", ["suggest_float", "enqueue_trial", "ask"])
def test_a_trial_killed_while_it_is_created_stays_the_same_trial(small, monkeypatch, trial, call):
    small(14)
    undisturbed = _table(small.project), _curve(small.project)
    owner = optuna.Trial if call == "suggest_float" else optuna.Study
    real, calls = getattr(owner, call), []

    def killed(self, *arguments, **options):
        # not a call on the sampler's study in memory
        if not (owner is optuna.Study and "fixed_distributions" in options):
            calls.append(arguments)
        result = real(self, *arguments, **options)
        if len(calls) == (3 * trial + 2 if call == "suggest_float" else trial + 1):
            raise SystemExit("killed")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, killed)
        with pytest.raises(SystemExit):
            small(14, fresh=True)
    small(14)
    assert (_table(small.project), _curve(small.project)) == undisturbed


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_report_that_a_trial_ended_loses_and_doubles_nothing(small, monkeypatch, when):
    small(5)
    undisturbed = _table(small.project), _curve(small.project)
    real, calls = optuna.Study.tell, []

    def tell(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3 and when == "before":
            raise SystemExit("killed")
        real(self, *arguments)
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

    def compute(context, values, folder, watcher):
        (folder / "here").touch()
        with leading.Interruption():
            os.kill(os.getpid(), signal.SIGTERM)
            raise Pruned("behind the other trials")

    monkeypatch.setattr(trials, "compute", compute)
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


def test_a_trial_that_kills_its_workers_ends_with_that_reason(small, monkeypatch):
    monkeypatch.setattr(worker.Claims, "lost_workers", lambda self, key: 6 * (key == "trial-0001"))
    small(3)
    assert [row["state"] for row in _table(small.project)] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert _table(small.project)[1]["reason"] == "6 workers were killed in it"


def test_a_worker_that_lost_its_trial_leaves_it_alone(small, monkeypatch):
    """A worker that slept longer than its claim lasts must not report into a trial that another worker has taken."""
    real, lost = worker.Claims.holds, []

    def holds(self, key, within=0.0):
        if key == "trial-0001" and not lost:
            lost.append(key)
            return False
        return real(self, key, within)

    monkeypatch.setattr(worker.Claims, "holds", holds)
    small(3)
    assert lost
    assert [row["state"] for row in _table(small.project)] == ["COMPLETE"] * 3
    assert len({row["trial"] for row in _table(small.project)}) == 3


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


@pytest.mark.parametrize("store", STORES)
def test_workers_killed_at_random_lose_no_trial_and_double_none(finished, tmp_path, request, store):
    """A leader and two helpers. Four times a helper with a trial is killed with -9; benchmarks/tune_workers.py does the
    same at a larger size."""
    project = finished.copy_without("nothing", tmp_path / "many")
    project.write({"tune": {"sampler": "random"}})
    total, rng, url = 12, random.Random(3), database_url(store, request, tmp_path)
    storages = {"DMAT_STUDIES": url}
    leader = _start(project, total, **storages)
    helpers = [_start(project, total, "--worker", output=f".output-{k}", **storages) for k in range(2)]
    engine, killed = sqlalchemy.create_engine(url), 0
    query = "select count(*) from dmat_claims where pid = :pid and holder is not null and item like 'trial-%'"

    def has_a_trial_or_ended(helper):
        if helper.process.exitcode is not None:
            return True
        try:
            with engine.connect() as connection:
                return connection.execute(sqlalchemy.text(query), {"pid": helper.process.pid}).scalar() > 0
        except sqlalchemy.exc.SQLAlchemyError:  # the table is not there yet
            return False

    for k in (0, 1, 0, 1):
        forked.until(functools.partial(has_a_trial_or_ended, helpers[k]), 120)
        killed += helpers[k].kill_after(rng.uniform(0, 0.2))
        helpers[k] = _start(project, total, "--worker", output=f".output-{k}", **storages)
    results = [command.wait() for command in (leader, *helpers)]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert killed >= 2
    study = optuna.load_study(study_name=None, storage=url)
    assert [trial.number for trial in study.trials] == list(range(total))
    assert all(trial.state.is_finished() for trial in study.trials)
    folder = next((project.folder / "runs/tune").glob("generated-*"))
    for trial in study.trials:
        lines = (folder / f"trial-{trial.number:04d}/metrics.jsonl").read_text().splitlines()
        reports = {record["images_seen"]: record["validation_robust"] for record in map(json.loads, lines)}
        assert len(reports) == len(lines), "no report twice"
        assert trial.intermediate_values == reports
        assert trial.state.name == "PRUNED" or list(reports) == [128, 256, 384, 512, 640]
    assert sum(trial.user_attrs["workers_killed"] for trial in study.trials) >= 1
    assert json.loads(results[0][1])["trials"] == total
    assert len(_table(project)) == total


def test_machines_that_share_no_folder_share_a_study(finished, tmp_path, request):
    """Two projects with equal settings and data on one storage: one restarts and ends the trial that the other left."""
    url, total = database_url("sqlite", request, tmp_path), 6
    local, remote = (finished.copy_without("nothing", tmp_path / name) for name in ("here", "there"))
    for project in (local, remote):
        project.write({"tune": {"sampler": "random", "pruner": "none"}})
    remote_worker = _start(remote, total, "--worker", DMAT_STUDIES=url)
    forked.until(lambda: list((remote.folder / "runs/tune").glob("generated-*/trial-0001/metrics.jsonl")))
    assert remote_worker.kill_after(0.1)
    _study(local, total, DMAT_STUDIES=url)
    study = optuna.load_study(study_name=None, storage=url)
    assert [(trial.number, trial.state.name) for trial in study.trials] == [(k, "COMPLETE") for k in range(total)]
    assert {tuple(trial.intermediate_values) for trial in study.trials} == {(128, 256, 384, 512, 640)}
    made_locally = {path.name for path in (local.folder / "runs/tune").glob("generated-*/trial-*")}
    assert made_locally == {f"trial-{k:04d}" for k in range(1, total)}
    assert [int(row["trial"]) for row in _table(local)] == list(range(total))


def test_real_workers_are_replaced_when_killed_and_end_with_their_leader(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "real")
    command = [sys.executable, "-m", "cli.main", "tune", "start", "--trials", "100", "--workers", "2", "--json"]
    started = subprocess.Popen(
        command, cwd=project.folder, env={**os.environ, "DMAT_TRACKING": "off"}, stderr=subprocess.PIPE, text=True
    )
    tree = psutil.Process(started.pid)

    def ended():
        return len(list((project.folder / "runs/tune").glob("generated-*/trial-*/result/classifier")))

    try:
        forked.until(lambda: ended() >= 1, 200)
        workers = tree.children()
        assert len(workers) == 2
        workers[1].kill()  # not the first, to show that every worker is watched
        forked.until(
            lambda: len([child for child in tree.children() if child.is_running()]) == 2 and tree.children() != workers,
            60,
        )
        before = ended()
        forked.until(lambda: ended() >= before + 2, 200)
        workers = tree.children()
    finally:
        started.kill()
        started.wait()
    forked.until(lambda: not any(child.is_running() and child.status() != "zombie" for child in workers), 120)
    exit_code, text = forked.run(project.folder, "tune", "status")
    assert (exit_code, "process" in text) == (0, False), text


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


def test_the_best_are_ranked_by_autoattack_on_validation_and_the_first_becomes_an_arm(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "ranked")
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


def test_status_names_the_workers_and_a_study_that_was_not_begun(finished, tmp_path):
    project = finished.copy_without("nothing", tmp_path / "status")
    code, text = forked.run(project.folder, "tune", "status")
    assert code == 2
    assert "was not begun" in text
    project.write({"tune": {"images_seen": 64000}})  # so long that the signal below finds a trial at work
    first = _start(project, 40)
    forked.until(lambda: list((project.folder / "runs/tune").glob("generated-*/trial-0000/metrics.jsonl")))
    _, text = forked.run(project.folder, "tune", "status", "--json")
    status = json.loads(text)
    assert f"process {first.process.pid}" in status["at_work"][0]
    assert "is being computed by process" in _study(project, 40, code=2, arguments=["--fresh"])
    first.signal(signal.SIGTERM)
    assert first.wait()[0] == 143
    _, text = forked.run(project.folder, "tune", "status", "--json")
    assert "no worker; `dmat tune start` resumes it" in json.loads(text)["at_work"][0]


def test_the_dashboard_shows_the_same_storage_on_this_machine_alone(studied):
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "tune", "dashboard", "--port", str(port)]
    started = subprocess.Popen(command, cwd=studied.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def fetch(path="", **headers):
        try:
            http_request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers=headers)
            with urllib.request.urlopen(http_request, timeout=5) as response:
                return response.read().decode()
        except urllib.error.HTTPError as http_error:
            return str(http_error.code)
        except OSError:
            return ""

    try:
        forked.until(lambda: "api/studies" in fetch() or "Optuna" in fetch(), 120)
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
        started.terminate()
        started.wait(30)


def test_the_stage_tune_lies_beside_the_pipeline(root):
    (stage_name,) = yaml.safe_load((root / "tune/dvc.yaml").read_text())["stages"]
    assert stage_name == "tune"
    assert "tune" not in yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
