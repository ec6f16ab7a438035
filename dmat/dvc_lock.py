"""The project's dvc.lock, which DVC empties before it writes it anew: a kill in between leaves a file that stops every
later `dvc` command. Each stage keeps a copy of one that can be read, and `restore` brings it back.
"""

import shutil
import subprocess
import time
from pathlib import Path

import yaml

from dmat import files

NAME = "dvc.lock"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads a large dvc.lock ten times faster


def is_sound(text: str | bytes) -> bool:
    """Whether DVC 3 reads it: schema 2.0, and a command in every stage (dvc/schema.py)."""
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, dict) or value.get("schema") != "2.0":
        return False
    stages = value.get("stages", {})
    return isinstance(stages, dict) and all(isinstance(one, dict) and "cmd" in one for one in stages.values())


def remember(root: Path, home: Path) -> None:
    """Copies a sound dvc.lock of the main checkout beside the work folders. Those of experiments vanish with them."""
    path, copy = root / NAME, _copy(home)
    if root != home or not path.is_file():
        return
    if copy.is_file() and copy.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return
    content = path.read_bytes()
    if is_sound(content):
        with files.writing(copy) as file:
            file.write(content)


def restore(root: Path, home: Path) -> str | None:
    """Brings dvc.lock back where it cannot be read: the newest copy, else that of the last commit, else none, as if
    nothing had run yet. What lay there is kept. Returns a sentence, or None where nothing is wrong."""
    path = root / NAME
    if not path.exists() or is_sound(path.read_bytes()):
        return None
    kept = _copy(home).with_name(f"{NAME}-damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, kept)
    for content, source in ((_remembered(home), "the copy that the last stage kept"), (_committed(root), "git")):
        if content is not None and is_sound(content):
            with files.writing(path) as file:
                file.write(content)
            return f"{path} could not be read and was brought back from {source}; the damaged one is {kept}"
    path.unlink()
    return f"{path} could not be read and there is no copy: `dvc repro` begins anew; the damaged one is {kept}"


def _copy(home: Path) -> Path:
    return home / "runs" / NAME


def _remembered(home: Path) -> bytes | None:
    return _copy(home).read_bytes() if _copy(home).is_file() else None


def _committed(root: Path) -> bytes | None:
    try:
        answer = subprocess.run(["git", "show", f"HEAD:./{NAME}"], cwd=root, capture_output=True, check=False)
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 else None
