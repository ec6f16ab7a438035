"""The folders of `runs/`: whose work is in them, how far it is, who holds them. Only looks, and changes nothing.

A folder is work if it lies where `dmat/pipeline` or `tuning/` puts it and is named as there; others are nobody's.
"""

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from dmat import files
from dmat.errors import DmatError
from dmat.job import POOLS
from dmat.pipeline import STAGES, work_folder
from dmat.workspace import FINISHED

_NAME = re.compile(r"(?P<instance>.+)-(?P<fingerprint>[0-9a-f]{12})")
_ASIDE = re.compile(r"before-\d{8}-\d{6}")
STUDY = "tune"  # where a stage has its word
# What jobs write, or wrote before code.yaml (code.json), at the top of their folder. Anything else is a person's.
_STATE = re.compile(
    r"finished\.json|code\.json|checkpoint\.dmat|metrics\.jsonl?|result|pictures|shard-\d+\.json|shards"
)


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """runs/<word>/<instance>-<fingerprint>/; word: of a stage, or STUDY"""

    path: Path
    stage_name: str
    instance_name: str
    fingerprint: str

    @property
    def finished(self) -> dict[str, Any] | None:
        """The note of a complete result. Raises DmatError if it is not this folder's."""
        path = self.path / FINISHED
        if not path.exists():
            return None
        note = files.read_json(path)
        about = note.get("provenance") if isinstance(note, dict) else None
        names = [about.get(key) for key in ("stage", "instance", "fingerprint")] if isinstance(about, dict) else []
        if names != [self.stage_name, self.instance_name, self.fingerprint]:
            raise DmatError(f"{path} is not the note of {self.path.name}; look at the folder and remove it by hand")
        return dict(note)

    @property
    def progress(self) -> list[Path]:
        """State that an unfinished run goes on from."""
        return work_folder.kept(self.path)

    @property
    def aside(self) -> list[Path]:
        """`before-<time>/` folders, oldest first."""
        return [path for path in self._visible() if _ASIDE.fullmatch(path.name) and _is_folder(path)]

    @property
    def strangers(self) -> list[Path]:
        """What no job wrote."""
        return [path for path in self.progress if path.is_symlink() or not _STATE.fullmatch(path.name)]

    @property
    def holder(self) -> str | None:
        """Who is at work here, or None."""
        if not is_held(self.path / "lock"):
            return None
        try:
            pid = int(files.read_json(self.path / "holder.json")["pid"])
        except (DmatError, OSError, KeyError, TypeError, ValueError):
            return "an unknown process"
        return f"process {pid}" if psutil.pid_exists(pid) else f"process {pid} of another machine"

    def _visible(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if not path.name.startswith("."))


def all_of(home: Path) -> list[WorkFolder]:
    return [found for path in _folders(home) if (found := _known(path))]


def strays(home: Path) -> list[Path]:
    """Folders beside work in `runs/` that no job named so."""
    return [path for path in _folders(home) if not _known(path)]


def pools(home: Path) -> list[Path]:
    """Folders of shards that several sets share."""
    folder = home / "runs" / POOLS
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock file. Asks for a shared lock, waits for nothing and gives it back at once."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _known(path: Path) -> WorkFolder | None:
    match = _NAME.fullmatch(path.name)
    if match is None or path.is_symlink():
        return None
    return WorkFolder(path, path.parent.name, match["instance"], match["fingerprint"])


def _folders(home: Path) -> Iterator[Path]:
    """Of all stages and studies, without hidden ones: those are being made or removed."""
    for parent in (home / "runs" / stage_name for stage_name in (*STAGES, STUDY)):
        if parent.is_dir() and not parent.is_symlink():
            yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
