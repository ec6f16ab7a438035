"""Names of tensors in other projects, and the network that a set of tensors is: its sizes are read from their shapes.

`theirs` turns a name of dmat's network into the name in such a file. Both layouts are wide residual networks; they
differ in names and in how stride 2 is padded. Facts from public code:

- `wide_resnet`: Gowal et al. 2020 (DeepMind), used by Wang et al. 2023 and by RobustBench's DMWideResNet.
- `wide_resnet_symmetric`: TRADES (Zhang et al. 2019) and Carmon et al. 2019; also RobustBench's WideResNet. Such files
  may hold `sub_block1`, a group of blocks that no forward pass visits.
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
from dmat.robust.networks import NETWORKS, Facts
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


LAYOUTS: dict[str, Callable[[str], str]] = {"wide_resnet": _as_here, "wide_resnet_symmetric": _as_in_trades}


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


def recognise(tensors: Mapping[str, Any], path: Path) -> Found:
    """Which network these tensors are. Raises DmatError unless it is all of one, and nothing else."""
    _expect_tensors(tensors, path)
    network, prefix = _layout(tensors, path)
    theirs = LAYOUTS[network]
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

    depth = 6 * _blocks(given, theirs, path) + 4
    width, odd = divmod(size("layer.0.block.0.conv_1.weight", 0, 4), 16)
    if odd or not width:
        raise DmatError(
            f"{path}: the first group has {16 * width + odd} channels; expected a multiple of 16; dmat reads wide "
            f"residual networks only"
        )
    facts = Facts(size("logits.weight", 0, 2), size("init_conv.weight", 1, 4), (0.0,), (1.0,))
    with torch.device("meta"):  # shapes only
        model = NETWORKS[network](facts, depth, width, "relu")
    wanted = model.state_dict()
    if problem := weights.misfit({theirs(name): tuple(tensor.shape) for name, tensor in wanted.items()}, given):
        raise DmatError(
            f"{path} is not a whole WRN-{depth}-{width} (names after {prefix!r}): {problem}; expected the state_dict "
            f"of one network; download the file again"
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
    for network, theirs in LAYOUTS.items():
        for prefix in PREFIXES:
            if all(
                f"{prefix}{theirs(name)}" in tensors for name in ("init_conv.weight", "layer.0.block.0.conv_0.weight")
            ):
                return network, prefix
    raise DmatError(
        f"{path} holds {len(tensors)} tensors named {', '.join(sorted(tensors)[:3]) or 'nothing'}; expected a wide "
        f"residual network with init_conv and layer.0.block.0 (Wang et al. 2023), or with conv1 and block1.layer.0 "
        f"(Carmon et al. 2019), after module., module.0., model. or nothing; dmat reads no other network"
    )


def _blocks(given: Mapping[str, Tensor], theirs: Callable[[str], str], path: Path) -> int:
    """Blocks in each of the three groups."""
    counts = []
    for group in range(3):
        blocks = 0
        while theirs(f"layer.{group}.block.{blocks}.conv_0.weight") in given:
            blocks += 1
        counts.append(blocks)
    if len(set(counts)) != 1:
        raise DmatError(
            f"{path} has groups of {counts[0]}, {counts[1]} and {counts[2]} blocks; expected three alike; download the "
            f"file again, or save the whole state_dict"
        )
    return counts[0]


def _normalisation(
    tensors: Mapping[str, Tensor], network: str, prefix: str, path: Path
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, set[str]]:
    """Mean and std of the layer in front of the network, if there is one, and the names of its tensors."""
    if not prefix.endswith("1."):
        return None, None, set()
    front = [f"{prefix[:-2]}0.{name}" for name in ("mean", "std")]
    if network == "wide_resnet":
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
