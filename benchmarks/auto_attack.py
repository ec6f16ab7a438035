"""Seconds of standard AutoAttack: the package called directly, and the way an evaluation calls it.

    python benchmarks/auto_attack.py --model artifacts/train_robust/generated-1/best.safetensors --images digits
    python benchmarks/auto_attack.py --depth 10 --width 4 --count 32 --repeats 3       # random weights, 32x32

Both use the same model, images and seed, in float32. Plain: contiguous NCHW images and weights that require gradients,
one call with the package's own batch of 250. Ours: one shard, channels-last, frozen weights, attack after attack. The
two alternate, and the ratio is that of the medians of one run. Flags are compared too: with up to 250 images and
--batch 250 they must be equal.
"""

import argparse
import statistics
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack

from dmat import devices
from dmat.data.pixels import to_float
from dmat.data.sources import recognise
from dmat.models.loading import open_classifier
from dmat.robust import auto_attack
from dmat.robust.attacks import Ball
from dmat.robust.networks import DataSpec, wide_resnet

_NORMS = {"linf": "Linf", "l2": "L2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a .safetensors file; without it a network with random weights")
    parser.add_argument("--images", default="digits")
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--norm", choices=_NORMS, default="linf")
    parser.add_argument("--epsilon", type=float, help="default: that of the model, else 1/255")
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    compute = devices.resolve(args.device, "fp32", args.threads).exact()
    model, images, labels, epsilon = _load(args)
    plain_model = model.to(compute.device).requires_grad_(True)
    x, y = images.to(compute.device), labels.to(compute.device)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    flags = {}
    for _ in range(args.repeats):
        for name in seconds:
            started = time.perf_counter()
            if name == "plain":
                plain_model.to(memory_format=torch.contiguous_format).requires_grad_(True)
                package = AutoAttack(
                    plain_model, norm=_NORMS[args.norm], eps=epsilon, seed=1, device=str(compute.device)
                )
                _, prediction = package.run_standard_evaluation(x, y, batch_size=250)
                flags[name] = (prediction == y).cpu()
            else:
                our_model = compute.model_to_device(plain_model).requires_grad_(False)
                _, broken_by = auto_attack.attack(
                    our_model, compute.to_device(x), y, Ball(args.norm, epsilon), auto_attack.suite("standard", 10), 1,
                    args.batch,
                )  # fmt: skip
                flags[name] = (broken_by == auto_attack.ROBUST).cpu()
            seconds[name].append(time.perf_counter() - started)
            print(f"{name:6s} {seconds[name][-1]:8.2f} s  robust {int(flags[name].sum())} of {len(y)}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"median: plain {medians['plain']:.2f} s, ours {medians['ours']:.2f} s; "
          f"plain / ours {medians['plain'] / medians['ours']:.3f}; "
          f"flags that differ: {int((flags['plain'] != flags['ours']).sum())} of {len(y)}; "
          f"{compute.describe()['device']}, {compute.threads} threads, torch {torch.__version__}")  # fmt: skip


def _load(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, float]:
    """Returns model, images [N, C, H, W] in [0, 1], labels int64 [N] and epsilon."""
    if args.model is None:
        torch.manual_seed(0)
        model = wide_resnet(DataSpec(10, 3, (0.5,) * 3, (0.25,) * 3), args.depth, args.width, "silu").eval()
        images = torch.rand(args.count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            labels = model(images).argmax(1)
        return model, images, labels, args.epsilon or 1 / 255
    model, sidecar = open_classifier(args.model)
    source = recognise(args.images, "test")
    indices = np.random.default_rng(0).permutation(len(source.labels))[: args.count]
    epsilon = args.epsilon or float(Fraction(sidecar["threat"]["epsilon"]))
    return model, to_float(source.images[indices]).contiguous(), torch.from_numpy(source.labels[indices]), epsilon


if __name__ == "__main__":
    main()
