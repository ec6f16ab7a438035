"""Seconds of one denoiser call and of one training step of DDPM++, compared with the plain network of the same size.

    python benchmarks/denoiser_speed.py --batch 8 --repeats 7
    python benchmarks/denoiser_speed.py --network unet --batch 256       # the digits' network
    python benchmarks/denoiser_speed.py --device cuda --batch 512        # a GPU
    ... --compiled   # our network through torch.compile as well

Plain: fp32 (TF32 on a GPU), NCHW, eager. Ours: what `generate_images` and `training.denoiser` run. The two alternate
within each repeat, so that other load on the machine affects both. Prints a JSON line for sampling and one for
training: medians, their ratio, and the fraction of the measured matrix peak (2048 x 2048 products; 8192 on a GPU).
Shapes: B batch, C channels, H height, W width.
"""

import argparse
import contextlib
import copy
import json
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode
from trades_step import peak, seconds

from dmat import devices
from dmat.config import DenoiserNetwork
from dmat.diffusion import formulations
from dmat.diffusion.formulations import EDM, Preconditioned
from dmat.diffusion.networks import NETWORKS, DenoiserSpec

SETTINGS = {  # the network of the published CIFAR-10 weights, and that of the digits' recipe
    "ddpmpp": ((32, 32, 3, 10), {"channels": 128, "multipliers": [2, 2, 2], "blocks": 4, "attention": [16]}),
    "unet": ((8, 8, 1, 10), {"channels": 32, "multipliers": [1, 2], "blocks": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SETTINGS, default="ddpmpp")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    compute = devices.resolve(args.device, args.precision, args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    (height, width, channels, classes), values = SETTINGS[args.network]
    torch.manual_seed(0)
    network = NETWORKS[args.network](
        DenoiserSpec(height, width, channels, classes),
        DenoiserNetwork.model_validate({"name": args.network, "dropout": 0.13, **values}),
    )
    plain = Preconditioned(network, EDM(0.5)).to(compute.device)
    ours = copy.deepcopy(plain)
    compute.model_to_device(ours)
    if args.compiled:
        ours.compile()
    x = torch.randn(args.batch, channels, height, width, device=compute.device)
    sigma = torch.linspace(0.1, 5, args.batch, device=compute.device)
    labels = torch.arange(args.batch, device=compute.device) % classes
    noise = torch.randn_like(x)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = copy.deepcopy(network).to("meta")
        meta(torch.empty(1, channels, height, width), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    forward = counter.get_total_flops()

    def as_it_runs(is_ours: bool) -> tuple[torch.Tensor, contextlib.AbstractContextManager[object]]:
        """The images [B, C, H, W] in their layout, and the precision."""
        return (compute.to_device(x), compute.autocast()) if is_ours else (x, contextlib.nullcontext())

    def call(model: Preconditioned, is_ours: bool) -> None:
        model.eval()
        images, precision = as_it_runs(is_ours)
        with torch.no_grad(), precision:
            model(images, sigma, labels)

    optimisers = {id(model): torch.optim.Adam(model.parameters(), 1e-4) for model in (plain, ours)}

    def train(model: Preconditioned, is_ours: bool) -> None:
        model.train()
        images, precision = as_it_runs(is_ours)
        optimisers[id(model)].zero_grad(set_to_none=True)
        with precision:
            loss = formulations.loss(model, images, labels, sigma, noise).mean()
        loss.backward()
        optimisers[id(model)].step()

    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    for name, step, passes in (("sampling", call, 1), ("training", train, 3)):
        pair = (lambda step=step: step(plain, False), lambda step=step: step(ours, True))
        for _ in range(args.warm_up):
            for run in pair:
                run()
        times = [[seconds(run, compute.device) for run in pair] for _ in range(args.repeats)]
        plain_seconds, our_seconds = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = sorted(first / second for first, second in times)
        print(json.dumps({
            "what": name, "network": args.network, "batch": args.batch, "compiled": args.compiled,
            "plain_seconds": round(plain_seconds, 4), "our_seconds": round(our_seconds, 4),
            "ratio": round(statistics.median(ratios), 3), "ratios": [round(ratio, 3) for ratio in ratios],
            "forward_gflop": round(forward / 1e9, 3),
            "peak_fraction": round(passes * forward * args.batch / our_seconds / peak(compute.device, dtype), 3),
            **compute.describe(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
