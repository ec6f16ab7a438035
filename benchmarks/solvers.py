"""Samplers at equal numbers of denoiser calls: quality of digits, and distance from the exact end of each path.

    python benchmarks/solvers.py --images 1000 --draws 3 --generators edm ddpm --to docs/results/solvers

Needs `artifacts/` of `make repro` up to `measure_images` in the present folder, and of `dmat train-diffusion` for other
generators. For each of them, sampler and number of calls,
draws sets of images with the seeds 1, 2, ... and measures them as `measure_images` does: Frechet distance to the
validation images in features of the scorer, and the fraction whose label the scorer confirms. "error" is the root mean
square difference of pixels in [-1, 1] from Heun with 128 steps, for the latents of the first draw.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dmat import devices, seeds
from dmat.config import Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes, to_float
from dmat.diffusion import schedule_search
from dmat.diffusion.samplers import SAMPLERS, SEARCHED
from dmat.metrics import pictures, quality
from dmat.models.classifiers import load_classifier
from dmat.models.denoisers import load_denoiser
from dmat.robust import prediction
from dmat.training import weights

CALLS = (5, 6, 8, 10, 18, 40)
ANCESTRAL_CALLS = (*CALLS, 200)  # of a model of DDPM, which its paper calls 1,000 times
ARTIFACTS = Path("artifacts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="in a draw")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--generators", nargs="+", default=["edm"])
    parser.add_argument("--to", type=Path, required=True, help="folder for solvers.json, solvers.md and solvers.png")
    arguments = parser.parse_args()
    compute = devices.resolve(threads=int(os.environ.get("OMP_NUM_THREADS", "1")))
    validation = shards.open_shards(ARTIFACTS / "prepare_data/validation")
    scorer, _ = load_classifier(ARTIFACTS / "train_scorer/scorer" / weights.BEST, validation.manifest, compute)
    records = [
        record
        for name in arguments.generators
        for record in compare(name, scorer, validation.all()[0], arguments.images, arguments.draws, compute)
    ]
    arguments.to.mkdir(parents=True, exist_ok=True)
    about = {"images": arguments.images, "draws": arguments.draws, **compute.describe()}
    (arguments.to / "solvers.json").write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    (arguments.to / "solvers.md").write_text(table(records))
    draw_curves(arguments.to / "solvers.png", records)


def compare(generator, scorer, real_images, count, draws, compute):
    """Records of all cases of a generator."""
    model, sidecar = load_denoiser(ARTIFACTS / "train_diffusion" / generator / weights.DENOISER, compute)
    lowest, highest = sidecar["sigma_range"]
    limits = {"sigma_min": max(0.002, lowest), "sigma_max": min(80.0, highest or 80.0)}
    height, width, channels = sidecar["image_shape"]
    labels = torch.arange(count) % sidecar["label_dim"]

    def sample(settings: Sampler, draw: int, levels: list[float] | None = None) -> torch.Tensor:
        def normals(purpose: str) -> torch.Tensor:
            return seeds.normals(draw, purpose, np.arange(count), (channels, height, width), compute.device)

        def noise(step: int) -> torch.Tensor:
            return normals(f"churn/{step}")

        latents = compute.to_device(normals("latents"))
        with compute.autocast():
            return SAMPLERS[settings.name](
                model, latents, labels.to(compute.device), settings, noise, levels
            ).cpu()  # fmt: skip

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return scorer.features(compute.to_device(to_float(images))).float().cpu().numpy()

    real = quality.moments(features(real_images))
    exact = sample(Sampler(name="heun", steps=128, **limits), 1)
    searched = {}
    for name, schedule, calls in tqdm([*cases(sidecar["formulation"])], desc=generator, mininterval=20):
        steps = (calls + 1) // 2 if name == "heun" else calls
        settings = Sampler(name=name, steps=steps, schedule=schedule, **({} if schedule == "ddpm" else limits))
        if schedule == SEARCHED and steps not in searched:
            indices = np.arange(schedule_search.IMAGES)
            latents = seeds.normals(1, "schedule search", indices, (channels, height, width), compute.device)
            started = time.perf_counter()
            levels = schedule_search.search(
                model, latents, torch.from_numpy(indices) % sidecar["label_dim"], steps, *limits.values()
            )
            searched[steps] = levels.tolist(), time.perf_counter() - started
        levels, seconds = searched[steps] if schedule == SEARCHED else (None, None)
        distances, agreements, error = [], [], 0.0
        for draw in range(1, draws + 1):
            images = sample(settings, draw, levels)
            if draw == 1:
                error = (images - exact).square().mean().sqrt().item()
            pixels = to_bytes(images)
            distances.append(quality.frechet_distance(quality.moments(features(pixels)), real))
            predicted = prediction.logits(scorer, to_float(pixels), compute).argmax(1)
            agreements.append((predicted == labels).float().mean().item())
        yield {
            "generator": generator, "sampler": name, "schedule": schedule,
            "calls": 2 * steps - 1 if name == "heun" else steps, "distances": distances,
            "distance": statistics.mean(distances), "agreement": statistics.mean(agreements), "error": error,
            **({"levels": levels, "search_seconds": seconds} if levels else {}),
        }  # fmt: skip


def cases(formulation: str):
    """Sampler, schedule and calls. Heun makes odd numbers of calls: one less than an even number."""
    if formulation == "ddpm":
        for calls in ANCESTRAL_CALLS:
            yield "ancestral", "ddpm", calls
        for calls in CALLS:
            yield "euler", "ddpm", calls
        for calls in CALLS:
            yield "ipndm", "edm", calls
        return
    for name in SAMPLERS:
        for calls in (5, 10, 18, 35, 40) if name == "heun" else CALLS:
            yield name, "edm", calls
    for name, schedule in (("dpmpp_3m", "log_snr"), ("euler", SEARCHED), ("ipndm", SEARCHED), ("unipc_2", SEARCHED)):
        for calls in CALLS:
            yield name, schedule, calls


def table(records: list[dict]) -> str:
    lines = ["| generator | sampler | schedule | calls | Frechet distance (min to max) | class agreement | error |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in records:
        low, high = min(r["distances"]), max(r["distances"])
        lines.append(
            f"| `{r['generator']}` | "
            f"`{r['sampler']}` | `{r['schedule']}` | {r['calls']} | {r['distance']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {100 * r['agreement']:.1f} % | {r['error']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(path: Path, records: list[dict]) -> None:
    """Distance and error against calls, one line for each sampler."""
    figure, axes = pictures.new_figure(9, 4.4, columns=2)
    groups: dict[str, list[dict]] = {}
    for record in records:
        suffix = "" if record["schedule"] == "edm" else f", {record['schedule']}"
        prefix = "" if record["generator"] == records[0]["generator"] else f"{record['generator']}: "
        groups.setdefault(f"{prefix}{record['sampler']}{suffix}", []).append(record)
    for number, (name, group) in enumerate(groups.items()):
        style = {"color": pictures.PALETTE[number % len(pictures.PALETTE)], "marker": "os^vDxP*h"[number % 9], "ms": 4}
        style["linestyle"] = "-" if number < len(pictures.PALETTE) else "--"
        for axis, key in zip(axes.flat, ("distance", "error"), strict=True):
            axis.plot([r["calls"] for r in group], [r[key] for r in group], label=name, lw=1.2, **style)
    titles = ("Frechet distance to validation images", "Pixel error, from Heun with 128 steps")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = sorted({record["calls"] for record in records} & {*ANCESTRAL_CALLS})
        axis.set_xticks(ticks, [str(calls) for calls in ticks])
        axis.minorticks_off()
    axes.flat[0].set_yticks((0.25, 0.5, 1, 2, 5), ("0.25", "0.5", "1", "2", "5"))
    axes.flat[0].minorticks_off()
    for axis, title in zip(axes.flat, titles, strict=True):
        pictures.style_axes(axis, title, "denoiser calls", "", legend=False)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    pictures.save(figure, path)


if __name__ == "__main__":
    main()
