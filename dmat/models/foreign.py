"""Files that other projects wrote, read without running anything that is in them: weights and args.txt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmat.errors import DmatError
from dmat.models import torch_files
from dmat.models.torch_files import StoredTensor, UnknownObject

_NAMES_TOLD = 8  # assumed: enough to know what else is in a file


def content(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The dictionary that a .pt or .safetensors file holds, and notes. Tensors of a .pt file are not yet read."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected a .pt, .pth or .safetensors file; give its path")
    _expect_no_page(path)
    unread: list[str] = []
    try:
        found: Any
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found, unread = torch_files.read(path)
    except SafetensorError as error:
        raise DmatError(
            f"{path} is not a whole .safetensors file ({str(error).splitlines()[0]}); expected one as it was "
            f"published; download it again and compare its checksum"
        ) from None
    except Exception as error:  # hostile bytes may end in any of them, and none is a defect of dmat
        raise _incomplete(path, error) from None
    if not isinstance(found, dict):
        raise DmatError(
            f"{path} holds {kind(found)}; expected a dictionary of tensors; save the network's state_dict()"
        )
    return found, [f"the file names code, which was neither run nor read: {listed(unread)}"] if unread else []


def tensor_names(entries: Mapping[Any, Any]) -> list[str]:
    return [
        name for name, value in entries.items() if isinstance(value, Tensor | StoredTensor) and isinstance(name, str)
    ]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - _NAMES_TOLD
    return ", ".join(names[:_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def tensors(entries: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Those of the entries that are tensors, as float or whole numbers on the CPU; they may share memory.

    Raises DmatError if they claim more bytes than the file has: a view may, and a copy of it would fill the memory.
    """
    found = {name: entries[name] for name in tensor_names(entries)}
    for name, value in entries.items():
        if isinstance(value, UnknownObject) and value.name.startswith("torch._utils."):
            raise DmatError(
                f"{path}: {name} is {kind(value)}; expected tensors of plain numbers; save them dense, on the CPU and "
                f"not quantised"
            )
    claimed, there = sum(value.nbytes for value in found.values()), path.stat().st_size
    if claimed > there:
        raise DmatError(
            f"{path} claims tensors of {claimed} bytes and has {there}; expected a file that holds its numbers; "
            f"download it again and compare its checksum"
        )
    try:
        return {name: value.tensor() if isinstance(value, StoredTensor) else value for name, value in found.items()}
    except Exception as error:
        raise _incomplete(path, error) from None


def kind(value: Any) -> str:
    """What a value is, for an error: "a list", "a core.models.WideResNet"."""
    return f"a {value.name if isinstance(value, UnknownObject) else type(value).__name__}"


def _incomplete(path: Path, error: Exception) -> DmatError:
    text = " ".join(str(error).split())[:100]
    problem = text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
    return DmatError(
        f"{path} is no whole file of weights ({problem}); expected what torch.save wrote; download it again and "
        f"compare its checksum"
    )


def _expect_no_page(path: Path) -> None:
    """Downloads that a server refused are small texts with the name of the weights."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<", b"version https://git-lfs")):
        what = "a web page" if head.startswith(b"<") else "a Git LFS pointer"
        raise DmatError(
            f"{path} is {what}, not weights; expected what torch.save wrote; download the file itself and compare its "
            f"checksum"
        )


def arguments(path: Path) -> dict[str, Any]:
    """The arguments of a training of Wang et al. 2023: args.txt, one JSON object."""
    try:
        found = json.loads(path.read_text(), parse_constant=_no_number)
    except FileNotFoundError:
        raise DmatError(f"{path} does not exist; expected the args.txt beside the weights; give its path") from None
    except ValueError as error:
        raise DmatError(f"{path} is not valid JSON ({error}); expected one object; download it again") from None
    if not isinstance(found, dict):
        raise DmatError(
            f"{path} holds a {type(found).__name__}; expected a JSON object; give the args.txt of the training"
        )
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
