"""train_diffusion: train split -> EMA weights of a denoiser, loss curve, sample sheet; or published weights.

Snapshots of a training are judged by what measure_images measures, in features of the scorer; the best is published.
EMA: exponential moving average of the weights (weight averaging). Live weights: those that the optimiser updates.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dmat import files, seeds
from dmat.config import Generator, PublishedGenerator, Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.diffusion.augmentation_pipe import LABELS
from dmat.diffusion.formulations import FORMULATIONS
from dmat.diffusion.networks import DenoiserSpec
from dmat.diffusion.samplers import SAMPLERS
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import image_measures, pictures
from dmat.metrics.image_measures import Measure
from dmat.models import published_denoisers
from dmat.models.denoisers import denoiser_sidecar, forward_flops, load_denoiser, new_denoiser
from dmat.models.image_judge import ImageJudge
from dmat.training import HISTORY, SNAPSHOTS, denoiser, weights
from dmat.training.denoiser import Judge
from dmat.training.weights import DenoiserSidecar

_IMAGES_PER_CLASS = 10  # of the sample sheet of a trained model
_BLOCK = 500  # images of a snapshot that are sampled together
_NEAR = 0.5  # as by default in measure_images
_IMAGES_OF_AN_IMPORT = 10  # of all classes together: a published network takes seconds for an image without a GPU


def run(settings: Generator | PublishedGenerator, job: Job) -> Result:
    """Trains the denoiser, resumes its training, or imports it.

    Raises DmatError where the network does not fit the images, or the file is not a model that dmat has.
    """
    real = shards.open_shards(job.inputs["train"])
    return _import(job, real) if isinstance(settings, PublishedGenerator) else _train(settings, job, real)


def _train(settings: Generator, job: Job, real: Shards) -> Result:
    images, labels = real.all()
    spec = DenoiserSpec(
        *real.shape, real.classes if settings.conditional else 0, LABELS if settings.augment_probability else 0
    )
    heights = [real.shape[0] >> level for level in range(len(settings.network.multipliers))]
    if strangers := sorted(set(settings.network.attention) - set(heights)):
        raise DmatError(
            f"generator {job.instance['generator']}: network.attention names the height {strangers[0]}; expected some "
            f"of {', '.join(map(str, heights))}, which the images have in this network; correct it"
        )
    try:
        model = new_denoiser(settings.network, spec, FORMULATIONS[settings.formulation](settings), settings.seed)
    except ValueError as error:
        raise DmatError(f"generator {job.instance['generator']}: {error}") from None
    sidecar = denoiser_sidecar(settings, real, job.compute)
    judge = _judge(settings, sidecar, real, job) if settings.snapshot_every else None
    with job.long_run(settings.images_seen) as run:
        outcome = denoiser.train(model, images, labels, settings, settings.seed, run, job.compute, judge)
    folder, best = job.result / "denoiser", outcome.best_snapshot
    weights.save(folder / weights.DENOISER, outcome.best, sidecar)
    files.write_json(folder / HISTORY, outcome.history)
    pictures.curves(job.pictures / "loss.png", outcome.history, ["loss"], "Denoising loss of the live weights", "loss")
    forward = forward_flops(sidecar, folder / weights.DENOISER)
    metrics = {
        "loss": outcome.history[-1]["loss"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward_flops": forward,
        "training_flops": 3 * forward * outcome.history[-1]["images_seen"],  # forward, and twice as much backward
    }
    if judge is not None and best is not None:
        weights.save(folder / weights.LAST, outcome.last, sidecar)
        files.write_json(folder / SNAPSHOTS, outcome.snapshots)
        pictures.curves(
            job.pictures / "snapshots.png", outcome.snapshots, [judge.selects], "Snapshots of the EMA weights",
            "Frechet distance, scorer's features", {"best": best["images_seen"]},
        )  # fmt: skip
        metrics |= {f"best_{name}": best[name] for name in ("images_seen", judge.selects, "memorised")}
    _sample_sheet(folder, settings.seed, np.repeat(np.arange(real.classes), _IMAGES_PER_CLASS), job)
    return Result(metrics)


def _judge(settings: Generator, sidecar: DenoiserSidecar, real: Shards, job: Job) -> Judge:
    """What measures a snapshot: its images by the default sampler, of all classes in turn."""
    judge = ImageJudge(
        job.inputs["scorer"] / weights.BEST, real, shards.open_shards(job.inputs["validation"]), job.compute
    )
    labels = np.arange(settings.snapshot_images) % real.classes

    def measure(model: nn.Module) -> dict[str, float]:
        images = np.concatenate(
            [
                _sample(model, sidecar, settings.seed, "snapshot", start, labels[start : start + _BLOCK], job.compute)
                for start in range(0, len(labels), _BLOCK)
            ]
        )
        asked = labels if sidecar["label_dim"] else None
        return image_measures.metrics(judge.measure(images, asked, _NEAR).measures)

    distance = Measure("frechet_distance", 0.0, settings.snapshot_images, judge.network.name)
    return Judge(measure, distance.metric)


def _import(job: Job, real: Shards) -> Result:
    published = published_denoisers.read(job.inputs["source"])
    sidecar = published.sidecar
    if sidecar["image_shape"] != list(real.shape):
        raise DmatError(
            f"generator {job.instance['generator']} makes images {sidecar['image_shape']}; the training images are "
            f"{list(real.shape)}; expected the same; name a model of this data set"
        )
    sidecar["data_class_names"] = real.manifest["class_names"]
    if sidecar["label_dim"] == real.classes:
        sidecar["class_names"] = real.manifest["class_names"]
    folder = job.result / "denoiser"
    weights.save(folder / weights.DENOISER, published.state, sidecar)
    labels = np.arange(_IMAGES_OF_AN_IMPORT) % max(1, sidecar["label_dim"])
    _sample_sheet(folder, 1, np.sort(labels), job)
    return Result({"parameters": sum(tensor.numel() for tensor in published.state.values())}, notes=published.notes)


def _sample_sheet(folder: Path, seed: int, labels: np.ndarray, job: Job) -> None:
    """Draws an image for each of the labels [N] with the default sampler, as a first look at the denoiser."""
    model, sidecar = load_denoiser(folder / weights.DENOISER, job.compute)
    with tqdm(unit=" calls", desc="sample sheet", disable=job.quiet) as bar:
        images = _sample(model, sidecar, seed, "sample sheet", 0, labels, job.compute, bar.update)
    pictures.sheet(job.pictures / "samples.png", images, labels if sidecar["label_dim"] else None, "Generated images")


def _sample(
    model: nn.Module,
    sidecar: DenoiserSidecar,
    seed: int,
    purpose: str,
    start: int,
    labels: np.ndarray,
    compute: Compute,
    called: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Images uint8 [N, H, W, C] with labels [N] by the default sampler, at the noise levels that the model accepts.

    Their noise is named by seed, purpose and the numbers from `start`. called: after each call of the model. Raises
    DmatError for a model that makes NaN.
    """
    height, width, channels = sidecar["image_shape"]
    indices = np.arange(start, start + len(labels))
    latents = seeds.normals(seed, purpose, indices, (channels, height, width), compute.device)
    classes = torch.from_numpy(labels).to(compute.device) if sidecar["label_dim"] else None

    def denoise(noisy: torch.Tensor, sigma: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        """The arguments and result of `model`: images [B, C, H, W]."""
        called()
        denoised: torch.Tensor = model(noisy, sigma, classes)
        return denoised

    with compute.autocast():
        images = SAMPLERS["heun"](denoise, compute.to_device(latents), classes, _sampler(sidecar))
    if not images.isfinite().all():
        raise DmatError(
            "the model makes images with NaN or infinite pixels; expected finite ones; lower the learning rate, or "
            "look at the file that it is imported from"
        )
    return to_bytes(images)


def _sampler(sidecar: DenoiserSidecar) -> Sampler:
    """The default sampler, with noise levels that the model accepts."""
    settings = Sampler()
    lowest, highest = sidecar["sigma_range"]
    if not (lowest or 0) < settings.sigma_max or (highest is not None and highest <= settings.sigma_min):
        settings = settings.model_copy(update={"sigma_min": lowest, "sigma_max": highest or 10 * (lowest or 1)})
    return settings.model_copy(
        update={
            "sigma_min": max(settings.sigma_min, lowest or 0),
            "sigma_max": min(settings.sigma_max, settings.sigma_max if highest is None else highest),
        }
    )
