"""The work folder of an instance: who is at work there, the record of a complete result, and what goes aside."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from dmat import files, tracking
from dmat.errors import DmatError
from dmat.workspace import FINISHED, METRICS, PICTURES, RESULT


@contextlib.contextmanager
def lock(work: Path) -> Iterator[None]:
    """Keeps a second writer out of a work folder. Raises DmatError with the process that is at work."""
    held = filelock.FileLock(work / "lock", timeout=0)
    holder = work / "holder.json"
    try:
        held.acquire()
    except filelock.Timeout:
        who = json.loads(holder.read_text())["pid"] if holder.exists() else "unknown"
        raise DmatError(
            f"{work} is being computed by process {who}; wait for it, or stop it and run the same command "
            f"again: it goes on from the last checkpoint"
        ) from None
    try:
        files.write_json(holder, {"pid": os.getpid()})
        yield
    finally:
        held.release()


def kept(work: Path) -> list[Path]:
    """State of an earlier attempt that this one goes on from."""
    about = ("lock", "holder.json", *tracking.FILES)
    found = sorted(work.iterdir()) if work.exists() else []
    return [path for path in found if path.name not in about and not path.name.startswith(("before-", "."))]


def _before(work: Path) -> Path:
    """A folder for what is set aside now, which is not there yet."""
    while (old := work / f"before-{time.strftime('%Y%m%d-%H%M%S')}").exists():  # set aside twice within a second
        time.sleep(0.2)
    return old


def set_aside(work: Path, home: Path, keep: Collection[str] = ()) -> None:
    """Earlier state moves to `before-<time>/` beside the new one; nothing is deleted. keep: names that stay."""
    old = _before(work)
    tracking.set_aside(home, work, old)
    stay = {"lock", "holder.json", *tracking.FILES, *keep}
    for path in [p for p in work.iterdir() if p.name not in stay and not p.name.startswith("before-")]:
        old.mkdir(exist_ok=True)
        path.rename(old / path.name)


def finished(work: Path) -> dict[str, Any] | None:
    """The record of a complete result in a work folder. A damaged one counts as none."""
    with contextlib.suppress(DmatError):
        record = files.read_record(work / FINISHED, metrics=dict, code=str, files=dict, provenance=dict)
        if record.pop("checksum", None) == files.fingerprint(record):
            return record
    return None


def write_finished(work: Path, record: dict[str, Any]) -> None:
    """With a checksum of its own, so that no altered number is ever published."""
    files.write_json(work / FINISHED, record | {"checksum": files.fingerprint(record)})


def intact(work: Path) -> dict[str, Any] | None:
    """The record of the finished result, if each of its files still is what was computed.

    Otherwise what is not goes aside, and so does the record: the job then computes again what is missing, from its
    checkpoint, shards or inputs. Files that no job wrote go aside too.
    """
    path, record = work / FINISHED, finished(work)
    if not path.exists():
        return None
    found, recorded = files_of(work), record["files"] if record else {}
    damaged = [] if record else [FINISHED]
    damaged += sorted(name for name, digest in recorded.items() if found.get(name) != digest)
    strange = sorted(found.keys() - recorded.keys()) if record else []
    aside = [*strange, *(name for name in damaged if (work / name).exists())]
    if damaged:
        aside = list(dict.fromkeys([FINISHED, *aside]))
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        tqdm.write(
            f"note: {work}: {damaged[0]}{more} changed after the result was computed; it is computed again, and "
            f"what lies there is kept in before-*/",
            file=sys.stderr,
        )
    old = _before(work)
    for name in aside:
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, old / name)
    return None if damaged else record


def files_of(work: Path) -> dict[str, str]:
    """Name below the work folder -> SHA-256 of every file that is published."""
    folders = {
        f"{part}/{name}": one for part in (RESULT, PICTURES) for name, one in files.checksums(work / part).items()
    }
    return folders | ({METRICS: files.sha256(work / METRICS)} if (work / METRICS).is_file() else {})
