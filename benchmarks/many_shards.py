"""What a shard costs more as a task of a Dask worker than in a plain process, in an instance of 1,000 shards.

    python benchmarks/many_shards.py --shards 1000 --tasks 60

Stand-in shards of a few random images of 8x8 pixels are scored, once by one process and once by one worker. A task
loads the parameters, plans the instance, compares fingerprints, opens the set, takes locks and writes a file, as tasks
of every size do; the network is so small that little else remains. Only the first tasks are measured, from the time
when the first scores are there: seconds, and processor seconds of all processes, which other work on the machine
changes less. Prints a JSON line per way, and last the overhead per task. Fails unless both ways give the same bytes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
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


def cpu_seconds(process: subprocess.Popen) -> float:
    """Processor seconds of a command and of all processes that it has started."""
    root = psutil.Process(process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (root, *root.children(recursive=True)))


def measure(template: Path, folder: Path, tasks: int, workers: int) -> dict[str, float]:
    """Scores the first shards in a copy of the project. workers: 0 for the process of the command itself."""
    shutil.copytree(template, folder)
    options = ["--workers", str(workers)] if workers else []
    process = dmat(folder, "score-images", "--image-set", SET, "--json", *options)
    samples = []
    while process.poll() is None and len(samples) < 2:
        done = len(scores(folder))
        if done >= (tasks if samples else 1):
            samples.append((done, time.perf_counter(), cpu_seconds(process)))
        time.sleep(0.005)
    process.terminate()
    process.wait()
    if len(samples) < 2:
        raise SystemExit(f"{process.args} ended before {tasks} shards were scored")
    (first, *starts), (last, *ends) = samples
    per_task = [(end - start) / (last - first) for start, end in zip(starts, ends, strict=True)]
    return {"workers": workers, "seconds_per_shard": per_task[0], "cpu_seconds_per_shard": per_task[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=60, help="how many of them are measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        template, folders = Path(name) / "template", [Path(name) / way for way in ("plain", "worker")]
        prepare(template, args.shards)
        plain, divided = (measure(template, folder, args.tasks, n) for n, folder in enumerate(folders))
        for result in (plain, divided):
            print(json.dumps({"shards": args.shards, **result}), flush=True)
        both = {path.name: path for path in scores(folders[1])}
        pairs = [(path, both[path.name]) for path in scores(folders[0]) if path.name in both]
        assert len(pairs) >= args.tasks, "the two ways scored different shards"
        assert all(files.sha256(first) == files.sha256(second) for first, second in pairs)
    overhead = {key: divided[key] - plain[key] for key in ("seconds_per_shard", "cpu_seconds_per_shard")}
    print(json.dumps({"overhead": overhead, "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
