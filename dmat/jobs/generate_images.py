"""generate_images: denoiser -> a set of labelled images as shards.

Image k of a set has the label k modulo the number of classes and its own latents, drawn from (seed, k). An image does
not depend on the size of the set or on restarts. The shards are in a pool that sets of any size share, so a restart or
a larger set generates only what is missing.
"""

import functools
from pathlib import Path

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
from dmat.training.weights import DenoiserSidecar


def run(settings: ImageSet, job: Job) -> Result:
    """Generates the missing shards of the image set, links all of them and writes the manifest."""
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
    _offer_cached_shards(pool, settings.shard, job.root)
    entries = []
    bar = tqdm(total=settings.images, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number, start in enumerate(range(0, settings.images, settings.shard)):
            indices = np.arange(start, min(start + settings.shard, settings.images))
            make = functools.partial(_generate_shard, indices, model, sidecar, settings, job, interruption, bar)
            record = pool.obtain(
                _shard_name(number, len(indices), settings.shard), len(indices), make, interruption.raise_if_received
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
        measured={f"shards_{origin}": float(count) for origin, count in pool.counts.items()},
        pools=[pool.name],
    )


def first_block(settings: ImageSet, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The first images uint8 [N, H, W, C] of a set and their labels [N], as `run` generates them."""
    model, sidecar = load_denoiser(job.inputs["denoiser"] / weights.DENOISER, job.compute)
    indices = np.arange(min(settings.block, settings.images))
    images = _generate_block(np.arange(settings.block), model, sidecar, settings, job)[: len(indices)]
    return images, indices % len(sidecar["class_names"])


def _shard_name(number: int, count: int, full_count: int) -> str:
    """Name of a shard in its pool. A partial shard has its count in the name: sets of two sizes may need both."""
    return f"{number:05d}" if count == full_count else f"{number:05d}-{count}"


def _offer_cached_shards(pool: ShardPool, full_count: int, root: Path) -> None:
    """Offers the pool its shards from DVC's cache: in a clone, after `dvc pull`, the pool is empty."""
    for manifest, copies in dvc_cache.sets_of_pool(root, "generate_images", pool.name):
        for entry in manifest["shards"]:
            pool.offer(
                _shard_name(entry["index"], entry["count"], full_count),
                {key: (copies[entry[key]], entry[f"{key}_sha256"]) for key in ("images", "labels")},
            )


def _generate_shard(
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: DenoiserSidecar,
    settings: ImageSet,
    job: Job,
    interruption: Interruption,
    bar: tqdm,
) -> dict[shards.ArrayName, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels int64 [N] of a shard. indices [N]: of the images in the set."""
    images = np.empty((len(indices), *sidecar["image_shape"]), dtype=np.uint8)
    for start in range(0, len(indices), settings.block):
        interruption.raise_if_received()
        # Always a full block, whose surplus is dropped: another batch size sums in another order and rounds otherwise.
        block = indices[start] + np.arange(settings.block)
        count = min(settings.block, len(indices) - start)
        images[start : start + count] = _generate_block(block, model, sidecar, settings, job)[:count]
        bar.update(count)
    return {"images": images, "labels": indices % len(sidecar["class_names"])}


def _generate_block(
    indices: np.ndarray,
    model: Preconditioned,
    sidecar: DenoiserSidecar,
    settings: ImageSet,
    job: Job,
) -> np.ndarray:
    """Images uint8 [B, H, W, C] by the sampler. indices [B]: of the images in the set, as they name the noise."""
    height, width, channels = sidecar["image_shape"]

    def noise(purpose: str) -> Tensor:  # [B, C, H, W], on the device
        numbers = [
            seeds.normal(seeds.stream(settings.seed, purpose, int(k)), (channels, height, width)) for k in indices
        ]
        return job.compute.to_device(torch.stack(numbers))

    sample = plugins.find(SAMPLERS, settings.sampler.name)
    classes = torch.from_numpy(indices % len(sidecar["class_names"])).to(job.compute.device)
    with job.compute.autocast():
        images = sample(model, noise("latents"), classes, settings.sampler, lambda step: noise(f"churn/{step}"))
    return to_bytes(images)
