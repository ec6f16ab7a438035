"""DVC's cache of a project, read without starting DVC. Changes nothing.

Layout as of DVC 3: `files/md5/ab/cdef...` holds a file; for a folder `....dir` lists the files inside.
"""

import configparser
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dmat import dvc_lock


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
    """Path of each file of some outputs -> its copy in the cache; None if one of them is not there.

    outs: path of an output below the project -> md5, as dvc.lock has them.
    """
    found: dict[str, Path] = {}
    for path, md5 in outs.items():
        copy = copy_of(root_of_objects, md5)
        if not copy.is_file():
            return None
        if md5.endswith(".dir"):
            inside = json.loads(copy.read_text())
            found |= {f"{path}/{entry['relpath']}": copy_of(root_of_objects, entry["md5"]) for entry in inside}
        else:
            found[path] = copy
    return found if all(copy.is_file() for copy in found.values()) else None


def outputs_below(root: Path, start: str) -> Iterator[dict[str, Path]]:
    """For each output that dvc.lock names below a folder of the project: name inside it -> copy in the cache.

    DVC removes an output before it starts its stage, and dvc.lock still names what was there. Nothing for a project
    without DVC, or what the cache does not have.
    """
    try:
        stages = (dvc_lock.parse((root / dvc_lock.NAME).read_bytes()) or {}).get("stages", {})
    except (OSError, ValueError, AttributeError):
        return
    objects = folder(root) / "files" / "md5"
    for entry in stages.values():
        for out in entry.get("outs", []) if isinstance(entry, dict) else []:
            path, md5 = out.get("path", ""), out.get("md5", "")
            if path.startswith(f"{start}/") and md5 and (copies := copies_of(objects, {path: md5})):
                yield {name.removeprefix(f"{path}/"): copy for name, copy in copies.items()}
