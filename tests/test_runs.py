"""`dmat runs list`, `show` and `compare` on a real embedded store; reading the file gives what MLflow gives.

Run alone: pytest tests/test_runs.py
"""

import dataclasses
import json
import resource
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from cli import runs
from dmat import files, tracking
from dmat.errors import DmatError
from dmat.evaluation.table import write_table
from dmat.metrics.intervals import paired_difference
from dmat.tracking import queries, sender
from dmat.training.long_run import MetricsLog
from dmat.upkeep import comparing
from dmat.workspace import Workspace
from tests import forked, senders


@pytest.fixture(scope="module")
def home(tmp_path_factory, put_store):
    """Five runs, one after the other: two trainings, two evaluations, one that failed."""
    folder = tmp_path_factory.mktemp("home")
    put_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMAT_TRACKING", "on")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(sender, "_start", senders.start_thread)
        for name, stage, beta, accuracy in (
            ("real-1", "train_robust", 5.0, 0.5),
            ("mixed-1", "train_robust", 6.0, 7 * 0.1),  # 17 digits
            ("real-1", "evaluate_robust", None, 0.45),
            ("mixed-1", "evaluate_robust", None, 0.65),
        ):
            _track(folder, name, stage, {"beta": beta} if beta else {"shard": 250}, accuracy)
        with pytest.raises(DmatError):
            _track(folder, "broken-1", "train_robust", {"beta": -1.0}, None)
    return folder


def _track(home, instance_name, stage, settings, accuracy):
    work = home / "runs" / stage / f"{instance_name}-{stage[:4]}{instance_name[:4]}"
    work.mkdir(parents=True)
    with tracking.open_run(
        home, work, stage=stage, instance_name=instance_name, settings=settings,
        inputs={"test": {"path": "artifacts/prepare_data/test", "sha256": "abc"}}, compute={"device": "cpu"},
    ) as run:  # fmt: skip
        if accuracy is None:
            raise DmatError("beta is -1; expected 0 or more")
        log = MetricsLog(work / "metrics.jsonl")
        for step in (1, 2):
            log.write(step, {"loss": 1.0 / step})
        log.close()
        if stage == "evaluate_robust":
            run.tag("evaluation.headline", "no" if instance_name == "real-1" else "yes")
        run.finish_with({"best_pgd": accuracy}, [])


def _dmat(folder, *arguments, code=0):
    exit_code, text = forked.Command(folder, "runs", *arguments).wait()
    assert exit_code == code, text
    return text


def test_reading_the_file_gives_what_mlflow_gives(home):
    from_file, from_mlflow = queries.recent(home, limit=0), queries._from_mlflow(home, {}, None, 0)
    assert [run.id for run in from_file] == [run.id for run in from_mlflow]
    for actual, expected in zip(from_file, from_mlflow, strict=True):
        assert (actual.name, actual.status, actual.started, actual.ended) == (
            expected.name, expected.status, expected.started, expected.ended
        )  # fmt: skip
        assert actual.params == expected.params
        assert actual.metrics == expected.metrics
        assert {k: v for k, v in actual.tags.items() if k.startswith("dmat")} == {
            k: v for k, v in expected.tags.items() if k.startswith("dmat")
        }
    for stage, status in (("train_robust", None), (None, "FAILED"), ("evaluate_robust", "FINISHED")):
        tags = {"dmat.stage": stage} if stage else {}
        filtered = [run.id for run in queries.recent(home, stage, status, 0)]
        assert filtered == [run.id for run in queries._from_mlflow(home, tags, status, 0)]
        assert filtered


def test_an_unknown_layout_of_the_file_is_read_through_mlflow(home, monkeypatch):
    def unknown_layout(*_):
        raise sqlite3.OperationalError("no such column")

    monkeypatch.setattr(queries, "_from_file", unknown_layout)
    assert len(queries.recent(home)) == 5


def test_list_is_newest_first_and_shows_the_main_metrics(home):
    lines = _dmat(home, "list").splitlines()
    assert len(lines) == 5
    assert "FAILED" in lines[0]
    assert "train_robust broken-1" in lines[0]
    assert "evaluate_robust mixed-1" in lines[1]
    assert "best_pgd 0.65" in lines[1]
    assert "no headline" not in lines[1]
    assert lines[2].endswith("best_pgd 0.45, loss 0.5; no headline")
    assert len(_dmat(home, "list", "--limit", "2").splitlines()) == 2
    assert len(_dmat(home, "list", "--stage", "train_robust").splitlines()) == 3
    assert len(_dmat(home, "list", "--status", "FAILED").splitlines()) == 1


def test_a_summary_holds_the_first_metrics_of_its_list():
    metrics = {"kept": 3.0, "loss": 0.25, "frechet_distance_scorer_60": 0.5, "frechet_distance_scorer_60_spread": 0.1}
    assert runs._summary(metrics, {}, None).startswith("frechet_distance_scorer_60 0.5, ")
    assert runs._summary({"kept": 3.0, "loss": 0.25}, {}, "loss") == "loss 0.25, kept 3"


def test_list_by_a_metric_is_best_first(home):
    runs = json.loads(_dmat(home, "list", "--sort", "best_pgd", "--json"))
    assert [run["metrics"]["best_pgd"] for run in runs] == [7 * 0.1, 0.65, 0.5, 0.45]
    text = _dmat(home, "list", "--sort", "best_gpd", code=2)
    assert "no run has the metric 'best_gpd'; expected one of best_pgd, loss" in text


def test_show_finds_a_run_by_id_and_by_name(home):
    newest = queries.recent(home, limit=1)[0]
    for reference in (newest.id, newest.id[:9], "train_robust/broken-1", "broken-1"):
        text = _dmat(home, "show", reference)
        assert newest.id in text
        assert "FAILED: beta is -1; expected 0 or more" in text
        assert f"work folder   {home}/runs/train_robust/broken-1-traibrok\n" in text
    assert "input.test" in text
    assert "no run 'nobody'; expected the first four characters of an id or more" in _dmat(
        home, "show", "nobody", code=2
    )


def test_compare_shows_what_differs_and_what_does_not(home):
    comparison = json.loads(_dmat(home, "compare", "train_robust/real-1", "train_robust/mixed-1", "--json"))
    assert comparison["differences"] == {
        "instance": ["real-1", "mixed-1"],
        "beta": ["5", "6"],
        "metric best_pgd": ["0.5", "0.7"],
    }
    assert {"stage", "input.test", "compute.device", "metric loss"} <= set(comparison["same"])
    assert comparison["paired"] == {}
    assert "expected two or more" in _dmat(home, "compare", "real-1", code=2)


def test_compare_of_evaluations_is_paired_by_image(home):
    rng = np.random.default_rng(0)
    flags = {name: rng.random(400) < share for name, share in (("real-1", 0.5), ("mixed-1", 0.6))}
    runs = {name: queries.find_run(home, f"evaluate_robust/{name}") for name in flags}
    workspace = Workspace(home, home)
    for name, run in runs.items():
        path = comparing.result_folder(workspace, run) / "evaluation" / "per_image.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, {"label": np.arange(400), "best_pgd": flags[name]})
    difference = comparing.paired(workspace, runs["real-1"], runs["mixed-1"])["best_pgd"]
    assert difference["value"] == pytest.approx(flags["mixed-1"].mean() - flags["real-1"].mean())
    exact = paired_difference([flags["mixed-1"]], [flags["real-1"]], 2000, np.random.default_rng(5))
    assert difference["low"] == pytest.approx(exact["low"], abs=0.02)
    text = _dmat(home, "compare", "evaluate_robust/real-1", "evaluate_robust/mixed-1")
    assert f"best_pgd: second − first {100 * difference['value']:+.1f} points" in text
    write_table(path, {"label": np.arange(400)[::-1].copy(), "best_pgd": flags[name]})
    assert comparing.paired(workspace, runs["real-1"], runs["mixed-1"]) == {}, "other images"


def _recorded_run(home, folder, id_, tags):
    """A run as the store returns it, with the record in its work folder."""
    files.write_json(home / folder / "tracking.json", {"run": id_, "store": "embedded"})
    return queries.TrackedRun(id_, "", "FINISHED", 1.0, 2.0, tags, {}, {})


def test_a_run_is_found_where_its_tag_says_also_when_it_was_set_aside(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study, trial = "runs/tune/arm-0123456789ab", {"dmat.stage": "train_robust", "dmat.instance": "trial 4"}
    tags = trial | {"dmat.work": f"{study}/trial-0004"}
    before = _recorded_run(tmp_path, f"{study}/before-1/trial-0004", "a" * 32, tags)
    again = _recorded_run(tmp_path, f"{study}/trial-0004/before-2", "b" * 32, tags)
    current = _recorded_run(tmp_path, f"{study}/trial-0004", "c" * 32, tags)
    folders = {run.id[0]: queries.work_folder(tmp_path, run) for run in (before, again, current)}
    assert {id_: str(path.relative_to(tmp_path / study)) for id_, path in folders.items()} == {
        "a": "before-1/trial-0004",
        "b": "trial-0004/before-2",
        "c": "trial-0004",
    }
    later_run = dataclasses.replace(current, id="d" * 32)
    assert queries.work_folder(tmp_path, later_run) is None, "another run worked there since"
    old = {"dmat.stage": "train_robust", "dmat.instance": "real-1", "dmat.fingerprint": "0123456789ab"}
    folder = "runs/train_robust/real-1-0123456789ab"
    assert queries.work_folder(tmp_path, _recorded_run(tmp_path, folder, "e" * 32, old)) == tmp_path / folder


def test_trials_that_were_ranked_are_compared_in_pairs(tmp_path):
    rng = np.random.default_rng(0)
    flags = {name: rng.random(30) < 0.5 for name in ("one", "two")}
    runs = []
    for name, robust in flags.items():
        tags = {"dmat.stage": "train_robust", "optuna.trial": name, "dmat.work": f"runs/tune/s/{name}"}
        runs.append(_recorded_run(tmp_path, f"runs/tune/s/{name}", name, tags))
        for number, part in enumerate(np.split(robust, 3)):
            path = tmp_path / "runs/tune/s" / name / "auto_attack" / f"shard-{number:05d}"
            path.parent.mkdir(exist_ok=True)
            np.savez(path.with_suffix(".npz"), auto_attack=part, adversarial=np.zeros((10, 1, 2, 2)))
            identity = {"images": "abc", "weights": name, "shard": number, "images_attacked": 30}
            digest = files.sha256(path.with_suffix(".npz"))
            record = {"images": 10, "identity": identity, "seconds": 1.0, "sha256": digest}
            files.write_json(path.with_suffix(".json"), record)
    workspace = Workspace(tmp_path, tmp_path)
    differences = comparing.paired(workspace, *runs)
    assert set(differences) == {"auto_attack"}
    assert differences["auto_attack"]["value"] == pytest.approx(flags["two"].mean() - flags["one"].mean())
    path.with_suffix(".json").unlink()
    assert comparing.paired(workspace, *runs) == {}, "a shard is missing"


def test_an_empty_project_has_no_runs_and_another_folder_is_refused(tmp_path):
    assert "is not a project: it has neither params.yaml nor mlruns" in _dmat(tmp_path, "list", code=2)
    assert not list(tmp_path.glob("mlruns"))
    (tmp_path / "params.yaml").touch()
    assert _dmat(tmp_path, "list") == "no runs\n"
    assert not (tmp_path / "mlruns").exists(), "reading creates nothing"
    assert "--status is 'DONE'; expected one of RUNNING" in _dmat(tmp_path, "list", "--status", "DONE", code=2)


def test_a_store_that_does_not_answer_is_one_message(tmp_path):
    (tmp_path / "params.yaml").touch()
    code, text = forked.run(tmp_path, "runs", "list", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 2, text
    assert "MLflow at http://127.0.0.1:9 cannot be reached" in text
    assert "correct MLFLOW_TRACKING_URI" in text
    assert "Traceback" not in text


def test_thousands_of_runs_are_listed_quickly(tmp_path):
    """2,000 runs; benchmarks/runs_list.py measures, this test checks a generous bound on the whole command."""
    from benchmarks import runs_list

    runs_list.fill(tmp_path, 2000, 10)
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "cli.main", "runs", "list", "--sort", "validation_robust"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: what else runs here does not count
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert len(result.stdout.splitlines()) == 30
    assert min(times) < 2, times
