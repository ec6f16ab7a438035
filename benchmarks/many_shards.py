"""What a shard costs more as a task of a Dask worker than in a plain process, in an instance of 1,000 shards.

    python benchmarks/many_shards.py --workers 2

Stand-in shards of a few random images of 8x8 pixels are scored, once by one process and once by workers, one of which
is killed in the middle. A task loads the parameters, plans the instance, compares fingerprints, takes locks and writes
a file, as tasks of every size do; the network is so small that little else remains. Seconds per shard come from the
times at which the files of scores appeared, so starting is left out. Prints a JSON line per way, and last the overhead:
what a task takes of a worker beyond what the plain process takes for a shard. Fails unless both ways give the same
bytes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

from dmat import files
from dmat.data.npz_stream import write_released

ROOT = Path(__file__).parent.parent
SHAPE, CLASSES, PER_SHARD = (8, 8, 1), 10, 10
SET = "stand_in"


def dmat(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "DMAT_TRACKING": "off", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"{process.args} ended with exit code {process.returncode}")


def prepare(folder: Path, count: int) -> None:
    """A project with a trained scorer and an image set of `count` shards."""
    finish(dmat(ROOT, "init", str(folder), "--recipe", "smoke"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["image_sets"] = {SET: {"generator": "none", "source": "stand-in.npz"}}
    params["generate_images"]["shard"] = params["generate_images"]["block"] = PER_SHARD
    params["selections"] = {"all": {"image_set": SET, "keep": 1.0}}
    params["arms"]["generated"]["images"] = "all"
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    generator = np.random.default_rng(1)

    def blocks():
        for _ in range(count):
            yield generator.integers(0, 256, (PER_SHARD, *SHAPE), dtype=np.uint8), np.arange(PER_SHARD) % CLASSES

    with (folder / "sources/stand-in.npz").open("wb") as file:
        write_released(file, blocks(), count * PER_SHARD, SHAPE, [str(k) for k in range(CLASSES)])
    for command in (["lock"], ["prepare-data"], ["train-scorer"], ["generate-images", "--image-set", SET]):
        finish(dmat(folder, *command))


def scores(folder: Path) -> list[Path]:
    return sorted((folder / "runs/pools").glob("score_images-*/*.npy"))


def kill_a_worker(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Kills a process that computes, once half of the shards are there."""
    while len(scores(folder)) < count // 2 and process.poll() is None:
        time.sleep(0.2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "--multiprocessing-fork" in child.cmdline() and not child.children()
    ]
    workers[0].kill()


def measure(template: Path, folder: Path, count: int, workers: int) -> dict[str, object]:
    """Scores all shards in a copy of the project. workers: 0 for the process of the command itself."""
    shutil.copytree(template, folder)
    process = dmat(folder, "score-images", "--image-set", SET, "--json", *(["--workers", str(workers)] * bool(workers)))
    if workers:
        threading.Thread(target=kill_a_worker, args=(process, folder, count)).start()
    finish(process)
    times = sorted(path.stat().st_mtime for path in scores(folder))
    assert len(times) == count, f"{len(times)} files of scores; expected {count}"
    return {
        "workers": workers,
        "shards": count,
        "seconds_per_shard": round((times[-1] - times[0]) / (count - 1), 4),
        "checksum": files.checksum(folder / "artifacts/score_images" / SET),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template"
        prepare(template, args.shards)
        plain = measure(template, Path(name) / "plain", args.shards, 0)
        print(json.dumps(plain), flush=True)
        divided = measure(template, Path(name) / "divided", args.shards, args.workers)
        print(json.dumps(divided), flush=True)
        assert plain["checksum"] == divided["checksum"], "workers computed other scores"
    overhead = divided["seconds_per_shard"] * args.workers - plain["seconds_per_shard"]
    print(json.dumps({"overhead_seconds_per_task": round(overhead, 4), "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
