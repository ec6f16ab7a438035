"""generate_images: denoiser -> a set of labelled images as shards.

Image k of a set has the label k modulo the number of classes and its own latents, named by (seed, k): an image
does not depend on the size of the set or on restarts. Shards lie in a pool that sets of any size share, so a restart
or a larger set makes only what is missing.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import plugins, seeds
from dmat.config import ImageSet
from dmat.data import dvc_cache, shards
from dmat.data.pixels import to_bytes
from dmat.data.shard_pool import ShardPool
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.samplers import SAMPLERS
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models.denoisers import load_denoiser
from dmat.training import weights
from dmat.training.interruption import Interruption


def run(settings: ImageSet, job: Job) -> Result:
    model, sidecar = load_denoiser(job.inputs["denoiser"] / weights.DENOISER, job.compute)
    folder, classes = job.result / "images", len(sidecar["class_names"])
    pool = job.pool(
        {
            "generator_sha256": sidecar["sha256"],
            "generator": sidecar["generator"],
            "classes": classes,
            "sampler": settings.sampler.plain(),
            "seed": settings.seed,
            "shard": settings.shard,
            "block": settings.block,
            "precision": job.compute.precision,
            "device": job.compute.device.type,
        },
        ("images", "labels"),
    )
    _offer_copies(pool, settings.shard, job.root)
    entries = []
    bar = tqdm(total=settings.images, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number, start in enumerate(range(0, settings.images, settings.shard)):
            indices = np.arange(start, min(start + settings.shard, settings.images))
            make = functools.partial(_make, indices, model, sidecar, settings, job, interruption, bar)
            record = pool.obtain(
                _name(number, len(indices), settings.shard), len(indices), make, interruption.raise_if_asked
            )
            entry = shards.entry(number, record)
            pool.link(record, {key: folder / entry[key] for key in ("images", "labels")})
            entries.append(entry)
            bar.update(start + len(indices) - bar.n)
    counts = np.bincount(np.arange(settings.images) % classes, minlength=classes)
    shards.write_manifest(
        folder,
        entries,
        shape=sidecar["image_shape"],
        class_names=sidecar["class_names"],
        class_counts=counts,
        metadata={
            "generator_sha256": sidecar["sha256"],
            "sampler": settings.sampler.plain(),
            "seed": settings.seed,
            "block": settings.block,
            "licence": sidecar["licence_of_data"],
            "precision": job.compute.precision,
        },
    )
    sample, labels = shards.open_shards(folder, verify=False).take(np.arange(min(100, settings.images)))
    pictures.sheet(job.pictures / "sheet.png", sample, labels, "Generated images, one row per class")
    return Result(
        {"images": settings.images},
        measured={f"shards_{how}": float(count) for how, count in pool.counts.items()},
        pools=[pool.name],
    )


def first_block(settings: ImageSet, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a set and their labels, as `run` makes them."""
    model, sidecar = load_denoiser(job.inputs["denoiser"] / weights.DENOISER, job.compute)
    indices = np.arange(min(settings.block, settings.images))
    images = _block(np.arange(settings.block), model, sidecar, settings, job)[: len(indices)]
    return images, indices % len(sidecar["class_names"])


def _name(number: int, count: int, whole: int) -> str:
    """Of a shard in its pool. One that is not full has its count in the name: sets of two sizes may need both."""
    return f"{number:05d}" if count == whole else f"{number:05d}-{count}"


def _offer_copies(pool: ShardPool, whole: int, root: Path) -> None:
    """Shards of this pool that DVC's cache has: in a clone, after `dvc pull`, the pool is empty."""
    for manifest, copies in dvc_cache.sets_of_pool(root, "generate_images", pool.name):
        for entry in manifest["shards"]:
            pool.offer(
                _name(entry["index"], entry["count"], whole),
                {key: (copies[entry[key]], entry[f"{key}_sha256"]) for key in ("images", "labels")},
            )


def _make(
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: dict[str, Any],
    settings: ImageSet,
    job: Job,
    interruption: Interruption,
    bar: Any,
) -> dict[str, np.ndarray]:
    """Images uint8 [n, H, W, C] and labels int64 [n] of a shard."""
    images = np.empty((len(indices), *sidecar["image_shape"]), dtype=np.uint8)
    for start in range(0, len(indices), settings.block):
        interruption.raise_if_asked()
        # Always a whole block, whose surplus is dropped: sums in another order round differently.
        block = indices[start] + np.arange(settings.block)
        wanted = min(settings.block, len(indices) - start)
        images[start : start + wanted] = _block(block, model, sidecar, settings, job)[:wanted]
        bar.update(wanted)
    return {"images": images, "labels": indices % len(sidecar["class_names"])}


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
        return job.compute.to_device(torch.stack(numbers))

    sample = plugins.find(SAMPLERS, settings.sampler.name)
    classes = torch.from_numpy(indices % len(sidecar["class_names"])).to(job.compute.device)
    with job.compute.autocast():
        made = sample(model, noise("latents"), classes, settings.sampler, lambda step: noise(f"churn/{step}"))
    return to_bytes(made)
