"""Denoisers: creates them, describes them in sidecars, and loads them from weights and sidecar."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from dmat import files, plugins, seeds
from dmat.config import (
    DenoiserNetwork,
    DenoiserTraining,
    denoiser_network,
    denoiser_of_an_earlier_version,
    diffusers_network,
    noise_process,
)
from dmat.data.shards import Shards
from dmat.devices import Compute
from dmat.diffusion import diffusers_unet
from dmat.diffusion.augmentation_pipe import LABELS
from dmat.diffusion.diffusers_unet import DiffusersUNet
from dmat.diffusion.formulations import DDPM, EDM, FORMULATIONS, Formulation, Preconditioned
from dmat.diffusion.networks import NETWORKS, DenoiserSpec
from dmat.errors import DmatError
from dmat.models.network_cost import denoiser_cost
from dmat.training import weights
from dmat.training.weights import DenoiserSidecar

_OF_THE_MODEL = ("network", "formulation", "sigma_data")  # settings of a training that sidecars have on their own


def new_denoiser(network: DenoiserNetwork, spec: DenoiserSpec, formulation: Formulation, seed: int) -> Preconditioned:
    """Returns a new denoiser; its initial weights depend on the seed alone.

    Raises ValueError where the settings of the network do not fit the images.
    """
    seeds.reseed_torch(seed, "initial weights", 0)
    return Preconditioned(plugins.find(NETWORKS, network.name)(spec, network), formulation)


def denoiser_sidecar(settings: DenoiserTraining, real: Shards, compute: Compute) -> DenoiserSidecar:
    """Returns the sidecar that is written beside the weights of a training."""
    class_names = real.manifest["class_names"]
    sidecar: DenoiserSidecar = {
        "kind": "denoiser",
        "weights": "averaged",
        "network": settings.network.plain(),
        "label_dim": real.classes if settings.conditional else 0,
        "augment_dim": LABELS if settings.augment_probability else 0,
        "formulation": settings.formulation,
        "sigma_data": settings.sigma_data,
        "sigma_range": limits(FORMULATIONS[settings.formulation](settings)),
        "image_shape": list(real.shape),
        "class_names": class_names if settings.conditional else [],
        "licence_of_data": real.manifest["licence"],
        "precision": compute.precision,
        "training": {name: value for name, value in settings.plain().items() if name not in _OF_THE_MODEL},
    }
    if not settings.conditional:
        sidecar["data_class_names"] = class_names
    return sidecar


def limits(formulation: Formulation) -> list[float | None]:
    """The range of noise levels as a sidecar has it: None where there is no limit."""
    low, high = formulation.sigma_range
    return [low, None if math.isinf(high) else high]


def licence_of_images(sidecar: DenoiserSidecar) -> str:
    """The licence that generated images inherit: that of imported weights, or of the images that others learned."""
    return sidecar.get("licence") or sidecar.get("licence_of_data") or "unknown"


def identity(sidecar: DenoiserSidecar) -> dict[str, object]:
    """What decides, with the settings of a sampler, the images that a denoiser generates: its weights and network."""
    keys = ["sha256", "network", "label_dim", "augment_dim", "formulation", "sigma_data"]
    keys += ["noise_process"] if "noise_process" in sidecar else []
    return {key: cast(Mapping[str, object], sidecar)[key] for key in keys}


def load_denoiser(path: Path, compute: Compute) -> tuple[Preconditioned, DenoiserSidecar]:
    """Loads a denoiser in evaluation mode without gradients, on the device of `compute`, and its sidecar.

    Raises DmatError if one of the two files is missing, damaged or does not fit the other.
    """
    state, sidecar = weights.read(path, "denoiser")
    sidecar = _with_todays_keys(sidecar, path)
    model = weights.fill(lambda: build(sidecar, path), state, path)
    compute.model_to_device(model).eval().requires_grad_(False)
    return model, sidecar


def read_sidecar(path: Path) -> DenoiserSidecar:
    """Reads the sidecar of the denoiser in `path`, in today's form."""
    return _with_todays_keys(weights.read_sidecar(path, "denoiser"), path)


class DenoiserDescription(DenoiserSidecar):
    """A sidecar and what the files themselves say."""

    file: str  # path of the weights
    parameters: int  # number of parameters
    found_sha256: str  # actual checksum of the weights
    checksum_ok: bool  # whether it is the one in the sidecar


def describe(path: Path) -> DenoiserDescription:
    """The sidecar of a denoiser with the four keys of `DenoiserDescription` added, for people and for `--json`."""
    sidecar = read_sidecar(path)
    with torch.device("meta"):  # shapes only, no memory
        model = build(sidecar, path)
    checksum = files.sha256(path)
    return {
        **sidecar,
        "file": str(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "found_sha256": checksum,
        "checksum_ok": checksum == sidecar["sha256"],
    }


def forward_flops(sidecar: DenoiserSidecar, path: Path) -> int:
    """Operations of a forward pass for one image. path: of the weights. Raises DmatError as `build` does."""
    with torch.device("meta"):  # shapes only, no memory
        model = build(sidecar, path)
    height, width, channels = sidecar["image_shape"]
    return denoiser_cost(model.network, DenoiserSpec(height, width, channels, sidecar["label_dim"])).forward


def build(sidecar: DenoiserSidecar, path: Path) -> Preconditioned:
    """Builds the network that a sidecar describes, with initial weights.

    Raises DmatError if the sidecar is incomplete or has impossible values: people edit sidecars.
    """
    try:
        _expect_complete(sidecar)
        height, width, channels = (_whole(length, 1) for length in sidecar["image_shape"])
        spec = DenoiserSpec(height, width, channels, _whole(sidecar["label_dim"], 0), _whole(sidecar["augment_dim"], 0))
        if len(sidecar["class_names"]) != spec.label_dim:
            raise ValueError(f"class_names has {len(sidecar['class_names'])} names for {spec.label_dim} classes")
        with torch.random.fork_rng(devices=[]):
            if _is_of_diffusers(sidecar["network"]):
                return Preconditioned(DiffusersUNet(spec, diffusers_network(sidecar["network"])), _formulation(sidecar))
            return new_denoiser(denoiser_network(sidecar["network"]), spec, _formulation(sidecar), seed=0)
    except DmatError as error:
        problem = str(error)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise DmatError(
        f"{path.with_suffix('.json')} does not describe a denoiser ({problem}); expected network, image_shape, "
        f"label_dim, augment_dim, formulation, sigma_data, sigma_range and class_names; restore the sidecar that was "
        f"written with {path.name}"
    )


def _expect_complete(sidecar: DenoiserSidecar) -> None:
    """Raises KeyError or ValueError for the first key that is missing or has a value of another kind."""
    values: Any = sidecar
    lowest, highest = values["sigma_range"]
    origin, training = values.get("origin"), values.get("training")
    notes: list[object] = origin["notes"] if isinstance(origin, dict) else []
    texts = [*values["class_names"], *values.get("data_class_names", []), *notes]
    for key, valid in (
        ("image_shape", isinstance(values["image_shape"], list) and len(values["image_shape"]) == 3),
        ("class_names", isinstance(values["class_names"], list) and all(isinstance(text, str) for text in texts)),
        ("sigma_range", _is_number(lowest) and (highest is None or (_is_number(highest) and lowest < highest))),
        ("formulation", values["formulation"] in list(FORMULATIONS)),
        ("origin or training", isinstance(origin, dict) or isinstance(training, dict)),
    ):
        if not valid:
            raise ValueError(f"{key} is {str(values.get(key))[:60]}")
    if origin is not None:
        for name in ("file", "sha256", "format"):
            if not isinstance(origin[name], str):
                raise ValueError(f"origin.{name} is {origin[name]!r}")
    elif training is not None:
        _whole(training["images_seen"], 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_of_diffusers(network: object) -> bool:
    return isinstance(network, Mapping) and network.get("name") == diffusers_unet.NAME


def _formulation(sidecar: DenoiserSidecar) -> Formulation:
    """The formulation of a sidecar. Raises KeyError for an unknown one, and ValueError or DmatError for bad values."""
    sigma_data = sidecar["sigma_data"]
    if not _is_number(sigma_data) or sigma_data == 0:
        raise ValueError(f"sigma_data is {sigma_data!r}")
    if "noise_process" in sidecar:
        if sidecar["formulation"] != "ddpm":
            raise ValueError(f"noise_process is given; {sidecar['formulation']} has no choice of it")
        return DDPM(**noise_process(sidecar["noise_process"]).plain())
    return FORMULATIONS[sidecar["formulation"]](EDM(float(sigma_data)))


def _whole(value: object, minimum: int) -> int:
    if type(value) is not int or value < minimum:
        raise ValueError(f"{value!r} is not a whole number from {minimum}")
    return value


def _with_todays_keys(sidecar: DenoiserSidecar, path: Path) -> DenoiserSidecar:
    """A sidecar of an earlier version had all settings of its training, with those of the network, in one mapping.

    Raises DmatError if that mapping is not complete.
    """
    earlier: Any = sidecar
    if "generator" not in earlier or "network" in earlier:
        return sidecar
    try:
        settings = denoiser_of_an_earlier_version(earlier["generator"])
        label_dim, sigma_data, network = (
            len(earlier["class_names"]),
            settings.pop("sigma_data"),
            settings.pop("network"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DmatError(
            f"{path.with_suffix('.json')} does not describe a denoiser ({type(error).__name__}: {error}); expected "
            f"generator with all its settings, and class_names; restore the sidecar that was written with {path.name}"
        ) from None
    others = {key: value for key, value in earlier.items() if key != "generator"}
    today = {
        "network": network,
        "label_dim": label_dim,
        "augment_dim": 0,
        "formulation": "edm",
        "sigma_data": sigma_data,
        "sigma_range": [0.0, None],
        "training": settings,
    }
    return cast(DenoiserSidecar, {**others, **today})
