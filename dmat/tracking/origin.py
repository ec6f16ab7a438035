"""What a run came from besides its data: the commit, what differed from it, and the software that computed."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmat import files

PATCH = "git.patch"
_LOCK = "dvc.lock"  # DVC rewrites it after every stage: a patch needs it, but it makes no tree dirty
_LARGEST = 10_000_000  # bytes of a patch
_PACKAGES = ("dmat", "numpy", "pyautoattack", "scikit-learn", "torch", "torchvision")


def git(folder: Path) -> dict[str, Any]:
    """git_commit and git_dirty: whether tracked files differ from it. Empty outside a repository."""
    try:
        head = _ask(folder, "rev-parse", "HEAD").strip()
        changed = _ask(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){_LOCK}")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": head, "git_dirty": bool(changed.strip())}


def write_patch(folder: Path, to: Path) -> None:
    """What tracked files differ by from their commit, as `to`/git.patch, for `git apply`. With dvc.lock, which says
    what data there was, also if it is new. No file if nothing differs, or so much that it is no patch any more."""
    try:
        text = _ask(folder, "diff", "--binary", "HEAD", "--", ":/")
        if _ask(folder, "ls-files", "--others", "--", f":(top){_LOCK}"):
            top = Path(_ask(folder, "rev-parse", "--show-toplevel").strip())
            text += _ask(top, "diff", "--no-index", "--", os.devnull, _LOCK, differs=True)
    except (OSError, subprocess.CalledProcessError):
        text = ""
    if text and len(text) <= _LARGEST:
        with files.writing(to / PATCH) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    else:
        (to / PATCH).unlink(missing_ok=True)


def software() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from a tree that was never installed
            continue
    return found


def _ask(folder: Path, *words: str, differs: bool = False) -> str:
    """What git answers. differs: 1 is no failure but says that files differ."""
    where = next(path for path in (folder, *folder.parents) if path.is_dir())
    answer = subprocess.run(  # a text file may be in any encoding: its bytes come through
        ["git", *words], cwd=where, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False
    )
    if answer.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(answer.returncode, words)
    return answer.stdout
