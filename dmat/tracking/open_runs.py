"""Marker files in `mlruns/active/`: one for each run that has not ended in its store yet.

A marker file outlives the process of its run. `complete` then sends what the store lacks: metrics, and the recorded end
of the run or KILLED.
"""

import contextlib
import platform
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NotRequired

import filelock
from typing_extensions import TypedDict

from dmat import files, liveness, redaction
from dmat.errors import DmatError, first_line
from dmat.tracking import stores
from dmat.tracking.run_record import (
    FILES,
    METRICS_LOG,
    RECORD,
    SYSTEM_LOG,
    RunDeletedError,
    RunRecord,
    RunUploader,
    read_tracking,
)

LOST = "the process ended without a final status: it was killed, or the machine stopped"


class Marker(TypedDict):
    """Content of a marker file."""

    folder: str  # with the record of the run, see `relative`
    host: str  # name of the machine
    pid: int  # of the process that executes the run
    started: str  # `liveness.identity` of that process
    by_children: bool  # the status of the run is that of its children
    store: str  # see `stores.identity`
    attempt: NotRequired[float | None]  # `started` of the record; None: of any
    ended: NotRequired[bool]  # the run ended, and its process may still run


def write(home: Path, folder: Path, pid: int, by_children: bool = False, attempt: float | None = None) -> None:
    """Writes the marker file of the run recorded in `folder`, which process `pid` of this machine executes.

    by_children: the status of the run is that of its children. attempt: `started` of a record that is written after
    this file; until then, `complete` sees that the run was started again.
    """
    marker: Marker = {
        "pid": pid,
        "started": liveness.identity(pid),
        "host": platform.node(),
        "folder": relative(home, folder),
        "by_children": by_children,
        "store": stores.identity(home),
        "attempt": attempt,
    }
    with lock(home):
        files.write_json(_path(home, folder), marker)


def remove(home: Path, folder: Path) -> None:
    """Removes the marker file of the run in `folder`: nothing is sent of it any more."""
    with lock(home):
        _path(home, folder).unlink(missing_ok=True)


def mark_ended(home: Path, folder: Path) -> None:
    """Marks the run in `folder` as ended; its record has its ending. Does nothing if the marker file is gone."""
    with lock(home):
        if (marker := _read(path := _path(home, folder))) is not None:
            files.write_json(path, marker | {"ended": True})


def read(home: Path) -> list[tuple[Path, Marker]]:
    """Path and content of every marker file. Unreadable ones are left out; `damaged` lists them."""
    return [(path, marker) for path in _paths(home) if (marker := _read(path)) is not None]


def damaged(home: Path) -> list[Path]:
    """Files in the folder of marker files that cannot be read as one."""
    return [path for path in _paths(home) if path.exists() and _read(path) is None]


def folder_of(home: Path, marker: Marker) -> Path:
    """The folder with the record of a marker's run."""
    return home / marker["folder"]


def alive(marker: Marker) -> bool:
    """Whether the process of a marker still runs. A reused pid does not count.

    Processes of other machines cannot be checked and count as alive.
    """
    if elsewhere(marker):
        return True
    return liveness.is_running(marker["pid"], marker["started"])


def has_ended(marker: Marker) -> bool:
    """Whether a run has ended: it says so, or its process is gone."""
    return marker.get("ended", False) or not alive(marker)


def elsewhere(marker: Marker) -> bool:
    """Whether the marker is of another machine that shares this project."""
    return bool(marker["host"] != platform.node())


def set_aside(home: Path, work: Path, target: Path) -> None:
    """Moves the record of the run in `work` to `target`, with its marker file: the run still has to be ended.

    Folders of child runs (trials of a study) that have not ended either move with it.
    """
    parent = relative(home, work)
    for marker in [marker for _, marker in read(home) if parent_of(folder_of(home, marker)) == parent]:
        folder = folder_of(home, marker)
        with _moved(home, folder, target / folder.name):
            target.mkdir(exist_ok=True)
            about = read_tracking(folder)["about"] | {"parent": relative(home, target)}
            RunRecord(folder, marker["store"]).update(about=about)
            folder.rename(target / folder.name)
    with _moved(home, work, target):
        for name in (METRICS_LOG, SYSTEM_LOG, RECORD):
            if (work / name).exists():
                target.mkdir(exist_ok=True)
                (work / name).rename(target / name)


def sync(home: Path, dead_hosts: Collection[str] = ()) -> list[str]:
    """Sends to the store what is missing of runs that have ended.

    dead_hosts: machines whose processes have all ended. Returns a line for each run, and lines about what is left.
    Raises DmatError if the store cannot be reached.
    """
    identity = stores.identity(home)
    pending = [
        (path, marker)
        for path, marker in read(home)
        if marker["store"] == identity and (has_ended(marker) or marker["host"] in dead_hosts)
    ]
    lines: list[str] = []
    try:
        # parents last: their status is that of their children
        for path, marker in sorted(pending, key=lambda entry: entry[1]["by_children"]):
            record = RunRecord(folder_of(home, marker), marker["store"])
            lines += complete(RunUploader(home, record), path, marker)
    except Exception as error:  # of MLflow or of the network
        raise DmatError(
            f"MLflow at {stores.masked_uri(home)} cannot be reached ({first_line(error)}); {len(lines)} of "
            f"{len(pending)} runs were brought up to date; start it or correct MLFLOW_TRACKING_URI, and run "
            f"the same command again"
        ) from error
    return lines + _unsynced(home, identity)


def complete(uploader: RunUploader, path: Path, marker: Marker) -> list[str]:
    """Sends what the store lacks of a run that has ended, and removes its marker file. Returns lines for people.

    Does nothing if the run was started again, or completed by another process, since `marker` was read. May raise any
    exception of MLflow.
    """
    home, record = uploader.home, uploader.record
    with lock(home):  # nobody moves it now
        if not record.folder.is_dir():
            path.unlink(missing_ok=True)
            return [f"{record.folder.name}: its record is gone"]
    try:
        return _complete(uploader, path, marker)
    except RunDeletedError as error:
        _unlink_unchanged(home, path, marker)
        return [str(error)]


def _complete(uploader: RunUploader, path: Path, marker: Marker) -> list[str]:
    home, record = uploader.home, uploader.record
    with uploader.exclusive():
        if _read(path) != marker:
            return []
        if record["about"] is None:
            _unlink_unchanged(home, path, marker)
            return [f"{record.folder.name}: its record is gone"]
        uploader.connect()
        uploader.send_new_metrics()
        ending = record["ending"]
        if marker["by_children"]:
            ending = _ending(**uploader.ending_by_children())
        elif ending is None:
            change_times = [
                file.stat().st_mtime for file in record.folder.iterdir() if file.name not in FILES and file.is_file()
            ]
            ending = _ending("KILLED", LOST, max(change_times, default=record["about"]["started"]))
        uploader.send_end(ending["status"], ending)
        _unlink_unchanged(home, path, marker)
    return [f"{record['about']['name']}: {ending['status']}", *record["warnings"]]


def reap(home: Path, names: Collection[str]) -> list[str]:
    """Ends runs whose process died on another machine. Returns a line for each.

    names: machines, of which all runs are ended; or ids of runs (the start of one suffices) without a marker file in
    this project. Without names, lists what there is to end.

    Raises DmatError for a run that is alive or has ended, for a name that is neither, and if the store is unreachable.
    """
    machines = {marker["host"] for _, marker in read(home) if elsewhere(marker)}
    this_host = platform.node()
    if this_host in names:
        raise DmatError(f"{this_host} is this machine; expected another; `dmat runs sync` ends what died here")
    lines = sync(home, machines & set(names))
    client, experiment = stores.connect_or_raise(home)
    running = {run.info.run_id: run for run in stores.search_runs(client, experiment, "attributes.status = 'RUNNING'")}
    markers = {read_tracking(folder_of(home, marker)).get("run"): marker for _, marker in read(home)}
    for name in [name for name in names if name not in machines]:
        matches = [run for run in running if len(name) >= 4 and run.startswith(name)]
        if len(matches) != 1:
            raise DmatError(
                f"{name!r} is neither a machine with open runs ({', '.join(sorted(machines)) or 'none'}) nor the start "
                f"of the id of one open run; expected one of these; `dmat runs list --status RUNNING` shows them"
            )
        if matches[0] in markers:
            marker = markers[matches[0]]
            raise DmatError(
                f"run {matches[0][:8]} has a marker file of process {marker['pid']} on {marker['host']}; expected "
                f"one without a marker file; stop that process, or name the machine if it is gone for good"
            )
        client.set_tag(matches[0], "dmat.error", LOST)
        client.set_terminated(matches[0], status="KILLED")
        lines.append(f"{running[matches[0]].info.run_name}: KILLED")
    if not names:
        unmarked = [run for id_, run in running.items() if id_ not in markers]
        lines += [
            f"{run.info.run_name} ({run.info.run_id[:8]}) is open and has no marker file here: if it died, "
            f"`dmat runs reap {run.info.run_id[:8]}`"
            for run in unmarked
        ]
    return lines or ["no run died elsewhere"]


def exists(home: Path, folder: Path) -> bool:
    """Whether the run in `folder` has a marker file: it has not ended in its store yet."""
    return _path(home, folder).exists()


def relative(home: Path, folder: Path) -> str:
    """A folder as marker files and records hold it: relative to the project, which may be moved."""
    return str(folder.relative_to(home) if folder.is_relative_to(home) else folder)


@contextlib.contextmanager
def _moved(home: Path, folder: Path, target: Path) -> Iterator[None]:
    """Moves the marker file of a run around the block, which moves its record. A kill inside leaves one marker file too
    many, never too few."""
    with filelock.FileLock(folder / "sending.lock", timeout=120), lock(home):
        path = _path(home, folder)
        marker = _read(path)
        if marker is not None:
            files.write_json(_path(home, target), marker | {"folder": relative(home, target)})
        yield
        path.unlink(missing_ok=True)


def parent_of(folder: Path) -> str | None:
    """The folder with the record of the parent of the run in `folder`."""
    about = read_tracking(folder).get("about")
    return about.get("parent") if isinstance(about, dict) else None


def _ending(status: str, error: str, ended: float) -> dict[str, Any]:
    return {"status": status, "error": error, "metrics": {}, "pictures": [], "ended": ended}


def _unsynced(home: Path, identity: str) -> list[str]:
    """Lines for people about the runs that this command could not sync."""
    other_stores: dict[str, int] = {}
    other_hosts: dict[str, int] = {}
    for _, marker in read(home):
        if marker["store"] != identity:
            other_stores[marker["store"]] = other_stores.get(marker["store"], 0) + 1
        elif elsewhere(marker):
            other_hosts[marker["host"]] = other_hosts.get(marker["host"], 0) + 1
    lines = [
        f"{count} of another store, {store}: set MLFLOW_TRACKING_URI to it{_with_password(store)} and run this again"
        if store != stores.EMBEDDED
        else f"{count} of this project's own store: unset MLFLOW_TRACKING_URI and run this again"
        for store, count in sorted(other_stores.items())
    ]
    lines += [
        f"{count} of machine {host}: if it is gone for good, `dmat runs reap {host}`"
        for host, count in sorted(other_hosts.items())
    ]
    return lines + [f"{path} is not a readable marker file of a run; delete it" for path in damaged(home)]


def _with_password(store: str) -> str:
    return f" (its password for {redaction.MASK})" if redaction.MASK in store else ""


def _path(home: Path, folder: Path) -> Path:
    names = [part for part in Path(relative(home, folder)).parts if part not in ("runs", "mlruns", "/")]
    return home / "mlruns" / "active" / f"{'-'.join(names)}.json"


def _paths(home: Path) -> list[Path]:
    return sorted((home / "mlruns" / "active").glob("[!.]*.json"))


def _read(path: Path) -> Marker | None:
    """Content of a marker file; None if it is missing or damaged."""
    try:
        marker = files.read_record(path, Marker)
    except DmatError:
        return None
    # earlier versions wrote a password into the store's address
    return marker | {"store": redaction.address(marker["store"])}


def _unlink_unchanged(home: Path, path: Path, marker: Marker) -> None:
    """Removes a marker file unless its run was started again meanwhile."""
    with lock(home):
        if _read(path) == marker:
            path.unlink(missing_ok=True)


def lock(home: Path) -> filelock.FileLock:
    """Lock to hold while a marker file is written, or compared and removed; never during requests to a store."""
    (home / "mlruns" / "active").mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(home / "mlruns" / "active" / ".lock", timeout=60)
