"""What checkpoints and metrics cost in the digits training, as fractions of its time.

    python benchmarks/bookkeeping.py --repeats 3 --images 64000

Needs the artifacts of `make repro`. Trains the arm `generated` again in a temporary home with the shipped parameters.
Sums the wall time inside checkpoint saving and metric writing. Prints one JSON line per repeat and the medians. MLflow
is used by a process of its own; `benchmarks/logging_cost.py` measures that.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dmat import config
from dmat.pipeline import STAGES, execution, planning
from dmat.training.long_run import LongRun, MetricsLog
from dmat.workspace import Workspace

ROOT = Path(__file__).parent.parent
spent: dict[str, float] = {}  # name -> seconds


def add_timer(owner: type, method: str, name: str, clock: Callable[[], float]) -> None:
    """Makes a method add the time inside it, by `clock` in seconds, to `spent[name]`."""
    original = getattr(owner, method)

    def measured(*arguments: Any, **keywords: Any) -> Any:
        started = clock()
        try:
            return original(*arguments, **keywords)
        finally:
            spent[name] = spent.get(name, 0.0) + clock() - started

    setattr(owner, method, measured)


def train_once(images: int) -> dict[str, float]:
    """Trains for `images` images. Returns seconds of all and of each part, and each part as a fraction of all."""
    spent.clear()
    with tempfile.TemporaryDirectory() as folder:
        content = yaml.safe_load((ROOT / "params.yaml").read_text())
        content["train_robust"]["images_seen"] = images
        path = Path(folder) / "params.yaml"
        path.write_text(yaml.safe_dump(content))
        params, workspace = config.load(path), Workspace(Path(folder), Path(folder))
        shutil.copy(ROOT / "code.yaml", folder)
        (Path(folder) / "artifacts").mkdir()
        for stage in ("prepare_data", "generate_images", "select_images", "mix_images"):
            (Path(folder) / "artifacts" / stage).symlink_to(ROOT / "artifacts" / stage)
        plan = planning.plan(STAGES["train_robust"], {"arm": "generated", "seed": 1}, params, workspace)
        started = time.perf_counter()
        execution.execute(plan, params, workspace, quiet=True)
        total = time.perf_counter() - started
    return {"seconds": total, **spent, **{f"{name}_share": value / total for name, value in spent.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=256000, help="training images; the recipe has 256000")
    arguments = parser.parse_args()
    add_timer(LongRun, "save", "checkpoints", time.perf_counter)
    add_timer(MetricsLog, "write", "metrics", time.perf_counter)
    records = []
    for _ in range(arguments.repeats):
        records.append(train_once(arguments.images))
        print(json.dumps({name: round(value, 5) for name, value in records[-1].items()}), flush=True)
    medians = {name: round(statistics.median(record[name] for record in records), 5) for name in records[0]}
    print("median", json.dumps(medians))


if __name__ == "__main__":
    main()
