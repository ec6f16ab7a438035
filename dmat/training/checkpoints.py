"""One checkpoint file: a JSON line with its header, then the state. It is complete or absent, never half written.

Loading executes no code (torch's weights-only reader) and refuses a file that is cut, altered or of another schema.
`LongRun.resume` also refuses a checkpoint of another precision than that of the run.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, NotRequired, cast

import torch
from typing_extensions import TypedDict

from dmat import files
from dmat.errors import DmatError, first_line

SCHEMA = 1

State = dict[str, Any]  # of a run: tensors, numbers, strings, lists, dicts


class Header(TypedDict):
    """The first line of a checkpoint, shown to people and checked on load."""

    images_seen: int
    precision: str  # "fp32" or "bf16"
    threads: int
    compiled: NotRequired[bool | None]  # steps of a classifier; None: not decided yet; missing: False
    schema: NotRequired[int]  # this key and the next: added by `save`
    sha256: NotRequired[str]  # of the state


def save(path: Path, header: Header, state: State) -> None:
    """Writes a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    line = {"schema": SCHEMA, "sha256": hashlib.sha256(payload).hexdigest(), **header}
    with files.writing(path) as file:
        file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        file.write(payload)


def load(path: Path) -> tuple[Header, State]:
    """Reads header and state of a checkpoint. Raises DmatError if the file cannot be trusted."""
    return parse(files.read_bytes(path), path)


def parse(data: bytes, path: Path) -> tuple[Header, State]:
    """Parses header and state from the bytes of a checkpoint file. path: for messages. Raises DmatError like `load`."""
    header_line, _, payload = data.partition(b"\n")
    advice = "delete it to start this run over, or bring back a good copy"
    try:
        header = files.parse_json(header_line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not {"schema", "sha256"} <= set(header):
        raise DmatError(f"{path} is not a checkpoint of dmat (its first line is not a header); {advice}")
    if header.get("schema") != SCHEMA:
        raise DmatError(
            f"{path} has checkpoint schema {header.get('schema')}; this dmat reads {SCHEMA}; use the dmat "
            f"that wrote it, or {advice}"
        )
    if problems := files.schema_problems(header, Header):
        raise DmatError(f"{path} has a header of another kind ({problems}); {advice}")
    if (checksum := hashlib.sha256(payload).hexdigest()) != header["sha256"]:
        raise DmatError(
            f"{path} was cut or altered (checksum {checksum[:12]}, expected {header['sha256'][:12]}); {advice}"
        )
    try:
        state: State = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes may raise any exception; none of them is a bug of dmat
        raise DmatError(f"{path} holds no state that torch reads ({first_line(error)}); {advice}") from None
    return cast(Header, header), state
