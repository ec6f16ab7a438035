"""Weights that others published -> weights and sidecar as dmat writes them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmat import files
from dmat.data.sources import NORMALISATIONS
from dmat.errors import DmatError
from dmat.models import foreign, layouts
from dmat.models.loading import SUFFIX
from dmat.robust.networks import ACTIVATIONS
from dmat.training import weights

AVERAGED, RAW, UNKNOWN = "averaged", "raw", "unknown"


@dataclasses.dataclass(frozen=True)
class Images:
    """What a network must know of a data set, and what its users want to know."""

    classes: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(count))


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATA = {
    "cifar10": Images(10, 32, *NORMALISATIONS["cifar10"], _CIFAR10),
    "cifar100": Images(100, 32, *NORMALISATIONS["cifar100"], _numbered(100)),
    "svhn": Images(10, 32, *NORMALISATIONS["svhn"], _numbered(10)),
    "tinyimagenet": Images(200, 64, *NORMALISATIONS["tinyimagenet"], _numbered(200)),
}
# How args.txt writes them: an s at the end means "with generated images".
_DATA_IN_ARGS = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "svhn", "tiny-imagenet": "tinyimagenet"}
_DATA_IN_ARGS |= {f"{name}s": ours for name, ours in _DATA_IN_ARGS.items()}
_LINF_ATTACKS = ("fgsm", "linf-pgd", "linf-df")  # in args.txt; every other attack there is an L2 one


@dataclasses.dataclass(frozen=True)
class Imported:
    path: Path
    sidecar: dict[str, Any]
    notes: list[str]  # what was assumed or left out


def import_model(
    file: Path,
    args: Path | None = None,
    data: str | None = None,
    which: str | None = None,
    activation: str | None = None,
    licence: str | None = None,
    target: Path | None = None,
) -> Imported:
    """Reads foreign weights without running anything in them and writes them to `target` (.safetensors and .json).

    args: the args.txt of the training. data: a name in DATA. which: "averaged" or "raw". activation: a name in
    ACTIVATIONS. What the file, `args` and these say must agree.
    """
    if which not in (None, AVERAGED, RAW):
        raise DmatError(f"--weights is {which!r}; expected {AVERAGED} or {RAW}")
    target = _target(file, target)
    found = foreign.content(file)
    said = foreign.arguments(args) if args else {}
    tensors, key, form, weights_are, notes = _choose(found, said, which, file)
    network = layouts.recognise(tensors, file)
    name = _data(said, data, network.classes, args)
    images = DATA[name]
    _expect_agreement(network, images, name, said, found, file)
    mean, std = _normalisation(network, images)
    notes += network.notes
    if not any(mean):
        notes.append("its network takes pixels in [0, 1] as they are: mean 0, std 1")
    chosen, note = _activation(network, said, activation)
    notes += [note] if note else []
    sidecar: dict[str, Any] = {
        "kind": "classifier",
        "weights": weights_are,
        "network": {"name": network.network, "depth": network.depth, "width": network.width, "activation": chosen},
        "classes": network.classes,
        "channels": network.channels,
        "mean": list(mean),
        "std": list(std),
        "image_shape": [images.size, images.size, network.channels],
        "class_names": list(images.class_names),
        "data": name,
        "threat": _threat(said),
        "seed": said.get("seed"),
        "beta": said.get("beta"),
        "licence": licence or UNKNOWN,
        "licence_of_data": UNKNOWN,
        "origin": {
            "file": file.name,
            "sha256": files.sha256(file),
            "format": form,
            "tensors": key,
            "args": said or None,
            "notes": notes,
        },
    }
    weights.save(target, network.state, sidecar)
    return Imported(target, sidecar, notes)


def _target(file: Path, target: Path | None) -> Path:
    """Where to write. Never over the file that is read, and over no other model."""
    target = target or file.with_suffix(SUFFIX)
    if target.suffix != SUFFIX:
        raise DmatError(
            f"--to is {target}; expected a name that ends in {SUFFIX}; give one such as {target.stem}{SUFFIX}"
        )
    if target.exists() and file.exists() and target.samefile(file):
        raise DmatError(f"{target} is the file to import; expected another name to write; give one with --to")
    other = next((path for path in (target, target.with_suffix(".json")) if path.exists()), None)
    if other and not _same_origin(target, file):
        raise DmatError(f"{other} exists and is no import of {file.name}; expected a new name; give one with --to")
    return target


def _same_origin(target: Path, file: Path) -> bool:
    """Whether the sidecar of `target` says that it comes from `file`."""
    try:
        return bool(files.read_json(target.with_suffix(".json"))["origin"]["sha256"] == files.sha256(file))
    except (DmatError, KeyError, TypeError):
        return False


def _choose(
    found: Mapping[str, Any], said: Mapping[str, Any], which: str | None, file: Path
) -> tuple[Mapping[str, Any], str, str, str, list[str]]:
    """Tensors, the key they were under, format, what they are (averaged, raw, unknown) and notes."""
    if "model_state_dict" in found:
        both = "unaveraged_model_state_dict" in found
        if which == RAW and not both:
            raise DmatError(
                f"{file} has no unaveraged_model_state_dict; expected it beside model_state_dict for raw weights; "
                f"leave --weights away or get the file that the training wrote"
            )
        key = "unaveraged_model_state_dict" if which == RAW else "model_state_dict"
        notes = []
        if which is None and not both and not said.get("tau"):
            notes.append("nothing in the file says that its weights are averages; those of Wang et al. 2023 are")
        return _mapping(found, key, file), key, "Wang et al. 2023", RAW if which == RAW else AVERAGED, notes
    if "state_dict" in found:
        return _mapping(found, "state_dict", file), "state_dict", "state_dict", which or UNKNOWN, []
    if (
        found
        and all(isinstance(key, str) for key in found)
        and any(hasattr(value, "shape") for value in found.values())
    ):
        return found, "", "bare tensors", which or UNKNOWN, []
    raise DmatError(
        f"{file} holds {', '.join(map(str, list(found)[:6])) or 'nothing'}; expected model_state_dict, state_dict or "
        f"tensors; save the state_dict of its network"
    )


def _mapping(found: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    value = found[key]
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DmatError(
            f"{file}: {key} is a {type(value).__name__}; expected a dictionary of named tensors; save the network's "
            f"state_dict()"
        )
    return value


def _data(said: Mapping[str, Any], data: str | None, classes: int, args: Path | None) -> str:
    """The data set that `args` or --data name."""
    written = said.get("data")
    if written is None and data is None:
        fits = [name for name, images in DATA.items() if images.classes == classes]
        raise DmatError(
            f"neither --args nor --data says which images the model is for; it has {classes} classes, as "
            f"{' and '.join(fits) or 'none of the known data sets'}; say --data {fits[0] if fits else 'NAME'}"
        )
    if written is not None and written not in _DATA_IN_ARGS:
        raise DmatError(f"{args}: data is {written!r}; expected one of {', '.join(_DATA_IN_ARGS)}; dmat knows no other")
    if data is not None and data not in DATA:
        raise DmatError(f"--data is {data!r}; expected one of {', '.join(DATA)}")
    if written is not None and data is not None and _DATA_IN_ARGS[written] != data:
        raise DmatError(f"{args} says data {written!r} and --data says {data}; expected the same; leave --data away")
    return data or _DATA_IN_ARGS[str(written)]


def _expect_agreement(
    network: layouts.Found, images: Images, name: str, said: Mapping[str, Any], found: Mapping[str, Any], file: Path
) -> None:
    """Tensors against what the data set, args.txt and the file's own entries say."""
    if network.classes != images.classes:
        raise DmatError(
            f"{file} has {network.classes} classes; expected {images.classes}, as {name} has; give the args.txt or "
            f"--data of this file"
        )
    if network.channels != 3:
        raise DmatError(
            f"{file} takes images of {network.channels} channels; expected 3, as {name} has; name other data"
        )
    for key, there in (("num_classes", network.classes), ("normalize_input", network.mean is not None)):
        if key in found and found[key] != there:
            raise DmatError(
                f"{file} says {key} {found[key]} and its tensors say {there}; expected the same; download it again"
            )
    if said.get("normalize") and network.mean is None:
        raise DmatError(
            f"{file}: its args say normalize true, a layer that the tensors do not show; expected normalize false; "
            f"give the args.txt of this file"
        )
    here = _in_args(network)
    if said.get("model", here) != here:
        raise DmatError(
            f"{file} holds {here}; its args say model {said['model']}; expected the same; give the args.txt of this "
            f"file"
        )


def _in_args(network: layouts.Found) -> str:
    """How args.txt names it. The code of Wang et al. 2023 has the layouts of DeepMind with swish (SiLU) alone."""
    if network.network == "preact_resnet":
        return f"preact-resnet{network.depth}-swish"
    return f"wrn-{network.depth}-{network.width}{'-swish' if network.network == 'wide_resnet' else ''}"


def _normalisation(network: layouts.Found, images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the layer in the file; else that which the layout has built in; else none."""
    if network.mean is not None and network.std is not None:
        return network.mean, network.std
    if layouts.LAYOUTS[network.network].normalises:
        return images.mean, images.std
    return (0.0,) * network.channels, (1.0,) * network.channels


def _activation(network: layouts.Found, said: Mapping[str, Any], wanted: str | None) -> tuple[str, str]:
    """No tensor shows it. The layout of TRADES has ReLU only; those of DeepMind have SiLU unless told."""
    if wanted is not None and wanted not in ACTIVATIONS:
        raise DmatError(f"--activation is {wanted!r}; expected one of {', '.join(ACTIVATIONS)}")
    if network.network == "wide_resnet_symmetric" or "model" in said:
        known = "relu" if network.network == "wide_resnet_symmetric" else "silu"
        if wanted not in (None, known):
            raise DmatError(
                f"--activation is {wanted}; networks of this kind have {known}; expected the same; leave it away"
            )
        return known, ""
    return (
        wanted or "silu",
        "" if wanted else "activation silu was assumed, because no tensor shows it: see --activation",
    )


def _threat(said: Mapping[str, Any]) -> dict[str, str] | None:
    """Norm and radius that args.txt names, the radius as n/255 where it is one."""
    attack, epsilon = said.get("attack"), said.get("attack_eps")
    if not isinstance(attack, str) or not isinstance(epsilon, int | float):
        return None
    of_255 = round(epsilon * 255)
    text = f"{of_255}/255" if of_255 and abs(of_255 / 255 - epsilon) < 1e-9 else repr(float(epsilon))
    return {"norm": "linf" if attack in _LINF_ATTACKS else "l2", "epsilon": text}
