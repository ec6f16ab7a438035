"""The MLflow run of a whole `dvc repro`: parent of the runs of its stages.

`dvc` itself does not take part. The first stage writes the record of the parent run. The sending process waits until
`dvc` has ended and then ends the run.
"""

import os
from pathlib import Path

import psutil

from dmat import files, liveness
from dmat.errors import Interrupted, first_line
from dmat.redaction import redacted
from dmat.tracking import dvc_process, open_runs, origin, stores
from dmat.tracking.run_record import RunRecord

_PARENTS = Path("mlruns") / "parents"
_VARIABLE = "DMAT_PARENT"  # environment variable of the stages of `dmat repro`: name of the folder below _PARENTS


def folder_above(home: Path, root: Path) -> Path | None:
    """The folder with the record of the run of the `dvc` or `dmat repro` above this process; None for a direct command.

    Writes the record if no stage did so yet. root: the folder with `dvc.lock`.
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
            command, git = redacted(command), origin.git(home)
            tags = {
                "dmat.stage": "dvc",
                "dmat.command": command,
                **origin.user_and_source(command, git),
                **{k.replace("_", "."): str(v) for k, v in git.items()},
            }
            about = {"name": command, "tags": tags, "settings": {}, "started": process.create_time(), "parent": None}
            record.update(about=about | {"root": open_runs.relative(home, root), "dvc": process.pid})
            open_runs.write(home, folder, process.pid, by_children=True)
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


def watch(home: Path, folder: Path, pid: int, process_identity: str) -> None:
    """Waits for the end of `dvc`, then records how it ended in the run whose record is in `folder`."""
    status = liveness.wait_for_end(pid, process_identity)
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


def _folder(home: Path, pid: int, process_identity: str) -> Path:
    return home / _PARENTS / f"{pid}-{files.fingerprint([process_identity, stores.identity(home)])}"
