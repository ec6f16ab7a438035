"""The project's dvc.lock, which DVC empties before it writes it anew: a kill in between leaves a file that stops every
later `dvc` command. Each stage keeps a copy of one that can be read, and `restore` brings it back.
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
_CONFLICT = b"<<<<<<< "  # how git marks the beginning of two versions
# In C, as ruamel, which reads what people write, needs half a minute for 500 instances.
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def parse(content: bytes) -> Any:
    """What DVC wrote, every value as text. Raises ValueError that names the line."""
    loader = None
    try:
        loader = _Loader(content)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: {getattr(error, 'problem', error)}" if mark else first_line(error)
        raise ValueError(place) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def is_sound(content: bytes) -> bool:
    """Whether DVC 3 reads it: schema 2.0, and a command in every stage (dvc/schema.py)."""
    try:
        value = parse(content)
    except ValueError:
        return False
    if not isinstance(value, dict) or value.get("schema") != "2.0":
        return False
    stages = value.get("stages", {})
    return isinstance(stages, dict) and all(isinstance(one, dict) and "cmd" in one for one in stages.values())


def remember(root: Path, home: Path) -> None:
    """Copies the sound dvc.lock of the main checkout beside the work folders. Those of experiments vanish with them."""
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
    """Brings back each dvc.lock that cannot be read, of the project and of its folders. Returns a sentence for each.

    The copy of `remember` takes its place, else that of the last commit, else none, as if its stages had not run yet.
    Raises DmatError for one that a merge left with two versions.
    """
    paths = [path for path in (root / NAME, *sorted(root.glob(f"[!.]*/{NAME}"))) if path.is_file()]
    damaged = [path for path in paths if not is_sound(path.read_bytes())]
    for path in damaged:
        if _CONFLICT in path.read_bytes():  # somebody's to decide
            raise DmatError(
                f"{path} holds two versions after a merge; expected one; choose one by `git checkout --ours`"
            )
    return [_restore(path, root, home) for path in damaged]


def _restore(path: Path, root: Path, home: Path) -> str:
    """What lay there is kept."""
    kept = home / "runs" / f"{path.relative_to(root).as_posix().replace('/', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kept)
    copy = home / "runs" / NAME
    copied = copy.read_bytes() if path == home / NAME and copy.is_file() else None  # of the main checkout alone
    for content, source in ((copied, "the copy that the last stage kept"), (_committed(path), "the last commit")):
        if content is not None and is_sound(content):
            with files.writing(path) as file:
                file.write(content)
            return f"{path} could not be read and was brought back from {source}; the damaged one is {kept}"
    path.unlink()
    return f"{path} could not be read and there is no copy: `dvc repro` begins anew; the damaged one is {kept}"


def _committed(path: Path) -> bytes | None:
    try:
        answer = subprocess.run(["git", "show", f"HEAD:./{NAME}"], cwd=path.parent, capture_output=True, check=False)
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 else None
