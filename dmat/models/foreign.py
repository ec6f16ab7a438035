"""Files that other projects wrote, read without running anything that is in them.

A .pt file is a pickle, and a pickle is a program. torch reads it here with `weights_only=True`: numbers, text, lists,
dictionaries and tensors come through, any other name in it is refused before it is called.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dmat.errors import DmatError

_NAMED = re.compile(r"GLOBAL ([\w.]+)")  # how torch tells the name that it refused


def content(path: Path) -> dict[str, Any]:
    """The dictionary that a .pt or .safetensors file holds, its tensors on the CPU and not yet read from disk."""
    if not path.is_file():
        raise DmatError(f"{path} does not exist; expected a .pt, .pth or .safetensors file; give its path")
    _expect_no_page(path)
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _without_running(path)
    except SafetensorError as error:
        raise DmatError(
            f"{path} is not a whole .safetensors file ({str(error).splitlines()[0]}); expected one as it was "
            f"published; download it again and compare its checksum"
        ) from None
    if not isinstance(found, dict):
        raise DmatError(
            f"{path} holds a {type(found).__name__}; expected a dictionary of tensors; save the network's state_dict()"
        )
    return found


def _without_running(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions: the answer below says what matters
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # hostile bytes may end in any of them, and none is a defect of dmat
        if named := _NAMED.search(str(error)):
            raise DmatError(
                f"{path} names {named[1]} beside its tensors, and reading that would run code; expected tensors, "
                f"numbers and text; save only the state_dict of its network, on a machine where you trust the file"
            ) from None
        raise DmatError(
            f"{path} is no whole file of weights ({_short(error)}); expected what torch.save wrote; download it again "
            f"and compare its checksum"
        ) from None


def _short(error: Exception) -> str:
    """The line of torch's answer that says what is wrong; the others advise to run the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Unsupported", "PytorchStreamReader", "unexpected"))]
    line = (telling or [f"{type(error).__name__}, not a pickle of tensors"])[0]
    return line.partition(". ")[0].removesuffix(".")


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
