"""Seconds of one TRADES step, attack included: the published plain step, and ours, eager and compiled.

    python benchmarks/trades_step.py --threads 1 2 --batch 32            # a CPU
    python benchmarks/trades_step.py --depth 28 --width 10 --batch 512 1024 --sides plain ours-bf16 ours-bf16-compiled
    ... --profile    # also the slowest kernels of a step of the last side

plain: the step of Wang et al.'s code: fp32, NCHW, eager, SiLU in place, the first convolution of a block padded by a
copy, one more clean forward pass for the targets of the attack. ours: what `training.classifier` runs, in fp32 or bf16,
eager or compiled. All sides alternate within each repeat, so that other load on the machine affects all. Prints a JSON
line per number of threads and batch size: medians in seconds, ratios of the plain median to them, and the fraction of
the measured matrix peak of the machine in the side's precision (MFU; on a GPU fp32 convolutions use TF32, and the fp32
peak does not). Needs torch and numpy alone.
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

from dmat import compiler, devices, modes
from dmat.devices import Compute
from dmat.robust import flops, losses
from dmat.robust.attacks import Ball
from dmat.robust.networks import DataSpec, WideBlock, WideResNet, wide_resnet

DATA_SPEC = DataSpec(10, 3, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
STEPS, STEP_SIZE, EPSILON, BETA = 10, 2 / 255, 8 / 255, 5.0
SIDES = ["plain", "ours-fp32", "ours-fp32-compiled", "ours-bf16", "ours-bf16-compiled"]


def padded_block(block: WideBlock, x: Tensor) -> Tensor:
    """Computes a block whose first convolution pads by a copy. [B, C, H, W] -> [B, C', H', W']."""
    active = block.activation_0(block.batchnorm_0(x))
    sides = (1, 1, 1, 1) if block.conv_0.stride[0] == 1 else (0, 1, 0, 1)
    h = F.conv2d(F.pad(active, sides), block.conv_0.weight, stride=block.conv_0.stride)
    h = block.conv_1(block.activation_1(block.batchnorm_1(h)))
    return h + (x if block.shortcut is None else block.shortcut(active))


def plain_network(model: WideResNet) -> nn.Module:
    """Copies a network into contiguous memory, with SiLU in place and blocks that pad by a copy."""
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for layer in plain.modules():
        if isinstance(layer, WideBlock):
            layer.forward = padded_block.__get__(layer)  # type: ignore[method-assign]
        elif isinstance(layer, nn.SiLU):
            layer.inplace = True
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
    optimiser.zero_grad(set_to_none=True)
    with modes.mode(model, training=True), compute.autocast():
        loss = losses.trades(model, compute.to_device(x), y, start, loss_settings)
    loss.total.mean().backward()
    optimiser.step()


def seconds(step: Callable[[], None], compute: Compute) -> float:
    """Returns the wall time of a step in seconds, until the device has finished."""
    compute.synchronise()
    started = time.perf_counter()
    step()
    compute.synchronise()
    return time.perf_counter() - started


def kernels(step: Callable[[], None], count: int = 16) -> list[str]:
    """Returns the slowest kernels of one step, each with its percentage of the time of all kernels."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as trace:
        step()
    times = {event.key: event.self_device_time_total or event.self_cpu_time_total for event in trace.key_averages()}
    longest = sorted(times, key=lambda key: -times[key])[:count]
    return [f"{100 * times[key] / sum(times.values()):.1f} % {key[:90]}" for key in longest]


def step_of(side: str, model: WideResNet, batch: tuple[Tensor, Tensor, Tensor], compute: Compute) -> Callable[[], None]:
    """Returns a step of one side, on a copy of the model. batch: x [B, C, H, W], y int64 [B], start [B, C, H, W]."""
    if side == "plain":
        network = plain_network(model).to(compute.device)
        optimiser = torch.optim.SGD(network.parameters(), 0.01, 0.9, nesterov=True)
        return lambda: plain_step(network, optimiser, *batch)
    ours = compute.model_to_device(copy.deepcopy(model))
    optimiser = torch.optim.SGD(ours.parameters(), 0.01, 0.9, nesterov=True)
    module = compiler.compiled(ours, fullgraph=True) if side.endswith("-compiled") else ours
    return lambda: our_step(module, optimiser, *batch, compute)


def measure(args: argparse.Namespace, threads: int, batch: int) -> dict[str, Any]:
    """Times the sides for one number of threads and one batch size. Returns the record to print."""
    computes = {
        side: devices.resolve(args.device, "bf16" if "bf16" in side else "fp32", threads) for side in args.sides
    }
    compute = computes[args.sides[0]]
    torch.manual_seed(0)
    model = wide_resnet(DATA_SPEC, args.depth, args.width, "silu")
    x = torch.rand(batch, 3, args.size, args.size)
    tensors = (x, torch.randint(10, (batch,)), (2 * torch.rand(x.shape) - 1) * EPSILON)
    inputs = tuple(tensor.to(compute.device) for tensor in tensors)
    steps = {side: step_of(side, model, inputs, computes[side]) for side in args.sides}  # type: ignore[arg-type]
    warm_ups = {side: [seconds(step, compute) for _ in range(args.warm_up)] for side, step in steps.items()}
    times = [{side: seconds(step, compute) for side, step in steps.items()} for _ in range(args.repeats)]
    medians = {side: statistics.median(row[side] for row in times) for side in steps}
    step_flops = (
        batch * flops.forward(model, (3, args.size, args.size)) * flops.forward_passes_per_step("trades", STEPS)
    )
    peaks = {side: devices.matrix_peak(computes[side]) for side in steps}
    return {
        "network": f"WRN-{args.depth}-{args.width}",
        "size": args.size,
        "batch": batch,
        **{key: value for key, value in compute.describe().items() if not key.startswith("precision")},
        "bf16_in_hardware": devices.resolve(args.device, "auto", threads).reason,
        "repeats": args.repeats,
        "first_seconds": {side: round(values[0], 1) for side, values in warm_ups.items()},  # with compilation
        "seconds": {side: round(value, 4) for side, value in medians.items()},
        "times_as_fast_as_plain": {
            side: round(medians["plain"] / value, 2) for side, value in medians.items() if "plain" in medians
        },
        "images_per_second": {side: round(batch / value, 1) for side, value in medians.items()},
        "peak_gflops": {side: round(value / 1e9) for side, value in peaks.items()},
        "share_of_peak": {side: round(step_flops / medians[side] / peaks[side], 3) for side in steps},
        **({"profile": kernels(steps[args.sides[-1]])} if args.profile else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=[0])
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = True  # torch's default, with which the published code ran
    for threads in args.threads:
        for batch in args.batch:
            print(json.dumps(measure(args, threads, batch)), flush=True)


if __name__ == "__main__":
    main()
