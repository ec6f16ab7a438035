"""DVC's own files, read without starting DVC: who holds its locks, and which results it can bring back.

Formats as of DVC 3.67 (`dvc/rwlock.py`, `dvc/lock.py`, `dvc/stage/cache.py`). Changes nothing.
"""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import psutil

from dmat import dvc_lock, yaml_file
from dmat.data import dvc_cache
from dmat.errors import DmatError
from dmat.upkeep import work_folders


@dataclasses.dataclass(frozen=True)
class RwlockHolder:
    """One process's entries in `.dvc/tmp/rwlock`."""

    pid: int
    command: str
    paths: int

    @property
    def state(self) -> str:
        """alive, gone, or reused: its number belongs to another program by now, which DVC takes for the holder."""
        try:
            return "alive" if "dvc" in " ".join(psutil.Process(self.pid).cmdline()) else "reused"
        except psutil.NoSuchProcess:
            return "gone"
        except psutil.AccessDenied:
            return "alive"


def claims(root: Path) -> list[RwlockHolder]:
    """Everyone who reads or writes stages, as DVC noted it: entries of killed processes stay."""
    path = root / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return []
    try:
        who = _claimed(path)
    except (ValueError, TypeError, KeyError, AttributeError):
        time.sleep(0.2)  # DVC writes it in place, so it may have been half a file
        try:
            who = _claimed(path)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DmatError(
                f"{path} cannot be read ({type(error).__name__}: {error}), so every dvc command stops; "
                f"delete it while no dvc runs"
            ) from None
    return [RwlockHolder(pid, command, who.count((pid, command))) for pid, command in sorted(set(who))]


def _claimed(path: Path) -> list[tuple[int, str]]:
    """Process and command of each entry."""
    noted = json.loads(path.read_text())
    entries = [*noted.get("write", {}).values(), *(one for many in noted.get("read", {}).values() for one in many)]
    return [(int(entry["pid"]), str(entry["cmd"])) for entry in entries]


def repository_holder(root: Path) -> str | None:
    """Who holds `.dvc/tmp/lock`, which DVC keeps while it plans and not while a stage runs."""
    lock = root / ".dvc" / "tmp" / "lock"
    return f"process {lock.read_text().strip()}" if work_folders.is_held(lock) else None


@dataclasses.dataclass(frozen=True)
class DvcResult:
    """What one run of a stage left, as DVC recorded it."""

    outs: dict[str, str]  # path below the project -> md5
    params: dict[str, Any]  # of params.yaml: dotted key -> value, numbers as text
    code: dict[str, str]  # of code.yaml: stage -> identity
    file: Path  # that says so: dvc.lock, or an entry of the run cache
    objects: Path

    @property
    def locked(self) -> bool:
        """Named by dvc.lock, not by the run cache alone."""
        return self.file.name == dvc_lock.NAME

    @functools.cached_property
    def copies(self) -> dict[str, Path] | None:
        """Path of each file below the project -> the copy in DVC's cache; None if one of them is not there."""
        return dvc_cache.copies_of(self.objects, self.outs)

    def copy_of(self, path: str) -> Path | None:
        """The copy of an output that is a file, if DVC's cache has it."""
        copy = dvc_cache.copy_of(self.objects, self.outs[path])
        return copy if copy.is_file() else None


def results(root: Path) -> list[DvcResult]:
    """Everything that dvc.lock and the run cache name: what DVC brings back instead of computing it."""
    cache = dvc_cache.folder(root)
    lock = read_lock(root)
    found = [(entry, root / dvc_lock.NAME) for entry in lock.get("stages", {}).values()]
    for path in sorted((cache / "runs").glob("*/*/[!.]*")):  # hidden ones are being written
        with contextlib.suppress(DmatError):  # cut by a kill: DVC does not bring that result back either
            found.append((_recorded(path), path))
    return [
        DvcResult(
            {out["path"]: out["md5"] for out in outs},
            entry.get("params", {}).get("params.yaml", {}),
            entry.get("params", {}).get("code.yaml", {}),
            file,
            cache / "files" / "md5",
        )
        for entry, file in found
        if (outs := entry.get("outs", [])) and all({"path", "md5"} <= set(out) for out in outs)
    ]


def read_lock(root: Path) -> dict[str, Any]:
    """dvc.lock, every value as text; empty if there is none. Raises DmatError for one that a kill left damaged."""
    path = root / dvc_lock.NAME
    if not path.exists():
        return {}
    content = path.read_bytes()
    if not dvc_lock.is_sound(content):
        try:
            dvc_lock.parse(content)
            what = "holds no stages of schema 2.0"
        except ValueError as error:
            what = f"is not valid YAML ({error})"
        raise DmatError(
            f"{path} {what}, so every dvc command stops: a kill or a merge left it so; `dmat doctor --fix` brings back "
            f"the copy that the last stage kept, or take it from git"
        )
    return _recorded(path)


def read_pipeline(root: Path) -> dict[str, Any]:
    """dvc.yaml. Raises DmatError if it has no stages."""
    path = root / "dvc.yaml"
    try:
        pipeline = yaml_file.read(path).value
    except DmatError as error:
        raise DmatError(f"{path}: {error}; or bring the file back from git") from None
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("stages"), dict):
        raise DmatError(f"{path} has no stages; bring the file back from git")
    return pipeline


def _recorded(path: Path) -> dict[str, Any]:
    """What DVC wrote."""
    try:
        value = dvc_lock.parse(path.read_bytes())
    except ValueError as error:
        raise DmatError(f"{path} is not valid YAML ({error}); bring it back from git") from None
    if not isinstance(value, dict):
        raise DmatError(f"{path} holds {type(value).__name__}; expected a mapping; bring it back from git")
    return value
