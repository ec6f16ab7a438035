"""The MLflow run of a whole `dvc repro`: parent of the runs of its stages.

`dvc` itself does not take part. The first stage writes the record of the parent run, and starts a small process that
waits until `dvc` has ended and then ends the run.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import psutil

from dmat import files, liveness
from dmat.errors import Interrupted, first_line
from dmat.redaction import redacted
from dmat.tracking import dvc_process, open_runs, origin, sender, stores
from dmat.tracking.run_record import RunRecord

_NICENESS = 5
_PARENTS = Path("mlruns") / "parents"
_VARIABLE = "DMAT_PARENT"  # environment variable of the stages of `dmat repro`: name of the folder below _PARENTS


def folder_above(home: Path, root: Path) -> Path | None:
    """The folder with the record of the run of the `dvc` or `dmat repro` above this process; None for a direct command.

    Writes the record and starts the waiting process if no stage did so yet. root: the folder with `dvc.lock`.
    """
    if name := os.environ.get(_VARIABLE):
        return home / _PARENTS / name
    ancestor = dvc_process.outermost()
    if ancestor is None:
        return None
    dvc, _, arguments = ancestor
    return _begin(home, root, dvc, " ".join(["dvc", *arguments]))


def begin_parent(home: Path, root: Path, command: str) -> dict[str, str]:
    """Begins the parent run of stages that this process starts, also on other machines.

    Returns the environment variables with which they find it. command: its name. Nothing if tracking is off.
    """
    if os.environ.get("DMAT_TRACKING", "on") == "off":
        return {}
    return {_VARIABLE: _begin(home, root, psutil.Process(), command).name}


def _begin(home: Path, root: Path, process: psutil.Process, command: str) -> Path:
    """Writes the record of the run of a process, unless it has one. Returns its folder."""
    store, process_identity = stores.identity(home), liveness.identity(process.pid)
    folder = _folder(home, process.pid, process_identity)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(folder, store)
    with record.lock:
        record.refresh()
        if record["about"] is None:
            command = redacted(command)
            tags = {
                "dmat.stage": "dvc",
                "dmat.command": command,
                **{k.replace("_", "."): str(v) for k, v in origin.git(home).items()},
            }
            about = {"name": command, "tags": tags, "settings": {}, "started": process.create_time(), "parent": None}
            record.update(about=about | {"root": open_runs.relative(home, root), "dvc": process.pid})
            open_runs.write(home, folder, process.pid, by_children=True)
            _start_watching(home, folder, process.pid, process_identity)
    return folder


def record_stage_error(home: Path, error: BaseException) -> None:
    """Records in the run of the `dvc` process above, if any, that a stage ended with an error.

    The stage may have failed before it had a run of its own. KILLED after Interrupted, else FAILED.
    """
    if "DVC_STAGE" not in os.environ:
        return
    if name := os.environ.get(_VARIABLE):
        folder = home / _PARENTS / name
    elif (ancestor := dvc_process.outermost()) is not None:
        folder = _folder(home, ancestor[0].pid, ancestor[1])
    else:
        return
    if folder.is_dir() and (record := RunRecord(folder, stores.identity(home)))["stopped"] is None:
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        record.update(stopped={"status": status, "error": f"{os.environ['DVC_STAGE']}: {first_line(error)}"})


def main() -> None:
    """The waiting process. Its arguments in sys.argv: home, folder of the record, pid and identity of `dvc`."""
    home, folder, pid = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.nice(_NICENESS)
    status = liveness.wait_for_end(pid, sys.argv[4])
    if not folder.is_dir():  # the project was deleted meanwhile; nothing may be written into it
        return
    record = RunRecord(folder, stores.identity(home))
    if status == 0:
        record.update(stopped=None)  # an error of a stage was followed by a successful attempt
    elif status is None:
        record.detect_kill(home)  # at once, because the next `dvc` removes the traces of a kill
    elif os.WIFSIGNALED(status):
        record.update(stopped={"status": "KILLED", "error": f"dvc was killed by signal {os.WTERMSIG(status)}"})
    elif status and record["stopped"] is None:
        record.update(stopped={"status": "FAILED", "error": f"dvc ended with code {os.WEXITSTATUS(status)}"})
    warnings.simplefilter("ignore")  # nobody reads them
    open_runs.sync(home, wait=60)


def _folder(home: Path, pid: int, process_identity: str) -> Path:
    return home / _PARENTS / f"{pid}-{files.fingerprint([process_identity, stores.identity(home)])}"


def _start_watching(home: Path, folder: Path, pid: int, process_identity: str) -> None:
    arguments = [str(home), str(folder), str(pid), process_identity]
    with contextlib.suppress(OSError):  # no further process can be started: the next command ends the run
        devnull = subprocess.DEVNULL
        # `dvc` removes the folder of a queued experiment, so it must not be the working directory
        options = sender.popen_options("from dmat.tracking import parents; parents.main()", *arguments) | {"cwd": home}
        subprocess.Popen(**options, stdin=devnull, stdout=devnull, stderr=devnull)
