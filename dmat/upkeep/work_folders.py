"""Work folders in `runs/`: their stage and instance, their state, and the process that holds them. Changes nothing.

A folder is a work folder if its place and its name are those that `dmat/pipeline` or `dmat/tuning` gives.
"""

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from dmat import files
from dmat.errors import DmatError
from dmat.pipeline import STAGES, work_folder
from dmat.pipeline.work_folder import Finished
from dmat.workspace import FINISHED, POOLS

_NAME = re.compile(r"(?P<instance>.+)-(?P<fingerprint>[0-9a-f]{12})")
_SET_ASIDE_NAME = re.compile(r"before-\d{8}-\d{6}")
STUDY = "tune"  # in place of a stage name: a tuning study
# Files that jobs write at the top of their folder; code.json by versions before code.yaml. All others are foreign.
_JOB_FILES = re.compile(
    r"finished\.json|code\.json|compiled\.json|diverged\.json|compiled|checkpoint\.dmat|metrics\.jsonl?|result|pictures|shard-\d+\.json|shards"
)


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """The folder runs/<stage_name>/<instance_name>-<fingerprint>/. stage_name: of a stage, or STUDY."""

    path: Path
    stage_name: str
    instance_name: str
    fingerprint: str

    @property
    def finished_record(self) -> Finished | None:
        """Content of finished.json; None without a finished result. Raises DmatError if it is of another folder."""
        path = self.path / FINISHED
        if not path.exists():
            return None
        record = files.read_record(path, Finished)
        identity = [record["provenance"][key] for key in ("stage", "instance", "fingerprint")]
        if identity != [self.stage_name, self.instance_name, self.fingerprint]:
            raise DmatError(f"{path} is not the record of {self.path.name}; inspect the folder and delete it")
        return record

    @property
    def resumable_paths(self) -> list[Path]:
        """State from which an unfinished run resumes."""
        return work_folder.resumable_paths(self.path)

    @property
    def set_aside_folders(self) -> list[Path]:
        """`before-<time>/` folders, oldest first."""
        return [path for path in self._visible() if _SET_ASIDE_NAME.fullmatch(path.name) and _is_folder(path)]

    @property
    def foreign_paths(self) -> list[Path]:
        """Files and folders that no job wrote."""
        return [path for path in self.resumable_paths if path.is_symlink() or not _JOB_FILES.fullmatch(path.name)]

    @property
    def holder(self) -> str | None:
        """The process that works in the folder, for messages; None if none does."""
        if not is_held(self.path / "lock"):
            return None
        if (pid := work_folder.holder(self.path)) is None:
            return "an unknown process"
        return f"process {pid}" if psutil.pid_exists(pid) else f"process {pid} of another machine"

    def _visible(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if not path.name.startswith("."))


def list_work_folders(home: Path) -> list[WorkFolder]:
    """All work folders of a project."""
    return [work for path in _folders(home) if (work := _parse_name(path))]


def list_strays(home: Path) -> list[Path]:
    """Folders beside work folders whose names no job gives."""
    return [path for path in _folders(home) if not _parse_name(path)]


def list_pools(home: Path) -> list[Path]:
    """Pools: folders of shards that several image sets share."""
    folder = home / "runs" / POOLS
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock file. Tries to take a shared lock, does not wait, and releases it at once."""
    try:
        lock_fd = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock_fd)
    return False


def _parse_name(path: Path) -> WorkFolder | None:
    match = _NAME.fullmatch(path.name)
    if match is None or path.is_symlink():
        return None
    return WorkFolder(path, path.parent.name, match["instance"], match["fingerprint"])


def _folders(home: Path) -> Iterator[Path]:
    """Folders of all stages and studies, without hidden ones: those are being written or removed."""
    for parent in (home / "runs" / stage_name for stage_name in (*STAGES, STUDY)):
        if parent.is_dir() and not parent.is_symlink():
            yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
