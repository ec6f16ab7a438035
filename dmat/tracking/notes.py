"""Which runs of this machine are not ended in their store yet: one note each in `mlruns/active/`.

A note outlives its process. `sync` sends what such a run still owes: metrics, its end as it was, or KILLED.
"""

import warnings
from pathlib import Path
from typing import Any

import filelock
import psutil

from dmat import files
from dmat.tracking import stores
from dmat.tracking.memory import Memory, Sender

LOST = "the process ended without a word: killed, or the machine stopped"


def write(home: Path, folder: Path, pid: int, by_children: bool = False) -> None:
    """A run remembered in `folder` is the work of process `pid`. by_children: its status is that of its children."""
    files.write_json(
        _path(home, folder),
        {
            "folder": str(folder),
            "pid": pid,
            "started": psutil.Process(pid).create_time(),
            "by_children": by_children,
            "store": stores.store(home),
        },
    )


def read(home: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every note with its path."""
    return [(path, files.read_json(path)) for path in sorted((home / "mlruns" / "active").glob("[!.]*.json"))]


def alive(note: dict[str, Any]) -> bool:
    """Whether the process that the note names still runs; its number alone may belong to another by now."""
    try:
        return bool(abs(psutil.Process(note["pid"]).create_time() - note["started"]) < 1)
    except psutil.NoSuchProcess:
        return False


def remove(home: Path, folder: Path) -> None:
    _path(home, folder).unlink(missing_ok=True)


def sync(home: Path, report: bool = False) -> list[str]:
    """Brings the store up to date with runs whose process is gone; returns a line for each.

    report: raise what goes wrong, for a person who asked; else warn and go on.
    """
    address = stores.store(home)
    waiting = [(path, note) for path, note in read(home) if note["store"] == address and not alive(note)]
    if not waiting:
        return []
    done = []
    lock = filelock.FileLock(home / "mlruns" / "sync.lock", timeout=60 if report else 0)
    try:
        with lock:
            # parents last: their status is that of their children
            for path, note in sorted(waiting, key=lambda item: item[1]["by_children"]):
                done.append(_catch_up(home, note))
                path.unlink(missing_ok=True)
    except filelock.Timeout:
        return []  # another process does it
    except Exception as error:  # an unreachable store must not stop a stage
        if report:
            raise
        warnings.warn(f"earlier runs could not be brought up to date ({first_line(error)})", stacklevel=1)
    return done


def _catch_up(home: Path, note: dict[str, Any]) -> str:
    folder = Path(note["folder"])
    memory = Memory(folder, note["store"])
    if memory["about"] is None:
        return f"{folder.name}: nothing is known of it any more"
    sender = Sender(home, memory)
    sender.connect(live=False)
    sender.send_new()
    ending = memory["ending"]
    if ending is None:
        ended = max((path.stat().st_mtime for path in folder.iterdir() if path.is_file()), default=0.0)
        ending = {"status": "KILLED", "error": LOST, "metrics": {}, "pictures": [], "ended": ended}
    if note["by_children"]:
        status, ended = sender.status_by_children()
        ending = {"status": status, "error": "", "metrics": {}, "pictures": [], "ended": ended}
    sender.send_end(ending["status"], ending)
    return f"{memory['about']['name']}: {ending['status']}"


def _path(home: Path, folder: Path) -> Path:
    return home / "mlruns" / "active" / f"{folder.parent.name}-{folder.name}.json"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
