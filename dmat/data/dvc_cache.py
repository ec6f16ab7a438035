"""DVC's cache of a project, read without starting DVC. This module changes nothing.

Layout as of DVC 3: `files/md5/ab/cdef...` holds a file; for a folder, `files/md5/ab/cdef....dir` is a JSON list of the
files inside.
"""

import configparser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dmat import ARTIFACTS, dvc_lock, files
from dmat.data import shards
from dmat.errors import DmatError

JsonValue = TypeVar("JsonValue")


def folder(root: Path) -> Path:
    """Folder of the project's DVC cache: `cache.dir` of .dvc/config and .dvc/config.local.

    DVC also reads configurations of the user and of the system. A cache that these put elsewhere looks empty here.
    """
    base = root / ".dvc"
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read([base / "config", base / "config.local"])
    cache_dir = config.get("cache", "dir", fallback="cache").strip("'\"")
    return base / Path(cache_dir).expanduser()


def cached_file(objects_root: Path, md5: str) -> Path:
    """Path of an object in the cache; the file may be missing. objects_root: `folder(root) / "files" / "md5"`."""
    return objects_root / md5[:2] / md5[2:]


def cached_outputs(objects_root: Path, outs: Mapping[str, str]) -> dict[str, Path] | None:
    """Maps the path of each file of the outputs to its copy in the cache.

    Returns None if a copy is missing or a list of files is damaged. outs: path of an output below the project -> md5,
    as in dvc.lock.
    """
    copies: dict[str, Path] = {}
    for path, md5 in outs.items():
        copy = cached_file(objects_root, md5)
        if not copy.is_file():
            return None
        if md5.endswith(".dir"):
            entries = _read(copy, list)
            if entries is None:
                return None
            copies |= {f"{path}/{entry['relpath']}": cached_file(objects_root, entry["md5"]) for entry in entries}
        else:
            copies[path] = copy
    return copies if all(copy.is_file() for copy in copies.values()) else None


def cached_stage_outputs(root: Path, stage_name: str) -> Iterator[dict[str, Path]]:
    """Yields, for each instance of a stage in dvc.lock, the path of each file that it wrote -> its copy in the cache.

    Outputs without a copy are left out. DVC removes outputs before it starts a stage, but dvc.lock still names the
    removed ones. Yields nothing for a project without DVC.
    """
    try:
        stages = (dvc_lock.parse((root / dvc_lock.NAME).read_bytes()) or {}).get("stages", {})
    except (OSError, ValueError, AttributeError):
        return
    objects = folder(root) / "files" / "md5"
    for name, entry in stages.items():
        if name.partition("@")[0] == stage_name:
            outs = {out["path"]: out["md5"] for out in entry.get("outs", []) if {"path", "md5"} <= set(out)}
            yield {
                path: copy
                for out, md5 in outs.items()
                for path, copy in (cached_outputs(objects, {out: md5}) or {}).items()
            }


def sets_of_pool(root: Path, stage_name: str, pool: str) -> Iterator[tuple[dict[str, Any], dict[str, Path]]]:
    """Yields the sets of a stage whose shards are from a pool: manifest, and file name in the set -> cached copy.

    The pool is named in their provenance alone. Nothing that other stages read may name the code, or every change of
    the code would make them run again.
    """
    for copies in cached_stage_outputs(root, stage_name):
        set_files: dict[str, Path] = {}
        pools: object = None
        for name, copy in copies.items():
            if name.startswith(f"{ARTIFACTS}/provenance/"):
                pools = (_read(copy, dict) or {}).get("pools")
            elif name.startswith(f"{ARTIFACTS}/{stage_name}/"):
                set_files[Path(name).name] = copy
        manifest = _read(set_files[shards.MANIFEST], dict) if shards.MANIFEST in set_files else None
        if pools == [pool] and manifest is not None:
            yield manifest, set_files


def _read(path: Path, expected_type: type[JsonValue]) -> JsonValue | None:
    """Value of a JSON file of the cache; None if the file is damaged or the value is not of the expected type."""
    try:
        value = files.read_json(path)
    except DmatError:
        return None
    return value if isinstance(value, expected_type) else None
