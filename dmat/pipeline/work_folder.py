"""The work folder of an instance: its lock, the record of a complete result, and setting earlier state aside."""

import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NotRequired

import filelock
from tqdm import tqdm
from typing_extensions import TypedDict

from dmat import files, tracking
from dmat.errors import DmatError
from dmat.workspace import FINISHED, METRICS, PICTURES, RESULT, Provenance


class Finished(TypedDict):
    """The record of a complete result."""

    metrics: Mapping[str, float | Mapping[str, float]]  # as `job.Metrics`
    notes: list[str]  # sentences that a reader of the result must know
    code: str  # identity of the stage's code
    files: dict[str, str]  # path below the work folder -> SHA-256, of every file that is published
    provenance: Provenance
    checksum: NotRequired[str]  # of the other keys; in the file only


_HOLDER = "holder.json"
_ADVICE = "wait for it, or stop it and run the same command again: it resumes from the last checkpoint"


@contextlib.contextmanager
def lock(work: Path, advice: str = _ADVICE, timeout: float = 0) -> Iterator[None]:
    """Holds the lock of a work folder, so that no second process writes there.

    timeout: seconds for a process that holds the lock. Raises DmatError with its id, and the advice, after them.
    """
    file_lock = filelock.FileLock(work / "lock", timeout=timeout)
    try:
        file_lock.acquire()
    except filelock.Timeout:
        raise DmatError(f"{work} is being computed by process {holder(work) or 'unknown'}; {advice}") from None
    try:
        files.write_json(work / _HOLDER, {"pid": os.getpid()})
        yield
    finally:
        file_lock.release()


def holder(work: Path) -> int | None:
    """The process that holds the lock of a work folder, or held it last; None if that cannot be read."""
    with contextlib.suppress(DmatError):
        return files.read_record(work / _HOLDER, dict[str, int]).get("pid")
    return None


def is_locked(work: Path) -> bool:
    """Whether a process holds the lock of a work folder."""
    if not (work / "lock").exists():
        return False
    try:
        with filelock.FileLock(work / "lock", timeout=0):
            return False
    except filelock.Timeout:
        return True


def resumable_paths(work: Path) -> list[Path]:
    """Files and folders of an earlier attempt from which this one resumes."""
    bookkeeping = ("lock", _HOLDER, *tracking.FILES)
    paths = sorted(work.iterdir()) if work.exists() else []
    return [path for path in paths if path.name not in bookkeeping and not path.name.startswith(("before-", "."))]


def _new_archive(work: Path) -> Path:
    """A new name `before-<time>` for what is set aside now; the folder does not exist yet."""
    while (archive := work / f"before-{time.strftime('%Y%m%d-%H%M%S')}").exists():  # set aside twice within a second
        time.sleep(0.2)
    return archive


def set_aside(work: Path, home: Path, keep: Collection[str] = ()) -> None:
    """Moves earlier state to `before-<time>/` in the same work folder; nothing is deleted.

    The record of the tracked run moves too. home: the folder that holds `mlruns/`. keep: names of files that stay.
    """
    archive = _new_archive(work)
    tracking.set_aside(home, work, archive)
    staying = {"lock", _HOLDER, *tracking.FILES, *keep}
    for path in [p for p in work.iterdir() if p.name not in staying and not p.name.startswith("before-")]:
        archive.mkdir(exist_ok=True)
        path.rename(archive / path.name)


def read_finished(work: Path) -> Finished | None:
    """The record of a complete result in a work folder; None without one, and for a damaged one."""
    with contextlib.suppress(DmatError):
        record = files.read_record(work / FINISHED, Finished)
        if record.pop("checksum", None) == files.fingerprint(record):
            return record
    return None


def write_finished(work: Path, record: Finished) -> None:
    """Writes the record of a complete result, with a checksum of the record, so that no altered number is ever
    published."""
    files.write_json(work / FINISHED, record | {"checksum": files.fingerprint(record)})


def verify_finished(work: Path) -> Finished | None:
    """The record of the finished result if every file is still the one that was computed; None otherwise.

    Sets aside damaged files together with the record, so that the job recomputes what is missing from its checkpoint,
    shards or inputs. Sets aside files that no job wrote as well; these alone do not invalidate the record.
    """
    path, record = work / FINISHED, read_finished(work)
    if not path.exists():
        return None
    checksums, recorded = files_of(work), record["files"] if record else {}
    damaged = [] if record else [FINISHED]
    damaged += sorted(name for name, digest in recorded.items() if checksums.get(name) != digest)
    unrecorded = sorted(checksums.keys() - recorded.keys()) if record else []
    to_set_aside = [*unrecorded, *(name for name in damaged if (work / name).exists())]
    if damaged:
        to_set_aside = list(dict.fromkeys([FINISHED, *to_set_aside]))
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        tqdm.write(
            f"note: {work}: {damaged[0]}{more} changed after the result was computed; it is computed again, and "
            f"the changed files are kept in before-*/",
            file=sys.stderr,
        )
    archive = _new_archive(work)
    for name in to_set_aside:
        (archive / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, archive / name)
    return None if damaged else record


def files_of(work: Path) -> dict[str, str]:
    """SHA-256 of every file that is published, by its path below the work folder."""
    folders = {
        f"{part}/{name}": digest for part in (RESULT, PICTURES) for name, digest in files.checksums(work / part).items()
    }
    return folders | ({METRICS: files.sha256(work / METRICS)} if (work / METRICS).is_file() else {})
