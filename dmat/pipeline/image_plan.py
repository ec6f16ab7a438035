"""What a set of images costs before it is generated: disk, memory, and hours by a short probe of the generator."""

import math
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from typing_extensions import TypedDict

from dmat import ARTIFACTS, NONE, SOURCES, files
from dmat.config import ImageSet, Params
from dmat.data import npz_stream
from dmat.data.shards import MANIFEST, read_manifest
from dmat.errors import DmatError
from dmat.jobs import generate_images
from dmat.models import denoisers
from dmat.pipeline import execution, image_sets, planning
from dmat.pipeline.planning import Plan
from dmat.pipeline.stages import STAGES
from dmat.training import weights
from dmat.workspace import Workspace

_RESERVE = 1 << 30  # bytes of the disk that stay free: logs, checkpoints and MLflow need some
_SHARD_OVERHEAD = 2 * 128 + 2 * 4096  # bytes: headers of two arrays, and what the file system rounds up
_FIRST_PROBE = 8  # images


class _Made(TypedDict):
    """A provenance record, as far as it is read here."""

    code: str


class SetPlan(TypedDict):
    """What a set costs. None where no generator was there to measure."""

    image_set: str
    images: int
    shards: int
    disk_bytes: int  # of the whole set
    reused_bytes: int  # of its shards that exist
    free_bytes: int  # on the disk of the work folders
    device: str
    memory_bytes: int | None  # peak of the process
    device_memory_bytes: int | None  # peak of the GPU
    images_per_second: float | None
    hours: float | None  # of one device, for the images that do not exist
    unmeasured: str  # why there is no speed; empty if there is one


class _Probe(NamedTuple):
    """A block that was generated."""

    images: int
    seconds: float  # with loading the model
    memory: int  # bytes, peak of the process so far
    device_memory: int  # bytes, peak of the GPU so far


def plan(name: str, images: int | None, params: Params, workspace: Workspace, probe_seconds: float) -> SetPlan:
    """What `images` of a set of params.yaml cost; None: as many as it says.

    probe_seconds: at most so long are blocks of growing size generated, if the generator exists; 0: none. Of a
    set that is imported, only disk and shards are said. Raises DmatError if nothing says how large the images are.
    """
    folder = image_sets.output_folder(name, params, workspace)
    settings = params.image_sets[name]
    denoiser = workspace.at(f"{ARTIFACTS}/train_diffusion/{settings.generator}") / weights.DENOISER
    count = images or settings.images or 0
    if settings.source == NONE:
        height, width, channels = _image_shape(denoiser, settings, workspace)
    else:
        with npz_stream.open_released(workspace.at(f"{SOURCES}/{settings.source}")) as released:
            height, width, channels = released.shape
            if count > len(released):
                raise DmatError(
                    f"image set {name}: {count:,} images are asked for, and {settings.source} holds {len(released):,}; "
                    f"expected at most that; ask for fewer"
                )
            count = count or len(released)
    settings = settings.model_copy(update={"images": count})
    image_bytes, shards = height * width * channels, math.ceil(count / settings.shard)
    compute = execution.compute_of(STAGES["generate_images"], params)
    result: SetPlan = {
        "image_set": name,
        "images": count,
        "shards": shards,
        "disk_bytes": count * (image_bytes + 8) + shards * _SHARD_OVERHEAD,
        "reused_bytes": 0,
        "free_bytes": shutil.disk_usage(workspace.home).free,
        "device": str(compute.device),
        "memory_bytes": None,
        "device_memory_bytes": None,
        "images_per_second": None,
        "hours": None,
        "unmeasured": "the images are imported" if settings.source != NONE else "there is no generator yet",
    }
    if not denoiser.is_file():
        return result
    planned = planning.plan(STAGES["generate_images"], {"image_set": name}, params, workspace)
    reused = _reusable_images(folder, planned, settings, denoisers.read_sidecar(denoiser)["sha256"], workspace)
    result["reused_bytes"] = reused * (image_bytes + 8) + reused // settings.shard * _SHARD_OVERHEAD
    result["unmeasured"] = "" if probe_seconds else "--probe is 0"
    if probe_seconds:
        small, large = _probe(planned, settings, params, workspace, probe_seconds)
        blocks = (settings.block - small.images) / max(large.images - small.images, 1)
        per_second = _images_per_second(small, large)
        shard_bytes = min(settings.shard, count) * (image_bytes + 8)
        result["memory_bytes"] = round(small.memory + blocks * (large.memory - small.memory)) + shard_bytes
        if compute.device.type == "cuda":
            growth = large.device_memory - small.device_memory
            result["device_memory_bytes"] = round(small.device_memory + blocks * growth)
        result["images_per_second"] = per_second
        result["hours"] = (count - reused) / per_second / 3600
    return result


def expect_space(result: SetPlan) -> None:
    """Raises DmatError if the disk has no space for what is missing of a set."""
    needed = result["disk_bytes"] - result["reused_bytes"] + _RESERVE
    if needed > result["free_bytes"]:
        raise DmatError(
            f"{result['image_set']} needs {needed / 1e9:,.1f} GB more, 1.1 GB of them to spare; the disk has "
            f"{result['free_bytes'] / 1e9:,.1f} GB free; free some (`dmat clean`), or generate fewer images"
        )


def _image_shape(denoiser: Path, settings: ImageSet, workspace: Workspace) -> tuple[int, int, int]:
    """Height, width and channels of the images: of the generator, else of the real images that it will learn."""
    train = workspace.at(f"{ARTIFACTS}/prepare_data/train")
    if denoiser.with_suffix(".json").is_file():
        height, width, channels = denoisers.read_sidecar(denoiser)["image_shape"]
    elif (train / MANIFEST).is_file():
        height, width, channels = read_manifest(train)["shape"]
    else:
        raise DmatError(
            f"neither {denoiser} nor {train} exists, so nothing says how large the images are; expected one of them; "
            f"run `dmat prepare-data`, or `dmat train-diffusion --generator {settings.generator}`"
        )
    return height, width, channels


def _reusable_images(folder: Path, planned: Plan, settings: ImageSet, generator: str, workspace: Workspace) -> int:
    """How many images of the set exist in whole shards that the stage would take from their pool."""
    provenance = workspace.at(planned.stage.provenance_path(planned.instance))
    if not (folder / MANIFEST).is_file() or not provenance.is_file():
        return 0
    manifest = read_manifest(folder)
    made_by = files.read_record(provenance, _Made)["code"], manifest.get("generator_sha256"), manifest.get("seed")
    same = made_by == (planned.code, generator, settings.seed) and manifest.get("block") == settings.block
    if not same or manifest.get("sampler") != settings.sampler.plain():
        return 0
    whole = sum(entry["count"] == settings.shard for entry in manifest["shards"])
    return min(whole, (settings.images or 0) // settings.shard) * settings.shard


def _images_per_second(small: _Probe, large: _Probe) -> float:
    """Speed without loading the model, which takes the same time for every block.

    Where loading takes nearly all of the time, the difference of two blocks is noise: then the speed with loading.
    """
    if large.seconds < 1.2 * small.seconds:
        return large.images / large.seconds
    return (large.images - small.images) / (large.seconds - small.seconds)


def _probe(
    planned: Plan, settings: ImageSet, params: Params, workspace: Workspace, seconds: float
) -> tuple[_Probe, _Probe]:
    """The smallest and the largest block that were generated: of twice the size each, while the next one fits the time.

    The smallest is generated twice, as the first time on a device is slower.
    """
    compute = execution.compute_of(planned.stage, params)
    largest, started = settings.block, time.perf_counter()
    sizes = [min(_FIRST_PROBE, max(1, largest // 2))] * 2
    sizes += [min(sizes[0] << k, largest) for k in range(1, largest.bit_length()) if sizes[0] << k < 2 * largest]
    probes = list[_Probe]()
    with tempfile.TemporaryDirectory() as work:
        job = execution.new_job(planned, params, workspace, compute, Path(work), quiet=True)
        for size in sizes:
            begun = time.perf_counter()
            if len(probes) > 2 and begun + 2 * probes[-1].seconds > started + seconds:
                break
            sizes_of_probe = dict.fromkeys(("images", "shard", "block"), size)
            # Without compilation, which would take its minute for each size.
            generate_images.block_of(0, settings.model_copy(update={**sizes_of_probe, "compile": False}), job)
            taken = time.perf_counter() - begun
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            on_gpu = compute.device.type == "cuda"
            device_memory = torch.cuda.max_memory_allocated(compute.device) if on_gpu else 0
            probes.append(_Probe(size, taken, memory, device_memory))
    return probes[1], probes[-1]
