"""Seconds to import a released image set, beside those of `cp` and `sha256sum` of its file, and the memory it takes.

The file is a stored .npz of random images 32x32x3, read once before, so that all three take it from memory. They run in
turns, `cp` and `sha256sum` one after the other: an import copies the bytes and computes their SHA-256, and besides this
compares the CRC-32 of the archive and waits until the shards are on the disk (fsync). RssAnon is the process's own
memory, without pages of files.

python benchmarks/import_npz.py [GB] [--repeat N] [--folder FOLDER]
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dmat.data.npz_stream import write_released

SHAPE, BLOCK, CLASSES = (32, 32, 3), 10_000, 10
SCRIPT = """
import sys, threading, time
from pathlib import Path
from dmat.data.image_import import import_released

def anonymous_kib():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])

peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous_kib())

thread = threading.Thread(target=watch)
thread.start()
started = time.perf_counter()
import_released(Path(sys.argv[1]), Path(sys.argv[2]), 50_000)
seconds = time.perf_counter() - started
done.set()
thread.join()
print(seconds, peak[0])
"""


def make(path: Path, size: float) -> None:
    """Writes an archive of about `size` bytes."""
    count = round(size / (np.prod(SHAPE) + 8) / BLOCK) * BLOCK or BLOCK
    generator = np.random.default_rng(0)

    def blocks():
        for start in range(0, count, BLOCK):
            yield generator.integers(0, 256, (BLOCK, *SHAPE), dtype=np.uint8), np.arange(start, start + BLOCK) % CLASSES

    with path.open("wb") as file:
        write_released(file, blocks(), count, SHAPE, [str(k) for k in range(CLASSES)])


def seconds_of(*command: str | Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gigabytes", nargs="?", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where a scratch folder of two and a half times the size fits")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        scratch = Path(name)
        archive = scratch / "images.npz"
        make(archive, arguments.gigabytes * 1e9)
        seconds_of("cat", archive)
        copies, checksums, imports, ratios, memories = ([] for _ in range(5))
        for _ in range(arguments.repeat):
            copies.append(seconds_of("cp", archive, scratch / "copy.npz"))
            (scratch / "copy.npz").unlink()
            checksums.append(seconds_of("sha256sum", archive))
            command = [sys.executable, "-c", SCRIPT, str(archive), str(scratch / "set")]
            seconds, kib = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            shutil.rmtree(scratch / "set")
            imports.append(float(seconds))
            ratios.append(imports[-1] / (copies[-1] + checksums[-1]))
            memories.append(int(kib) * 1024)
        print(f"{archive.stat().st_size / 1e9:.2f} GB, {arguments.repeat} times, medians:")
        for label, values in (("cp", copies), ("sha256sum", checksums), ("import", imports)):
            median = statistics.median(values)
            print(f"  {label:10s} {median:7.2f} s  {archive.stat().st_size / median / 1e9:6.2f} GB/s")
        print(f"  import / (cp + sha256sum) {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"  RssAnon at most {max(memories) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
