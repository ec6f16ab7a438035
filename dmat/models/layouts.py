"""Names of tensors in other projects, and the network that a set of tensors is: its sizes are read from their shapes.

A `Layout` turns a name of dmat's network into the name in such a file. DataSpec from public code:

- `wide_resnet`: Gowal et al. 2020 (DeepMind), used by Wang et al. 2023 and by RobustBench's DMWideResNet.
- `wide_resnet_symmetric`: TRADES (Zhang et al. 2019) and Carmon et al. 2019; also RobustBench's WideResNet. Such files
  may hold `sub_block1`, a group of blocks that no forward pass visits. Stride 2 is padded on all sides.
- `preact_resnet`: Rebuffi et al. 2021 (DeepMind), used by Gowal et al. 2021, Rade and Moosavi-Dezfooli 2022, Wang et
  al. 2023 and by RobustBench's DMPreActResNet.

The other PreActResNet in public use (conv1, layer1 to layer4, linear) pads stride 2 on all sides and has shortcuts of
1 x 1: no network here computes that, so its files are refused.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust.networks import NETWORKS, PREACT_BLOCKS, DataSpec
from dmat.training import weights

_AVERAGES = ("ema", "swa", "avg", "average", "averaged")
_NAMES = ("model", "net", "network", "classifier")
# Words that wrappers put before a name or between its parts: those of torch itself (compile, DataParallel, DDP, FSDP,
# activation checkpoints), attributes of the class around a network, and places in an nn.Sequential.
_OF_TORCH = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPERS = {
    *("module", "0", "1", *_OF_TORCH, *_NAMES, *_AVERAGES),
    *(f"{average}_{name}" for average in _AVERAGES for name in _NAMES),
    *(f"{name}_{average}" for average in _AVERAGES for name in _NAMES),
}
_UNUSED = "sub_block1."
_COUNTER = "num_batches_tracked"  # of a batch norm; torch before 0.4.1 has none, and no evaluation uses it
AVERAGED_MODEL = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates
_MEANS, _STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")

_SYMMETRIC = {
    "init_conv.": "conv1.",
    "batchnorm.": "bn1.",
    "logits.": "fc.",
    "batchnorm_0.": "bn1.",
    "conv_0.": "conv1.",
    "batchnorm_1.": "bn2.",
    "conv_1.": "conv2.",
    "shortcut.": "convShortcut.",
}


def _as_here(name: str) -> str:
    return name


def _as_in_trades(name: str) -> str:
    """layer.1.block.0.conv_0.weight -> block2.layer.0.conv1.weight"""
    group = re.fullmatch(r"layer\.(\d+)\.block\.(\d+)\.(.*)", name)
    before, rest = (f"block{int(group[1]) + 1}.layer.{group[2]}.", group[3]) if group else ("", name)
    part, _, leaf = rest.rpartition(".")
    return f"{before}{_SYMMETRIC[f'{part}.']}{leaf}"


@dataclasses.dataclass(frozen=True)
class CheckpointLayout:
    """What tells a network in NETWORKS in a file, under dmat's names. theirs: from such a name to that in the file."""

    theirs: Callable[[str], str]
    first: str  # its first convolution
    groups: tuple[str, ...]  # a convolution of block {} for each group
    normalises: bool  # by mean and std of its data, which are not in the file


_WIDE = tuple(f"layer.{group}.block.{{}}.conv_0.weight" for group in range(3))
_PREACT = tuple(f"layer_{group}.{{}}.conv_2d_1.weight" for group in range(4))

LAYOUTS = {
    "wide_resnet": CheckpointLayout(_as_here, "init_conv.weight", _WIDE, normalises=True),
    "wide_resnet_symmetric": CheckpointLayout(_as_in_trades, "init_conv.weight", _WIDE, normalises=False),
    "preact_resnet": CheckpointLayout(_as_here, "conv_2d.weight", _PREACT, normalises=True),
}
_OTHER_RESNET = "layer1.0.conv1.weight"  # every ResNet and PreActResNet in the manner of torchvision has it


Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, a number per channel each


@dataclasses.dataclass(frozen=True)
class NetworkInFile:
    """A network in a file. state: float32 tensors under dmat's names. own: the normalisation that is among the tensors
    of the network. front: that of a layer in front of it. layer_in_front: whether there is such a layer; the file may
    not hold its numbers."""

    network: str  # a name in NETWORKS
    depth: int
    width: int
    classes: int
    channels: int
    state: dict[str, Tensor]
    own: Normalisation | None
    front: Normalisation | None
    layer_in_front: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Named:
    """Entries of a file by the wrappers before their names, as "module.0.", and by the rest of their names."""

    groups: Mapping[str, Mapping[str, str]]  # wrappers -> rest of a name -> the whole name in the file

    def networks(self) -> dict[str, str]:
        """Wrappers -> network in NETWORKS, for each network whose first convolutions are here."""
        return {
            prefix: network
            for prefix, names in self.groups.items()
            for network, layout in LAYOUTS.items()
            if all(layout.theirs(sign) in names for sign in (layout.first, layout.groups[0].format(0)))
        }


def title(name: str, depth: int, width: int) -> str:
    """How papers call a network in NETWORKS: WRN-28-10, PreActResNet-18."""
    return f"PreActResNet-{depth}" if name == "preact_resnet" else f"WRN-{depth}-{width}"


def named(names: Iterable[str], path: Path) -> Named:
    """Takes the wrappers off. Raises DmatError if two names are the same then."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _OF_TORCH]
        wrappers = next((k for k, part in enumerate(parts) if part not in _WRAPPERS), len(parts))
        prefix = "".join(f"{part}." for part in parts[:wrappers])
        rest = ".".join(part for part in parts[wrappers:] if part != "module")
        group = groups.setdefault(prefix, {})
        if rest in group:
            raise DmatError(
                f"{path} holds {group[rest]} and {name}; expected one tensor of this name beside its wrappers; save "
                f"the state_dict of one network alone"
            )
        group[rest] = name
    return Named(groups)


def says_averaged(text: str) -> bool:
    """Whether a name, as "state_dict_ema" or "ema_model.", says that what it holds are averages."""
    return not set(_AVERAGES).isdisjoint(re.split(r"[._]", text.lower()))


def recognise(tensors: Mapping[str, Tensor], path: Path, prefix: str) -> NetworkInFile:
    """The network after the wrappers `prefix`, one that `Named.networks` has. Raises DmatError unless it is whole, and
    nothing else is there but other networks, which are left out."""
    names = named(tensors, path)
    others = names.networks()
    network = others.pop(prefix)
    inner = {name: tensors[whole] for name, whole in names.groups[prefix].items() if name != AVERAGED_MODEL}
    unused = {name for name in inner if name.startswith(_UNUSED)} if network == "wide_resnet_symmetric" else set[str]()
    own = _pair(inner.keys() - unused)
    front = _front(names, {prefix, *others}, prefix, path)
    given = {name: tensor for name, tensor in inner.items() if name not in {*unused, *own}}
    depth, width, data_spec = _measures(given, network, prefix, path)
    with torch.device("meta"):  # shapes only
        wanted = NETWORKS[network](data_spec, depth, width, "relu").state_dict()
    theirs = LAYOUTS[network].theirs
    counters = {theirs(name) for name in wanted if name.endswith(_COUNTER)}
    uncounted = {name for name in counters if name not in given or given[name].dtype != torch.int64}
    given |= {name: torch.tensor(0) for name in uncounted}
    if problem := weights.misfit({theirs(name): tuple(tensor.shape) for name, tensor in wanted.items()}, given):
        raise DmatError(
            f"{path} is not a whole {title(network, depth, width)} (names after {prefix!r}): {problem}; expected the "
            f"state_dict of one network; download the file again"
        )
    state = {name: _converted(given[theirs(name)], tensor.dtype, name, path) for name, tensor in wanted.items()}
    notes = [f"{len(unused)} tensors of {_UNUSED[:-1]} were left out: the network never uses them"] if unused else []
    kinds = sorted({str(tensor.dtype) for tensor in given.values() if tensor.is_floating_point()} - {"torch.float32"})
    notes += [f"{kind.removeprefix('torch.')} tensors are stored as float32" for kind in kinds]
    if uncounted:
        notes.append(f"{len(uncounted)} counters {_COUNTER} were filled in with 0: logits do not depend on them")
    notes += [f"the network under {other!r} was left out" for other in others]
    return NetworkInFile(
        network,
        depth,
        width,
        data_spec.classes,
        data_spec.channels,
        state,
        _numbers(own, inner, data_spec.channels, path),
        _numbers(front, tensors, data_spec.channels, path),
        bool(front) or "1" in prefix.split("."),
        tuple(notes),
    )


def _front(names: Named, networks: set[str], prefix: str, path: Path) -> tuple[str, ...]:
    """Names of mean and std of a layer outside the networks, or (). Raises DmatError if anything else is there."""
    outside = {
        whole
        for group, members in names.groups.items()
        for rest, whole in members.items()
        if group not in networks and rest != AVERAGED_MODEL
    }
    front = _pair(outside)
    if strangers := sorted(outside - {*front}):
        raise DmatError(
            f"{path} holds {strangers[0]} beside a network whose names begin with {prefix!r}; expected the tensors of "
            f"one network; save its state_dict alone"
        )
    return front


def _measures(given: Mapping[str, Tensor], network: str, prefix: str, path: Path) -> tuple[int, int, DataSpec]:
    """Depth, width, classes and channels, from shapes."""
    layout = LAYOUTS[network]

    def size(name: str, axis: int, dimensions: int) -> int:
        """A length along one axis of a tensor, under dmat's name for it."""
        theirs = layout.theirs(name)
        shape = tuple(given[theirs].shape) if theirs in given else ()
        if len(shape) != dimensions or 0 in shape:
            found = f"is {shape}" if shape else "is missing"
            raise DmatError(
                f"{path}: {prefix}{theirs} {found}; expected a tensor of {dimensions} dimensions; download the file "
                f"again, or save the whole state_dict"
            )
        return shape[axis]

    counts = _blocks(given, layout)
    if network == "preact_resnet":
        depth, width = _preact_depth(counts, path), 0
    else:
        depth, width = _wide_depth(counts, path), _width(size("layer.0.block.0.conv_1.weight", 0, 4), path)
    return depth, width, DataSpec(size("logits.weight", 0, 2), size(layout.first, 1, 4), (0.0,), (1.0,))


def unknown(tensors: Mapping[str, Tensor], path: Path) -> DmatError:
    """That none of LAYOUTS is among these tensors."""
    groups = named(tensors, path).groups
    if other := next((group[_OTHER_RESNET] for group in groups.values() if _OTHER_RESNET in group), ""):
        return DmatError(
            f"{path} holds {other}: a ResNet or PreActResNet that pads stride 2 on all sides and has shortcuts of "
            f"1 x 1, which no network of dmat computes; expected the PreActResNet of Rebuffi et al. 2021, with conv_2d "
            f"and layer_0.0.conv_2d_1; import a file of that one"
        )
    return DmatError(
        f"{path} holds {len(tensors)} tensors named {', '.join(sorted(tensors)[:3]) or 'nothing'}; expected a wide "
        f"residual network with init_conv and layer.0.block.0 (Wang et al. 2023), or with conv1 and block1.layer.0 "
        f"(Carmon et al. 2019), or a PreActResNet with conv_2d and layer_0.0 (Rebuffi et al. 2021), after module., "
        f"module.0., model. or nothing; dmat reads no other network"
    )


def _blocks(given: Mapping[str, Tensor], layout: CheckpointLayout) -> tuple[int, ...]:
    """Blocks in each group."""
    counts = []
    for group in layout.groups:
        blocks = 0
        while layout.theirs(group.format(blocks)) in given:
            blocks += 1
        counts.append(blocks)
    return tuple(counts)


def _preact_depth(counts: tuple[int, ...], path: Path) -> int:
    for depth, blocks in PREACT_BLOCKS.items():
        if counts == blocks:
            return depth
    known = " or ".join(f"{_listed(blocks)} (PreActResNet-{depth})" for depth, blocks in PREACT_BLOCKS.items())
    raise DmatError(
        f"{path} has groups of {_listed(counts)} blocks; expected {known}; download the file again, or save the whole "
        f"state_dict"
    )


def _listed(counts: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"


def _width(channels: int, path: Path) -> int:
    """The factor on 16 channels."""
    if channels % 16:
        raise DmatError(
            f"{path}: the first group has {channels} channels; expected a multiple of 16, as wide residual networks "
            f"have; dmat reads no other width"
        )
    return channels // 16


def _wide_depth(counts: tuple[int, ...], path: Path) -> int:
    if len(set(counts)) != 1:
        raise DmatError(
            f"{path} has groups of {_listed(counts)} blocks; expected three alike; download the file again, or save "
            f"the whole state_dict"
        )
    return 6 * counts[0] + 4


def _pair(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the mean and of the std of one layer, or (): not one of each."""
    leaves = {name: name.rpartition(".")[::2] for name in names}
    means, stds = ([name for name, (_, leaf) in leaves.items() if leaf in words] for words in (_MEANS, _STDS))
    if len(means) != 1 or len(stds) != 1 or leaves[means[0]][0] != leaves[stds[0]][0]:
        return ()
    return means[0], stds[0]


def _numbers(names: tuple[str, ...], tensors: Mapping[str, Tensor], channels: int, path: Path) -> Normalisation | None:
    """Mean and std under these names. One number is that of every channel."""
    if not names:
        return None
    mean, std = (tuple(tensors[name].double().flatten().tolist()) for name in names)
    mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
    if not len(mean) == len(std) == channels or not all(0 <= m <= 1 for m in mean) or not all(0 < s < 1e6 for s in std):
        raise DmatError(
            f"{path} normalises by mean {mean[:4]} and std {std[:4]}; expected {channels} numbers each, mean from 0 to "
            f"1 as pixels are, std above 0; download the file again, or divide both by 255 if they are for bytes"
        )
    return mean, std


def _converted(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """In the network's number type, finite, and with memory of its own."""
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise DmatError(
            f"{path}: {name} holds numbers of type {tensor.dtype}; expected finite numbers of {dtype}; download the "
            f"file again"
        )
    found = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(found).all():
        raise DmatError(
            f"{path}: {name} holds numbers that are not finite; expected finite numbers of {dtype}; download the file "
            f"again"
        )
    return found
