"""train_diffusion: train split -> EMA weights of a denoiser, loss curve, sample sheet; or published weights.

EMA: exponential moving average of the weights (weight averaging). Live weights: those that the optimiser updates.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dmat import files, seeds
from dmat.config import Generator, PublishedGenerator, Sampler
from dmat.data import shards
from dmat.data.pixels import to_bytes
from dmat.data.shards import Shards
from dmat.diffusion.formulations import FORMULATIONS
from dmat.diffusion.networks import DenoiserSpec
from dmat.diffusion.samplers import SAMPLERS
from dmat.errors import DmatError
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.models import published_denoisers
from dmat.models.denoisers import denoiser_sidecar, load_denoiser, new_denoiser
from dmat.training import HISTORY, denoiser, weights

_IMAGES_PER_CLASS = 10  # of the sample sheet of a trained model
_IMAGES_OF_AN_IMPORT = 10  # of all classes together: a published network takes seconds for an image without a GPU


def run(settings: Generator | PublishedGenerator, job: Job) -> Result:
    """Trains the denoiser, resumes its training, or imports it.

    Raises DmatError where the network does not fit the images, or the file is not a model that dmat has.
    """
    real = shards.open_shards(job.inputs["train"])
    return _import(job, real) if isinstance(settings, PublishedGenerator) else _train(settings, job, real)


def _train(settings: Generator, job: Job, real: Shards) -> Result:
    images, labels = real.all()
    spec = DenoiserSpec(*real.shape, real.classes)
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
    with job.long_run(settings.images_seen) as run:
        ema_weights, history = denoiser.train(model, images, labels, settings, settings.seed, run, job.compute)
    folder = job.result / "denoiser"
    weights.save(folder / weights.DENOISER, ema_weights, denoiser_sidecar(settings, real, job.compute))
    files.write_json(folder / HISTORY, history)
    pictures.curves(job.pictures / "loss.png", history, ["loss"], "Denoising loss of the live weights", "loss")
    _sample_sheet(folder, settings.seed, np.repeat(np.arange(real.classes), _IMAGES_PER_CLASS), job)
    return Result({"loss": history[-1]["loss"], "parameters": sum(p.numel() for p in model.parameters())})


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
    height, width, channels = sidecar["image_shape"]
    latents = seeds.normals(seed, "sample sheet", np.arange(len(labels)), (channels, height, width), job.compute.device)
    classes = torch.from_numpy(labels).to(job.compute.device) if sidecar["label_dim"] else None
    lowest, highest = sidecar["sigma_range"]
    settings = Sampler()
    if not (lowest or 0) < settings.sigma_max or (highest is not None and highest <= settings.sigma_min):
        settings = settings.model_copy(update={"sigma_min": lowest, "sigma_max": highest or 10 * (lowest or 1)})
    settings = settings.model_copy(
        update={
            "sigma_min": max(settings.sigma_min, lowest or 0),
            "sigma_max": min(settings.sigma_max, settings.sigma_max if highest is None else highest),
        }
    )
    bar = tqdm(total=2 * settings.steps - 1, unit=" calls", desc="sample sheet", disable=job.quiet)

    def denoise(noisy: torch.Tensor, sigma: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        """The arguments and result of `model`: images [B, C, H, W]."""
        bar.update()
        return model(noisy, sigma, classes)

    with bar, job.compute.autocast():
        images = SAMPLERS["heun"](denoise, job.compute.to_device(latents), classes, settings)
    rows = ", one row per class" if sidecar["label_dim"] else ""
    pictures.sheet(job.pictures / "samples.png", to_bytes(images), labels, f"Generated images{rows}")
