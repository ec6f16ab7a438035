"""Seconds to hash a large image set at the start of a process: the first time, later with the cache, and without it.

python benchmarks/checksum_cache.py [GiB]
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHARD = 24 << 20  # bytes of a shard, as of 8,000 images 32x32x3
SCRIPT = """
import contextlib, sys, time
from pathlib import Path
from dmat import checksum_cache, files
started = time.perf_counter()
with checksum_cache.bypassed() if sys.argv[2] == "anew" else contextlib.nullcontext():
    digest = files.checksum(Path(sys.argv[1]))
print(time.perf_counter() - started, digest)
"""


def main() -> None:
    shards = round(float(sys.argv[1]) * (1 << 30) / SHARD) if len(sys.argv) > 1 else 85
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(shards):
            (images / f"images-{number:05d}.npy").write_bytes(os.urandom(SHARD))
        subprocess.run([sys.executable, "-c", "import time; time.sleep(2.5)"], check=True)  # file times must age
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        seconds_by_kind: dict[str, list[float]] = {}
        digests = set[str]()
        for kind in ("first", *["later", "anew"] * 5):
            command = [sys.executable, "-c", SCRIPT, str(images), kind]
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
            seconds_by_kind.setdefault(kind, []).append(float(output[0]))
            digests.add(output[1])
        assert len(digests) == 1, digests
        print(f"{shards} files of {SHARD >> 20} MiB")
        for kind, seconds in seconds_by_kind.items():
            print(f"{kind:6s} median {statistics.median(seconds):8.3f} s of {len(seconds)}")


if __name__ == "__main__":
    main()
