"""Reads diffusion models that the library diffusers saved, without executing anything in them: JSON and safetensors.

A folder of `DDPMPipeline.save_pretrained` has `unet/` and `scheduler/`. A bare one, as `google/ddpm-cifar10-32` is, has
the same files side by side. Pickles (.bin) are refused, as are networks and noise processes that dmat does not have.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmat.config import DiffusersNetwork, NoiseProcess, diffusers_network, noise_process
from dmat.diffusion import diffusers_unet
from dmat.diffusion.diffusers_unet import DiffusersUNet
from dmat.diffusion.formulations import DDPM, EDM, Formulation
from dmat.diffusion.networks import DenoiserSpec
from dmat.errors import DmatError
from dmat.models import foreign
from dmat.training import weights

_INDEX, _CONFIG, _WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
_PICKLE, _SPLIT = "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json"
_SCHEDULER = "scheduler_config.json"
_README, _README_BYTES = "README.md", 1 << 16  # its front matter is at the start

# Settings of a UNet2DModel with the defaults of diffusers 0.42: of the images, of the network, and those for which dmat
# has one value alone.
_IMAGES: Mapping[str, object] = {"sample_size": None, "in_channels": 3, "out_channels": 3, "num_class_embeds": None}
_NETWORK: Mapping[str, object] = {
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "add_attention": True,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "mid_block_scale_factor": 1.0,
    "dropout": 0.0,
    "center_input_sample": False,
    "time_embedding_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
_FIXED: Mapping[str, object] = {"time_embedding_type": "positional", "class_embed_type": None}
_WITHOUT_EFFECT = {"num_train_timesteps"}  # of a network with positional embedding

# Schedulers by their class -> keys that say how images are sampled; here the settings of an image set say that.
_OF_SAMPLING = {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
_OF_SAMPLING |= {"timestep_spacing", "steps_offset"}
_DDPM_SCHEDULERS: Mapping[str, set[str]] = {
    "DDPMScheduler": {*_OF_SAMPLING, "variance_type"},
    "DDIMScheduler": {*_OF_SAMPLING, "set_alpha_to_one"},
    "PNDMScheduler": {*_OF_SAMPLING, "set_alpha_to_one", "skip_prk_steps"},
}
_EDM_SAMPLING = {"sigma_min", "sigma_max", "sigma_schedule", "num_train_timesteps", "rho", "final_sigmas_type"}
_EDM_SCHEDULERS: Mapping[str, set[str]] = {
    "EDMEulerScheduler": _EDM_SAMPLING,
    "EDMDPMSolverMultistepScheduler": {
        *(_EDM_SAMPLING | _OF_SAMPLING),
        *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final"),
    },
}
# Key of a scheduler of the DDPM kind -> field of `NoiseProcess`, and default of diffusers 0.42.
_PROCESS: Mapping[str, tuple[str, object]] = {
    "num_train_timesteps": ("steps", 1000),
    "beta_start": ("beta_start", 1e-4),
    "beta_end": ("beta_end", 0.02),
    "beta_schedule": ("beta_schedule", "linear"),
    "prediction_type": ("prediction_type", "epsilon"),
}
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, formerly


@dataclasses.dataclass(frozen=True)
class DiffusersModel:
    """A model in a folder.

    process: of the formulation ddpm; None for edm. state: names in dmat -> float32 tensors of any shape. licence: as
    the folder says it, or None. version: of diffusers that wrote it, or "". notes: what was assumed, for people.
    """

    network: DiffusersNetwork
    spec: DenoiserSpec
    formulation: Formulation
    process: NoiseProcess | None
    state: dict[str, Tensor]
    licence: str | None
    version: str
    notes: list[str]


def read(folder: Path) -> DiffusersModel:
    """Reads a model. Raises DmatError if a file is missing or damaged, or dmat does not have the model."""
    config_path, scheduler_path = (
        _only_path(folder, *names) for names in (("unet", _CONFIG), ("scheduler", _SCHEDULER))
    )
    index = _settings(folder / _INDEX) if (folder / _INDEX).is_file() else {}
    config, scheduler = _settings(config_path), _settings(scheduler_path)
    entries = _tensors(config_path.parent)
    try:
        _expect_no_other_parts(index)
        spec, network = _architecture(config)
        formulation, process = _formulation(scheduler)
        state = _state(entries, spec, network)
    except (ValueError, TypeError, RuntimeError, OverflowError, DmatError) as error:
        raise DmatError(
            f"{folder} holds a model that dmat does not have: {str(error)[:300]}; expected a UNet2DModel and a "
            f"scheduler of the DDPM or EDM kind; import another model"
        ) from None
    licence, origin = _licence(folder, index, config)
    notes = [
        f"licence {licence}, as {origin} says" if licence else "nothing in the folder names a licence: it is unknown",
        f"of the {scheduler['_class_name']} only the noise process was read: an image set says how images are sampled",
    ]
    version = str(config.get("_diffusers_version"))
    version = version if re.fullmatch(r"[0-9A-Za-z.+-]{1,30}", version) and version != "None" else ""
    return DiffusersModel(network, spec, formulation, process, state, licence, version, notes)


def _only_path(folder: Path, name: str, file: str) -> Path:
    """The file `file` of a model, in the subfolder `name` or in the folder. Raises DmatError for none or both."""
    paths = [path for path in (folder / name / file, folder / file) if path.is_file()]
    if not paths:
        raise DmatError(
            f"{folder} has neither {name}/{file} nor {file}; expected a folder that diffusers' save_pretrained wrote; "
            f"give its path"
        )
    if len(paths) > 1:
        raise DmatError(f"{folder} has {name}/{file} and {file}; expected one of them; remove the other")
    return paths[0]


def _settings(path: Path) -> dict[str, object]:
    return foreign.json_object(path, f"the {path.name} that diffusers wrote", f"the {path.name} of the model")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors, of any shape, beside a config.json. Raises DmatError if no readable file holds all of them."""
    if not (folder / _WEIGHTS).is_file():
        if (folder / _SPLIT).exists():
            state, action = f"splits its weights ({_SPLIT})", "save it again with a larger max_shard_size"
        elif (folder / _PICKLE).exists():
            state, action = (
                f"has its weights in {_PICKLE}, a pickle",
                "convert it: load it in diffusers and save it again",
            )
        else:
            state, action = f"has no {_WEIGHTS}", "download it too"
        raise DmatError(f"{folder} {state}; expected one {_WEIGHTS}, which holds no code; {action}")
    entries, _ = foreign.content(folder / _WEIGHTS)
    return foreign.tensors(entries, folder / _WEIGHTS)


def _expect_no_other_parts(index: Mapping[str, object]) -> None:
    """Raises ValueError if the pipeline has more than network and scheduler: a decoder of latents, a text encoder."""
    others = [name for name, part in index.items() if isinstance(part, list) and len(part) == 2 and any(part)]
    if others := sorted({*others} - {"unet", "scheduler"}):
        raise ValueError(f"its pipeline has the part {others[0]}")


def _architecture(config: Mapping[str, object]) -> tuple[DenoiserSpec, DiffusersNetwork]:
    """Images and network that config.json describes. Raises ValueError or DmatError for what dmat does not have."""
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"its network is {config.get('_class_name')!r}")
    values = {key: value for key, value in config.items() if not key.startswith("_") and key not in _WITHOUT_EFFECT}
    for key, expected in _FIXED.items():
        if (value := values.pop(key, expected)) != expected:
            raise ValueError(f"{key} is {value!r}; expected {'none' if expected is None else expected}")
    images = {key: values.pop(key, default) for key, default in _IMAGES.items()}
    size = images["sample_size"]
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    channels = _whole("in_channels", images["in_channels"])
    if images["out_channels"] != channels:
        raise ValueError(f"out_channels is {images['out_channels']!r}; expected {channels}, as in_channels")
    classes = 0 if images["num_class_embeds"] is None else _whole("num_class_embeds", images["num_class_embeds"])
    if unknown := sorted(values.keys() - _NETWORK.keys()):
        raise ValueError(f"the key {unknown[0]} of {_CONFIG} is unknown")
    spec = DenoiserSpec(_whole("sample_size", height), _whole("sample_size", width), channels, classes)
    return spec, diffusers_network({"name": diffusers_unet.NAME, **_NETWORK, **values})


def _whole(name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= 100_000:
        raise ValueError(f"{name} is {value!r}; expected a whole number from 1")
    return value


def _formulation(scheduler: Mapping[str, object]) -> tuple[Formulation, NoiseProcess | None]:
    """The formulation that scheduler_config.json describes. Raises ValueError or DmatError for what dmat lacks."""
    kind = scheduler.get("_class_name")
    values = {key: value for key, value in scheduler.items() if not key.startswith("_")}
    if isinstance(kind, str) and kind in _EDM_SCHEDULERS:
        sigma_data, prediction = values.pop("sigma_data", 0.5), values.pop("prediction_type", "epsilon")
        _expect_known(values, _EDM_SCHEDULERS[kind])
        if prediction != "epsilon":
            raise ValueError(f"prediction_type is {prediction!r}; expected epsilon of a scheduler of the EDM kind")
        if not isinstance(sigma_data, int | float) or isinstance(sigma_data, bool) or not 0 < sigma_data < 1e30:
            raise ValueError(f"sigma_data is {sigma_data!r}; expected a number above 0")
        return EDM(float(sigma_data)), None
    if not isinstance(kind, str) or kind not in _DDPM_SCHEDULERS:
        raise ValueError(f"its scheduler is {kind!r}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if value := values.pop(key, None):
            raise ValueError(f"{key} is {str(value)[:40]}; expected none")
    process = noise_process({field: values.pop(key, default) for key, (field, default) in _PROCESS.items()})
    _expect_known(values, _DDPM_SCHEDULERS[kind])
    return DDPM(**process.plain()), process


def _expect_known(values: Mapping[str, object], of_sampling: set[str]) -> None:
    """Raises ValueError for a key of a scheduler whose effect dmat does not know."""
    if unknown := sorted(values.keys() - of_sampling):
        raise ValueError(f"the key {unknown[0]} of its scheduler is unknown")


def _state(entries: Mapping[str, Tensor], spec: DenoiserSpec, network: DiffusersNetwork) -> dict[str, Tensor]:
    """The tensors, of any shape, in float32 under dmat's names. Raises ValueError if they do not fit the network."""
    with torch.device("meta"):  # shapes only, no memory
        model = DiffusersUNet(spec, network)
    state = {_todays_name(name): tensor for name, tensor in entries.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problem = weights.misfit(expected, state)
    if problem or len(state) != len(entries):
        raise ValueError(f"its tensors are not those of {_CONFIG} ({problem or 'some under an old and a new name'})")
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values, or other values than decimals")
    return {f"network.{name}": tensor.float() for name, tensor in state.items()}


def _todays_name(name: str) -> str:
    """A name of a tensor, of attention in the words of today's diffusers."""
    layer, _, parameter = name.rpartition(".")
    block, _, old = layer.rpartition(".")
    return f"{block}.{_OLD_NAMES[old]}.{parameter}" if ".attentions." in block and old in _OLD_NAMES else name


def _licence(folder: Path, *settings: Mapping[str, object]) -> tuple[str | None, str]:
    """The licence that the folder names, and in which file; None if it names none. README.md comes first."""
    if (folder / _README).is_file():
        with open(folder / _README, "rb") as file:
            text = file.read(_README_BYTES).decode(errors="replace").replace("\r\n", "\n")
        front = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
        line = re.search(r"^licen[sc]e:[ \t]*(?:\n[ \t]*-[ \t]*)?(\S.*)$", front[1], re.MULTILINE) if front else None
        if line and (licence := line[1].strip().strip("\"'")).isprintable():
            return licence[:100], _README
    for values, name in zip(settings, (_INDEX, _CONFIG), strict=True):
        licence = values.get("license") or values.get("licence")
        if isinstance(licence, str) and licence.isprintable():
            return licence[:100], name
    return None, ""
