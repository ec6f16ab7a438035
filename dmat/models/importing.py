"""Imports published weights of other projects: writes weights and sidecar in dmat's format."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dmat import files
from dmat.data.data_sets import DATA_SETS, NORMALISATIONS
from dmat.errors import DmatError
from dmat.models import foreign, layouts, published_denoisers
from dmat.models.foreign import FileDictionary
from dmat.models.loading import SUFFIX, shown
from dmat.models.published_denoisers import PublishedDenoiser
from dmat.robust.networks import ACTIVATIONS
from dmat.training import weights
from dmat.training.weights import ClassifierSidecar, ThreatRecord

AVERAGED, RAW, UNKNOWN = "averaged", "raw", "unknown"
_WANG_KEYS = ("model_state_dict", "unaveraged_model_state_dict")  # averaged weights (EMA), and the raw weights
_LIGHTNING_KEYS = ("state_dict", "current_model_state")  # the same, with the callback WeightAveraging
TrainingArgs = Mapping[str, object]  # JSON values of args.txt
_MAX_DEPTH = 3  # levels of nested dictionaries that are searched for a network; assumed: no network is deeper


@dataclasses.dataclass(frozen=True)
class PublishedDataSet:
    """What a network and its users need to know of a data set.

    classes: number of classes. size: height and width in pixels. mean, std: per channel, for pixels in [0, 1].
    front_normalisation: mean and std of the layer that the code of Wang et al. 2023 puts in front of a network with
    --normalize True; for SVHN that code uses those of CIFAR-10.
    """

    classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    front_normalisation: layouts.MeanAndStd


def _published(name: str, front_normalisation: layouts.MeanAndStd | None = None) -> PublishedDataSet:
    """The facts about a data set. front_normalisation: None if it is that of the data set."""
    data_set = DATA_SETS[name]
    mean, std = NORMALISATIONS[name]
    names = data_set.class_names or tuple(map(str, range(data_set.classes)))
    return PublishedDataSet(
        data_set.classes, data_set.size, mean, std, names, front_normalisation or NORMALISATIONS[name]
    )


# Mean and std that --normalize puts in front of the published networks, where they differ from those inside them.
_CIFAR10_IN_FRONT = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DATA = {
    "cifar10": _published("cifar10", _CIFAR10_IN_FRONT),
    "cifar100": _published("cifar100"),
    "svhn": _published("svhn", _CIFAR10_IN_FRONT),
    "tinyimagenet": _published("tinyimagenet"),
}
# Names of the data sets in args.txt; an s at the end means "with generated images".
_DATA_IN_ARGS = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "svhn", "tiny-imagenet": "tinyimagenet"}
_DATA_IN_ARGS |= {f"{name}s": data_name for name, data_name in _DATA_IN_ARGS.items()}
_LINF_ATTACKS = ("fgsm", "linf-pgd", "linf-df")  # in args.txt; all other attacks there are L2


@dataclasses.dataclass(frozen=True)
class WeightsCandidate:
    """A network in a file.

    key: of its dictionary; "" for the file itself, "a.b" for a nested one. entries: that dictionary. prefix: the
    wrappers before the names of its tensors. kind: AVERAGED, RAW or UNKNOWN.
    """

    key: str
    entries: FileDictionary
    prefix: str
    kind: str

    @property
    def title(self) -> str:
        """Description for messages: key, wrappers and kind."""
        where = self.key or "the file itself"
        return f"{where} ({self.kind})" if not self.prefix else f"{where}, {self.prefix} ({self.kind})"


@dataclasses.dataclass(frozen=True)
class Imported:
    """Result of an import: the file that was written, its sidecar, and notes for people."""

    path: Path
    sidecar: ClassifierSidecar
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
    """Reads weights of another project without executing anything in them and writes them to `target`.

    Writes a .safetensors file and its .json sidecar. args: the args.txt of the training. data: a name in DATA. which:
    "averaged" or "raw". activation: a name in ACTIVATIONS. Raises DmatError if the file, `args` and the other arguments
    contradict each other, or leave something open.
    """
    if which not in (None, AVERAGED, RAW):
        raise DmatError(f"--weights is {which!r}; expected {AVERAGED} or {RAW}")
    target = _target(file, target)
    checkpoint, notes = foreign.content(file)
    training_args = foreign.arguments(args) if args else {}
    candidate, more_notes = _select_candidate(checkpoint, training_args, which, file)
    network = layouts.recognise(foreign.tensors(candidate.entries, file), file, candidate.prefix)
    notes += more_notes + _left_out_notes(candidate.entries)
    name = _data_name(training_args, data, network.classes, args)
    data_set = DATA[name]
    _expect_agreement(network, data_set, name, training_args, checkpoint, file)
    (mean, std), more_notes = _normalisation(network, data_set, training_args, file)
    notes += [*network.notes, *more_notes]
    function, note = _activation(network, training_args, activation)
    notes += [note] if note else []
    sidecar: ClassifierSidecar = {
        "kind": "classifier",
        "weights": which if candidate.kind == UNKNOWN and which else candidate.kind,
        "network": {"name": network.network, "depth": network.depth, "width": network.width, "activation": function},
        "classes": network.classes,
        "channels": network.channels,
        "mean": list(mean),
        "std": list(std),
        "image_shape": [data_set.size, data_set.size, network.channels],
        "class_names": list(data_set.class_names),
        "data": name,
        "threat": _threat(training_args),
        "seed": training_args.get("seed"),
        "beta": training_args.get("beta"),
        "licence": licence or UNKNOWN,
        "licence_of_data": UNKNOWN,
        "origin": {
            "file": file.name,
            "sha256": files.sha256(file),
            "format": "Wang et al. 2023" if candidate.key in _WANG_KEYS else candidate.key or "bare tensors",
            "tensors": candidate.key,
            "args": training_args or None,
            "notes": notes,
        },
    }
    weights.save(target, network.state, sidecar)
    return Imported(target, sidecar, notes)


def import_denoiser(file: Path, licence: str | None = None, target: Path | None = None) -> PublishedDenoiser:
    """Reads a published diffusion model, a file or a folder, and writes it to `target`: .safetensors and sidecar.

    Raises DmatError as `published_denoisers.read` does, or if `target` is the file that is read or holds another model.
    """
    target = _target(file, target)
    published = published_denoisers.read(file, licence)
    weights.save(target, published.state, published.sidecar)
    return published


def default_target(file: Path) -> Path:
    """The path to write an import of a file or folder to, unless a user gives another: beside it, with its name."""
    return file.with_suffix(SUFFIX) if not file.is_dir() else file.resolve().with_name(f"{file.resolve().name}{SUFFIX}")


def _target(file: Path, target: Path | None) -> Path:
    """The path to write an import of `file` to.

    Raises DmatError if it is the file that is read, or holds another model.
    """
    target = target or default_target(file)
    if target.suffix != SUFFIX:
        raise DmatError(
            f"--to is {target}; expected a name that ends in {SUFFIX}; give one such as {target.stem}{SUFFIX}"
        )
    if target.exists() and file.exists() and target.samefile(file):
        raise DmatError(f"{target} is the file to import; expected another name to write; give one with --to")
    if file.is_dir() and file.resolve() in target.resolve().parents:
        raise DmatError(f"{target} is in the folder to import; expected another one; give a path elsewhere with --to")
    other = next((path for path in (target, target.with_suffix(".json")) if path.exists()), None)
    if other and not _same_origin(target, file):
        raise DmatError(f"{other} exists and is not an import of {file.name}; expected a new name; give one with --to")
    return target


def _same_origin(target: Path, file: Path) -> bool:
    """Whether the sidecar of `target` says that it comes from `file`."""
    with contextlib.suppress(DmatError):
        origin = files.read_record(target.with_suffix(".json"), dict[str, object]).get("origin")
        return isinstance(origin, dict) and origin.get("sha256") == files.checksum(file)
    return False


def _select_candidate(
    checkpoint: FileDictionary, training_args: TrainingArgs, which: str | None, file: Path
) -> tuple[WeightsCandidate, list[str]]:
    """The network to read, and notes. Raises DmatError if there is none, or several and none is selected."""
    if set(_WANG_KEYS) <= checkpoint.keys() and training_args.get("tau", 1) == 0:
        raise DmatError(
            f"{file} holds {_WANG_KEYS[1]}, which no training with tau 0 writes, and its args say tau 0; expected the "
            f"same; give the args.txt of this file"
        )
    candidates = [
        WeightsCandidate(key, entries, prefix, _weights_kind(key, entries, prefix, checkpoint, training_args, file))
        for key, entries in _dictionaries(checkpoint)
        for prefix in layouts.group_by_wrappers(foreign.tensor_names(entries), file).networks()
    ]
    if not candidates:
        raise _no_network_error(checkpoint, file)
    if any(candidate.kind == AVERAGED for candidate in candidates):  # then the others are the raw weights
        candidates = [
            dataclasses.replace(candidate, kind=RAW) if candidate.kind == UNKNOWN else candidate
            for candidate in candidates
        ]
    if len(candidates) == 1:
        _expect_kind(candidates[0], checkpoint, training_args, which, file)
        return candidates[0], _doubts(candidates[0], which)
    expected_kind = which or (AVERAGED if {candidate.key for candidate in candidates} == set(_WANG_KEYS) else None)
    fits = [candidate for candidate in candidates if candidate.kind == expected_kind]
    if len(fits) != 1:
        kinds = {candidate.kind for candidate in candidates}
        choose = (
            f"say --weights {AVERAGED} or --weights {RAW} to `dmat models import`"
            if len(candidates) == 2 and kinds == {AVERAGED, RAW}
            else "save the state_dict of one alone"
        )
        raise DmatError(
            f"{file} holds {len(candidates)} networks: {'; '.join(candidate.title for candidate in candidates)}; "
            f"expected one; {choose}"
        )
    return fits[0], []


def _dictionaries(checkpoint: FileDictionary) -> list[tuple[str, FileDictionary]]:
    """Keys and entries of the file's dictionary (key "") and of the nested ones, each once, _MAX_DEPTH levels down."""
    level: list[tuple[str, FileDictionary]] = [("", checkpoint)]
    dictionaries, seen = list(level), {id(checkpoint)}
    for _ in range(_MAX_DEPTH):
        next_level: list[tuple[str, FileDictionary]] = []
        for key, entries in level:
            for name, value in entries.items():
                if isinstance(value, dict) and isinstance(name, str) and id(value) not in seen:
                    seen.add(id(value))
                    next_level.append((f"{key}.{name}" if key else name, value))
        dictionaries += next_level
        level = next_level
    return dictionaries


def _weights_kind(
    key: str,
    entries: FileDictionary,
    prefix: str,
    checkpoint: FileDictionary,
    training_args: TrainingArgs,
    file: Path,
) -> str:
    """AVERAGED, RAW or UNKNOWN, from the names in the file, a counter of updates, and args.txt."""
    averaged_key, raw_key = _WANG_KEYS
    # Without averaging this key holds the raw weights.
    if key == averaged_key and (raw_key in checkpoint or training_args):
        return AVERAGED if raw_key in checkpoint or training_args.get("tau") else RAW
    if key in (raw_key, _LIGHTNING_KEYS[1]):
        return RAW
    if key == _LIGHTNING_KEYS[0] and _LIGHTNING_KEYS[1] in checkpoint:
        return AVERAGED
    return (
        AVERAGED if layouts.says_averaged(f"{key}.{prefix}") or _has_counted_updates(entries, prefix, file) else UNKNOWN
    )


def _has_counted_updates(entries: FileDictionary, prefix: str, file: Path) -> bool:
    """Whether a torch AveragedModel that wraps the network under `prefix` has counted updates."""
    counters = {
        name: value
        for name, value in entries.items()
        if str(name).endswith(layouts.AVERAGED_MODEL) and prefix.startswith(name.removesuffix(layouts.AVERAGED_MODEL))
    }
    return any(tensor.numel() == 1 and tensor.item() > 0 for tensor in foreign.tensors(counters, file).values())


def _expect_kind(
    candidate: WeightsCandidate,
    checkpoint: FileDictionary,
    training_args: TrainingArgs,
    which: str | None,
    file: Path,
) -> None:
    """Raises DmatError if the only network of a file is not what --weights (`which`) asks for."""
    averaged_key, raw_key = _WANG_KEYS
    if which == RAW and candidate.key == averaged_key and raw_key not in checkpoint and candidate.kind != RAW:
        raise DmatError(
            f"{file} has no {raw_key}; expected it beside {averaged_key} for raw weights; omit --weights, get the "
            f"weights-best.pt that the training wrote, or give its args.txt if that says tau 0"
        )
    if which is not None and candidate.kind not in (which, UNKNOWN):
        why = (
            "; its args name no tau"
            if candidate.key == averaged_key and training_args and not training_args.get("tau")
            else ""
        )
        raise DmatError(
            f"{file} holds one network, {candidate.title}{why}; expected {which} weights; omit --weights, or give a "
            f"file that has them"
        )


def _doubts(candidate: WeightsCandidate, which: str | None) -> list[str]:
    """A note if nothing says whether weights in the format of Wang et al. 2023 are averaged."""
    if candidate.key == _WANG_KEYS[0] and candidate.kind == UNKNOWN and which is None:
        return [
            "nothing in the file says whether its weights are averages: those of Wang et al. 2023 are, unless their "
            "args.txt says tau 0"
        ]
    return []


def _left_out_notes(entries: FileDictionary) -> list[str]:
    """A note with the entries that are not tensors; no note if there are none."""
    names = set(foreign.tensor_names(entries))
    others = [str(name) for name in entries if name not in names]
    return [f"left out beside the tensors: {foreign.shortened_list(others)}"] if others else []


def _no_network_error(checkpoint: FileDictionary, file: Path) -> DmatError:
    """The error for a file without a network.

    It describes the dictionary that should hold a network, or else the one with most tensors.
    """
    key = next((key for key in ("model_state_dict", "state_dict") if key in checkpoint), None)
    if key and not isinstance(checkpoint[key], dict):
        return DmatError(
            f"{file}: {key} is {foreign.type_name(checkpoint[key])}; expected a dictionary of named tensors; save the "
            f"network's state_dict()"
        )
    entries = (
        cast(FileDictionary, checkpoint[key])
        if key
        else max((e for _, e in _dictionaries(checkpoint)), key=lambda e: len(foreign.tensor_names(e)))
    )
    if not key and not foreign.tensor_names(entries):
        return DmatError(
            f"{file} holds {', '.join(map(str, list(checkpoint)[:6])) or 'nothing'}; expected model_state_dict, "
            f"state_dict or tensors; save the state_dict of its network"
        )
    return layouts.unknown_network(foreign.tensors(entries, file), file)


def _data_name(training_args: TrainingArgs, data: str | None, classes: int, args: Path | None) -> str:
    """Name in DATA of the data set that args.txt or --data (`data`) names."""
    data_in_args = training_args.get("data")
    if data_in_args is None and data is None:
        fits = [name for name, data_set in DATA.items() if data_set.classes == classes]
        raise DmatError(
            f"neither --args nor --data says which images the model is for; it has {classes} classes, as "
            f"{' and '.join(fits) or 'none of the known data sets'}; say --data {fits[0] if fits else 'NAME'}"
        )
    if data_in_args is not None and data_in_args not in list(_DATA_IN_ARGS):  # a list or a record has no hash
        raise DmatError(
            f"{args}: data is {shown(data_in_args)}; expected one of {', '.join(_DATA_IN_ARGS)}; dmat knows no other"
        )
    if data is not None and data not in DATA:
        raise DmatError(f"--data is {data!r}; expected one of {', '.join(DATA)}")
    if data_in_args is not None and data is not None and _DATA_IN_ARGS[str(data_in_args)] != data:
        raise DmatError(f"{args} says data {data_in_args!r} and --data says {data}; expected the same; omit --data")
    return data or _DATA_IN_ARGS[str(data_in_args)]


def _expect_agreement(
    network: layouts.NetworkInFile,
    data_set: PublishedDataSet,
    name: str,
    training_args: TrainingArgs,
    checkpoint: FileDictionary,
    file: Path,
) -> None:
    """Raises DmatError if the tensors contradict the data set, args.txt or other entries of the file."""
    if network.classes != data_set.classes:
        raise DmatError(
            f"{file} has {network.classes} classes; expected {data_set.classes}, as {name} has; give the args.txt or "
            f"--data of this file"
        )
    if network.channels != 3:
        raise DmatError(
            f"{file} takes images of {network.channels} channels; expected 3, as {name} has; name other data"
        )
    for key, actual in (
        ("num_classes", network.classes),
        ("normalize_input", bool(network.inner_normalisation or network.front_normalisation)),
    ):
        if key in checkpoint and checkpoint[key] != actual:
            raise DmatError(
                f"{file} says {key} {checkpoint[key]} and its tensors say {actual}; expected the same; download it "
                f"again"
            )
    if training_args.get("normalize") and not network.layer_in_front:
        raise DmatError(
            f"{file}: its args say normalize true, a layer that the tensors do not show; expected normalize false; "
            f"give the args.txt of this file"
        )
    model_name = _model_name_in_args(network)
    if training_args.get("model", model_name) != model_name:
        raise DmatError(
            f"{file} holds {model_name}; its args say model {training_args['model']}; expected the same; give the "
            f"args.txt of this file"
        )


def _model_name_in_args(network: layouts.NetworkInFile) -> str:
    """Name of the network in args.txt. The code of Wang et al. 2023 has DeepMind's layouts with swish (SiLU) only."""
    if network.network == "preact_resnet":
        return f"preact-resnet{network.depth}-swish"
    family = "ra-wrn" if network.network == "ra_wide_resnet" else "wrn"
    return f"{family}-{network.depth}-{network.width}{'-swish' if network.network == 'wide_resnet' else ''}"


def _normalisation(
    network: layouts.NetworkInFile, data_set: PublishedDataSet, training_args: TrainingArgs, file: Path
) -> tuple[layouts.MeanAndStd, list[str]]:
    """Mean and std of all normalising layers combined into one, and notes.

    Two layers in sequence: ((x - m) / s - m') / s' = (x - (m + s m')) / (s s').
    """
    inner, front = network.inner_normalisation, network.front_normalisation
    if inner is None and layouts.LAYOUTS[network.network].normalises:
        inner = data_set.mean, data_set.std
    if network.layer_in_front and front is None:
        if not training_args.get("normalize"):
            raise DmatError(
                f"{file} has a layer in front of its network and does not hold its mean and std; expected both, or an "
                f"args.txt that says normalize true; give the args.txt of its training with --args"
            )
        front = data_set.front_normalisation
    if inner is None or front is None:
        unchanged = (0.0,) * network.channels, (1.0,) * network.channels
        note = "its network takes pixels in [0, 1] as they are: mean 0, std 1"
        return inner or front or unchanged, [] if inner or front else [note]
    (m, s), (mean, std) = front, inner
    combined = (
        tuple(m[k] + s[k] * mean[k] for k in range(network.channels)),
        tuple(s[k] * std[k] for k in range(network.channels)),
    )
    return combined, [
        f"its images are normalised twice and the sidecar has both as one: in front by mean {_format_numbers(m)} and "
        f"std {_format_numbers(s)}, in the network by mean {_format_numbers(mean)} and std {_format_numbers(std)}"
    ]


def _format_numbers(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


def _activation(network: layouts.NetworkInFile, training_args: TrainingArgs, requested: str | None) -> tuple[str, str]:
    """Name of the activation, and a note if it was assumed ("" otherwise). No tensor shows the activation.

    The layout of TRADES has ReLU only; those of DeepMind have SiLU unless --activation (`requested`) says otherwise.
    """
    if requested is not None and requested not in ACTIVATIONS:
        raise DmatError(f"--activation is {requested!r}; expected one of {', '.join(ACTIVATIONS)}")
    if network.network == "wide_resnet_symmetric" or "model" in training_args:
        required = "relu" if network.network == "wide_resnet_symmetric" else "silu"
        if requested not in (None, required):
            raise DmatError(
                f"--activation is {requested}; networks of this kind have {required}; expected the same; omit it"
            )
        return required, ""
    return (
        requested or "silu",
        "" if requested else "activation silu was assumed, because no tensor shows it: see --activation",
    )


def _threat(training_args: TrainingArgs) -> ThreatRecord | None:
    """Norm and radius in args.txt, or None without them. A radius that is a multiple of 1/255 is written as n/255."""
    attack, epsilon = training_args.get("attack"), training_args.get("attack_eps")
    if not isinstance(attack, str) or not isinstance(epsilon, int | float):
        return None
    of_255 = round(epsilon * 255)
    text = f"{of_255}/255" if of_255 and abs(of_255 / 255 - epsilon) < 1e-9 else repr(float(epsilon))
    return {"norm": "linf" if attack in _LINF_ATTACKS else "l2", "epsilon": text}
