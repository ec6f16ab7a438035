"""Robust accuracy of the digits recipe in float32 and in bf16, the same seeds.

    python benchmarks/precision.py --seeds 1 2 3 --precisions fp32 bf16 --to /tmp/precision

Needs the artifacts of `make repro` in this project. Trains the arm `generated` again for every seed and precision, in
copies of the project. Attacks best and last weights with PGD-40 on the test split. Prints one JSON line per run, then a
table. After an interruption the same command resumes.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dmat.metrics.intervals import wilson

ROOT = Path(__file__).parent.parent
TEST = 1000  # images of the test split


def prepare(folder: Path, precision: str, seeds: list[int]) -> None:
    """Copies this project's inputs into a project that trains in one precision."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["compute"] |= {"precision": precision, "threads": 1}
    params["seeds"] = seeds
    params["evaluate_robust"]["auto_attack"] = "none"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copy(ROOT / "code.yaml", folder)
    for stage in ("prepare_data", "generate_images", "select_images", "mix_images"):
        if not (folder / "artifacts" / stage).exists():
            shutil.copytree(ROOT / "artifacts" / stage, folder / "artifacts" / stage)


def run(folder: Path, command: str, seed: int) -> dict[str, Any]:
    """Runs a stage command of dmat for one seed and returns its result."""
    arguments = [command, "--arm", "generated", "--seed", str(seed), "--json"]
    process = subprocess.run([sys.executable, "-m", "cli.main", *arguments], cwd=folder, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    accuracies: dict[str, list[float]] = {}  # precision -> robust accuracy of each seed
    for precision in args.precisions:
        folder = args.to / precision
        prepare(folder, precision, args.seeds)
        for seed in args.seeds:
            trained = run(folder, "train-robust", seed)
            measured = run(folder, "evaluate-robust", seed)
            provenance = json.loads((folder / f"artifacts/provenance/train_robust/generated-{seed}.json").read_text())
            record = {
                "precision": precision,
                "seed": seed,
                "validation_robust": trained["best_validation_robust"],
                "test": {name: measured[name] for name in ("best_clean", "best_pgd", "last_clean", "last_pgd")},
                "images_per_second": provenance["measured"].get("images_per_second"),
            }
            print(json.dumps(record), flush=True)
            accuracies.setdefault(precision, []).append(measured["best_pgd"])
    for precision, values in accuracies.items():
        n = TEST * len(values)
        interval = wilson(np.arange(n) < round(sum(values) * TEST))
        print(f"{precision}: PGD-40 {statistics.mean(values):.4f}, {interval}, seeds {values}")


if __name__ == "__main__":
    main()
