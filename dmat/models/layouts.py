"""Names of tensors in other projects, and the network that a set of tensors is: its sizes are read from their shapes.

A `Layout` turns a name of dmat's network into the name in such a file. Facts from public code:

- `wide_resnet`: Gowal et al. 2020 (DeepMind), used by Wang et al. 2023 and by RobustBench's DMWideResNet.
- `wide_resnet_symmetric`: TRADES (Zhang et al. 2019) and Carmon et al. 2019; also RobustBench's WideResNet. Such files
  may hold `sub_block1`, a group of blocks that no forward pass visits. Stride 2 is padded on all sides.
- `preact_resnet`: Rebuffi et al. 2021 (DeepMind), used by Gowal et al. 2021, Rade and Moosavi-Dezfooli 2022, Wang et
  al. 2023 and by RobustBench's DMPreActResNet.

The other PreActResNet in public use (conv1, layer1 to layer4, linear) pads stride 2 on all sides and has shortcuts of
1 x 1: no network here computes that, so its files are refused.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmat.errors import DmatError
from dmat.robust.networks import NETWORKS, PREACT_BLOCKS, Facts
from dmat.training import weights

# DataParallel adds "module.", nn.Sequential a number, some wrappers "model.". A network at place 1 of a Sequential has
# a layer in front of it, which can only be a normalisation.
PREFIXES = ("", "module.", "model.", "module.model.", "module.0.", "0.", "module.1.", "1.")
_UNUSED = "sub_block1."

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
class Layout:
    """What tells a network in NETWORKS in a file, under dmat's names. theirs: from such a name to that in the file."""

    theirs: Callable[[str], str]
    first: str  # its first convolution
    groups: tuple[str, ...]  # a convolution of block {} for each group
    normalises: bool  # by mean and std of its data, which are not in the file


_WIDE = tuple(f"layer.{group}.block.{{}}.conv_0.weight" for group in range(3))
_PREACT = tuple(f"layer_{group}.{{}}.conv_2d_1.weight" for group in range(4))

LAYOUTS = {
    "wide_resnet": Layout(_as_here, "init_conv.weight", _WIDE, normalises=True),
    "wide_resnet_symmetric": Layout(_as_in_trades, "init_conv.weight", _WIDE, normalises=False),
    "preact_resnet": Layout(_as_here, "conv_2d.weight", _PREACT, normalises=True),
}
_OTHER_RESNET = "layer1.0.conv1.weight"  # every ResNet and PreActResNet in the manner of torchvision has it


@dataclasses.dataclass(frozen=True)
class Found:
    """A network in a file. state: float32 tensors under dmat's names. mean and std: of the normalisation in front of
    it, if the file has one."""

    network: str  # a name in NETWORKS
    depth: int
    width: int
    classes: int
    channels: int
    state: dict[str, Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: tuple[str, ...]


def title(name: str, depth: int, width: int) -> str:
    """How papers call a network in NETWORKS: WRN-28-10, PreActResNet-18."""
    return f"PreActResNet-{depth}" if name == "preact_resnet" else f"WRN-{depth}-{width}"


def recognise(tensors: Mapping[str, Any], path: Path) -> Found:
    """Which network these tensors are. Raises DmatError unless it is all of one, and nothing else."""
    _expect_tensors(tensors, path)
    network, prefix = _layout(tensors, path)
    layout = LAYOUTS[network]
    theirs = layout.theirs
    mean, std, front = _normalisation(tensors, network, prefix, path)
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    unused = {name for name in inner if name.startswith(_UNUSED)} if network == "wide_resnet_symmetric" else set[str]()
    strangers = sorted(name for name in tensors if not name.startswith(prefix) and name not in front)
    if strangers:
        raise DmatError(
            f"{path} holds {strangers[0]} beside a network whose names begin with {prefix!r}; expected the tensors of "
            f"one network; save its state_dict alone"
        )
    given = {name: tensor for name, tensor in inner.items() if name not in unused}

    def size(name: str, axis: int, dimensions: int) -> int:
        """A length along one axis of a tensor, under dmat's name for it."""
        shape = tuple(given[theirs(name)].shape) if theirs(name) in given else ()
        if len(shape) != dimensions or 0 in shape:
            found = f"is {shape}" if shape else "is missing"
            raise DmatError(
                f"{path}: {prefix}{theirs(name)} {found}; expected a tensor of {dimensions} dimensions; "
                f"download the file again, or save the whole state_dict"
            )
        return shape[axis]

    counts = _blocks(given, layout)
    if network == "preact_resnet":
        depth, width = _preact_depth(counts, path), 0
    else:
        depth, width = _wide_depth(counts, path), _width(size("layer.0.block.0.conv_1.weight", 0, 4), path)
    facts = Facts(size("logits.weight", 0, 2), size(layout.first, 1, 4), (0.0,), (1.0,))
    with torch.device("meta"):  # shapes only
        model = NETWORKS[network](facts, depth, width, "relu")
    wanted = model.state_dict()
    if problem := weights.misfit({theirs(name): tuple(tensor.shape) for name, tensor in wanted.items()}, given):
        raise DmatError(
            f"{path} is not a whole {title(network, depth, width)} (names after {prefix!r}): {problem}; expected the "
            f"state_dict of one network; download the file again"
        )
    state = {name: _converted(given[theirs(name)], tensor.dtype, name, path) for name, tensor in wanted.items()}
    notes = [f"{len(unused)} tensors of {_UNUSED[:-1]} were left out: the network never uses them"] if unused else []
    kinds = sorted({str(tensor.dtype) for tensor in given.values() if tensor.is_floating_point()} - {"torch.float32"})
    notes += [f"{kind.removeprefix('torch.')} tensors are stored as float32" for kind in kinds]
    return Found(network, depth, width, facts.classes, facts.channels, state, mean, std, tuple(notes))


def _expect_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Plain tensors whose numbers are in the file: a view may claim more than that, and would fill the memory."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise DmatError(
                f"{path}: {name} is a {type(tensor).__name__}; expected tensors alone; save the network's state_dict()"
            )
    claimed, there = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > there:
        raise DmatError(
            f"{path} claims tensors of {claimed} bytes and has {there}; expected a file that holds its numbers; "
            f"download it again and compare its checksum"
        )


def _layout(tensors: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """Network and prefix of the names."""
    for network, layout in LAYOUTS.items():
        signs = [layout.theirs(name) for name in (layout.first, layout.groups[0].format(0))]
        for prefix in PREFIXES:
            if all(f"{prefix}{sign}" in tensors for sign in signs):
                return network, prefix
    if other := next((f"{prefix}{_OTHER_RESNET}" for prefix in PREFIXES if f"{prefix}{_OTHER_RESNET}" in tensors), ""):
        raise DmatError(
            f"{path} holds {other}: a ResNet or PreActResNet that pads stride 2 on all sides and has shortcuts of "
            f"1 x 1, which no network of dmat computes; expected the PreActResNet of Rebuffi et al. 2021, with conv_2d "
            f"and layer_0.0.conv_2d_1; import a file of that one"
        )
    raise DmatError(
        f"{path} holds {len(tensors)} tensors named {', '.join(sorted(tensors)[:3]) or 'nothing'}; expected a wide "
        f"residual network with init_conv and layer.0.block.0 (Wang et al. 2023), or with conv1 and block1.layer.0 "
        f"(Carmon et al. 2019), or a PreActResNet with conv_2d and layer_0.0 (Rebuffi et al. 2021), after module., "
        f"module.0., model. or nothing; dmat reads no other network"
    )


def _blocks(given: Mapping[str, Tensor], layout: Layout) -> tuple[int, ...]:
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


def _normalisation(
    tensors: Mapping[str, Tensor], network: str, prefix: str, path: Path
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, set[str]]:
    """Mean and std of the layer in front of the network, if there is one, and the names of its tensors."""
    if not prefix.endswith("1."):
        return None, None, set()
    front = [f"{prefix[:-2]}0.{name}" for name in ("mean", "std")]
    if LAYOUTS[network].normalises:
        raise DmatError(
            f"{path} has a layer in front of a network that normalises by itself; expected one trained with normalize "
            f"false; dmat cannot know what that layer does"
        )
    if not set(front) <= tensors.keys():
        raise DmatError(
            f"{path} has a layer in front of its network and does not hold {front[0]} and {front[1]}; expected both, "
            f"or a network trained with normalize false; dmat cannot know their values"
        )
    mean, std = (tuple(tensors[name].double().flatten().tolist()) for name in front)
    channels = tensors[f"{prefix}conv1.weight"].shape[1:2].numel()
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, mean)) or not all(0 < s < 1e6 for s in std):
        raise DmatError(
            f"{path} normalises by mean {mean[:4]} and std {std[:4]}; expected {channels} finite numbers each, std "
            f"above 0; download the file again"
        )
    return mean, std, set(front)


def _converted(tensor: Tensor, dtype: torch.dtype, name: str, path: Path) -> Tensor:
    """In the network's number type, and finite."""
    if tensor.is_floating_point() != dtype.is_floating_point or not torch.isfinite(tensor).all():
        what = "numbers that are not finite" if tensor.dtype.is_floating_point else f"numbers of type {tensor.dtype}"
        raise DmatError(f"{path}: {name} holds {what}; expected finite numbers of {dtype}; download the file again")
    return tensor.to(dtype).contiguous()
