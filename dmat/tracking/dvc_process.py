"""Finds the `dvc` process that runs a stage, and how it ended. DVC reports that nowhere: its files show it."""

import contextlib
import hashlib
from collections.abc import Collection
from pathlib import Path

import psutil
from typing_extensions import TypedDict

from dmat import ARTIFACTS, files, liveness
from dmat.errors import DmatError


class _Tracked(TypedDict):
    """A provenance record, as far as it is read here."""

    mlflow_run: str | None


def outermost() -> tuple[psutil.Process, str, list[str]] | None:
    """The outermost `dvc` process above this one, its identity and its arguments; None for a direct command."""
    outermost_dvc = None
    for process in psutil.Process().parents():
        try:
            arguments = dvc_arguments(process.cmdline())
        except psutil.Error:  # it ended meanwhile, or belongs to another user
            continue
        if arguments is not None and (process_identity := liveness.identity(process.pid)):
            outermost_dvc = process, process_identity, arguments
    return outermost_dvc


def dvc_arguments(command: list[str]) -> list[str] | None:
    """Arguments of a command line that runs DVC: `dvc ...`, or Python with that script or module. None for others."""
    names = [Path(argument).name for argument in command]
    if names[:1] == ["dvc"]:
        return command[1:]
    if not names or not names[0].startswith("python"):
        return None
    start = next(
        (k for k, option in enumerate(command[1:], 1) if not option.startswith("-") or option == "-m"), len(command)
    )
    if command[start : start + 2] == ["-m", "dvc"]:
        return command[start + 2 :]
    return command[start + 1 :] if names[start : start + 1] == ["dvc"] else None


def was_killed(root: Path, pid: int) -> bool:
    """Whether the ended `dvc` process `pid` was killed while it reproduced a stage of the project at `root`.

    DVC has entries in `.dvc/tmp/rwlock` from before it looks at a stage until its outputs are in the cache. It removes
    them after a success and after a failure. So only a killed process leaves entries. The next `dvc` removes them.
    """
    dvc_root = next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), root)
    try:
        return any(entry_pid == pid for entry_pid, _ in rwlock_entries(dvc_root))
    except (OSError, DmatError):  # missing, or incomplete because of the kill
        return False


def rwlock_entries(root: Path) -> list[tuple[int, str]]:
    """Pid and command of each entry of `.dvc/tmp/rwlock`: processes that read or write stages, or were killed.

    Raises DmatError if the file is damaged.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        rwlock = files.parse_json(path.read_bytes())
        entries = [
            *rwlock.get("write", {}).values(),
            *(reader for readers in rwlock.get("read", {}).values() for reader in readers),
        ]
        return [(int(entry["pid"]), str(entry["cmd"])) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DmatError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so every dvc command stops; "
            f"delete it while no dvc runs"
        ) from None


def unrecorded(root: Path, runs: Collection[str]) -> list[str]:
    """Stage instances, as "stage instance", whose results these runs published and that `dvc.lock` does not name.

    `dvc` stopped before it could record them, for example because the disk was full. runs: ids of MLflow runs.
    """
    try:
        lock = (root / "dvc.lock").read_text(encoding="utf-8")
    except OSError:
        lock = ""
    instances = []
    for path in sorted((root / ARTIFACTS / "provenance").glob("*/*.json")):
        with contextlib.suppress(DmatError, OSError):
            # a provenance file holds its time and its run, so its checksum identifies this result
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if md5 not in lock and files.read_record(path, _Tracked)["mlflow_run"] in runs:
                instances.append(f"{path.parent.name} {path.stem}")
    return instances
