"""Denoisers of the stages: new ones, what their sidecars say, and how they are built again from them."""

from pathlib import Path
from typing import Any

from dmat import seeds
from dmat.config import Generator
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.diffusion.edm import Preconditioned
from dmat.diffusion.unet import UNet
from dmat.training import weights


def new_denoiser(settings: Generator, channels: int, classes: int) -> Preconditioned:
    """A denoiser with initial weights named by the seed."""
    seeds.reseed_torch(settings.seed, "initial weights", 0)
    network = UNet(channels, classes, settings.channels, settings.multipliers, settings.blocks, settings.dropout)
    return Preconditioned(network, settings.sigma_data)


def denoiser_sidecar(settings: Generator, real: Shards, compute: Compute) -> dict[str, Any]:
    """What a denoiser's weights must be shipped with."""
    return {
        "kind": "denoiser",
        "weights": "averaged",
        "generator": settings.plain(),
        "image_shape": list(real.shape),
        "class_names": real.manifest["class_names"],
        "licence_of_data": real.manifest["licence"],
        "precision": compute.precision,
    }


def load_denoiser(path: Path, compute: Compute) -> tuple[Preconditioned, dict[str, Any]]:
    """A denoiser in evaluation mode without gradients, and its sidecar."""
    state, sidecar = weights.read(path, "denoiser")
    settings = Generator.model_validate(sidecar["generator"])
    model = new_denoiser(settings, sidecar["image_shape"][2], len(sidecar["class_names"]))
    weights.fill(model, state, path)
    compute.model_to_device(model).eval().requires_grad_(False)
    return model, sidecar
