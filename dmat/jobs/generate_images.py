"""generate_images: denoiser -> one chunk of labelled images as shards.

Image k of a set has the label k modulo the number of classes and its own latents, named by (seed, k): the set does
not depend on chunk, shard or restart. Finished shards are kept, so a restart makes only what is missing.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import files, seeds
from dmat.config import GenerateImages
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.samplers import SAMPLERS
from dmat.errors import DmatError
from dmat.jobs.denoisers import load_denoiser
from dmat.jobs.execution import Job
from dmat.metrics import pictures
from dmat.training.interruption import Interruption


def run(settings: GenerateImages, job: Job) -> dict[str, Any]:
    model, sidecar = load_denoiser(job.inputs["denoiser"] / "denoiser.safetensors", job.compute)
    chunk = job.params.chunks[job.chosen["chunk"]]
    first = chunk.index * settings.chunk
    folder = job.result / "images"
    starts = range(first, first + settings.chunk, settings.shard)
    entries = []
    bar = tqdm(total=settings.chunk, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number, start in enumerate(starts):
            indices = np.arange(start, min(start + settings.shard, first + settings.chunk))
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
            "first_index": first,
            "block": settings.block,
            "licence": sidecar["licence_of_data"],
            "precision": job.compute.precision,
        },
    )
    sample = np.load(folder / entries[0]["images"], mmap_mode="r")[:100]
    pictures.sheet(job.pictures / "sheet.png", sample, labels[: len(sample)], "Generated images, one row a class")
    return {"images": len(labels)}


def first_block(settings: GenerateImages, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a chunk and their labels, as `run` makes them."""
    model, sidecar = load_denoiser(job.inputs["denoiser"] / "denoiser.safetensors", job.compute)
    first = job.params.chunks[job.chosen["chunk"]].index * settings.chunk
    indices = first + np.arange(min(settings.block, settings.shard, settings.chunk))
    labels = indices % len(sidecar["class_names"])
    return _block(indices, labels, model, sidecar, settings, job), labels


def _shard(
    folder: Path,
    number: int,
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: dict[str, Any],
    settings: GenerateImages,
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
        block = slice(start, start + settings.block)
        images[block] = _block(indices[block], labels[block], model, sidecar, settings, job)
        bar.update(len(indices[block]))
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
    labels: np.ndarray,
    model: Preconditioned,
    sidecar: dict[str, Any],
    settings: GenerateImages,
    job: Job,
) -> np.ndarray:
    height, width, channels = sidecar["image_shape"]

    def noise(purpose: str) -> Tensor:
        numbers = [
            seeds.normal(seeds.stream(settings.seed, purpose, int(k)), (channels, height, width)) for k in indices
        ]
        return job.compute.place(torch.stack(numbers))

    sample = SAMPLERS[settings.sampler.name]
    classes = torch.from_numpy(labels).to(job.compute.device)
    with job.compute.autocast():
        made = sample(model, noise("latents"), classes, settings.sampler, lambda step: noise(f"churn/{step}"))
    return to_bytes(made)
