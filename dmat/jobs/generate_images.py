"""generate_images: denoiser -> a set of labelled images as shards.

Image k of a set has the label k modulo the number of classes and its own latents, named by (seed, k): an image
does not depend on the size of the set, on shards or restarts. Finished shards are kept, so a restart makes
only what is missing.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import files, seeds
from dmat.config import ImageSet
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.samplers import SAMPLERS
from dmat.errors import DmatError
from dmat.jobs.denoisers import load_denoiser
from dmat.jobs.execution import Job
from dmat.metrics import pictures
from dmat.training.interruption import Interruption


def run(settings: ImageSet, job: Job) -> dict[str, Any]:
    model, sidecar = load_denoiser(job.inputs["denoiser"] / "denoiser.safetensors", job.compute)
    folder = job.result / "images"
    starts = range(0, settings.images, settings.shard)
    entries = []
    bar = tqdm(total=settings.images, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number, start in enumerate(starts):
            indices = np.arange(start, min(start + settings.shard, settings.images))
            entries.append(_shard(folder, number, indices, model, sidecar, settings, job, bar, interruption))
    labels = np.concatenate([np.load(folder / entry["labels"]) for entry in entries])
    counts = np.bincount(labels, minlength=len(sidecar["class_names"]))
    shards.write_manifest(
        folder,
        entries,
        shape=sidecar["image_shape"],
        class_names=sidecar["class_names"],
        class_counts=counts,
        facts={
            "generator_sha256": sidecar["sha256"],
            "sampler": settings.sampler.plain(),
            "seed": settings.seed,
            "block": settings.block,
            "licence": sidecar["licence_of_data"],
            "precision": job.compute.precision,
        },
    )
    sample = np.load(folder / entries[0]["images"], mmap_mode="r")[:100]
    pictures.sheet(job.pictures / "sheet.png", sample, labels[: len(sample)], "Generated images, one row a class")
    return {"images": len(labels)}


def _shard(
    folder: Path,
    number: int,
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: dict[str, Any],
    settings: ImageSet,
    job: Job,
    bar: Any,
    interruption: Interruption,
) -> dict[str, Any]:
    """One shard, made or found finished by an earlier attempt (its entry beside it is written last)."""
    note = job.work / f"shard-{number:05d}.json"
    if (earlier := _finished(folder, note, number, len(indices))) is not None:
        bar.update(earlier["count"])
        return earlier
    images = np.empty((len(indices), *sidecar["image_shape"]), dtype=np.uint8)
    labels = indices % len(sidecar["class_names"])
    for start in range(0, len(indices), settings.block):
        interruption.raise_if_asked()
        # Always a whole block, whose surplus is dropped: sums in another order round differently.
        block = indices[start] + np.arange(settings.block)
        wanted = min(settings.block, len(indices) - start)
        images[start : start + wanted] = _block(block, model, sidecar, settings, job)[:wanted]
        bar.update(wanted)
    entry = shards.write_shard(folder, number, images, labels)
    files.write_json(note, entry)
    return entry


def _finished(folder: Path, note: Path, number: int, count: int) -> dict[str, Any] | None:
    """The manifest entry of a shard that is whole. A damaged one is made again."""
    if not note.exists():
        return None
    try:
        entry = files.read_record(
            note, index=int, count=int, images=str, labels=str, images_sha256=str, labels_sha256=str
        )
        if (entry["index"], entry["count"]) == (number, count) and shards.is_whole(folder, entry):
            return entry
    except DmatError:
        pass
    tqdm.write(f"note: {note} or its shard was damaged after it was made; it is made again", file=sys.stderr)
    return None


def _block(
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: dict[str, Any],
    settings: ImageSet,
    job: Job,
) -> np.ndarray:
    height, width, channels = sidecar["image_shape"]

    def noise(purpose: str) -> Tensor:
        numbers = [
            seeds.normal(seeds.stream(settings.seed, purpose, int(k)), (channels, height, width)) for k in indices
        ]
        return job.compute.place(torch.stack(numbers))

    sample = SAMPLERS[settings.sampler.name]
    classes = torch.from_numpy(indices % len(sidecar["class_names"])).to(job.compute.device)
    with job.compute.autocast():
        made = sample(model, noise("latents"), classes, settings.sampler, lambda step: noise(f"churn/{step}"))
    return to_bytes(made)
