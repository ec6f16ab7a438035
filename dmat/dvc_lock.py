"""Protects the project's dvc.lock against kills.

DVC empties dvc.lock before it writes it anew. A kill in between leaves a file that stops every later `dvc` command.
Each stage keeps a copy of a valid dvc.lock, and `restore` brings it back.
"""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from dmat import files
from dmat.errors import DmatError, first_line

NAME = "dvc.lock"
_CONFLICT_MARKER = b"<<<<<<< "  # how git marks the beginning of two versions
# PyYAML in C: ruamel, which reads the files that people write, needs half a minute for 500 instances.
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def parse(content: bytes) -> Any:
    """Reads the content of a dvc.lock, every value as text. Raises ValueError that names the line."""
    loader = None
    try:
        loader = _Loader(content)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else first_line(error)
        raise ValueError(location) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def is_sound(content: bytes) -> bool:
    """Whether DVC 3 can read the content of a dvc.lock: schema 2.0, and a command in every stage (dvc/schema.py)."""
    try:
        value = parse(content)
    except ValueError:
        return False
    if not isinstance(value, dict) or value.get("schema") != "2.0":
        return False
    stages = value.get("stages", {})
    return isinstance(stages, dict) and all(isinstance(stage, dict) and "cmd" in stage for stage in stages.values())


def remember(root: Path, home: Path) -> None:
    """Copies a valid dvc.lock of the main checkout to `runs/`, unless the copy there is as new.

    root: the project. home: the main checkout. Nothing is copied for experiments, whose dvc.lock vanishes with them.
    """
    path, copy = root / NAME, home / "runs" / NAME
    if root != home or not path.is_file():
        return
    if copy.is_file() and copy.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return
    content = path.read_bytes()
    if is_sound(content):
        with files.writing(copy) as file:
            file.write(content)


def restore(root: Path, home: Path) -> list[str]:
    """Restores each damaged dvc.lock of the project and of its direct subfolders. Returns a sentence for each.

    It is replaced by the copy of `remember`, else by that of the last commit. Without either it is removed, as if its
    stages had not run yet. The damaged file is kept in `runs/`.
    Raises DmatError for a dvc.lock that a merge left with two versions.
    """
    paths = [path for path in (root / NAME, *sorted(root.glob(f"[!.]*/{NAME}"))) if path.is_file()]
    damaged = [path for path in paths if not is_sound(path.read_bytes())]
    for path in damaged:
        if _CONFLICT_MARKER in path.read_bytes():  # only the user can decide
            raise DmatError(
                f"{path} holds two versions after a merge; expected one; choose one by `git checkout --ours`"
            )
    return [_restore(path, root, home) for path in damaged]


def _restore(path: Path, root: Path, home: Path) -> str:
    """Restores one damaged dvc.lock and keeps a copy of it. Returns a sentence that says from where."""
    backup = home / "runs" / f"{path.relative_to(root).as_posix().replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    backup.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, backup)
    copy = home / "runs" / NAME
    copied = copy.read_bytes() if path == home / NAME and copy.is_file() else None  # of the main checkout alone
    for content, source in ((copied, "the copy that the last stage kept"), (_committed(path), "the last commit")):
        if content is not None and is_sound(content):
            with files.writing(path) as file:
                file.write(content)
            return f"{path} could not be read and was brought back from {source}; the damaged one is {backup}"
    path.unlink()
    return f"{path} could not be read and there is no copy: `dvc repro` starts over; the damaged one is {backup}"


def _committed(path: Path) -> bytes | None:
    """The content of a dvc.lock in the last commit; None if git has none."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{NAME}"], cwd=path.parent, capture_output=True, check=False)
    except OSError:
        return None
    return shown.stdout if shown.returncode == 0 else None
