"""The quick tier of AutoAttack against the standard suite: seconds, and the images whose flags differ.

    python benchmarks/auto_attack_quick.py artifacts/train_robust/*/best.safetensors --out table.md

Every model is attacked by both with the same images, seed and shards, one after the other, `--repeats` times; times are
medians, on a CPU of processor time, which other work on the machine changes less. The table holds the share of the
standard time, the passes that both took (`dmat.evaluation.progress.Meter`), and the images that only one of the two
breaks.
"""

import argparse
import os
import statistics
import time
from fractions import Fraction
from pathlib import Path

import torch

from dmat import devices
from dmat.data.pixels import to_float
from dmat.data.sources import recognise
from dmat.devices import Compute
from dmat.evaluation.progress import Meter
from dmat.models.loading import open_classifier
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.robust.auto_attack import ROBUST

SHARD = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help=".safetensors files with their sidecars")
    parser.add_argument("--images", default="artifacts/prepare_data/test", help="a path, or a name such as digits")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    compute = devices.resolve(args.device, "fp32", args.threads).exact()
    source = recognise(args.images, "test")
    images, labels = to_float(source.images[: args.count]), torch.from_numpy(source.labels[: args.count])
    images, labels = compute.to_device(images), labels.to(compute.device)
    lines = [
        f"{len(labels)} images of {args.images}, {args.repeats} repeats, {compute.describe()['device']}, "
        f"{compute.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}",
        "",
        "| model | robust, standard | quick | standard, s | quick, s | time | passes | broken by standard alone | "
        "by quick alone |",
        "|---" * 9 + "|",
    ]
    for path in args.models:
        lines.append(_row(path, images, labels, args.repeats, compute))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


def _row(path: Path, images: torch.Tensor, labels: torch.Tensor, repeats: int, compute: Compute) -> str:
    """A line of the table. images [N, C, H, W] in [0, 1], labels int64 [N]."""
    model, sidecar = open_classifier(path)
    compute.model_to_device(model)
    ball = Ball(sidecar["threat"]["norm"], float(Fraction(sidecar["threat"]["epsilon"])))
    seconds: dict[str, list[float]] = {"standard": [], "quick": []}
    passes, robust = {}, {}
    for _ in range(repeats):
        for name in seconds:
            clock = time.process_time if compute.device.type == "cpu" else time.perf_counter
            started = clock()
            robust[name], passes[name] = _attack(model, images, labels, ball, name, sidecar["classes"])
            seconds[name].append(clock() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cells = [
        f"{path.parent.name}/{path.stem}",
        f"{int(robust['standard'].sum())}",
        f"{int(robust['quick'].sum())}",
        f"{median['standard']:.1f}",
        f"{median['quick']:.1f}",
        f"{median['quick'] / median['standard']:.1%}",
        f"{passes['quick'] / passes['standard']:.1%}",
        f"{int((robust['quick'] & ~robust['standard']).sum())}",
        f"{int((robust['standard'] & ~robust['quick']).sum())}",
    ]
    return f"| {' | '.join(cells)} |"


def _attack(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, ball: Ball, name: str, classes: int
) -> tuple[torch.Tensor, int]:
    """Robust flags [N] of images [N, C, H, W] with labels [N], on the device, and the passes that they took."""
    states, flags = [], []
    for number, (x, y) in enumerate(zip(images.split(SHARD), labels.split(SHARD), strict=True)):
        newest = []
        meter = Meter(model, 0, len(y), lambda state, newest=newest: newest.__setitem__(slice(None), [state]))
        _, broken_by = auto_attack.attack(
            meter, x, y, ball, auto_attack.suite(name, classes), 1 + number, SHARD
        )
        states.append(newest[0].passes_done)
        flags.append((broken_by == ROBUST).cpu())
    return torch.cat(flags), sum(states)


if __name__ == "__main__":
    main()
