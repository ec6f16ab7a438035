"""Seconds of one TRADES step, attack included, compared with the published plain step of the same size.

    python benchmarks/trades_step.py --depth 10 --width 4 --size 32 --batch 64 --repeats 7
    python benchmarks/trades_step.py --device cuda --depth 28 --width 10 --batch 512 2048   # a GPU
    ... --compiled   # our network through torch.compile as well
    ... --profile    # also the slowest kernels of one of our steps

Plain: fp32, NCHW, eager, every convolution padded by a copy, parameters that require gradients during the attack, one
more clean forward pass for the targets of the attack. Ours: what `training.classifier` runs. The two alternate within
each repeat, so that other load on the machine affects both. Prints one JSON line per batch size: medians, and the
fraction of the measured matrix peak of the machine (2048 x 2048 products; 8192 on a GPU).
Shapes: B batch, C channels, H height, W width.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmat import devices, modes
from dmat.devices import Compute
from dmat.robust import flops, losses
from dmat.robust.attacks import Ball
from dmat.robust.networks import DataSpec, WideBlock, WideResNet, wide_resnet

DATA_SPEC = DataSpec(10, 3, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
STEPS, STEP_SIZE, EPSILON, BETA = 10, 2 / 255, 8 / 255, 5.0


def padded_block(block: WideBlock, x: Tensor) -> Tensor:
    """Computes a block whose convolutions pad by a copy. [B, C, H, W] -> [B, C', H', W']."""
    active = block.activation_0(block.batchnorm_0(x))
    sides = (1, 1, 1, 1) if block.conv_0.stride[0] == 1 else (0, 1, 0, 1)
    h = F.conv2d(F.pad(active, sides), block.conv_0.weight, stride=block.conv_0.stride)
    h = block.activation_1(block.batchnorm_1(h))
    h = F.conv2d(F.pad(h, (1, 1, 1, 1)), block.conv_1.weight)
    return h + (x if block.shortcut is None else block.shortcut(active))


def plain_network(model: WideResNet) -> nn.Module:
    """Copies a network into contiguous memory, with blocks that pad by a copy."""
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for block in [layer for layer in plain.modules() if isinstance(layer, WideBlock)]:
        block.forward = padded_block.__get__(block)  # type: ignore[method-assign]
    return plain.train()


def plain_step(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, start: Tensor) -> None:
    """Trains one TRADES step as published. x and start [B, C, H, W], y int64 [B]."""
    layers = [layer for layer in model.modules() if isinstance(layer, modes.BATCH_NORMS)]
    for layer in layers:
        layer.track_running_stats = False
    target = F.softmax(model(x), 1).detach()
    adversarial = (x + start).clamp(0, 1)
    for _ in range(STEPS):
        adversarial.requires_grad_(True)
        loss = F.kl_div(F.log_softmax(model(adversarial), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [adversarial])
        adversarial = adversarial.detach() + STEP_SIZE * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, x - EPSILON), x + EPSILON).clamp(0, 1)
    for layer in layers:
        layer.track_running_stats = True
    optimiser.zero_grad()
    clean_logits, adversarial_logits = model(x), model(adversarial.detach())
    robust = F.kl_div(F.log_softmax(adversarial_logits, 1), F.softmax(clean_logits, 1), reduction="batchmean")
    (F.cross_entropy(clean_logits, y, label_smoothing=0.1) + BETA * robust).backward()
    optimiser.step()


def our_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, start: Tensor, compute: Compute
) -> None:
    """Trains one TRADES step as `training.classifier` does. x and start [B, C, H, W], y int64 [B]."""
    loss_settings = losses.LossSettings(Ball("linf", EPSILON), STEPS, STEP_SIZE, BETA, 0.1)
    with modes.mode(model, training=True), compute.autocast():
        loss = losses.trades(model, compute.to_device(x), y, start, loss_settings)
    optimiser.zero_grad(set_to_none=True)
    loss.total.mean().backward()
    optimiser.step()


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Returns the wall time of a step in seconds, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of a large matrix product, best of 10."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(10))


def kernels(step: Callable[[], None], count: int = 16) -> list[str]:
    """Returns the slowest kernels of one step, each with its percentage of the time of all kernels."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as trace:
        step()
    times = {event.key: event.self_device_time_total or event.self_cpu_time_total for event in trace.key_averages()}
    longest = sorted(times, key=lambda key: -times[key])[:count]
    return [f"{100 * times[key] / sum(times.values()):.1f} % {key[:90]}" for key in longest]


def measure(args: argparse.Namespace, batch: int, compute: Compute) -> dict[str, Any]:
    """Times both steps for one batch size. Returns the record to print."""
    torch.manual_seed(0)
    model = wide_resnet(DATA_SPEC, args.depth, args.width, "silu")
    plain = plain_network(model).to(compute.device)
    compute.model_to_device(model)
    if args.compiled:
        model.compile()
    x = torch.rand(batch, 3, args.size, args.size).to(compute.device)
    y = torch.randint(10, (batch,)).to(compute.device)
    start = ((2 * torch.rand(x.shape) - 1) * EPSILON).to(compute.device)
    optimisers = [torch.optim.SGD(m.parameters(), 0.01, 0.9, nesterov=True) for m in (plain, model)]
    steps = (
        lambda: plain_step(plain, optimisers[0], x, y, start),
        lambda: our_step(model, optimisers[1], x, y, start, compute),
    )
    for step in steps * args.warm_up:
        step()
    times = [[seconds(step, compute.device) for step in steps] for _ in range(args.repeats)]
    plain_seconds, our_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    step_flops = (
        batch * flops.forward(model, (3, args.size, args.size)) * flops.forward_passes_per_step("trades", STEPS)
    )
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    return {
        "network": f"WRN-{args.depth}-{args.width}",
        "size": args.size,
        "batch": batch,
        **compute.describe(),
        "plain_seconds": round(plain_seconds, 4),
        "our_seconds": round(our_seconds, 4),
        "ratio": round(statistics.median(a / b for a, b in times), 2),
        "images_per_second": round(batch / our_seconds, 1),
        "gflops_per_second": round(step_flops / our_seconds / 1e9),
        "peak_gflops": round(peak(compute.device, dtype) / 1e9),
        "share_of_peak": round(step_flops / our_seconds / peak(compute.device, dtype), 3),
        "repeats": args.repeats,
        "compiled": args.compiled,
        **({"profile": kernels(steps[1])} if args.profile else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    compute = devices.resolve(args.device, args.precision, args.threads)
    if compute.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = True
    for batch in args.batch:
        print(json.dumps(measure(args, batch, compute)), flush=True)


if __name__ == "__main__":
    main()
