"""Seconds of standard AutoAttack: the package called directly, and the way an evaluation calls it.

    python benchmarks/auto_attack.py --model artifacts/train_robust/generated-1/best.safetensors
    python benchmarks/auto_attack.py --depth 10 --width 4 --count 32 --repeats 3       # random weights, 32x32
    python benchmarks/auto_attack.py --workers 2 ...     # both sides on the same two cores

All use the same model, images and seed, in float32. Plain: contiguous NCHW images and weights that require gradients,
one call with the package's own batch of 250. Ours: one shard, channels-last, frozen weights, attack after attack. The
sides alternate, and ratios are those of the medians of one run. Flags are compared too: with up to 250 images and
--batch 250 they must be equal.

With --workers N ours has shards of up to 250 images, which the engine divides over N processes of one thread each, as
`dmat evaluate-robust --workers N` does. Every shard has a seed of its own, so that some flags differ. Plain runs with
one thread and with N; the faster one is compared with. All processes have the same N cores, and have loaded the model
before the time starts.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import auto_attack as this_file  # a worker imports it by its name

from dmat import devices
from dmat.data.pixels import to_float
from dmat.engine import EngineOptions, Task, open_engine
from dmat.models.loading import open_classifier
from dmat.robust import auto_attack as attacks
from dmat.robust.attacks import Ball
from dmat.robust.networks import DataSpec, wide_resnet

SHARD = 250
_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is attacked. model: None for random weights. epsilon: None for that of the model, or 1/255."""

    model: Path | None
    images: str
    depth: int
    width: int
    norm: str
    epsilon: float | None
    count: int


@functools.cache
def load(case: Case) -> tuple[nn.Module, Tensor, Tensor, Ball]:
    """Returns model, images [N, C, H, W] in [0, 1], labels int64 [N] and the ball."""
    if case.model is None:
        torch.manual_seed(0)
        model = wide_resnet(DataSpec(10, 3, (0.5,) * 3, (0.25,) * 3), case.depth, case.width, "silu").eval()
        images = torch.rand(case.count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            labels = model(images).argmax(1)
        return model, images, labels, Ball(case.norm, case.epsilon or 1 / 255)
    from dmat.data.sources import recognise  # needs more packages than a machine with a GPU may have

    model, sidecar = open_classifier(case.model)
    source = recognise(case.images, "test")
    indices = np.random.default_rng(0).permutation(len(source.labels))[: case.count]
    epsilon = case.epsilon or float(Fraction(sidecar["threat"]["epsilon"]))
    images = to_float(source.images[indices]).contiguous()
    return model, images, torch.from_numpy(source.labels[indices]), Ball(case.norm, epsilon)


def plain_flags(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball) -> Tensor:
    """Robust flags [N] of images [N, C, H, W] with labels [N] by one call of the package, all on the model's device."""
    from pyautoattack import AutoAttack

    model.to(memory_format=torch.contiguous_format).requires_grad_(True)
    package = AutoAttack(model, norm=_NORMS[ball.norm], eps=ball.epsilon, seed=1, device=str(images.device))
    package.logger.setLevel("ERROR")
    _, prediction = package.run_standard_evaluation(images, labels, batch_size=250)
    return (prediction == labels).cpu()


def our_flags(
    model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, compute: devices.Compute, seed: int, batch: int
) -> Tensor:
    """Robust flags [N] of images [N, C, H, W] with labels [N], all on the device."""
    frozen = compute.model_to_device(model).requires_grad_(False)
    suite = attacks.suite("standard", 10)
    _, broken_by = attacks.attack(frozen, compute.to_device(images), labels, ball, suite, seed, batch)
    return (broken_by == attacks.ROBUST).cpu()


def shard_flags(context: object, case: Case, number: int | None, size: int) -> np.ndarray:
    """Robust flags of a shard, in a worker. number: None to load the model and attack nothing."""
    compute = devices.resolve("cpu", "fp32", 1).exact()
    model, images, labels, ball = load(case)
    if number is None:
        time.sleep(0.5)  # so that no worker gets two of these
        return np.empty(0, bool)
    rows = slice(number * size, (number + 1) * size)
    return our_flags(model, images[rows], labels[rows], ball, compute, 1 + number, size).numpy()


@contextlib.contextmanager
def divided(case: Case, workers: int) -> Iterator[Callable[[], Tensor]]:
    """Gives the function that computes the robust flags [N] in workers, which have loaded the model."""
    size = min(SHARD, -(-case.count // workers))

    with open_engine(EngineOptions(workers=workers)) as engine:

        def run(numbers: list[int | None]) -> dict[str, Any]:
            tasks = iter([Task(f"shard {number}", this_file.shard_flags, (case, number, size)) for number in numbers])
            results: dict[str, Any] = {}
            engine.run(
                lambda: next(tasks, None),
                on_outcome=lambda outcome: results.__setitem__(outcome.task.name, outcome.result),
            )
            return results

        def flags() -> Tensor:
            results = run(list(range(-(-case.count // size))))
            return torch.from_numpy(np.concatenate([results[f"shard {k}"] for k in range(len(results))]))

        run([None] * workers)
        yield flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .safetensors file; without it a network with random weights")
    parser.add_argument("--images", default="artifacts/prepare_data/test", help="a path, or a name such as digits")
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--norm", choices=_NORMS, default="linf")
    parser.add_argument("--epsilon", type=float, help="default: that of the model, else 1/255")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="0: ours in one process, with --threads")
    args = parser.parse_args()
    if args.workers:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.workers])  # workers inherit it
    case = Case(args.model, args.images, args.depth, args.width, args.norm, args.epsilon, args.count)
    compute = devices.resolve("cpu" if args.workers else args.device, "fp32", args.threads).exact()
    model, images, labels, ball = load(case)
    model, x, y = model.to(compute.device), images.to(compute.device), labels.to(compute.device)

    def plain(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return plain_flags(model, x, y, ball)

    with contextlib.ExitStack() as stack:
        if args.workers:
            plain_sides = {f"plain, {threads} threads": functools.partial(plain, threads)
                           for threads in sorted({1, args.workers})}  # fmt: skip
            sides = {**plain_sides, f"ours, {args.workers} workers": stack.enter_context(divided(case, args.workers))}
        else:
            sides = {
                "plain": functools.partial(plain, args.threads),
                "ours": functools.partial(our_flags, model, x, y, ball, compute, 1, args.batch),
            }
        medians, flags = _alternate(sides, args.repeats)
    *plains, ours = medians
    best = min(plains, key=medians.__getitem__)
    print(f"median: {', '.join(f'{name} {value:.2f} s' for name, value in medians.items())}; "
          f"{best} / {ours} {medians[best] / medians[ours]:.3f}; "
          f"flags that differ: {int((flags[best] != flags[ours]).sum())} of {len(y)}; "
          f"{compute.describe()['device']}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")  # fmt: skip


def _alternate(sides: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The median seconds and the robust flags [N] of each side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    flags = {}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            flags[name] = side()
            seconds[name].append(time.perf_counter() - started)
            robust, count = int(flags[name].sum()), len(flags[name])
            print(f"{name:16s} {seconds[name][-1]:8.2f} s  robust {robust} of {count}", flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}, flags


if __name__ == "__main__":
    main()
