"""Kills processes of a study with -9 at random: no trial may be lost, computed twice or stay RUNNING. Measures reports.

    python benchmarks/tune_workers.py --storage sqlite --kill workers --to /tmp/workers
    python benchmarks/tune_workers.py --storage postgresql --kill driver --to /tmp/driver
    python benchmarks/tune_workers.py --storage postgresql --kill one-of-two --to /tmp/two

`dmat tune start --trials 60 --workers 4` runs in a small project that the script makes in --to. `--kill workers`: ten
times, a worker is killed while it computes a trial. `--kill driver`: three times, the command itself is killed and
started again. `--kill one-of-two`: two commands with two workers each run in two folders, and one of them is killed.
PostgreSQL is a real server on a temporary folder; its programs must be installed.

Prints one JSON line. The exit code is 0 if the study ended without an error, all trials ended, no values were computed
twice, the reports in the storage are those of the trials' files, and MLflow has each trial with its true status. One
driver makes exactly --trials trials, without a gap in their numbers; two make at most one more.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil

from dmat.tuning import storage
from tests.conftest import _tiny_params as tiny_params
from tests.databases import server
from tests.projects import STAGE_OPTIONS, Project

STATUSES = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


def prepare(folder: Path, images: int) -> Project:
    """Creates a project with short trials and the artifacts that they need."""
    params = tiny_params()
    params["compute"]["save_every_seconds"] = 1.0
    params["tune"] |= {"images_seen": images, "evaluate_every": images // 4, "warmup_images": images // 4}
    folder.mkdir(parents=True)
    project = Project(folder, params)
    for stage_name in [name for name in STAGE_OPTIONS if name not in ("measure_images", "train_robust")][:-1]:
        project.run(stage_name)
    return project


class Study:
    """The study that runs: its commands, one in each folder, and its trials."""

    def __init__(self, folders: list[Path], url: str, args: argparse.Namespace):
        self.folders, self._url, self._args = folders, url, args
        self.commands = [self.start(folder) for folder in folders]

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """Starts the command in a folder."""
        command = [sys.executable, "-m", "cli.main", "tune", "start", "--json", "--trials", str(self._args.trials)]
        command += ["--workers", str(self._args.workers // len(self.folders))]
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "DMAT_STUDIES": self._url}, stdout=subprocess.DEVNULL
        )

    def trials(self, current: bool = True) -> list[optuna.trial.FrozenTrial]:
        """The trials so far. current: without those that a later one repeats."""
        try:
            names = optuna.get_all_study_names(self._url)
        except Exception:  # the storage is being created
            return []
        study = optuna.load_study(study_name=names[0], storage=self._url) if names else None
        return [] if study is None else storage.current_trials(study) if current else study.trials

    def wait_for(self, ended: int) -> None:
        """Waits until so many trials have ended, or the first command has."""
        while self.commands[0].poll() is None:
            if sum(trial.state.is_finished() for trial in self.trials()) >= ended:
                return
            time.sleep(0.5)

    def at_work(self) -> list[psutil.Process]:
        """The workers of the first command that compute a trial: they hold its lock."""
        return [
            process
            for process in psutil.Process(self.commands[0].pid).children(recursive=True)
            if any("/trial-" in path for path in _open_files(process))
        ]


def _open_files(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except psutil.Error:  # it ended meanwhile
        return []


def run(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Kills processes of the study, waits for its end and returns the record to print."""
    rng, started, kills = random.Random(args.seed), time.monotonic(), 0
    count = {"workers": 10, "driver": 3, "one-of-two": 1}[args.kill]
    for kill in range(count):
        study.wait_for(1 + int(kill * 0.75 * args.trials / count) + (args.trials // 4 if count == 1 else 0))
        time.sleep(rng.uniform(0, 1))
        if args.kill == "workers":
            while study.commands[0].poll() is None and not (workers := study.at_work()):
                time.sleep(0.05)
            if study.commands[0].poll() is None:
                rng.choice(workers).kill()
                kills += 1
            continue
        kills += study.commands[-1].poll() is None
        study.commands[-1].kill()
        study.commands[-1].wait()
        if args.kill == "driver":
            study.commands[0] = study.start(study.folders[0])
    code, seconds = study.commands[0].wait(), time.monotonic() - started
    trials = study.trials()
    values = [tuple(sorted(trial.params.items())) for trial in trials]
    report_seconds = [trial.user_attrs.get("report_seconds", 0.0) for trial in trials]
    return {
        "storage": args.storage,
        "killed": args.kill,
        "kills": kills,
        "code": code,
        "trials": len(trials),
        "ended": sum(trial.state.is_finished() for trial in trials),
        "running": sum(not trial.state.is_finished() for trial in study.trials(current=False)),
        "twice": len(values) - len(set(values)),
        "repeated_under_another_number": len(study.trials(current=False)) - len(trials),
        "numbers_are_whole": [trial.number for trial in trials] == list(range(args.trials)),
        "reports_match": all(trial.intermediate_values == _reports(study.folders, trial) for trial in trials),
        "kills_inside_a_trial": sum(trial.user_attrs.get("workers_killed", 0) for trial in trials),
        **{state.lower(): sum(trial.state.name == state for trial in trials) for state in STATUSES},
        "report_ms_median": round(1000 * sorted(report_seconds)[len(trials) // 2], 1),
        "report_ms_worst_trial": round(1000 * max(report_seconds), 1),
        "seconds": round(seconds),
        **_runs(study.folders, trials),
    }


def _reports(folders: list[Path], trial: optuna.trial.FrozenTrial) -> dict[int, float]:
    """Reads the reports of a trial from its metrics files: images seen -> accuracy. Each file has a report once."""
    reports: dict[int, float] = {}
    first = [*trial.system_attrs.get("retry_history", ()), trial.number][0]
    for path in [path for folder in folders for path in folder.glob(f"runs/tune/*/trial-{first:04d}/metrics.jsonl")]:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({record["images_seen"] for record in records}) == len(records), f"{path} has a report twice"
        reports |= {record["images_seen"]: record["validation_robust"] for record in records}
    return reports


def _runs(folders: list[Path], trials: list[optuna.trial.FrozenTrial]) -> dict[str, Any]:
    """Compares MLflow's runs with the trials: each trial has a run with the status of its state, none runs."""
    from mlflow import MlflowClient

    runs = []
    for folder in folders:
        subprocess.run(
            [sys.executable, "-m", "cli.main", "runs", "sync"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
        runs += client.search_runs([client.get_experiment_by_name("dmat").experiment_id], max_results=1000)
    studies = [run for run in runs if run.data.tags["dmat.stage"] == "tune"]
    of_trials = {
        int(run.data.tags["optuna.trial"]): run.info.status for run in runs if "optuna.trial" in run.data.tags
    }
    return {
        "mlflow_studies": len(studies),
        "mlflow_each_trial": {trial.number for trial in trials} <= of_trials.keys(),
        "mlflow_status_fits": all(of_trials.get(trial.number) == STATUSES[trial.state.name] for trial in trials),
        "mlflow_running": sum(run.info.status == "RUNNING" for run in runs),
    }


def main() -> None:
    os.environ["DMAT_TRACKING"] = "on"  # the fixtures of the tests switch it off
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--kill", choices=["workers", "driver", "one-of-two"], default="workers")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first = prepare(args.to.resolve() / "first", args.images)
    folders = [first.folder]
    if args.kill == "one-of-two":
        folders.append(first.copy_without("nothing", args.to.resolve() / "second").folder)
    if args.storage == "sqlite":
        record = run(Study(folders, f"sqlite:///{args.to.resolve()}/studies.db", args), args)
    else:
        with server() as base:
            record = run(Study(folders, f"{base}/postgres", args), args)
    print(json.dumps(record, sort_keys=True))
    exact = record["numbers_are_whole"] if len(folders) == 1 else record["trials"] <= args.trials + 1
    mlflow = record["mlflow_each_trial"] and record["mlflow_status_fits"] and not record["mlflow_running"]
    complete = record["ended"] == record["trials"] >= args.trials and not record["running"] and not record["twice"]
    sys.exit(0 if record["code"] == 0 and complete and exact and mlflow and record["reports_match"] else 1)


if __name__ == "__main__":
    main()
