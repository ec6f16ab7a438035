"""How long a start takes that hashes a large image set: first and later processes, with the memory and without.

python benchmarks/checksum_cache.py [GiB]
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHARD = 24 << 20  # bytes, as 8,000 images 32x32x3
TIMED = """
import contextlib, sys, time
from pathlib import Path
from dmat import checksum_cache, files
started = time.perf_counter()
with checksum_cache.reading_anew() if sys.argv[2] == "anew" else contextlib.nullcontext():
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
        subprocess.run([sys.executable, "-c", "import time; time.sleep(2.5)"], check=True)  # times of files settle
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        found: dict[str, list[float]] = {}
        for kind in ("first", *["later", "anew"] * 5):
            words = [sys.executable, "-c", TIMED, str(images), kind]
            done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split()
            found.setdefault(kind, []).append(float(done[0]))
            assert len({done[1]}) == 1
        print(f"{shards} files of {SHARD >> 20} MiB")
        for kind, seconds in found.items():
            print(f"{kind:6s} median {statistics.median(seconds):8.3f} s of {len(seconds)}")


if __name__ == "__main__":
    main()
