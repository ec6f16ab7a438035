"""Which runs are not ended in their store yet: one note each in `mlruns/active/`.

A note outlives its process. `sync` sends what such a run still owes: metrics, its end as it was, or KILLED.
"""

import contextlib
import platform
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
import psutil

from dmat import files, liveness, redaction
from dmat.errors import DmatError, first_line
from dmat.tracking import stores
from dmat.tracking.run_record import FILES, RunRecord, RunUploader, remembered

LOST = "the process ended without a word: killed, or the machine stopped"
_KEYS = {"folder", "host", "pid", "started", "by_children", "store"}


def write(home: Path, folder: Path, pid: int, by_children: bool = False) -> None:
    """A run remembered in `folder` is the work of process `pid` here. by_children: its status is its children's."""
    about = {"pid": pid, "started": liveness.identity(pid), "host": platform.node()}
    marker = {"folder": relative(home, folder), "by_children": by_children, "store": stores.identity(home)}
    _write(home, folder, about | marker)


def read(home: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every note with its path. One that cannot be read is left out; `damaged` names it."""
    return [(path, marker) for path in _paths(home) if (marker := _read(path)) is not None]


def damaged(home: Path) -> list[Path]:
    """Files among the notes that are none."""
    return [path for path in _paths(home) if path.exists() and _read(path) is None]


def folder_of(home: Path, marker: dict[str, Any]) -> Path:
    """The folder that remembers the run of a note."""
    return home / marker["folder"]


def alive(marker: dict[str, Any]) -> bool:
    """Whether the process that the note names still runs; its number alone may belong to another by now. What
    happens on another machine is not known here: its processes count as alive."""
    if elsewhere(marker):
        return True
    if isinstance(marker["started"], str):
        return liveness.lives(marker["pid"], marker["started"])
    return _lives_since(marker["pid"], marker["started"])


def _lives_since(pid: int, started: float) -> bool:
    """The same by the time of day (seconds since 1970), which older notes have; a step of the clock deceives it."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def elsewhere(marker: dict[str, Any]) -> bool:
    """Whether the note is of another machine that shares this project."""
    return bool(marker["host"] != platform.node())


def set_aside(home: Path, work: Path, old: Path) -> None:
    """Moves what is remembered of the run in `work` to `old`, and its note with it: it is still to be ended. So do
    the folders of runs below it (a study's trials) that are not ended either."""
    parent = relative(home, work)
    for marker in [marker for _, marker in read(home) if _parent(folder_of(home, marker)) == parent]:
        folder = folder_of(home, marker)
        with _moved(home, folder, old / folder.name):
            old.mkdir(exist_ok=True)
            about = remembered(folder)["about"] | {"parent": relative(home, old)}
            RunRecord(folder, marker["store"]).update(about=about)
            folder.rename(old / folder.name)
    with _moved(home, work, old):
        for name in ("metrics.jsonl", "tracking.json"):
            if (work / name).exists():
                old.mkdir(exist_ok=True)
                (work / name).rename(old / name)


def sync(home: Path, report: bool = False, gone: Collection[str] = (), wait: float = 0) -> list[str]:
    """Brings the store up to date with runs whose process is gone; returns a line for each.

    report: raise DmatError if the store cannot be reached, and say what is left, for a person who asked; else warn and
    go on. gone: names of machines whose processes have all ended. wait: seconds for another process that does the same;
    after them it is left to that one.
    """
    identity = stores.identity(home)
    waiting = [
        (path, marker) for path, marker in read(home) if marker["store"] == identity and _owed(home, marker, gone)
    ]
    done = []
    lock = filelock.FileLock(home / "mlruns" / "sync.lock", timeout=60 if report else wait)
    try:
        if waiting:
            with lock:
                # parents last: their status is that of their children
                for path, marker in sorted(waiting, key=lambda item: item[1]["by_children"]):
                    done += _catch_up(home, path, marker, gone)
    except filelock.Timeout:
        return []  # another process does it
    except Exception as error:  # an unreachable store must not stop a stage
        if report:
            raise DmatError(
                f"MLflow at {stores.shown(home)} cannot be reached ({first_line(error)}); {len(done)} of "
                f"{len(waiting)} runs were brought up to date; start it or correct MLFLOW_TRACKING_URI, and run "
                f"the same command again"
            ) from error
        warnings.warn(f"earlier runs could not be brought up to date ({first_line(error)})", stacklevel=1)
    return done + (_left(home, identity) if report else [])


def reap(home: Path, gone: Collection[str]) -> list[str]:
    """Ends runs that died elsewhere: all of the machines named, and runs named by (the start of) their id that nobody
    here remembers. With nothing named, says what there is to end. Returns a line for each.

    Raises DmatError for a run that is alive or has ended, for a name that is neither, and if the store is away.
    """
    machines = {marker["host"] for _, marker in read(home) if elsewhere(marker)}
    here = platform.node()
    if here in gone:
        raise DmatError(f"{here} is this machine; expected another; `dmat runs sync` ends what died here")
    done = sync(home, report=True, gone=machines & set(gone))
    client, experiment = stores.reach(home)
    open_runs = {run.info.run_id: run for run in client.search_runs([experiment], "attributes.status = 'RUNNING'")}
    known = {remembered(folder_of(home, marker)).get("run"): marker for _, marker in read(home)}
    for name in [name for name in gone if name not in machines]:
        fits = [run for run in open_runs if len(name) >= 4 and run.startswith(name)]
        if len(fits) != 1:
            raise DmatError(
                f"{name!r} is neither a machine with open runs ({', '.join(sorted(machines)) or 'none'}) nor the start "
                f"of the id of one open run; expected one of these; `dmat runs list --status RUNNING` shows them"
            )
        if fits[0] in known:
            marker = known[fits[0]]
            raise DmatError(
                f"run {fits[0][:8]} is remembered as work of process {marker['pid']} on {marker['host']}; expected one "
                f"that nobody remembers; stop that process, or name the machine if it is gone for good"
            )
        client.set_tag(fits[0], "dmat.error", LOST)
        client.set_terminated(fits[0], status="KILLED")
        done.append(f"{open_runs[fits[0]].info.run_name}: KILLED")
    if not gone:
        lost = [run for id_, run in open_runs.items() if id_ not in known]
        done += [
            f"{run.info.run_name} ({run.info.run_id[:8]}) is open and nobody here remembers it: if it died, "
            f"`dmat runs reap {run.info.run_id[:8]}`"
            for run in lost
        ]
    return done or ["no run died elsewhere"]


def remove(home: Path, folder: Path) -> None:
    with _lock(home):
        _path(home, folder).unlink(missing_ok=True)


def exists(home: Path, folder: Path) -> bool:
    """Whether the run in `folder` is still to be ended by somebody."""
    return _path(home, folder).exists()


def relative(home: Path, folder: Path) -> str:
    """A folder as notes and memories name it: a project may be moved."""
    return str(folder.relative_to(home) if folder.is_relative_to(home) else folder)


@contextlib.contextmanager
def _moved(home: Path, folder: Path, there: Path) -> Iterator[None]:
    """Inside, what is remembered of a run moves. Whoever is killed there leaves one note too many, not none."""
    with filelock.FileLock(folder / "sending.lock", timeout=120), _lock(home):
        path = _path(home, folder)
        marker = _read(path)
        if marker is not None:
            files.write_json(_path(home, there), marker | {"folder": relative(home, there)})
        yield
        path.unlink(missing_ok=True)


def _parent(folder: Path) -> str | None:
    """The folder that remembers the parent of the run in `folder`."""
    about = remembered(folder).get("about")
    return about.get("parent") if isinstance(about, dict) else None


def _owed(home: Path, marker: dict[str, Any], gone: Collection[str]) -> bool:
    """Whether a run has ended, by its own word or with its process."""
    if marker["host"] in gone and elsewhere(marker):
        return True
    if alive(marker):
        return not marker["by_children"] and RunRecord(folder_of(home, marker), marker["store"])["ending"] is not None
    return True


def _catch_up(home: Path, path: Path, marker: dict[str, Any], gone: Collection[str]) -> list[str]:
    """Sends what one run owes. Does nothing if it was started again or was ended since the note was read."""
    folder = folder_of(home, marker)
    with _lock(home):  # nobody moves it now
        if not folder.is_dir():
            path.unlink(missing_ok=True)
            return [f"{folder.name}: nothing is known of it any more"]
    uploader = RunUploader(home, RunRecord(folder, marker["store"]))
    with uploader.turn():
        if _read(path) != marker or not _owed(home, marker, gone):
            return []
        if uploader.record["about"] is None:
            _unlink_if(home, path, marker)
            return [f"{folder.name}: nothing is known of it any more"]
        uploader.connect(live=False)
        uploader.send_new()
        ending = uploader.record["ending"]
        if marker["by_children"]:
            ending = _ending(**uploader.ending_by_children())
        elif ending is None:
            changed = [file.stat().st_mtime for file in folder.iterdir() if file.name not in FILES and file.is_file()]
            ending = _ending("KILLED", LOST, max(changed, default=uploader.record["about"]["started"]))
        uploader.send_end(ending["status"], ending)
        _unlink_if(home, path, marker)
    return [f"{uploader.record['about']['name']}: {ending['status']}"]


def _ending(status: str, error: str, ended: float) -> dict[str, Any]:
    return {"status": status, "error": error, "metrics": {}, "pictures": [], "ended": ended}


def _left(home: Path, identity: str) -> list[str]:
    """What this command could not see to, for people."""
    others: dict[str, int] = {}
    hosts: dict[str, int] = {}
    for _, marker in read(home):
        if marker["store"] != identity:
            others[marker["store"]] = others.get(marker["store"], 0) + 1
        elif elsewhere(marker):
            hosts[marker["host"]] = hosts.get(marker["host"], 0) + 1
    lines = [
        f"{count} of another store, {store}: set MLFLOW_TRACKING_URI to it{_with_password(store)} and run this again"
        if store != stores.EMBEDDED
        else f"{count} of this project's own store: unset MLFLOW_TRACKING_URI and run this again"
        for store, count in sorted(others.items())
    ]
    lines += [
        f"{count} of machine {host}: if it is gone for good, `dmat runs reap {host}`"
        for host, count in sorted(hosts.items())
    ]
    return lines + [f"{path} is no note of a run; delete it" for path in damaged(home)]


def _with_password(store: str) -> str:
    return f" (its password for {redaction.MASK})" if redaction.MASK in store else ""


def _path(home: Path, folder: Path) -> Path:
    words = [part for part in Path(relative(home, folder)).parts if part not in ("runs", "mlruns", "/")]
    return home / "mlruns" / "active" / f"{'-'.join(words)}.json"


def _paths(home: Path) -> list[Path]:
    return sorted((home / "mlruns" / "active").glob("[!.]*.json"))


def _read(path: Path) -> dict[str, Any] | None:
    """A note; None if it is gone by now or is none."""
    try:
        marker = files.read_json(path)
    except (DmatError, OSError):
        return None
    if not isinstance(marker, dict) or not set(marker) >= _KEYS:
        return None
    return marker | {"store": redaction.address(marker["store"])}  # earlier versions wrote a password into it


def _write(home: Path, folder: Path, marker: dict[str, Any]) -> None:
    path = _path(home, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(home):
        files.write_json(path, marker)


def _unlink_if(home: Path, path: Path, marker: dict[str, Any]) -> None:
    """Removes a note unless its run was started again meanwhile."""
    with _lock(home):
        if _read(path) == marker:
            path.unlink(missing_ok=True)


def _lock(home: Path) -> filelock.FileLock:
    """Held while a note is compared and removed, or written; never while a store is spoken to."""
    (home / "mlruns" / "active").mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(home / "mlruns" / "active" / ".lock", timeout=60)
