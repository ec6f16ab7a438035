"""Reads published diffusion models without executing anything in them: tensors and sidecar in dmat's format.

Official names: those of the code of Karras et al. 2022, `EDMPrecond`, `VPPrecond`, `VEPrecond` or `iDDPMPrecond`
around `SongUNet` or `DhariwalUNet`. A folder is a model that the library diffusers saved; `diffusers_folders` reads it.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmat import files
from dmat.config import DenoiserNetwork, denoiser_network
from dmat.diffusion.formulations import EDM, IDDPM, VE, VP
from dmat.diffusion.networks import NETWORKS, DenoiserSpec
from dmat.errors import DmatError
from dmat.models import diffusers_folders, edm_pickles, foreign
from dmat.models.edm_pickles import PublishedNetwork
from dmat.training import weights
from dmat.training.weights import DenoiserSidecar

PICKLE = ".pkl"
EDM_LICENCE = "CC BY-NC-SA 4.0"  # of the official code and its weights

# Constructor arguments of an official network with their defaults: name -> (key of `DenoiserNetwork`, default).
_SONG = {
    "model_channels": ("channels", 128),
    "channel_mult": ("multipliers", [1, 2, 2, 2]),
    "num_blocks": ("blocks", 4),
    "attn_resolutions": ("attention", [16]),
    "dropout": ("dropout", 0.1),
    "label_dropout": ("label_dropout", 0.0),
}
_DHARIWAL = {
    "model_channels": ("channels", 192),
    "channel_mult": ("multipliers", [1, 2, 3, 4]),
    "num_blocks": ("blocks", 3),
    "attn_resolutions": ("attention", [32, 16, 8]),
    "dropout": ("dropout", 0.1),
    "label_dropout": ("label_dropout", 0.0),
}
_SONG_VARIANT = {  # defaults of what makes the variants of a SongUNet differ
    "channel_mult_emb": 4,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_VARIANTS: Mapping[str, Mapping[str, object]] = {  # network of dmat -> that of the official code
    "ddpmpp": {},
    "ncsnpp": {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    },
}
_IMAGES: Mapping[str, object] = {
    "img_resolution": None,
    "img_channels": None,
    "label_dim": 0,
    "use_fp16": False,
    "augment_dim": 0,
}
# Preconditioning -> its constructor arguments with their defaults.
_PRECONDITIONINGS: Mapping[str, Mapping[str, object]] = {
    "EDMPrecond": {
        **_IMAGES,
        "sigma_min": 0.0,
        "sigma_max": math.inf,
        "sigma_data": 0.5,
        "model_type": "DhariwalUNet",
    },
    "VPPrecond": {
        **_IMAGES,
        "beta_d": 19.9,
        "beta_min": 0.1,
        "M": 1000,
        "epsilon_t": 1e-5,
        "model_type": "SongUNet",
    },
    "VEPrecond": {
        **_IMAGES,
        "sigma_min": 0.02,
        "sigma_max": 100.0,
        "model_type": "SongUNet",
    },
    "iDDPMPrecond": {
        **_IMAGES,
        "C_1": 0.001,
        "C_2": 0.008,
        "M": 1000,
        "model_type": "DhariwalUNet",
    },
}
_LAST_LAYERS = ("out_conv.weight", "out_conv.bias", "aux_conv.weight", "aux_conv.bias")
# Preconditioning with a fixed noise process -> formulation of dmat, and its constants with those of the constructor.
_FIXED: Mapping[str, tuple[str, VP | VE | IDDPM, Mapping[str, str]]] = {
    "VPPrecond": ("vp", VP(), {"beta_d": "beta_d", "beta_min": "beta_min", "epsilon_t": "epsilon_t", "steps": "M"}),
    "VEPrecond": ("ve", VE(), {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": ("iddpm", IDDPM(), {"c_1": "C_1", "c_2": "C_2", "steps": "M"}),
}


@dataclasses.dataclass(frozen=True)
class PublishedDenoiser:
    """A published model that was read. state: names -> tensors of any shape. notes: what was assumed, for people."""

    state: dict[str, Tensor]
    sidecar: DenoiserSidecar
    notes: list[str]


def is_denoiser(path: Path) -> bool:
    """Whether `dmat models import` reads this path as a diffusion model: a .pkl file or a folder. Nothing is read."""
    return path.suffix.lower() == PICKLE or path.is_dir()


def read(path: Path, licence: str | None = None) -> PublishedDenoiser:
    """Reads a published diffusion model, a .pkl file or a folder.

    licence: of its weights, if it is not that of the official ones or the one that a folder names. Raises DmatError if
    a file is missing or damaged, or holds a model that dmat does not have.
    """
    if path.is_dir():
        return _from_folder(path, licence)
    if not path.is_file():
        raise DmatError(
            f"{path} does not exist; expected a {PICKLE} file or a folder of a diffusion model; give its path"
        )
    foreign.expect_no_failed_download(path)
    try:
        network = edm_pickles.read(path)
    except DmatError:
        raise
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise DmatError(
            f"{path} does not hold a diffusion model ({foreign.problem(error)}); expected a snapshot that the code of "
            f"Karras et al. 2022 wrote; download it again and compare its checksum"
        ) from None
    try:
        settings, spec, preconditioning = _architecture(network)
        state = _state(_predicted_mean(network, spec.channels), settings, spec)
        formulation, sigma_data, limits = _formulation(network.class_name, preconditioning)
    except (ValueError, TypeError, RuntimeError, OverflowError, DmatError) as error:
        *first, last = _PRECONDITIONINGS
        raise DmatError(
            f"{path} holds a model that dmat does not have: {str(error)[:300]}; expected "
            f"{', '.join(first)} or {last} around a SongUNet (DDPM++ or NCSN++) or a DhariwalUNet; import another file"
        ) from None
    notes = [
        f"the file names code, which was neither run nor read: {foreign.shortened_list(network.other_names)}"
    ] if network.other_names else []  # fmt: skip
    notes += _class_notes(spec)
    sidecar: DenoiserSidecar = {
        "kind": "denoiser",
        "weights": "averaged",
        "network": settings.plain(),
        "label_dim": spec.label_dim,
        "augment_dim": spec.augment_dim,
        "formulation": formulation,
        "sigma_data": sigma_data,
        "sigma_range": limits,
        "image_shape": [spec.height, spec.width, spec.channels],
        "class_names": [str(k) for k in range(spec.label_dim)],
        "licence": licence or EDM_LICENCE,
        "licence_of_data": "unknown",
        "origin": {
            "file": path.name,
            "sha256": files.sha256(path),
            "format": "Karras et al. 2022",
            "tensors": "ema",
            "args": None,
            "notes": notes,
        },
    }
    return PublishedDenoiser(state, sidecar, notes)


def _from_folder(folder: Path, licence: str | None) -> PublishedDenoiser:
    """Reads a model that diffusers saved. Raises DmatError as `diffusers_folders.read` does."""
    model = diffusers_folders.read(folder)
    notes = [*model.notes, *_class_notes(model.spec)]
    lowest, highest = model.formulation.sigma_range
    sidecar: DenoiserSidecar = {
        "kind": "denoiser",
        "weights": "unknown",
        "network": model.network.plain(),
        "label_dim": model.spec.label_dim,
        "augment_dim": 0,
        "formulation": "ddpm" if model.process else "edm",
        "sigma_data": model.formulation.sigma_data if isinstance(model.formulation, EDM) else 0.5,
        "sigma_range": [lowest, None if math.isinf(highest) else highest],
        "image_shape": [model.spec.height, model.spec.width, model.spec.channels],
        "class_names": [str(k) for k in range(model.spec.label_dim)],
        "licence": licence or model.licence or "unknown",
        "licence_of_data": "unknown",
        "origin": {
            "file": folder.resolve().name,
            "sha256": files.checksum(folder),
            "format": f"diffusers {model.version}".strip(),
            "tensors": "",
            "args": None,
            "notes": notes,
        },
    }
    if model.process:
        sidecar["noise_process"] = model.process.plain()
    return PublishedDenoiser(model.state, sidecar, notes)


def _class_notes(spec: DenoiserSpec) -> list[str]:
    """A note if the model has classes, as no published file names them."""
    return ["the file has no class names; class k is taken to be class k of the data set"] if spec.label_dim else []


def _architecture(network: PublishedNetwork) -> tuple[DenoiserNetwork, DenoiserSpec, dict[str, object]]:
    """Network, images and preconditioning that the constructor arguments describe.

    Raises ValueError for what dmat does not have: an argument that it does not read may change the function.
    """
    if network.class_name not in _PRECONDITIONINGS:
        raise ValueError(f"its preconditioning is {network.class_name}")
    remaining = dict(network.arguments)
    preconditioning = {
        name: remaining.pop(name, default) for name, default in _PRECONDITIONINGS[network.class_name].items()
    }
    kind = preconditioning["model_type"]
    if kind == "SongUNet":
        variant = {name: remaining.pop(name, default) for name, default in _SONG_VARIANT.items()}
        names = [name for name, difference in _VARIANTS.items() if _plain(variant) == {**_SONG_VARIANT, **difference}]
        if not names:
            raise ValueError(f"a SongUNet with {variant}")
        keys, name = _SONG, names[0]
    elif kind == "DhariwalUNet":
        if (multiplier := remaining.pop("channel_mult_emb", 4)) != 4:
            raise ValueError(f"channel_mult_emb is {multiplier!r}")
        keys, name = _DHARIWAL, "adm"
    else:
        raise ValueError(f"its model_type is {kind!r}")
    values = {key: remaining.pop(argument, default) for argument, (key, default) in keys.items()}
    if remaining:
        raise ValueError(f"the argument {sorted(remaining)[0]} is unknown")
    resolution = _whole(preconditioning, "img_resolution", 1)
    spec = DenoiserSpec(
        resolution,
        resolution,
        _whole(preconditioning, "img_channels", 1),
        _whole(preconditioning, "label_dim", 0),
        _whole(preconditioning, "augment_dim", 0),
    )
    return denoiser_network({"name": name, **_plain(values)}), spec, preconditioning


def _formulation(class_name: str, preconditioning: Mapping[str, object]) -> tuple[str, float, list[float | None]]:
    """Name of the formulation, sigma_data, and the range of noise levels. Raises ValueError for one that dmat lacks."""
    if class_name in _FIXED:
        name, formulation, names = _FIXED[class_name]
        expected = dataclasses.asdict(formulation)
        constants = {constant: preconditioning[argument] for constant, argument in names.items()}
        if constants != expected:
            raise ValueError(f"its noise process has {constants} and not {expected}")
        return name, 0.5, [*formulation.sigma_range]
    lowest, sigma_data = (_number(preconditioning, name) for name in ("sigma_min", "sigma_data"))
    highest = None if preconditioning["sigma_max"] == math.inf else _number(preconditioning, "sigma_max")
    if sigma_data <= 0 or lowest < 0 or (highest is not None and highest <= lowest):
        raise ValueError(f"sigma_data is {sigma_data}, and its noise levels go from {lowest} to {highest}")
    return "edm", sigma_data, [lowest, highest]


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Tuples as lists, and whole numbers as decimals where a fraction is expected."""
    return {
        name: list(value)
        if isinstance(value, tuple)
        else float(value)
        if name.endswith("dropout") and isinstance(value, int)
        else value
        for name, value in values.items()
    }


def _whole(values: Mapping[str, object], name: str, minimum: int) -> int:
    value = values[name]
    if type(value) is not int or not minimum <= value <= 100_000:
        raise ValueError(f"{name} is {value!r}")
    return value


def _number(values: Mapping[str, object], name: str) -> float:
    value = values[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _predicted_mean(network: PublishedNetwork, channels: int) -> PublishedNetwork:
    """An iDDPM network without its last outputs, a variance that no sampler here uses, and without its table of noise
    levels. Other networks as they are.

    The tensors of its last layer have 2 * channels rows, and any shape beyond; the first half stays. Raises ValueError
    for another number.
    """
    if network.class_name != "iDDPMPrecond":
        return network
    state = {name: tensor for name, tensor in network.state.items() if name != "u"}
    for name in [name for name in state if name.endswith(_LAST_LAYERS)]:
        if len(state[name]) != 2 * channels:
            raise ValueError(f"{name} has {len(state[name])} outputs for {channels} channels")
        state[name] = state[name][:channels].clone()
    return dataclasses.replace(network, state=state)


def _state(network: PublishedNetwork, settings: DenoiserNetwork, spec: DenoiserSpec) -> dict[str, Tensor]:
    """The tensors, of any shape, in float32 under dmat's names.

    Raises ValueError if they are not those of the architecture.
    """
    state = {f"network.{name.removeprefix('model.')}": tensor.float() for name, tensor in network.state.items()}
    with torch.device("meta"):  # shapes only, no memory
        model = NETWORKS[settings.name](spec, settings)
    expected = {f"network.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if problem := weights.misfit(expected, state):
        raise ValueError(f"its tensors are not those of its arguments ({problem})")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
    return state
