"""Reads DVC's own files without starting DVC: the holders of its locks, and the results that it can restore.

Formats of DVC 3.67 (`dvc/rwlock.py`, `dvc/lock.py`, `dvc/stage/cache.py`). Changes nothing.
"""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import psutil

from dmat import dvc_lock, yaml_file
from dmat.data import dvc_cache
from dmat.errors import DmatError
from dmat.tracking import dvc_process
from dmat.upkeep import work_folders


@dataclasses.dataclass(frozen=True)
class RwlockHolder:
    """A process with entries in `.dvc/tmp/rwlock`. paths: number of its entries."""

    pid: int
    command: str
    paths: int

    @property
    def state(self) -> str:
        """alive, gone, or reused: the pid now belongs to another program, which DVC takes for the holder."""
        try:
            return "alive" if "dvc" in " ".join(psutil.Process(self.pid).cmdline()) else "reused"
        except psutil.NoSuchProcess:
            return "gone"
        except psutil.AccessDenied:
            return "alive"


def rwlock_holders(root: Path) -> list[RwlockHolder]:
    """Processes that read or write stages, as DVC recorded them. Entries of killed processes stay.

    Raises DmatError if the file is damaged.
    """
    if not (root / ".dvc" / "tmp" / "rwlock").exists():
        return []
    try:
        entries = dvc_process.rwlock_entries(root)
    except DmatError:
        time.sleep(0.2)  # DVC writes it in place, so it may have been incomplete
        entries = dvc_process.rwlock_entries(root)
    return [RwlockHolder(pid, command, entries.count((pid, command))) for pid, command in sorted(set(entries))]


def repository_holder(root: Path) -> str | None:
    """The process that holds `.dvc/tmp/lock`, or None. DVC holds it while it plans, not while a stage runs."""
    lock = root / ".dvc" / "tmp" / "lock"
    return f"process {lock.read_text(encoding='utf-8').strip()}" if work_folders.is_held(lock) else None


@dataclasses.dataclass(frozen=True)
class DvcResult:
    """The result of one run of a stage, as DVC recorded it."""

    outs: dict[str, str]  # path relative to the project -> md5
    params: dict[str, Any]  # of params.yaml: dotted key -> value, numbers as text
    code: dict[str, str]  # of code.yaml: stage -> identity
    file: Path  # with the record: dvc.lock, or an entry of the run cache
    objects: Path  # folder of DVC's cache with the files

    @property
    def locked(self) -> bool:
        """Whether dvc.lock names the result, not only the run cache."""
        return self.file.name == dvc_lock.NAME

    @functools.cached_property
    def copies(self) -> dict[str, Path] | None:
        """Path of each file relative to the project -> its copy in DVC's cache; None if a copy is missing."""
        return dvc_cache.cached_outputs(self.objects, self.outs)

    def cached_copy(self, path: str) -> Path | None:
        """The copy in DVC's cache of an output that is a file; None if it is missing."""
        cached = dvc_cache.cached_file(self.objects, self.outs[path])
        return cached if cached.is_file() else None


def results(root: Path) -> list[DvcResult]:
    """All results that dvc.lock and the run cache name, which DVC restores instead of computing them."""
    cache = dvc_cache.folder(root)
    lock = read_lock(root)
    entries = [(entry, root / dvc_lock.NAME) for entry in lock.get("stages", {}).values()]
    for path in sorted((cache / "runs").glob("*/*/[!.]*")):  # hidden files are being written
        with contextlib.suppress(DmatError):  # incomplete after a kill: DVC does not restore that result either
            entries.append((_parse(path), path))
    return [
        DvcResult(
            {out["path"]: out["md5"] for out in outs},
            entry.get("params", {}).get("params.yaml", {}),
            entry.get("params", {}).get("code.yaml", {}),
            file,
            cache / "files" / "md5",
        )
        for entry, file in entries
        if (outs := entry.get("outs", [])) and all({"path", "md5"} <= set(out) for out in outs)
    ]


def read_lock(root: Path) -> dict[str, Any]:
    """Content of dvc.lock, every value as text; empty if it does not exist. Raises DmatError if it is damaged."""
    path = root / dvc_lock.NAME
    if not path.exists():
        return {}
    content = path.read_bytes()
    if not dvc_lock.is_sound(content):
        try:
            dvc_lock.parse(content)
            problem = "holds no stages of schema 2.0"
        except ValueError as error:
            problem = f"is not valid YAML ({error})"
        raise DmatError(
            f"{path} {problem}, so every dvc command stops: a kill or a merge damaged it; `dmat doctor --fix` restores "
            f"the copy that the last stage saved, or restore it from git"
        )
    return _parse(path)


def read_pipeline(root: Path) -> dict[str, Any]:
    """Content of dvc.yaml. Raises DmatError if it cannot be read or has no stages."""
    path = root / "dvc.yaml"
    try:
        pipeline = yaml_file.read(path).value
    except DmatError as error:
        raise DmatError(f"{path}: {error}; or restore the file from git") from None
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("stages"), dict):
        raise DmatError(f"{path} has no stages; restore the file from git")
    return pipeline


def _parse(path: Path) -> dict[str, Any]:
    """Content of a YAML file that DVC wrote. Raises DmatError if it is not a mapping."""
    try:
        content = dvc_lock.parse(path.read_bytes())
    except ValueError as error:
        raise DmatError(f"{path} is not valid YAML ({error}); restore it from git") from None
    if not isinstance(content, dict):
        raise DmatError(f"{path} holds {type(content).__name__}; expected a mapping; restore it from git")
    return content
