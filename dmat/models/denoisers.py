"""Denoisers of the stages: creates them, describes them in sidecars, and loads them from weights and sidecar."""

from pathlib import Path

from dmat import seeds
from dmat.config import Generator, with_new_names
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.unet import UNet
from dmat.training import weights
from dmat.training.weights import DenoiserSidecar


def new_denoiser(settings: Generator, channels: int, classes: int) -> Preconditioned:
    """Returns a new denoiser; its initial weights depend on `settings.seed` alone."""
    seeds.reseed_torch(settings.seed, "initial weights", 0)
    network = UNet(channels, classes, settings.channels, settings.multipliers, settings.blocks, settings.dropout)
    return Preconditioned(network, settings.sigma_data)


def denoiser_sidecar(settings: Generator, real: Shards, compute: Compute) -> DenoiserSidecar:
    """Returns the sidecar that is written beside a denoiser's weights."""
    return {
        "kind": "denoiser",
        "weights": "averaged",
        "generator": settings.plain(),
        "image_shape": list(real.shape),
        "class_names": real.manifest["class_names"],
        "licence_of_data": real.manifest["licence"],
        "precision": compute.precision,
    }


def load_denoiser(path: Path, compute: Compute) -> tuple[Preconditioned, DenoiserSidecar]:
    """Loads a denoiser in evaluation mode without gradients, on the device of `compute`, and its sidecar."""
    state, sidecar = weights.read(path, "denoiser")
    settings = Generator.model_validate(with_new_names(sidecar["generator"]))
    model = new_denoiser(settings, sidecar["image_shape"][2], len(sidecar["class_names"]))
    weights.fill(model, state, path)
    compute.model_to_device(model).eval().requires_grad_(False)
    return model, sidecar
