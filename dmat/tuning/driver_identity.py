"""Which driver computes a trial: what it writes into the trial, and whether it is the driver of a study folder."""

import os
import platform
import uuid
from pathlib import Path

from optuna.trial import FrozenTrial
from typing_extensions import TypedDict

from dmat import files

ATTRIBUTE = "driver"  # of a trial: {"id": of the driver that computes it, "process": for people}


class _FolderIdentity(TypedDict):
    """Content of driver.json."""

    id: str


def of_this_process(folder: Path) -> dict[str, str | None]:
    """The value of `ATTRIBUTE` for trials that this process drives in a study folder."""
    return {"id": _folder_identity(folder, create=True), "process": f"process {os.getpid()} of {platform.node()}"}


def is_of_folder(trial: FrozenTrial, folder: Path) -> bool:
    """Whether a driver of this study folder computes the trial, or did when it was killed."""
    return bool(trial.user_attrs.get(ATTRIBUTE, {}).get("id") == _folder_identity(folder))


def process_of(trial: FrozenTrial) -> str:
    """The process that drives a trial, as it named itself."""
    return str(trial.user_attrs.get(ATTRIBUTE, {}).get("process", "another process"))


def _folder_identity(folder: Path, create: bool = False) -> str | None:
    """Names the drivers of a study folder, which follow each other. A copy of the folder has another name.

    None where no driver has run, unless create.
    """
    path = folder / "driver.json"
    if create and not path.exists():
        files.write_json(path, {"id": uuid.uuid4().hex})
    return f"{files.read_record(path, _FolderIdentity)['id']}-{path.stat().st_ino}" if path.exists() else None
