"""The `dvc` process above a stage, and how it ended, which it tells nobody: read from the files that it leaves."""

import contextlib
import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import psutil

from dmat import ARTIFACTS, files, liveness
from dmat.errors import DmatError


def outermost() -> tuple[psutil.Process, str, list[str]] | None:
    """The process, its identity and the words after `dvc`; None for a direct command."""
    found = None
    for process in psutil.Process().parents():
        try:
            words = after_dvc(process.cmdline())
        except psutil.Error:  # ended meanwhile, or of another person
            continue
        if words is not None and (known := liveness.identity(process.pid)):
            found = process, known, words
    return found


def after_dvc(words: list[str]) -> list[str] | None:
    """The rest of a command line that is DVC's: `dvc ...`, or Python with that script or module. Else None."""
    names = [Path(word).name for word in words]
    if names[:1] == ["dvc"]:
        return words[1:]
    if not names or not names[0].startswith("python"):
        return None
    start = next((k for k, word in enumerate(words[1:], 1) if not word.startswith("-") or word == "-m"), len(words))
    if words[start : start + 2] == ["-m", "dvc"]:
        return words[start + 2 :]
    return words[start + 1 :] if names[start : start + 1] == ["dvc"] else None


def was_killed(root: Path, pid: int) -> bool:
    """Whether `dvc`, which is gone, was killed while it reproduced a stage of the project at `root`.

    It has entries in `.dvc/tmp/rwlock` from before it looks at a stage until its outputs are in the cache, and removes
    them whether that went well or not. So only a killed process leaves some. The next `dvc` clears them away.
    """
    folder = next((one for one in (root, *root.parents) if (one / ".dvc").is_dir()), root)
    try:
        noted = json.loads((folder / ".dvc" / "tmp" / "rwlock").read_text())
        entries = [*noted.get("write", {}).values(), *(one for many in noted.get("read", {}).values() for one in many)]
        return any(entry["pid"] == pid for entry in entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not there, or cut by the kill
        return False


def unrecorded(root: Path, runs: Collection[str]) -> list[str]:
    """Stage instances ("stage instance") whose results these runs left in the project, and which `dvc.lock` does not
    name: `dvc` stopped, for example at a full disk, before it could."""
    try:
        lock = (root / "dvc.lock").read_text()
    except OSError:
        lock = ""
    found = []
    for path in sorted((root / ARTIFACTS / "provenance").glob("*/*.json")):
        with contextlib.suppress(DmatError, OSError):
            # a provenance holds its time and its run, so that its checksum means this result alone
            md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            if md5 not in lock and files.read_json(path).get("mlflow_run") in runs:
                found.append(f"{path.parent.name} {path.stem}")
    return found
