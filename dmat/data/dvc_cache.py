"""DVC's cache of a project, read without starting DVC. Changes nothing.

Layout as of DVC 3: `files/md5/ab/cdef...` holds a file; for a folder `....dir` lists the files inside.
"""

import configparser
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dmat import ARTIFACTS, dvc_lock
from dmat.data import shards


def folder(root: Path) -> Path:
    """`cache.dir` of the project's configuration. DVC reads wider ones too; a cache that is elsewhere because of them
    looks empty here."""
    base = root / ".dvc"
    config = configparser.ConfigParser(interpolation=None, strict=False)
    config.read([base / "config", base / "config.local"])
    given = config.get("cache", "dir", fallback="cache").strip("'\"")
    return base / Path(given).expanduser()


def copy_of(root_of_objects: Path, md5: str) -> Path:
    """Where the cache has an object, if it has it. root_of_objects: `folder(root) / "files" / "md5"`."""
    return root_of_objects / md5[:2] / md5[2:]


def copies_of(root_of_objects: Path, outs: Mapping[str, str]) -> dict[str, Path] | None:
    """Path of each file of some outputs -> its copy in the cache; None if one of them is not there, or a list of files
    is damaged.

    outs: path of an output below the project -> md5, as dvc.lock has them.
    """
    found: dict[str, Path] = {}
    for path, md5 in outs.items():
        copy = copy_of(root_of_objects, md5)
        if not copy.is_file():
            return None
        if md5.endswith(".dir"):
            inside = _read(copy, list)
            if inside is None:
                return None
            found |= {f"{path}/{entry['relpath']}": copy_of(root_of_objects, entry["md5"]) for entry in inside}
        else:
            found[path] = copy
    return found if all(copy.is_file() for copy in found.values()) else None


def of_stage(root: Path, stage: str) -> Iterator[dict[str, Path]]:
    """For each instance of a stage in dvc.lock: path of each file that it wrote -> copy in the cache, if there is one.

    DVC removes outputs before it starts a stage, and dvc.lock still names what was there. Nothing for a project
    without DVC.
    """
    try:
        stages = (dvc_lock.parse((root / dvc_lock.NAME).read_bytes()) or {}).get("stages", {})
    except (OSError, ValueError, AttributeError):
        return
    objects = folder(root) / "files" / "md5"
    for name, entry in stages.items():
        if name.partition("@")[0] == stage:
            outs = {out["path"]: out["md5"] for out in entry.get("outs", []) if {"path", "md5"} <= set(out)}
            yield {
                path: copy for out, md5 in outs.items() for path, copy in (copies_of(objects, {out: md5}) or {}).items()
            }


def sets_of_pool(root: Path, stage: str, pool: str) -> Iterator[tuple[dict[str, Any], dict[str, Path]]]:
    """Sets of a stage whose shards are of a pool: the manifest, and the copy of each file by its name in the set.

    Their provenance names the pool: nothing that other stages read may name the code, or every change of it would
    make them run again.
    """
    for copies in of_stage(root, stage):
        own: dict[str, Path] = {}
        pools: Any = None
        for name, copy in copies.items():
            if name.startswith(f"{ARTIFACTS}/provenance/"):
                pools = (_read(copy, dict) or {}).get("pools")
            elif name.startswith(f"{ARTIFACTS}/{stage}/"):
                own[Path(name).name] = copy
        manifest = _read(own[shards.MANIFEST], dict) if shards.MANIFEST in own else None
        if pools == [pool] and manifest is not None:
            yield manifest, own


def _read(path: Path, kind: type) -> Any:
    """What a JSON file of the cache holds, if it is of that kind; a damaged one is as good as none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return None
    return value if isinstance(value, kind) else None
