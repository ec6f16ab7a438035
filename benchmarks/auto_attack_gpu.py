"""Seconds of standard AutoAttack on a GPU, ours and the package's, in float32 and with TF32.

    python benchmarks/auto_attack_gpu.py                     # 1,000 images PreActResNet-18, 200 images WRN-28-10
    python benchmarks/auto_attack_gpu.py --package DIR       # of a pyautoattack that is not installed
    python benchmarks/auto_attack_gpu.py --device cpu --count 4 --cases tiny

Networks have random weights, and images are noise of 32x32. Their labels are the predictions, and epsilon is the radius
at which about two thirds of the images survive ten steps of PGD, since robust images take most of the time. Both sides
attack the same images with the same seed in batches of 250, fp32 first. TF32 rounds the factors of convolutions and
products to 10 bits: it is no evaluation in the sense of dmat, and so has a column of its own for both sides. Prints a
Markdown table: seconds, plain to ours, hours projected for 10,000 images, robust images and flags that differ.
Needs torch, numpy and safetensors beside the package.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from auto_attack import our_flags, plain_flags
from torch import Tensor, nn

from dmat import devices
from dmat.robust import attacks
from dmat.robust.attacks import Ball
from dmat.robust.networks import NETWORKS, DataSpec

DATA_SPEC = DataSpec(10, 3, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
BATCH, PROJECTED = 250, 10_000
_ROBUST_SHARE = 2 / 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the number of images."""

    title: str
    network: str
    depth: int
    width: int
    count: int


CASES = {
    "preact18": Case("PreActResNet-18", "preact_resnet", 18, 1, 1000),
    "wrn28": Case("WRN-28-10", "wide_resnet", 28, 10, 200),
    "tiny": Case("WRN-10-1", "wide_resnet", 10, 1, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["preact18", "wrn28"])
    parser.add_argument("--count", type=int, help="images; default: those of the case")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--package", type=Path, help="the folder that holds the folder pyautoattack")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    if args.package is not None:
        sys.path.insert(0, str(args.package))
    compute = devices.resolve(args.device, "fp32").exact()
    lines = [
        f"{compute.describe()['device']}, torch {torch.__version__}, CUDA {torch.version.cuda}, one run",
        "",
        "| network | images | precision | plain, s | ours, s | plain / ours | ours for 10,000, h | robust, plain | "
        "ours | flags that differ |",
        "|---" * 10 + "|",
    ]
    for name in args.cases:
        case = CASES[name]
        for line in _rows(dataclasses.replace(case, count=args.count or case.count), compute):
            lines.append(line)
            print(line, flush=True)
            if args.out:  # a run that is cut off keeps what it has
                args.out.write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def _rows(case: Case, compute: devices.Compute) -> list[str]:
    """The lines of a case: float32, and TF32 on both sides."""
    torch.manual_seed(0)
    model = NETWORKS[case.network](DATA_SPEC, case.depth, case.width, "silu").eval().to(compute.device)
    images = torch.rand(case.count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(compute.device)
    labels = torch.cat([_predict(model, x) for x in images.split(BATCH)])
    ball = Ball("linf", _radius(model, images[:BATCH], labels[:BATCH]))
    _warm_up(model, images, labels, ball, compute)
    rows = []
    for precision in ("fp32", "TF32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "TF32"
        seconds, flags = {}, {}
        for side in ("plain", "ours"):
            compute.synchronise()
            started = time.perf_counter()
            flags[side] = (
                plain_flags(model, images, labels, ball)
                if side == "plain"
                else our_flags(model, images, labels, ball, compute, 1, BATCH)
            )
            seconds[side] = time.perf_counter() - started  # the flags are on the CPU: the device is idle
        hours = seconds["ours"] / case.count * PROJECTED / 3600
        cells = [
            case.title, f"{case.count:,}", precision, *(f"{seconds[side]:.1f}" for side in ("plain", "ours")),
            f"{seconds['plain'] / seconds['ours']:.2f}", f"{hours:.2f}",
            *(f"{int(flags[side].sum())}" for side in ("plain", "ours")),
            f"{int((flags['plain'] != flags['ours']).sum())}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _warm_up(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, compute: devices.Compute) -> None:
    """Lets the device choose its kernels and reserve its memory, in both layouts. images [N, C, H, W], labels [N]."""
    x, y = images[:BATCH], labels[:BATCH]
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        start = torch.zeros_like(x)
        attacks.pgd(model, x.contiguous(memory_format=layout), attacks.cross_entropy(y), ball, start, 3, ball.epsilon)
    compute.synchronise()


def _radius(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The radius in linf, between 0.01 / 255 and 16 / 255, at which `_ROBUST_SHARE` of the images survive ten steps.

    images [N, C, H, W], labels [N].
    """
    low, high = 0.01 / 255, 16 / 255
    for _ in range(10):
        radius = (low * high) ** 0.5
        ball, start = Ball("linf", radius), torch.zeros_like(images)
        adversarial = attacks.pgd(model, images, attacks.margin(labels), ball, start, 10, radius / 4)
        robust = float((_predict(model, adversarial) == labels).float().mean())
        low, high = (radius, high) if robust > _ROBUST_SHARE else (low, radius)
    return radius


def _predict(model: nn.Module, images: Tensor) -> Tensor:  # [B, C, H, W] -> int64 [B]
    with torch.no_grad():
        return model(images).argmax(1)


if __name__ == "__main__":
    main()
