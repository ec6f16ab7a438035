"""How fast training batches come from a store of generated images, and what memory they take.

    python benchmarks/image_store.py --folder /tmp/store --images 5000000     # 15 GB, made once and kept
    python benchmarks/image_store.py --folder /tmp/store --images 500000

Batches of 1,024 images 32x32, 80 % generated, in the order of a training. Three measurements that alternate within each
repeat: batches as bytes; batches as floats after crop and flip, read ahead by a thread as a training does; and the
plain way of the published code, a DataLoader with PIL transforms of every image over arrays in memory (the 50,000 real
images, which fit). Prints a JSON line: medians in images per second, seconds to open the store, and RssAnon, the memory
that is not file pages, of this process before and after.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dmat.data import shards
from dmat.data.augmentation import AUGMENTATIONS
from dmat.data.batches import MixedBatches
from dmat.data.mixing import Mix
from dmat.data.pixels import to_float
from dmat.data.selections import SelectedImages
from dmat.training.prefetcher import Prefetcher

SHARD = 50_000  # images
SHAPE = (32, 32, 3)
REAL, BATCH, SHARE = 50_000, 1024, 0.8


def make_store(folder: Path, images: int) -> None:
    """Writes shards of random bytes; those that exist stay. Labels count the classes over and over."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (SHARD, *SHAPE), dtype=np.uint8)
    labels = np.arange(SHARD) % 10
    entries = []
    for index in range(images // SHARD):
        record = folder / f"entry-{index}.json"
        if not record.exists():
            # Other bytes in each shard, without drawing them anew.
            record.write_text(
                json.dumps(shards.write_shard(folder, index, np.roll(pixels, index, 0) ^ np.uint8(index), labels))
            )
        entries.append(json.loads(record.read_text()))
    shards.write_manifest(
        folder, entries, shape=SHAPE, class_names=list("0123456789"), class_counts=[images // 10] * 10, metadata={}
    )


def anonymous_memory() -> float:
    """RssAnon of this process in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class PlainImages(Dataset):
    """Images in memory, each transformed by PIL and torchvision, as in the code of Wang et al. 2023."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from torchvision import transforms

        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(0.5), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def rate(step: Callable[[], object], seconds: float) -> float:
    """Images per second of a step that makes one batch, over at least so many seconds."""
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        step()
        count += BATCH
    return count / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5_000_000, help="a multiple of 50,000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--workers", type=int, default=2, help="of the plain DataLoader")
    args = parser.parse_args()
    folder, real_folder = args.folder / str(args.images), args.folder / "real"
    for path, count in ((folder, args.images), (real_folder, REAL)):
        if not (path / shards.MANIFEST).exists():
            path.mkdir(parents=True, exist_ok=True)
            make_store(path, count)
    started = time.perf_counter()
    generated = shards.open_shards(folder, verify=False)
    opened = time.perf_counter() - started
    real = shards.open_shards(real_folder, verify=False)
    batches = MixedBatches(Mix(REAL, len(generated), BATCH, SHARE), 1, real, SelectedImages(generated))
    steps = iter(range(10**9))
    augment, rng = AUGMENTATIONS["crop4_flip"], np.random.default_rng(1)
    prefetcher, own_steps = Prefetcher(batches.at, 10**9), iter(range(10**9))
    for array in generated.images:  # warm, as far as memory allows
        array.reshape(-1)[::4096].sum()
    plain_images, plain_labels = real.all()
    loader = DataLoader(
        PlainImages(plain_images, plain_labels),
        BATCH,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=True,
        drop_last=True,
    )

    def endless() -> "object":
        while True:
            yield from loader

    plain = endless()
    measurements: dict[str, Callable[[], object]] = {
        "bytes": lambda: batches.at(next(steps)),
        "augmented": lambda: augment(to_float(prefetcher.at(next(own_steps))[0]), rng),
        "plain": lambda: next(plain),  # type: ignore[call-overload]
    }
    for measure in measurements.values():
        measure()
    before = anonymous_memory()
    rates = {name: [] for name in measurements}
    for _ in range(args.repeats):
        for name, measure in measurements.items():
            rates[name].append(rate(measure, args.seconds))
    ratios = [fast / slow for fast, slow in zip(rates["augmented"], rates["plain"], strict=True)]
    print(json.dumps({
        "images": args.images, "open_seconds": round(opened, 3),
        **{f"{name}_per_second": round(statistics.median(values)) for name, values in rates.items()},
        "bytes_all": [round(value) for value in rates["bytes"]],
        "augmented_to_plain": round(statistics.median(ratios), 1),
        "rss_anon_mb": [round(before), round(anonymous_memory())], "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
