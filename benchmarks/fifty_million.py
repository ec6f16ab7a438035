"""A rehearsal of 50 million images with stand-in shards: what everything but the images themselves costs.

    python benchmarks/fifty_million.py --folder /tmp/rehearsal

Opens a set of 1,000 shards of 50,000 images whose files are sparse (they have the right size and take no disk),
selects the best 20 % of 50 million random scores of each class, walks through one epoch of the order of a training and
counts every image, and lets DVC record a folder of as many small files. Hashing is left out: it is the disk's speed.
Each part runs in a process of its own. Prints a JSON line per part: seconds, and the peak of RssAnon, the memory that
is not file pages.
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmat import files
from dmat.data import shards
from dmat.data.mixing import BatchOrder, Mix
from dmat.data.permutation import Permutation
from dmat.jobs import select_images

SHARD, CLASSES, SHAPE = 50_000, 10, (32, 32, 3)


def sparse_array(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An .npy file of zeros that takes no disk."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()


def make_set(folder: Path, count: int) -> None:
    """A manifest of `count` images, whose shards are links to one sparse shard of images and one of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    sparse_array(folder / "images-00000.npy", (SHARD, *SHAPE), np.uint8)
    np.save(folder / "labels-00000.npy", np.arange(SHARD) % CLASSES)
    record: shards.ShardRecord = {"count": SHARD, "images_sha256": "0" * 64, "labels_sha256": "0" * 64}
    entries = [shards.entry(index, record) for index in range(count // SHARD)]
    for entry in entries[1:]:
        for key in ("images", "labels"):
            files.link(folder / f"{key}-00000.npy", folder / entry[key])  # type: ignore[literal-required]
    shards.write_manifest(
        folder,
        entries,
        shape=SHAPE,
        class_names=list("0123456789"),
        class_counts=[count // CLASSES] * CLASSES,
        metadata={},
    )


def planning(folder: Path, count: int) -> dict[str, object]:
    opened = shards.open_shards(folder / "set", verify=False)
    images, labels = opened.take(np.arange(0, count, count // 999))
    return {"shards": len(opened.images), "read": len(images), "classes": len(set(labels.tolist()))}


def selection(folder: Path, count: int) -> dict[str, object]:
    scores = np.memmap(folder / "scores", np.float32, "r", shape=(count,))
    labels = np.resize(np.arange(CLASSES, dtype=np.uint8), count)
    selected = select_images.band_of_each_class(scores, labels, 0.2)
    return {"selected": len(selected), "per_class": len(selected) // CLASSES}


def permutation(folder: Path, count: int) -> dict[str, object]:
    """One epoch of a training with 80 % generated images, step by step: every image exactly once."""
    mix = Mix(50_000, count, 2048, 0.8)
    order, seen = BatchOrder(mix, 1), np.zeros(count, dtype=bool)
    numbers, chunk = Permutation(count, 1, "order/generated", 0), 1 << 17
    for start in range(0, count, chunk):
        seen[numbers.items(np.arange(start, min(start + chunk, count)))] = True
    first = order.at(0)[1]
    assert np.array_equal(first, numbers.items(np.arange(mix.generated_per_batch)))
    return {"seen": int(seen.sum()), "coverage": float(seen.mean())}


def bookkeeping(folder: Path, count: int) -> dict[str, object]:
    """DVC records a folder with as many files as the set has, each of a few bytes."""
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    (project / "set").mkdir(parents=True)
    for index in range(count // SHARD):
        for key in ("images", "labels"):
            (project / "set" / f"{key}-{index:05d}.npy").write_text(f"{key} {index}")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=project, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "set"], cwd=project, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "status", "-q"], cwd=project, check=True)
    return {"files": 2 * count // SHARD}


PARTS: dict[str, Callable[[Path, int], dict[str, object]]] = {
    "planning": planning, "selection": selection, "permutation": permutation, "bookkeeping": bookkeeping,
}  # fmt: skip


def measure(name: str, folder: Path, count: int) -> None:
    """Runs a part and prints its line."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = PARTS[name](folder, count)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    print(
        json.dumps({"part": name, "seconds": round(seconds, 2), "peak_rss_anon_mb": round(peak[0]), **result}),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50_000_000, help="a multiple of 50,000")
    args = parser.parse_args()
    make_set(args.folder / "set", args.images)
    np.random.default_rng(1).random(args.images, dtype=np.float32).tofile(args.folder / "scores")
    context = multiprocessing.get_context("spawn")
    for name in PARTS:
        process = context.Process(target=measure, args=(name, args.folder, args.images))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
