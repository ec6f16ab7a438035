"""One checkpoint file: a JSON line that says what it is, then the state. Whole or absent, never half.

Loading executes nothing (torch's weights-only reader) and refuses a file that is cut, altered, of a newer schema,
or of another precision than the run that asks.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from dmat import files
from dmat.errors import DmatError

SCHEMA = 1


def save(path: Path, header: dict[str, Any], state: dict[str, Any]) -> None:
    """header: JSON values shown to people and checked on load; state: tensors, numbers, strings, lists, dicts."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    line = {"schema": SCHEMA, "sha256": hashlib.sha256(payload).hexdigest(), **header}
    with files.writing(path) as file:
        file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        file.write(payload)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and state of a checkpoint. Raises DmatError if the file cannot be trusted."""
    return parse(path.read_bytes(), path)


def parse(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of what a file holds."""
    first, _, payload = data.partition(b"\n")
    advice = "delete it to start this run over, or bring back a good copy"
    try:
        header = json.loads(first)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not {"schema", "sha256"} <= set(header):
        raise DmatError(f"{path} is not a checkpoint of dmat (its first line is not a header); {advice}")
    if header.get("schema") != SCHEMA:
        raise DmatError(
            f"{path} has checkpoint schema {header.get('schema')}; this dmat reads {SCHEMA}; use the dmat "
            f"that wrote it, or {advice}"
        )
    if (found := hashlib.sha256(payload).hexdigest()) != header["sha256"]:
        raise DmatError(
            f"{path} was cut or altered (checksum {found[:12]}, expected {header['sha256'][:12]}); {advice}"
        )
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return header, state
