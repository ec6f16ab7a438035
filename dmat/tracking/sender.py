"""Sends runs to MLflow from a separate process: the import of MLflow and its work must not slow a training down.
A thread would slow it down, because Python runs one thread at a time.

A project has one such process per machine and store. It reads marker files, records and metrics, and writes what it did
into the records, so that there is nothing to agree on. It sends what is new every few seconds, completes runs that have
ended or whose process died, and ends when no run of this machine is active. If it dies, nothing is lost: the run starts
another, or the next command does.
"""

import contextlib
import dataclasses
import os
import platform
import site
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dmat import files, liveness
from dmat.errors import DmatError, first_line
from dmat.tracking import open_runs, parents, stores
from dmat.tracking.open_runs import Marker
from dmat.tracking.run_record import RunDeletedError, RunRecord, RunUploader

SEND_EVERY = 5.0  # seconds
_MAX_RETRY_SECONDS = 60.0  # longest interval between two attempts at a store that does not answer
_POLL_SECONDS = 0.1  # interval of looking for runs that began or ended
_NICENESS = 5


def ensure(home: Path, folder: Path) -> bool:
    """Starts the sending process for the run in `folder`. Returns whether it was started.

    Not if the process of this project, machine and store runs, or if the run has no marker file: nothing is left to do.
    """
    path = _process_file(home)
    with open_runs.lock(home):  # while it is held, the process does not decide to end
        if _is_running(path) or not open_runs.exists(home, folder):
            return False
        pid = _start(home)
        files.write_json(path, {"pid": pid, "started": liveness.identity(pid)})
        return True


def popen_options(home: Path) -> dict[str, Any]:
    """Options of `subprocess.Popen` that start the sending process with this interpreter and this code of dmat.

    The process gets its own session, so that Ctrl-C reaches only the process that starts it.
    """
    package = str(Path(__file__).parents[2])
    if package in (*site.getsitepackages(), site.getusersitepackages()):
        package = ""  # importable anyway; in PYTHONPATH, installed packages would hide modules of Python itself
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, "-P", "-c", "from dmat.tracking import sender; sender.main()", str(home)],
        "env": os.environ | {"PYTHONPATH": path},
        "cwd": home,  # `dvc` removes the folder of a queued experiment
        "start_new_session": True,
        # of its own, because a reader of the command's output would wait for this process too
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
    }


def main() -> None:
    """The sending process. Its argument in sys.argv: the home of the project."""
    os.nice(_NICENESS)
    warnings.simplefilter("ignore")  # nobody reads them
    follow(Path(sys.argv[1]))


def follow(home: Path) -> None:
    """Sends the runs of this machine until none is active and the end of each was attempted."""
    runs: dict[Path, _FollowedRun] = {}
    while home.is_dir():
        markers = _markers(home)
        runs = {path: runs.get(path) or _FollowedRun(home, path, marker) for path, marker in markers.items()}
        for path, run in runs.items():
            run.refresh(markers[path])
        due = [
            run for run in runs.values() if run.next_attempt <= time.monotonic() and not run.waits_for(runs.values())
        ]
        if due:
            run = min(due, key=lambda run: run.has_ended)  # active runs first
            if run.step():
                del runs[run.path]
        elif not all(run.has_ended for run in runs.values()):
            time.sleep(_POLL_SECONDS)
        else:
            with open_runs.lock(home):
                if _markers(home) == markers:  # no run began or ended meanwhile
                    _process_file(home).unlink(missing_ok=True)
                    return


def _start(home: Path) -> int:
    """Starts to send in a process; in a thread where no process can be started. Returns the pid."""
    try:
        process = subprocess.Popen(**popen_options(home))
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie stays of it
        return process.pid
    except OSError:
        threading.Thread(target=follow, args=(home,), daemon=True).start()
        return os.getpid()


def _process_file(home: Path) -> Path:
    """The file that names the sending process."""
    name = files.fingerprint([platform.node(), stores.identity(home)])
    return home / "mlruns" / "active" / f".sender-{name}.json"


class _Process(TypedDict):
    """Content of that file."""

    pid: int
    started: str  # `liveness.identity`


def _is_running(path: Path) -> bool:
    with contextlib.suppress(DmatError):  # missing or damaged
        process = files.read_record(path, _Process)
        return liveness.is_running(process["pid"], process["started"])
    return False


def _markers(home: Path) -> dict[Path, Marker]:
    """Marker files of this machine and store."""
    store = stores.identity(home)
    return {
        path: marker
        for path, marker in open_runs.read(home)
        if marker["store"] == store and not open_runs.elsewhere(marker)
    }


@dataclasses.dataclass
class _FollowedRun:
    """State of one run in the sending process."""

    home: Path
    path: Path  # of the marker file
    marker: Marker
    has_ended: bool = False
    next_attempt: float = 0.0  # time on the monotonic clock
    retry: float = dataclasses.field(default_factory=lambda: SEND_EVERY)  # seconds until the attempt after a failure
    watching: threading.Thread | None = None  # waits for the end of `dvc`

    def __post_init__(self) -> None:
        self.folder = open_runs.folder_of(self.home, self.marker)
        self.uploader = RunUploader(self.home, RunRecord(self.folder, self.marker["store"]))
        if self.marker["by_children"]:
            arguments = (self.home, self.folder, self.marker["pid"], self.marker["started"])
            self.watching = threading.Thread(target=parents.watch, args=arguments, daemon=True)
            self.watching.start()

    def refresh(self, marker: Marker) -> None:
        """Makes an attempt due if the run was started again or ended."""
        has_ended = not self.watching.is_alive() if self.watching else open_runs.has_ended(marker)
        if (marker, has_ended) != (self.marker, self.has_ended):
            self.marker, self.has_ended, self.next_attempt = marker, has_ended, 0.0

    def waits_for(self, others: Iterable["_FollowedRun"]) -> bool:
        """Whether the status of this run depends on that of a run which has ended and was not sent yet."""
        folder = open_runs.relative(self.home, self.folder)
        return self.marker["by_children"] and any(
            other.has_ended and open_runs.parent_of(other.folder) == folder for other in others
        )

    def step(self) -> bool:
        """Sends what is new, and the end of a run that has ended; records a failure. Returns whether all was sent."""
        problem, wait = "", self.retry
        try:
            if self.has_ended:
                open_runs.complete(self.uploader, self.path, self.marker)
                return True
            wait, self.retry = self._send(), SEND_EVERY
        except RunDeletedError as error:
            self.uploader.record.update(warnings=[*self.uploader.record["warnings"], str(error)])
            open_runs.remove(self.home, self.folder)
            return True
        except Exception as error:  # any failure of tracking must leave the run alone
            problem, self.retry = first_line(error), min(2 * self.retry, _MAX_RETRY_SECONDS)
        record = self.uploader.record
        if problem != record["problem"] and open_runs.exists(self.home, self.folder):
            with contextlib.suppress(DmatError, OSError):  # a full disk
                record.update(problem=problem)
        self.next_attempt = time.monotonic() + wait
        return False

    def _send(self) -> float:
        """Sends what is new of an active run. Returns the seconds until the next time."""
        if self.marker["by_children"]:  # it has no metrics; its first child creates it
            return SEND_EVERY
        with self.uploader.exclusive():
            about = self.uploader.record["about"] or {}
            if self.marker.get("attempt") not in (None, about.get("started")):
                return _POLL_SECONDS  # the record of this attempt is written in a moment
            self.uploader.connect()
            self.uploader.send_new_metrics()
            self.uploader.send_tags()
        return SEND_EVERY
