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
_WANG = ("model_state_dict", "unaveraged_model_state_dict")  # averages and what they are of
_LIGHTNING = ("state_dict", "current_model_state")  # the same where its callback WeightAveraging was used
_DEEPEST = 3  # levels of dictionaries that are searched for a network; assumed: none is deeper


@dataclasses.dataclass(frozen=True)
class DataSetSpec:
    """What a network must know of a data set, and what its users want to know. front: mean and std of the layer that
    the code of Wang et al. 2023 puts before a network with --normalize True; those of SVHN are CIFAR-10's there."""

    classes: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    front: layouts.Normalisation


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(count))


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# What --normalize puts in front of the published networks, where it is not the normalisation inside them.
_CIFAR10_IN_FRONT = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DATA = {
    "cifar10": DataSetSpec(10, 32, *NORMALISATIONS["cifar10"], _CIFAR10, _CIFAR10_IN_FRONT),
    "cifar100": DataSetSpec(100, 32, *NORMALISATIONS["cifar100"], _numbered(100), NORMALISATIONS["cifar100"]),
    "svhn": DataSetSpec(10, 32, *NORMALISATIONS["svhn"], _numbered(10), _CIFAR10_IN_FRONT),
    "tinyimagenet": DataSetSpec(
        200, 64, *NORMALISATIONS["tinyimagenet"], _numbered(200), NORMALISATIONS["tinyimagenet"]
    ),
}
# How args.txt writes them: an s at the end means "with generated images".
_DATA_IN_ARGS = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "svhn", "tiny-imagenet": "tinyimagenet"}
_DATA_IN_ARGS |= {f"{name}s": ours for name, ours in _DATA_IN_ARGS.items()}
_LINF_ATTACKS = ("fgsm", "linf-pgd", "linf-df")  # in args.txt; every other attack there is an L2 one


@dataclasses.dataclass(frozen=True)
class WeightsCandidate:
    """A network in a file. key: of its dictionary, "" for the file itself, "a.b" for one inside another. prefix: the
    wrappers before its names. kind: AVERAGED, RAW or UNKNOWN."""

    key: str
    entries: Mapping[str, Any]
    prefix: str
    kind: str

    @property
    def title(self) -> str:
        where = self.key or "the file itself"
        return f"{where} ({self.kind})" if not self.prefix else f"{where}, {self.prefix} ({self.kind})"


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
    found, notes = foreign.content(file)
    said = foreign.arguments(args) if args else {}
    chosen, more = _choose(found, said, which, file)
    network = layouts.recognise(foreign.tensors(chosen.entries, file), file, chosen.prefix)
    notes += more + _left_out(chosen.entries)
    name = _data(said, data, network.classes, args)
    images = DATA[name]
    _expect_agreement(network, images, name, said, found, file)
    (mean, std), more = _normalisation(network, images, said, file)
    notes += [*network.notes, *more]
    function, note = _activation(network, said, activation)
    notes += [note] if note else []
    sidecar: dict[str, Any] = {
        "kind": "classifier",
        "weights": which if chosen.kind == UNKNOWN and which else chosen.kind,
        "network": {"name": network.network, "depth": network.depth, "width": network.width, "activation": function},
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
            "format": "Wang et al. 2023" if chosen.key in _WANG else chosen.key or "bare tensors",
            "tensors": chosen.key,
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
) -> tuple[WeightsCandidate, list[str]]:
    """The network to read, and notes. Raises DmatError where there is none, or several and nothing says which."""
    if set(_WANG) <= found.keys() and said.get("tau", 1) == 0:
        raise DmatError(
            f"{file} holds {_WANG[1]}, which no training with tau 0 writes, and its args say tau 0; expected the same; "
            f"give the args.txt of this file"
        )
    candidates = [
        WeightsCandidate(key, entries, prefix, _kind(key, entries, prefix, found, said, file))
        for key, entries in _dictionaries(found)
        for prefix in layouts.named(foreign.tensor_names(entries), file).networks()
    ]
    if not candidates:
        raise _no_network(found, file)
    if any(one.kind == AVERAGED for one in candidates):  # then those beside it are what it is an average of
        candidates = [dataclasses.replace(one, kind=RAW) if one.kind == UNKNOWN else one for one in candidates]
    if len(candidates) == 1:
        _expect_kind(candidates[0], found, said, which, file)
        return candidates[0], _doubts(candidates[0], which)
    wanted = which or (AVERAGED if {one.key for one in candidates} == set(_WANG) else None)
    fits = [one for one in candidates if one.kind == wanted]
    if len(fits) != 1:
        kinds = {one.kind for one in candidates}
        choose = (
            f"say --weights {AVERAGED} or --weights {RAW} to `dmat models import`"
            if len(candidates) == 2 and kinds == {AVERAGED, RAW}
            else "save the state_dict of one alone"
        )
        raise DmatError(
            f"{file} holds {len(candidates)} networks: {'; '.join(one.title for one in candidates)}; expected one; "
            f"{choose}"
        )
    return fits[0], []


def _dictionaries(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Keys and entries of the file's dictionary, key "", and of those inside it, each once, _DEEPEST levels down."""
    level: list[tuple[str, Mapping[str, Any]]] = [("", found)]
    all_of_them, seen = list(level), {id(found)}
    for _ in range(_DEEPEST):
        inside: list[tuple[str, Mapping[str, Any]]] = []
        for key, entries in level:
            for name, value in entries.items():
                if isinstance(value, dict) and isinstance(name, str) and id(value) not in seen:
                    seen.add(id(value))
                    inside.append((f"{key}.{name}" if key else name, value))
        all_of_them += inside
        level = inside
    return all_of_them


def _kind(
    key: str, entries: Mapping[str, Any], prefix: str, found: Mapping[str, Any], said: Mapping[str, Any], file: Path
) -> str:
    """What names, a counter and args.txt say of weights."""
    averaged, live = _WANG
    if key == averaged and (live in found or said):  # without averaging the live weights go there, and alone
        return AVERAGED if live in found or said.get("tau") else RAW
    if key in (live, _LIGHTNING[1]):
        return RAW
    if key == _LIGHTNING[0] and _LIGHTNING[1] in found:
        return AVERAGED
    return AVERAGED if layouts.says_averaged(f"{key}.{prefix}") or _counted(entries, prefix, file) else UNKNOWN


def _counted(entries: Mapping[str, Any], prefix: str, file: Path) -> bool:
    """Whether an AveragedModel around the names after `prefix` has counted updates."""
    counters = {
        name: value
        for name, value in entries.items()
        if str(name).endswith(layouts.AVERAGED_MODEL) and prefix.startswith(name.removesuffix(layouts.AVERAGED_MODEL))
    }
    return any(tensor.numel() == 1 and tensor.item() > 0 for tensor in foreign.tensors(counters, file).values())


def _expect_kind(
    one: WeightsCandidate, found: Mapping[str, Any], said: Mapping[str, Any], which: str | None, file: Path
) -> None:
    """The only network of a file against --weights."""
    averaged, live = _WANG
    if which == RAW and one.key == averaged and live not in found and one.kind != RAW:
        raise DmatError(
            f"{file} has no {live}; expected it beside {averaged} for raw weights; leave --weights away, get the "
            f"weights-best.pt that the training wrote, or give its args.txt if that says tau 0"
        )
    if which is not None and one.kind not in (which, UNKNOWN):
        why = "; its args name no tau" if one.key == averaged and said and not said.get("tau") else ""
        raise DmatError(
            f"{file} holds one network, {one.title}{why}; expected {which} weights; leave --weights away, or give a "
            f"file that has them"
        )


def _doubts(one: WeightsCandidate, which: str | None) -> list[str]:
    if one.key == _WANG[0] and one.kind == UNKNOWN and which is None:
        return [
            "nothing in the file says whether its weights are averages: those of Wang et al. 2023 are, unless their "
            "args.txt says tau 0"
        ]
    return []


def _left_out(entries: Mapping[Any, Any]) -> list[str]:
    """Of a dictionary of tensors, what is none."""
    names = set(foreign.tensor_names(entries))
    others = [str(name) for name in entries if name not in names]
    return [f"left out beside the tensors: {foreign.listed(others)}"] if others else []


def _no_network(found: Mapping[str, Any], file: Path) -> DmatError:
    """What is there instead: of the dictionary that should hold a network, else of that with most tensors."""
    key = next((key for key in ("model_state_dict", "state_dict") if key in found), None)
    if key and not isinstance(found[key], dict):
        return DmatError(
            f"{file}: {key} is {foreign.kind(found[key])}; expected a dictionary of named tensors; save the network's "
            f"state_dict()"
        )
    entries = (
        found[key] if key else max((e for _, e in _dictionaries(found)), key=lambda e: len(foreign.tensor_names(e)))
    )
    if not key and not foreign.tensor_names(entries):
        return DmatError(
            f"{file} holds {', '.join(map(str, list(found)[:6])) or 'nothing'}; expected model_state_dict, state_dict "
            f"or tensors; save the state_dict of its network"
        )
    return layouts.unknown(foreign.tensors(entries, file), file)


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
    network: layouts.NetworkInFile,
    images: DataSetSpec,
    name: str,
    said: Mapping[str, Any],
    found: Mapping[str, Any],
    file: Path,
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
    for key, there in (("num_classes", network.classes), ("normalize_input", bool(network.own or network.front))):
        if key in found and found[key] != there:
            raise DmatError(
                f"{file} says {key} {found[key]} and its tensors say {there}; expected the same; download it again"
            )
    if said.get("normalize") and not network.layer_in_front:
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


def _in_args(network: layouts.NetworkInFile) -> str:
    """How args.txt names it. The code of Wang et al. 2023 has the layouts of DeepMind with swish (SiLU) alone."""
    if network.network == "preact_resnet":
        return f"preact-resnet{network.depth}-swish"
    return f"wrn-{network.depth}-{network.width}{'-swish' if network.network == 'wide_resnet' else ''}"


def _normalisation(
    network: layouts.NetworkInFile, images: DataSetSpec, said: Mapping[str, Any], file: Path
) -> tuple[layouts.Normalisation, list[str]]:
    """Mean and std of all layers that normalise, as one, and notes.

    Two after each other: ((x - m) / s - m') / s' = (x - (m + s m')) / (s s').
    """
    own, front = network.own, network.front
    if own is None and layouts.LAYOUTS[network.network].normalises:
        own = images.mean, images.std
    if network.layer_in_front and front is None:
        if not said.get("normalize"):
            raise DmatError(
                f"{file} has a layer in front of its network and does not hold its mean and std; expected both, or an "
                f"args.txt that says normalize true; give the args.txt of its training with --args"
            )
        front = images.front
    if own is None or front is None:
        as_they_are = (0.0,) * network.channels, (1.0,) * network.channels
        takes = "its network takes pixels in [0, 1] as they are: mean 0, std 1"
        return own or front or as_they_are, [] if own or front else [takes]
    (m, s), (mean, std) = front, own
    both = (
        tuple(m[k] + s[k] * mean[k] for k in range(network.channels)),
        tuple(s[k] * std[k] for k in range(network.channels)),
    )
    return both, [
        f"its images are normalised twice and the sidecar has both as one: in front by mean {_listed(m)} and std "
        f"{_listed(s)}, in the network by mean {_listed(mean)} and std {_listed(std)}"
    ]


def _listed(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def _activation(network: layouts.NetworkInFile, said: Mapping[str, Any], wanted: str | None) -> tuple[str, str]:
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
