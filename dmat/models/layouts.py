"""Recognises networks of other projects by the names of their tensors, and reads their sizes from the shapes.

A `CheckpointLayout` translates a tensor name of dmat's network into the name in such a file. Layouts of public code:

- `wide_resnet`: Gowal et al. 2020 (DeepMind), used by Wang et al. 2023 and by RobustBench's DMWideResNet.
- `wide_resnet_symmetric`: TRADES (Zhang et al. 2019) and Carmon et al. 2019; also RobustBench's WideResNet. Such files
  may hold `sub_block1`, a group of blocks that no forward pass visits. Stride 2 is padded on all sides.
- `ra_wide_resnet`: Peng et al. 2023 and RobustBench's `robustarch_wide_resnet`: a `wide_resnet` of other sizes with
  squeeze-excitation in each block.
- `preact_resnet`: Rebuffi et al. 2021 (DeepMind), used by Gowal et al. 2021, Rade and Moosavi-Dezfooli 2022, Wang et
  al. 2023 and by RobustBench's DMPreActResNet.

The other PreActResNet in public use (conv1, layer1 to layer4, linear) pads stride 2 on all sides and has shortcuts of
1 x 1. No network of dmat computes that, so its files are refused.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust.networks import NETWORKS, PREACT_BLOCKS, DataSpec
from dmat.robust.ra_wide_resnet import ra_blocks, ra_channels
from dmat.training import weights

_AVERAGE_NAMES = ("ema", "swa", "avg", "average", "averaged")
_MODEL_NAMES = ("model", "net", "network", "classifier")
# Parts that wrappers add before a name or inside it: those of torch itself (compile, DataParallel, DDP, FSDP,
# activation checkpoints), attributes of a class around the network, and indices in an nn.Sequential.
_TORCH_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPERS = {
    *("module", "0", "1", *_TORCH_WRAPPERS, *_MODEL_NAMES, *_AVERAGE_NAMES),
    *(f"{average}_{name}" for average in _AVERAGE_NAMES for name in _MODEL_NAMES),
    *(f"{name}_{average}" for average in _AVERAGE_NAMES for name in _MODEL_NAMES),
}
_UNUSED = "sub_block1."
_COUNTER = "num_batches_tracked"  # of a batch norm; missing before torch 0.4.1, and not used in evaluation mode
AVERAGED_MODEL = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates
_MEAN_NAMES, _STD_NAMES = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")

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


def _unchanged_name(name: str) -> str:
    return name


def _trades_name(name: str) -> str:
    """Name in the code of TRADES, for example layer.1.block.0.conv_0.weight -> block2.layer.0.conv1.weight."""
    group = re.fullmatch(r"layer\.(\d+)\.block\.(\d+)\.(.*)", name)
    before, rest = (f"block{int(group[1]) + 1}.layer.{group[2]}.", group[3]) if group else ("", name)
    part, _, leaf = rest.rpartition(".")
    return f"{before}{_SYMMETRIC[f'{part}.']}{leaf}"


@dataclasses.dataclass(frozen=True)
class CheckpointLayout:
    """Identifies a network of NETWORKS in a file. All names are dmat's.

    name_in_file: translates a tensor name of dmat into the name in the file.
    """

    name_in_file: Callable[[str], str]
    first: str  # its first convolution
    groups: tuple[str, ...]  # for each group, a convolution of its block {}
    normalises: bool  # with mean and std of its data, which are not in the file
    gated: bool = False  # whether blocks have squeeze-excitation


_WIDE = tuple(f"layer.{group}.block.{{}}.conv_0.weight" for group in range(3))
_PREACT = tuple(f"layer_{group}.{{}}.conv_2d_1.weight" for group in range(4))

LAYOUTS = {
    "wide_resnet": CheckpointLayout(_unchanged_name, "init_conv.weight", _WIDE, normalises=True),
    "wide_resnet_symmetric": CheckpointLayout(_trades_name, "init_conv.weight", _WIDE, normalises=False),
    "ra_wide_resnet": CheckpointLayout(_unchanged_name, "init_conv.weight", _WIDE, normalises=True, gated=True),
    "preact_resnet": CheckpointLayout(_unchanged_name, "conv_2d.weight", _PREACT, normalises=True),
}
_GATE = "layer.0.block.0.se.fc1.weight"  # of squeeze-excitation
_OTHER_RESNET = "layer1.0.conv1.weight"  # in every ResNet and PreActResNet with torchvision's names


MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one number per channel each


@dataclasses.dataclass(frozen=True)
class NetworkInFile:
    """A network in a file.

    state: tensors under dmat's names, floating-point ones as float32. inner_normalisation: mean and std among the
    tensors of the network. front_normalisation: mean and std of a layer in front of the network. layer_in_front:
    whether there is such a layer; its numbers may be missing in the file.
    """

    network: str  # a name in NETWORKS
    depth: int
    width: int
    classes: int
    channels: int
    state: dict[str, Tensor]
    inner_normalisation: MeanAndStd | None
    front_normalisation: MeanAndStd | None
    layer_in_front: bool
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorGroups:
    """Tensor names of a file, grouped by the wrappers before them, such as "module.0."."""

    groups: Mapping[str, Mapping[str, str]]  # wrappers -> rest of a name -> full name in the file

    def networks(self) -> dict[str, str]:
        """Maps wrappers to a network in NETWORKS, for each network whose first convolutions are present."""
        return {
            prefix: network
            for prefix, names in self.groups.items()
            for network, layout in LAYOUTS.items()
            if all(layout.name_in_file(name) in names for name in (layout.first, layout.groups[0].format(0)))
            and (_GATE in names) == layout.gated
        }


def title(name: str, depth: int, width: int) -> str:
    """Name of a network of NETWORKS in papers: WRN-28-10, RaWRN-70-16, PreActResNet-18, ViT-12-12."""
    if name == "preact_resnet":
        return f"PreActResNet-{depth}"
    family = {"ra_wide_resnet": "RaWRN", "vit": "ViT"}.get(name, "WRN")
    return f"{family}-{depth}-{width}"


def group_by_wrappers(names: Iterable[str], path: Path) -> TensorGroups:
    """Removes the wrappers from the names and groups the names by them.

    Raises DmatError if two names are equal without their wrappers.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _TORCH_WRAPPERS]
        wrappers = next((k for k, part in enumerate(parts) if part not in _WRAPPERS), len(parts))
        prefix = "".join(f"{part}." for part in parts[:wrappers])
        rest = ".".join(part for part in parts[wrappers:] if part != "module")
        group = groups.setdefault(prefix, {})
        if rest in group:
            raise DmatError(
                f"{path} holds {group[rest]} and {name}, which are equal without their wrappers; expected one tensor "
                f"of this name; save the state_dict of one network alone"
            )
        group[rest] = name
    return TensorGroups(groups)


def says_averaged(text: str) -> bool:
    """Whether a name such as "state_dict_ema" or "ema_model." says that it holds averaged weights."""
    return not set(_AVERAGE_NAMES).isdisjoint(re.split(r"[._]", text.lower()))


def recognise(tensors: Mapping[str, Tensor], path: Path, prefix: str) -> NetworkInFile:
    """Reads the network under the wrappers `prefix`, a key of `TensorGroups.networks`.

    tensors: of any shape, by their names in the file. Other networks in the file are left out, with a note. Raises
    DmatError if the network is incomplete, or if there are other tensors that belong to no network.
    """
    grouped = group_by_wrappers(tensors, path)
    others = grouped.networks()
    network = others.pop(prefix)
    inner = {name: tensors[full_name] for name, full_name in grouped.groups[prefix].items() if name != AVERAGED_MODEL}
    unused = {name for name in inner if name.startswith(_UNUSED)} if network == "wide_resnet_symmetric" else set[str]()
    inner_names = _normalisation_names(inner.keys() - unused)
    front_names = _front_layer_names(grouped, {prefix, *others}, prefix, path)
    present = {name: tensor for name, tensor in inner.items() if name not in {*unused, *inner_names}}
    depth, width, data_spec = _read_sizes(present, network, prefix, path)
    with torch.device("meta"):  # shapes only
        expected = NETWORKS[network](data_spec, depth, width, "relu").state_dict()
    name_in_file = LAYOUTS[network].name_in_file
    counters = {name_in_file(name) for name in expected if name.endswith(_COUNTER)}
    uncounted = {name for name in counters if name not in present or present[name].dtype != torch.int64}
    present |= {name: torch.tensor(0) for name in uncounted}
    if problem := weights.misfit(
        {name_in_file(name): tuple(tensor.shape) for name, tensor in expected.items()}, present
    ):
        raise DmatError(
            f"{path} does not match {title(network, depth, width)} (names after {prefix!r}): {problem}; expected the "
            f"state_dict of one network; download the file again"
        )
    state = {name: _convert(present[name_in_file(name)], tensor.dtype, name, path) for name, tensor in expected.items()}
    notes = [f"{len(unused)} tensors of {_UNUSED[:-1]} were left out: the network never uses them"] if unused else []
    kinds = sorted({str(tensor.dtype) for tensor in present.values() if tensor.is_floating_point()} - {"torch.float32"})
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
        _read_normalisation(inner_names, inner, data_spec.channels, path),
        _read_normalisation(front_names, tensors, data_spec.channels, path),
        bool(front_names) or "1" in prefix.split("."),
        tuple(notes),
    )


def _front_layer_names(grouped: TensorGroups, networks: set[str], prefix: str, path: Path) -> tuple[str, ...]:
    """Names of mean and std of a layer outside the networks, or (). Raises DmatError for any other tensor there."""
    outside = {
        full_name
        for group, members in grouped.groups.items()
        for rest, full_name in members.items()
        if group not in networks and rest != AVERAGED_MODEL
    }
    layer_names = _normalisation_names(outside)
    if strangers := sorted(outside - {*layer_names}):
        raise DmatError(
            f"{path} holds {strangers[0]} beside a network whose names begin with {prefix!r}; expected the tensors of "
            f"one network; save its state_dict alone"
        )
    return layer_names


def _read_sizes(present: Mapping[str, Tensor], network: str, prefix: str, path: Path) -> tuple[int, int, DataSpec]:
    """Depth, width, classes and channels, from the shapes of tensors; these may have any shape."""
    layout = LAYOUTS[network]

    def size(name: str, axis: int, dimensions: int) -> int:
        """Length of a tensor along one axis. name: dmat's name of the tensor."""
        stored_name = layout.name_in_file(name)
        shape = tuple(present[stored_name].shape) if stored_name in present else ()
        if len(shape) != dimensions or 0 in shape:
            state = f"is {shape}" if shape else "is missing"
            raise DmatError(
                f"{path}: {prefix}{stored_name} {state}; expected a tensor of {dimensions} dimensions; download the "
                f"file again, or save the whole state_dict"
            )
        return shape[axis]

    counts = _count_blocks(present, layout)
    if network == "preact_resnet":
        depth, width = _preact_depth(counts, path), 0
    elif network == "ra_wide_resnet":
        depth = _ra_depth(counts, path)
        width = _ra_width(size("logits.weight", 1, 2), path)
    else:
        depth, width = _wide_depth(counts, path), _width_factor(size("layer.0.block.0.conv_1.weight", 0, 4), path)
    return depth, width, DataSpec(size("logits.weight", 0, 2), size(layout.first, 1, 4), (0.0,), (1.0,))


def unknown_network(tensors: Mapping[str, Tensor], path: Path) -> DmatError:
    """The error for tensors, of any shape, that match none of LAYOUTS."""
    groups = group_by_wrappers(tensors, path).groups
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


def _count_blocks(present: Mapping[str, Tensor], layout: CheckpointLayout) -> tuple[int, ...]:
    """Number of blocks in each group; the tensors may have any shape."""
    counts = []
    for group in layout.groups:
        blocks = 0
        while layout.name_in_file(group.format(blocks)) in present:
            blocks += 1
        counts.append(blocks)
    return tuple(counts)


def _preact_depth(counts: tuple[int, ...], path: Path) -> int:
    """Depth of a PreActResNet from the number of blocks in each group."""
    for depth, blocks in PREACT_BLOCKS.items():
        if counts == blocks:
            return depth
    expected = " or ".join(f"{_join_counts(blocks)} (PreActResNet-{depth})" for depth, blocks in PREACT_BLOCKS.items())
    raise DmatError(
        f"{path} has groups of {_join_counts(counts)} blocks; expected {expected}; download the file again, or save "
        f"the whole state_dict"
    )


def _ra_depth(counts: tuple[int, ...], path: Path) -> int:
    """Depth of a RaWRN from the number of blocks in each group."""
    depth = 4 + 6 * round(11 * counts[0] / ra_blocks(70)[0])
    if counts != ra_blocks(depth):
        raise DmatError(
            f"{path} has groups of {_join_counts(counts)} blocks with squeeze-excitation; expected "
            f"{_join_counts(ra_blocks(70))}, as RaWRN-70-16 has, or a smaller network in proportion; download the file "
            f"again, or save the whole state_dict"
        )
    return depth


def _ra_width(channels: int, path: Path) -> int:
    """Width of a RaWRN: the factor on 54 channels of its last group."""
    per_width = ra_channels(1)[-1]
    if channels % per_width:
        raise DmatError(
            f"{path}: the last group has {channels} channels; expected a multiple of {per_width}, as RaWRN-70-16 has "
            f"{ra_channels(16)[-1]}; dmat reads no other width"
        )
    return channels // per_width


def _join_counts(counts: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, counts[:-1]))} and {counts[-1]}"


def _width_factor(channels: int, path: Path) -> int:
    """Width of a wide residual network: the factor on 16 channels."""
    if channels % 16:
        raise DmatError(
            f"{path}: the first group has {channels} channels; expected a multiple of 16, as wide residual networks "
            f"have; dmat reads no other width"
        )
    return channels // 16


def _wide_depth(counts: tuple[int, ...], path: Path) -> int:
    """Depth of a wide residual network from the number of blocks in each group."""
    if len(set(counts)) != 1:
        raise DmatError(
            f"{path} has groups of {_join_counts(counts)} blocks; expected three equal numbers; download the file "
            f"again, or save the whole state_dict"
        )
    return 6 * counts[0] + 4


def _normalisation_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the mean and the std of one layer, or () unless there is exactly one of each."""
    leaves = {name: name.rpartition(".")[::2] for name in names}
    mean_names, std_names = (
        [name for name, (_, leaf) in leaves.items() if leaf in candidates] for candidates in (_MEAN_NAMES, _STD_NAMES)
    )
    if len(mean_names) != 1 or len(std_names) != 1 or leaves[mean_names[0]][0] != leaves[std_names[0]][0]:
        return ()
    return mean_names[0], std_names[0]


def _read_normalisation(
    names: tuple[str, ...], tensors: Mapping[str, Tensor], channels: int, path: Path
) -> MeanAndStd | None:
    """Mean and std under these names, or None without names. Tensors: [C], or one number for all C channels."""
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


def _convert(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """Copies a tensor of any shape to the network's number type. Raises DmatError unless all numbers are finite."""
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise DmatError(
            f"{path}: {name} holds numbers of type {tensor.dtype}; expected finite numbers of {dtype}; download the "
            f"file again"
        )
    converted = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(converted).all():
        raise DmatError(
            f"{path}: {name} holds numbers that are not finite; expected finite numbers of {dtype}; download the file "
            f"again"
        )
    return converted
