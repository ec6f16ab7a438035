"""Seconds of `dmat runs list` and `dmat runs compare` in an embedded store of many runs.

    python benchmarks/runs_list.py --runs 2000 --points 500 --repeats 5

Makes the store in a temporary folder: MLflow creates the tables, this script inserts rows directly. Times are medians
of whole commands, including the start of Python.
"""

import argparse
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dmat.tracking import stores

ROOT = Path(__file__).parent.parent
COMMANDS = (
    ["runs", "list"],
    ["runs", "list", "--limit", "0"],
    ["runs", "list", "--sort", "validation_robust"],
    ["runs", "compare", f"{0:032x}", f"{1:032x}"],
    ["runs", "show", "train_robust/arm-7"],
)


def fill(home: Path, runs: int, points: int) -> None:
    """Fills the store with runs like those of train_robust: 45 parameters, 20 tags, 5 metrics; no parent runs.

    points: metric values per run.
    """
    _, experiment = stores.connect(home)
    ids = [f"{k:032x}" for k in range(runs)]
    now = 1_790_000_000_000
    with contextlib.closing(sqlite3.connect(home / "mlruns" / "mlflow.db")) as database, database:
        columns = "run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id"
        database.executemany(
            f"insert into runs ({columns}) values (?, ?, 'FINISHED', ?, ?, 'active', '', ?)",
            [(id_, f"run {k}", now + 1000 * k, now + 1000 * k + 500, experiment) for k, id_ in enumerate(ids)],
        )
        tags = [("dmat.stage", "train_robust"), *((f"tag.{k}", f"value {k}") for k in range(18))]
        rows = [(key, value, id_) for id_ in ids for key, value in tags]
        rows += [("dmat.instance", f"arm-{k}", id_) for k, id_ in enumerate(ids)]
        database.executemany("insert into tags (key, value, run_uuid) values (?, ?, ?)", rows)
        database.executemany(
            "insert into params (key, value, run_uuid) values (?, ?, ?)",
            [(f"p{k}", str(k + (n % 3)), id_) for n, id_ in enumerate(ids) for k in range(45)],
        )
        names = ("validation_robust", "validation_clean", "train_loss", "learning_rate", "train_robust")
        points_per_metric = points // len(names)
        for n, id_ in enumerate(ids):
            database.executemany(
                "insert into metrics (key, value, timestamp, run_uuid, step, is_nan) values (?, ?, ?, ?, ?, 0)",
                [(name, step / (n + 7), now + step, id_, step) for name in names for step in range(points_per_metric)],
            )
            database.executemany(
                "insert into latest_metrics (key, value, timestamp, step, is_nan, run_uuid) values (?, ?, ?, ?, 0, ?)",
                [
                    (name, points_per_metric / (n + 7), now + points_per_metric, points_per_metric, id_)
                    for name in names
                ],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        fill(home, args.runs, args.points)
        size = (home / "mlruns" / "mlflow.db").stat().st_size
        print(f"{args.runs} runs with {args.points} points, {size / 1e6:.0f} MB")
        for command in COMMANDS:
            seconds = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                process = subprocess.run(
                    [sys.executable, "-m", "cli.main", *command], cwd=home, capture_output=True, text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )  # fmt: skip
                seconds.append(time.perf_counter() - started)
                if process.returncode:
                    raise SystemExit(process.stderr)
            lines = len(process.stdout.splitlines())
            print(f"dmat {' '.join(command)[:60]:62s} median {statistics.median(seconds):.2f} s, {lines} lines")


if __name__ == "__main__":
    main()
