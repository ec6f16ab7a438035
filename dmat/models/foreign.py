"""Reads files of other projects (weights and args.txt) without executing anything in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmat import files
from dmat.errors import DmatError
from dmat.models import torch_files
from dmat.models.torch_files import StoredTensor, UnknownObject

_MAX_LISTED_NAMES = 8  # assumed: enough to see what else is in a file
_MAX_JSON_BYTES = 1 << 20  # assumed: settings of a training or a network take some kilobytes

FileDictionary = Mapping[Any, object]  # a dictionary in a file: mostly text -> tensors, but whatever the file holds


def content(path: Path) -> tuple[FileDictionary, list[str]]:
    """Reads the dictionary in a .pt or .safetensors file. Returns it with notes for people.

    Tensors of a .pt file are not read yet: they are `StoredTensor`s. Raises DmatError if the file is missing, damaged
    or does not hold a dictionary.
    """
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected a .pt, .pth or .safetensors file; give its path")
    expect_no_failed_download(path)
    unread_names: list[str] = []
    try:
        loaded: object
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded, unread_names = torch_files.read(path)
    except SafetensorError as error:
        raise DmatError(
            f"{path} is incomplete or not a .safetensors file ({str(error).splitlines()[0]}); expected the published "
            f"file; download it again and compare its checksum"
        ) from None
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise _incomplete(path, error) from None
    if not isinstance(loaded, dict):
        raise DmatError(
            f"{path} holds {type_name(loaded)}; expected a dictionary of tensors; save the network's state_dict()"
        )
    return loaded, [
        f"the file names code, which was neither run nor read: {shortened_list(unread_names)}"
    ] if unread_names else []


def tensor_names(entries: FileDictionary) -> list[str]:
    """Keys of the entries that are tensors and whose key is text."""
    return [
        name for name, value in entries.items() if isinstance(value, Tensor | StoredTensor) and isinstance(name, str)
    ]


def shortened_list(names: Sequence[str]) -> str:
    """The first names as text, and how many more there are: "a, b and 3 more"."""
    remaining = len(names) - _MAX_LISTED_NAMES
    return ", ".join(names[:_MAX_LISTED_NAMES]) + (f" and {remaining} more" if remaining > 0 else "")


def tensors(entries: FileDictionary, path: Path) -> dict[str, Tensor]:
    """Returns the entries that are tensors, of any shape, on the CPU; they may share memory.

    Raises DmatError if a tensor is not dense plain numbers, or if the tensors claim more bytes than the file has: a
    view may claim more, and a copy of it would fill the memory.
    """
    stored = {name: cast(Tensor | StoredTensor, entries[name]) for name in tensor_names(entries)}
    for name, value in entries.items():
        if isinstance(value, UnknownObject) and value.name.startswith("torch._utils."):
            raise DmatError(
                f"{path}: {name} is {type_name(value)}; expected tensors of plain numbers; save them dense, on the CPU "
                f"and not quantised"
            )
    claimed, available = sum(value.nbytes for value in stored.values()), path.stat().st_size
    if claimed > available:
        raise DmatError(
            f"{path} claims tensors of {claimed} bytes and has {available}; expected a file that holds its numbers; "
            f"download it again and compare its checksum"
        )
    try:
        return {name: value.tensor() if isinstance(value, StoredTensor) else value for name, value in stored.items()}
    except Exception as error:
        raise _incomplete(path, error) from None


def type_name(value: object) -> str:
    """Type of a value for an error message: "a list", "a core.models.WideResNet"."""
    return f"a {value.name if isinstance(value, UnknownObject) else type(value).__name__}"


def problem(error: Exception) -> str:
    """An exception about hostile bytes as a phrase for an error message."""
    text = " ".join(str(error).split())[:100]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _incomplete(path: Path, error: Exception) -> DmatError:
    return DmatError(
        f"{path} is incomplete or not a file of weights ({problem(error)}); expected what torch.save wrote; "
        f"download it again and compare its checksum"
    )


def expect_no_failed_download(path: Path) -> None:
    """Raises DmatError for the small text files that a refused download leaves under the name of the weights."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<", b"version https://git-lfs")):
        file_type = "a web page" if head.startswith(b"<") else "a Git LFS pointer"
        raise DmatError(
            f"{path} is {file_type}, not weights; expected what torch.save wrote; download the file itself and compare "
            f"its checksum"
        )


def arguments(path: Path) -> dict[str, object]:
    """Reads the training arguments of Wang et al. 2023: args.txt, a JSON object. Raises DmatError for anything else."""
    return json_object(path, "the args.txt beside the weights", "the args.txt of the training")


def json_object(path: Path, missing: str, other: str) -> dict[str, object]:
    """Reads a JSON object. Raises DmatError for anything else.

    missing, other: what the file should be, for messages about no file and about a file with something else.
    """
    if not path.is_file():  # opening a FIFO would wait for a writer
        state = "is not a file" if path.exists() else "does not exist"
        raise DmatError(f"{path} {state}; expected {missing}; give its path")
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise DmatError(f"{path} has {size} bytes; expected at most {_MAX_JSON_BYTES}; give {other}")
    try:
        parsed = files.parse_json(files.read_bytes(path))
    except ValueError as error:
        raise DmatError(f"{path} is not valid JSON ({error}); expected one object; download it again") from None
    if not isinstance(parsed, dict):
        raise DmatError(f"{path} holds a {type(parsed).__name__}; expected a JSON object; give {other}")
    return parsed
