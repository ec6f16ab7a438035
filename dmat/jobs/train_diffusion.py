"""train_diffusion: train split -> EMA weights of an EDM denoiser, loss curve, sample sheet.

EMA: exponential moving average of the weights (weight averaging). Live weights: those that the optimiser updates.
"""

from pathlib import Path

import numpy as np
import torch

from dmat import files, seeds
from dmat.config import Generator, Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion.samplers import SAMPLERS
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models.denoisers import denoiser_sidecar, load_denoiser, new_denoiser
from dmat.training import HISTORY, denoiser, weights


def run(settings: Generator, job: Job) -> Result:
    """Trains the denoiser, or resumes its training. Raises DmatError where the network cannot halve the images."""
    real = shards.open_shards(job.inputs["train"])
    halvings = len(settings.multipliers) - 1
    if any(side % 2**halvings for side in real.shape[:2]):
        raise DmatError(
            f"generator {job.instance['generator']}: {len(settings.multipliers)} multipliers halve the images "
            f"{halvings} times, which {real.shape[0]}x{real.shape[1]} pixels do not allow; give fewer multipliers"
        )
    images, labels = real.all()
    model = new_denoiser(settings, real.shape[2], real.classes)
    with job.long_run(settings.images_seen) as run:
        ema_weights, history = denoiser.train(model, images, labels, settings, settings.seed, run, job.compute)
    folder = job.result / "denoiser"
    weights.save(folder / weights.DENOISER, ema_weights, denoiser_sidecar(settings, real, job.compute))
    files.write_json(folder / HISTORY, history)
    pictures.curves(job.pictures / "loss.png", history, ["loss"], "Denoising loss of the live weights", "loss")
    _sample_sheet(folder, settings.seed, job)
    return Result({"loss": history[-1]["loss"], "parameters": sum(p.numel() for p in model.parameters())})


def _sample_sheet(folder: Path, seed: int, job: Job) -> None:
    """Draws ten images per class with the default sampler, as a first look at the denoiser."""
    model, sidecar = load_denoiser(folder / weights.DENOISER, job.compute)
    height, width, channels = sidecar["image_shape"]
    labels = np.repeat(np.arange(len(sidecar["class_names"])), 10)
    latents = seeds.normal(seeds.stream(seed, "sample sheet"), (len(labels), channels, height, width))
    with job.compute.autocast():
        images = SAMPLERS["heun"](
            model, job.compute.to_device(latents), torch.from_numpy(labels).to(job.compute.device), Sampler()
        )
    pictures.sheet(job.pictures / "samples.png", to_bytes(images), labels, "Generated images, one row per class")
