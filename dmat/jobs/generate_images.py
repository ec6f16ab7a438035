"""generate_images: denoiser -> a set of labelled images as shards.

Image k of a set has the label k modulo the number of classes and its own latents, drawn from (seed, k). An image does
not depend on the size of the set or on restarts. The shards are in a pool that sets of any size share, so a restart or
a larger set generates only what is missing. Images of an unconditional model get their labels from score_images.
Images of other people are imported into the same format.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmat import compiler, files, plugins, seeds
from dmat.config import ImageSet, ImportedImageSet
from dmat.data import croissant, dvc_cache, image_import, npz_stream, shards
from dmat.data.data_sets import NOT_STATED
from dmat.data.pixels import to_bytes
from dmat.data.shard_pool import ShardPool, expect_numbers
from dmat.data.shards import ArrayName, SetMetadata, ShardEntry, ShardRecord
from dmat.devices import Compute
from dmat.diffusion import schedule_search
from dmat.diffusion.formulations import Preconditioned
from dmat.diffusion.samplers import SAMPLERS, SEARCHED, Denoiser, called_levels, denoiser_calls, guided, noise_levels
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models.denoisers import forward_flops, identity, licence_of_images, load_denoiser
from dmat.training import weights
from dmat.training.interruption import Interruption
from dmat.training.weights import DenoiserSidecar

Arrays = dict[ArrayName, np.ndarray]  # of a shard: images uint8 [N, H, W, C] and labels int64 [N]


def run(settings: ImageSet | ImportedImageSet, job: Job) -> Result:
    """Generates or imports the missing shards of the image set, links all of them and writes the manifest.

    Raises DmatError if the model and the settings do not fit, or a file to import is damaged.
    """
    return _import(settings, job) if isinstance(settings, ImportedImageSet) else _generate(settings, job)


def pending_shards(settings: ImageSet | ImportedImageSet, job: Job) -> range:
    """Numbers of the shards that workers compute. Those that the pool has cost them no time.

    None of an imported set, which is read from end to end.
    """
    return range(0 if isinstance(settings, ImportedImageSet) else -(-(settings.images or 0) // settings.shard))


def run_shards(settings: ImageSet | ImportedImageSet, job: Job, numbers: range) -> None:
    """Computes some of the set's shards for the process that publishes it, which may run later and elsewhere.

    numbers: of the shards, from 0. Raises DmatError for numbers of shards that the set does not have.
    """
    if isinstance(settings, ImportedImageSet):
        raise DmatError(
            f"image set {job.instance['image_set']} is imported from {settings.source}, which is read from end to end; "
            f"expected a set that is generated; start the stage without --shards"
        )
    expect_numbers(numbers, len(pending_shards(settings, job)), f"image set {job.instance['image_set']}")
    generation, sidecar, _ = _open(settings, job)
    for _ in _records(_pool_of(generation, sidecar, job), settings, generation.maker, job, numbers):
        pass


def _generate(settings: ImageSet, job: Job) -> Result:
    assert settings.images is not None  # as ImageSet checks
    generation, sidecar, class_names = _open(settings, job)
    pool = _pool_of(generation, sidecar, job)
    entries = _link(pool, settings, generation.maker, job)
    shards.write_manifest(
        job.result / "images",
        entries,
        shape=sidecar["image_shape"],
        class_names=class_names,
        class_counts=generation.class_counts(settings.images, len(class_names)),
        metadata={
            "generator_sha256": sidecar["sha256"],
            "sampler": settings.sampler.plain(),
            **generation.searched,
            "seed": settings.seed,
            "block": settings.block,
            "licence": licence_of_images(sidecar),
            "precision": job.compute.precision,
            **({"compiled": True} if settings.compile else {}),
            **({} if generation.labelled else {"unlabelled": True}),
        },
    )
    forward, sampler = forward_flops(sidecar, job.inputs["denoiser"] / weights.DENOISER), settings.sampler
    flops = settings.images * denoiser_calls(sampler.name, sampler.steps, sampler.guidance) * forward
    result = _finished(settings.images, generation.labelled, "Generated images", pool, job)
    return dataclasses.replace(result, metrics={**result.metrics, "sampling_flops": flops})


def _pool_of(generation: "_Generation", sidecar: DenoiserSidecar, job: Job) -> ShardPool:
    """The pool of a set's shards: its name depends on all that an image depends on but its index."""
    settings = generation.settings
    return job.pool(
        {
            "denoiser": identity(sidecar),
            "classes": generation.class_map.tolist(),
            "sampler": settings.sampler.plain(),
            **generation.searched,
            "seed": settings.seed,
            "shard": settings.shard,
            "block": settings.block,
            "compile": settings.compile,
            "precision": job.compute.precision,
            "device": job.compute.device.type,
        },
        ("images", "labels"),
    )


def _import(settings: ImportedImageSet, job: Job) -> Result:
    with npz_stream.open_released(job.inputs["source"]) as released:
        names = image_import.class_names(released, job.inputs["source"], job.inputs["train"])
        count = len(released) if settings.images is None else settings.images
        if count > len(released):
            raise DmatError(
                f"image set {job.instance['image_set']}: images is {count:,}; {settings.source} holds "
                f"{len(released):,}; expected at most that; leave images out to import all"
            )
        checksums = [files.sha256(part.path) for part in released.parts]
        pool = job.pool({"source": checksums, "shard": settings.shard}, ("images", "labels"))
        blocks = released.blocks(settings.shard)

        def maker(indices: np.ndarray, interruption: Interruption, bar: tqdm) -> Callable[[], Arrays]:  # indices [N]
            images, labels = next(blocks)  # also where the pool has the shard: the archive is read from end to end
            return lambda: {"images": images[: len(indices)], "labels": labels[: len(indices)]}

        entries = _link(pool, settings.model_copy(update={"images": count}), maker, job)
        for _ in blocks:  # to its end, where the checksum of an archive is compared
            pass
        labels = released.labels[:count] if released.labelled else released.labels[:0]
        shards.write_manifest(
            job.result / "images",
            entries,
            shape=released.shape,
            class_names=names,
            class_counts=np.bincount(labels, minlength=len(names)),
            metadata={
                "source": settings.source,
                "licence": NOT_STATED,
                **({} if released.labelled else {"unlabelled": True}),
            },
        )
    notes = [f"{settings.source} has {', '.join(released.ignored)}, which is not read"] if released.ignored else []
    if released.labelled and not released.named:
        notes.append(f"{settings.source} does not name its classes; its labels count as those of the data set")
    result = _finished(count, released.labelled, "Imported images", pool, job)
    return dataclasses.replace(result, notes=notes)


# For indices int64 [N] of a shard: what computes its arrays if the pool lacks it.
_Maker = Callable[[np.ndarray, Interruption, tqdm], Callable[[], Arrays]]


def _link(pool: ShardPool, settings: ImageSet | ImportedImageSet, maker: _Maker, job: Job) -> list[ShardEntry]:
    """Links all shards of a set into the result and returns their manifest entries."""
    entries = []
    for number, record in _records(pool, settings, maker, job):
        entry = shards.entry(number, record)
        pool.link(record, {key: job.result / "images" / entry[key] for key in ("images", "labels")})
        entries.append(entry)
    return entries


def _records(
    pool: ShardPool,
    settings: ImageSet | ImportedImageSet,
    maker: _Maker,
    job: Job,
    numbers: range | None = None,
) -> Iterator[tuple[int, ShardRecord]]:
    """Yields number and record of each shard of a set, once the pool has it. numbers: of the shards; None: all."""
    count, size = settings.images or 0, settings.shard
    _offer_cached_shards(pool, size, job.root)
    numbers = range(-(-count // size)) if numbers is None else numbers
    first, end = numbers.start * size, min(numbers.stop * size, count)
    bar = tqdm(total=end - first, unit=" images", desc=job.work.parent.name, disable=job.quiet, unit_scale=True)
    with Interruption() as interruption, bar:
        for number in numbers:
            indices = np.arange(number * size, min((number + 1) * size, count))
            make = maker(indices, interruption, bar)
            name = _shard_name(number, len(indices), size)
            yield number, pool.obtain(name, len(indices), make, interruption.raise_if_received)
            bar.update(indices[-1] + 1 - first - bar.n)


def _finished(count: int, labelled: bool, title: str, pool: ShardPool, job: Job) -> Result:
    """Describes the set in croissant.json and draws a sheet of its first images. Returns the result of the stage."""
    croissant.write(job.result / "images", str(job.instance["image_set"]))
    opened = shards.open_shards(job.result / "images", verify=False)
    sample, labels = opened.take(np.arange(min(100, count)))
    pictures.sheet(job.pictures / "sheet.png", sample, labels if labelled else None, title)
    measured = {f"shards_{origin}": float(number) for origin, number in pool.counts.items()}
    return Result({"images": count}, measured=measured, pools=[pool.name])


def block_of(index: int, settings: ImageSet | ImportedImageSet, job: Job) -> tuple[int, np.ndarray, np.ndarray]:
    """Computes the block of a set that holds the image `index` again.

    Returns the index of the block's first image, the images uint8 [N, H, W, C] and their labels int64 [N].
    """
    if isinstance(settings, ImportedImageSet):
        with npz_stream.open_released(job.inputs["source"]) as released:
            count = len(released) if settings.images is None else settings.images
            size = min(settings.shard, 1000)
            start = index - index % size
            images, labels = next(itertools.islice(released.blocks(size), start // size, None))
            return start, images[: count - start], labels[: count - start]
    generation, _, _ = _open(settings, job)
    start = index - index % settings.block
    indices = np.arange(start, min(start + settings.block, settings.images or 0))
    images = generation.block(start + np.arange(settings.block))[: len(indices)]
    return start, images, generation.labels(indices)


@dataclasses.dataclass(frozen=True)
class _Generation:
    """All that an image depends on besides its index in the set.

    class_map: for each label of the set, the model's class that generates its images, int64 [K]; empty for
    an unconditional model.
    """

    denoiser: Denoiser
    image_shape: tuple[int, int, int]  # H, W, C
    class_map: np.ndarray
    levels: list[float]  # of noise, from the highest to the lowest, then 0
    settings: ImageSet
    compute: Compute

    @property
    def labelled(self) -> bool:
        """Whether the images have labels: not those of an unconditional model."""
        return bool(len(self.class_map))

    @property
    def searched(self) -> SetMetadata:
        """The levels, if they were searched: those of another machine may differ, and so do their images."""
        return {"levels": self.levels} if self.settings.sampler.schedule == SEARCHED else {}

    def class_counts(self, images: int, classes: int) -> list[int]:
        """Images per class of a set of `images`: the labels repeat from 0 to classes - 1. Zeros without labels."""
        return [(images - label + classes - 1) // classes * self.labelled for label in range(classes)]

    def maker(self, indices: np.ndarray, interruption: Interruption, bar: tqdm) -> Callable[[], Arrays]:
        """What computes the shard of images with these indices [N]."""
        return functools.partial(_generate_shard, indices, self, interruption, bar)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Labels of images of the set: int64 [N] for indices [N]."""
        return indices % len(self.class_map) if len(self.class_map) else np.full(len(indices), shards.NO_LABEL)

    def block(self, indices: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, C] by the sampler. indices [B]: of the images in the set, as they name the noise."""
        height, width, channels = self.image_shape

        def noise(purpose: str) -> Tensor:  # [B, C, H, W], on the device
            numbers = seeds.normals(
                self.settings.seed, purpose, indices, (channels, height, width), self.compute.device
            )
            return self.compute.to_device(numbers)

        sampler = self.settings.sampler
        classes = None
        if len(self.class_map):
            classes = torch.from_numpy(self.class_map[self.labels(indices)]).to(self.compute.device)
        errors = compiler.errors("compile is true", "write compile: false")
        with self.compute.autocast(), errors if self.settings.compile else contextlib.nullcontext():
            model = guided(self.denoiser, sampler.guidance)
            searched = {"levels": self.levels} if sampler.schedule == SEARCHED else {}
            images = plugins.find(SAMPLERS, sampler.name)(
                model, noise("latents"), classes, sampler, lambda step: noise(f"churn/{step}"), **searched
            )
        if not images.isfinite().all():
            raise DmatError(
                f"the sampler {sampler.name} made images with NaN or infinite pixels; expected finite ones; look at "
                f"the loss of the generator, and at the noise levels of the sampler"
            )
        return to_bytes(images)


def _open(settings: ImageSet, job: Job) -> tuple[_Generation, DenoiserSidecar, list[str]]:
    """What generates the set, the sidecar of its denoiser, and the names of its labels.

    Raises DmatError if the model has no classes, its classes need a map or do not fit the map, or the sampler leaves
    the noise levels that the model accepts.
    """
    model, sidecar = load_denoiser(job.inputs["denoiser"] / weights.DENOISER, job.compute)
    name, generator, count = job.instance["image_set"], settings.generator, sidecar["label_dim"]
    class_names = sidecar.get("data_class_names", sidecar["class_names"])
    if not count and settings.classes:
        raise DmatError(
            f"image set {name}: classes maps labels to classes of generator {generator}, which is unconditional; "
            f"expected none; leave it out: score_images gives its images their labels"
        )
    if count and not settings.classes and len(class_names) != count:
        raise DmatError(
            f"image set {name}: generator {generator} has {count} classes and the data set {len(class_names)}; "
            f"expected `classes` in the image set: the model's class for each class of the data set; add it"
        )
    class_map = settings.classes or tuple(range(count))
    if count and (len(class_map) != len(class_names) or max(class_map) >= count):
        raise DmatError(
            f"image set {name}: classes has {len(class_map)} entries up to {max(class_map)}; expected "
            f"{len(class_names)}, as the data set has, from 0 to {count - 1}, as the model has; correct it"
        )
    if settings.sampler.guidance != 1 and not (count and sidecar["network"].get("label_dropout")):
        raise DmatError(
            f"image set {name}: sampler.guidance is {settings.sampler.guidance}; generator {generator} never learned "
            f"to denoise without labels; expected guidance 1, or a network that was trained with label_dropout"
        )
    lowest, highest = sidecar["sigma_range"]
    height, width, channels = sidecar["image_shape"]
    classes = np.array(class_map, dtype=np.int64)
    levels = _levels(model, classes, (channels, height, width), settings, job.compute)
    called = called_levels(levels, settings.sampler)
    if any(after >= before for before, after in itertools.pairwise(levels)):
        raise DmatError(
            f"image set {name}: the {settings.sampler.steps} noise levels of the sampler do not decrease from "
            f"{settings.sampler.sigma_max} to {settings.sampler.sigma_min}, as their steps are smaller than float64 "
            f"tells apart; expected falling ones; change rho"
        )
    if min(called) < (lowest or 0) * (1 - 1e-6) or (highest is not None and max(called) > highest * (1 + 1e-6)):
        raise DmatError(
            f"image set {name}: the sampler calls the model at noise levels from {max(called):.6g} to "
            f"{min(called):.6g}; generator {generator} accepts {lowest} to {highest}; expected levels inside; change "
            f"schedule, sigma_min, sigma_max or s_churn of the sampler"
        )
    denoiser = compiler.compiled(model) if settings.compile else model
    return (
        _Generation(denoiser, (height, width, channels), classes, levels, settings, job.compute),
        sidecar,
        class_names,
    )


def _levels(
    model: Preconditioned, class_map: np.ndarray, shape: tuple[int, int, int], settings: ImageSet, compute: Compute
) -> list[float]:
    """The noise levels of the sampler: those of its schedule, or searched for the model. class_map [K]; shape: C, H, W.

    The search is the same in every set of a model, sampler and seed.
    """
    sampler = settings.sampler
    if sampler.schedule != SEARCHED:
        return noise_levels(sampler).tolist()
    if "levels" not in inspect.signature(plugins.find(SAMPLERS, sampler.name)).parameters:
        raise DmatError(
            f"sampler.schedule is {SEARCHED}; the sampler {sampler.name} takes no `levels`; expected a sampler that "
            f"does; give it this argument, or choose another schedule"
        )
    indices = np.arange(schedule_search.IMAGES)
    latents = compute.to_device(seeds.normals(settings.seed, "schedule search", indices, shape, compute.device))
    labels = torch.from_numpy(class_map[indices % len(class_map)]).to(compute.device) if len(class_map) else None
    denoiser = guided(model, sampler.guidance)
    with compute.autocast():
        return schedule_search.search(
            denoiser, latents, labels, sampler.steps, sampler.sigma_min, sampler.sigma_max
        ).tolist()


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


def _generate_shard(indices: np.ndarray, generation: _Generation, interruption: Interruption, bar: tqdm) -> Arrays:
    """Images uint8 [N, H, W, C] and labels int64 [N] of a shard. indices [N]: of the images in the set."""
    images = np.empty((len(indices), *generation.image_shape), dtype=np.uint8)
    size = generation.settings.block
    for start in range(0, len(indices), size):
        interruption.raise_if_received()
        # Always a full block, whose surplus is dropped: another batch size sums in another order and rounds otherwise.
        block = indices[start] + np.arange(size)
        count = min(size, len(indices) - start)
        images[start : start + count] = generation.block(block)[:count]
        bar.update(count)
    return {"images": images, "labels": generation.labels(indices)}
