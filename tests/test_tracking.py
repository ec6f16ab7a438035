"""MLflow: true status however a run ends, nothing sent twice or lost, and a broken store that stops nothing."""

import json
import subprocess
import sys

import pytest

from dmat import tracking
from dmat.errors import DmatError, Interrupted
from dmat.training.long_run import MetricsLog


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_PATIENCE", 120.0)
    return tmp_path


def _open(home, name="one"):
    work = home / "runs" / name
    work.mkdir(parents=True, exist_ok=True)
    return tracking.open_run(
        home, work, stage="train_robust", instance=name, settings={"beta": 5.0, "threat": {"epsilon": "8/255"}},
        inputs={"train": {"path": "p", "sha256": "abc"}}, compute={"device": "cpu"},
    )  # fmt: skip


def _runs(home):
    client, experiment = tracking.connect(home)
    return client, client.search_runs([experiment])


def _log(home, images_seen, name="one", **values):
    log = MetricsLog(home / "runs" / name / "metrics.jsonl")
    log.write(images_seen, values)
    log.close()


def test_a_killed_and_resumed_run_is_one_run_with_each_point_once(home):
    with pytest.raises(Interrupted), _open(home):
        _log(home, 10, loss=2.0)
        raise Interrupted(143, "stopped")
    client, runs = _runs(home)
    assert [run.info.status for run in runs] == ["KILLED"]
    with _open(home) as run:
        _log(home, 20, loss=1.0, bad=float("inf"))
        run.finish_with({"best": {"pgd": 0.5, "name": "text"}}, [])
    client, runs = _runs(home)
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]
    assert runs[0].data.metrics["best.pgd"] == 0.5
    assert "bad" not in runs[0].data.metrics
    assert runs[0].data.metrics["nonfinite"] == 1.0
    assert runs[0].data.params == {"beta": "5.0", "threat.epsilon": "8/255"}
    assert runs[0].data.tags["input.train"] == "abc"


def test_an_error_ends_failed(home):
    with pytest.raises(DmatError), _open(home):
        raise DmatError("diverged")
    assert [run.info.status for run in _runs(home)[1]] == ["FAILED"]


def test_a_run_whose_process_died_is_ended_by_the_next_command(home):
    client, experiment = tracking.connect(home)
    run = client.create_run(experiment, run_name="lost")
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    note = home / "mlruns" / "active" / f"{run.info.run_id}.json"
    note.parent.mkdir()
    about = {"pid": int(dead.stdout), "started": 0.0, "parent": False, "store": tracking.store(home)}
    note.write_text(json.dumps(about))
    (note.parent / "unknown.json").write_text(json.dumps(about))
    elsewhere = note.parent / "elsewhere.json"
    elsewhere.write_text(json.dumps(about | {"store": "http://127.0.0.1:9"}))
    assert tracking.reap(home) == ["lost: KILLED"]
    assert client.get_run(run.info.run_id).info.status == "KILLED"
    assert sorted(path.name for path in note.parent.iterdir()) == ["elsewhere.json"]
    assert tracking.reap(home) == []


def test_an_unreachable_server_stops_nothing_and_its_metrics_are_sent_later(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="cannot be reached .*; the run goes on"), _open(home) as run:
        _log(home, 10, loss=2.0)
        run.finish_with({"best": 1.0}, [])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with _open(home):
        pass
    client, runs = _runs(home)
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "loss")] == [10]


def test_an_empty_address_is_the_embedded_store(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    client, experiment = tracking.connect(home)
    assert tracking.store(home) == f"sqlite:///{home}/mlruns/mlflow.db"
    assert client.get_experiment(experiment).artifact_location == (home / "mlruns" / "artifacts").as_uri()
