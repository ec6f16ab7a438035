"""Kills workers of a study with -9 at random: no trial may be lost, run twice or stay RUNNING. Measures reports too.

    python benchmarks/tune_workers.py --storage sqlite --to /tmp/workers-sqlite
    python benchmarks/tune_workers.py --storage postgresql --to /tmp/workers-postgresql

Needs the artifacts of `make repro` (up to `mix_images`) in this project and, for the second command, PostgreSQL's
programs: it starts a real server on a temporary folder. `dmat tune start --trials 60 --workers 4` runs in a copy of the
project; ten times a worker is killed while it computes. Prints one JSON line. The exit code is 0 if the study ended
without an error, all trials ended, none is left RUNNING, their numbers have no gap, and the reports in the storage are
those of the trials' files. The comparison with MLflow is only printed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import yaml

from tests.databases import server

ROOT = Path(__file__).parent.parent


def prepare(folder: Path, images: int) -> None:
    """Creates a copy of this project with short trials."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["compute"] |= {"threads": 1, "save_every_seconds": 1.0}
    params["tune"] |= {"images_seen": images, "evaluate_every": images // 4, "warmup_images": images // 4, "rerank": 0}
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copy(ROOT / "code.yaml", folder)
    for stage in ("prepare_data", "generate_images", "select_images"):
        shutil.copytree(ROOT / "artifacts" / stage, folder / "artifacts" / stage)


def find_study(url: str) -> optuna.Study | None:
    """Loads the study of the storage; None until it exists."""
    try:
        names = optuna.get_all_study_names(url)
    except Exception:  # the storage is being created
        return None
    return optuna.load_study(study_name=names[0], storage=url) if names else None


def run(folder: Path, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the study, kills workers and returns the record to print."""
    command = [sys.executable, "-m", "cli.main", "tune", "start", "--json"]
    command += ["--trials", str(args.trials), "--workers", str(args.workers)]
    rng, started = random.Random(args.seed), time.monotonic()
    leader = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "DMAT_STUDIES": url}, stdout=subprocess.PIPE, text=True
    )
    kills: list[dict[str, Any]] = []
    while leader.poll() is None:
        time.sleep(1)
        study = find_study(url)
        if study is None or len(kills) >= args.kills:
            continue
        ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        if ended < len(kills) * 0.75 * args.trials / args.kills + 1:
            continue
        time.sleep(rng.uniform(0, 1))
        if workers := _workers(leader.pid):
            victim = rng.choice(workers)
            victim.kill()
            kills.append({"pid": victim.pid, "ended": ended})
    seconds = time.monotonic() - started
    study = find_study(url)
    assert study is not None
    trials = study.trials
    reports = {t.number: _reports(folder, t.number) for t in trials}
    return {
        "storage": url.partition(":")[0],
        "code": leader.returncode,
        "trials": len(trials),
        "ended": sum(trial.state.is_finished() for trial in trials),
        "running": sum(not trial.state.is_finished() for trial in trials),
        "numbers_are_whole": [trial.number for trial in trials] == list(range(args.trials)),
        "reports_match": all(trial.intermediate_values == reports[trial.number] for trial in trials),
        "kills": len(kills),
        "kills_inside_a_trial": sum(trial.user_attrs.get("workers_killed", 0) for trial in trials),
        "complete": sum(trial.state.name == "COMPLETE" for trial in trials),
        "pruned": sum(trial.state.name == "PRUNED" for trial in trials),
        "failed": sum(trial.state.name == "FAIL" for trial in trials),
        "longest_trial_seconds": max(trial.user_attrs["seconds"] for trial in trials),
        "report_ms_median": _median([1000 * trial.user_attrs["report_seconds"] for trial in trials]),
        "report_ms_worst_trial": max(1000 * trial.user_attrs["report_seconds"] for trial in trials),
        "seconds": round(seconds),
        **_runs(folder, args.trials),
    }


def _workers(leader: int) -> list[psutil.Process]:
    """Returns the worker processes that a leader, by its process id, has started."""
    workers = []
    for process in psutil.Process(leader).children():
        try:
            if "--worker" in process.cmdline():
                workers.append(process)
        except psutil.Error:  # killed a moment ago
            continue
    return workers


def _reports(folder: Path, number: int) -> dict[int, float]:
    """Reads the reports of a trial from its metrics file: images seen -> accuracy."""
    (path,) = (folder / "runs/tune").glob(f"generated-*/trial-{number:04d}/metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["images_seen"] for record in records}) == len(records), f"trial {number} has a report twice"
    return {record["images_seen"]: record["validation_robust"] for record in records}


def _runs(folder: Path, trials: int) -> dict[str, Any]:
    """Compares MLflow's runs with the trials: one run per trial and one for the study, with the matching status."""
    subprocess.run(
        [sys.executable, "-m", "cli.main", "runs", "sync"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dmat").experiment_id], max_results=1000)
    trial_runs = [run for run in runs if "optuna.trial" in run.data.tags]
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
    return {
        "mlflow_runs": len(runs),
        "mlflow_one_for_each_trial": sorted(int(r.data.tags["optuna.trial"]) for r in trial_runs)
        == list(range(trials)),
        "mlflow_status_fits": all(r.info.status == statuses[r.data.tags["optuna.state"]] for r in trial_runs),
        "mlflow_running": sum(run.info.status == "RUNNING" for run in runs),
    }


def _median(values: list[float]) -> float:
    return round(sorted(values)[len(values) // 2], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    prepare(args.to, args.images)
    if args.storage == "sqlite":
        record = run(args.to, f"sqlite:///{args.to.resolve()}/studies.db", args)
    else:
        with server() as base:
            record = run(args.to, f"{base}/postgres", args)
    print(json.dumps(record, sort_keys=True))
    all_ended = record["ended"] == record["trials"] == args.trials and not record["running"] and record["code"] == 0
    sys.exit(0 if all_ended and record["numbers_are_whole"] and record["reports_match"] else 1)


if __name__ == "__main__":
    main()
