"""The run of a whole `dvc repro`: parent of the runs of its stages.

`dvc` itself knows nothing of it. The first stage makes its record, and starts a small process that waits until `dvc` is
gone and then ends the run.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

from dmat import files, liveness
from dmat.errors import Interrupted, first_line
from dmat.redaction import redacted
from dmat.tracking import dvc_process, open_runs, origin, sender, stores
from dmat.tracking.run_record import RunRecord

_NICENESS = 5


def folder_above(home: Path, root: Path) -> Path | None:
    """The folder that remembers the run of the `dvc` process above this one; None for a direct command.

    root: the project's folder, which holds `dvc.lock`.
    """
    above, store = dvc_process.outermost(), stores.identity(home)
    if above is None:
        return None
    dvc, known, words = above
    folder = _folder(home, dvc.pid, known)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(folder, store)
    with record.lock:
        record.refresh()
        if record["about"] is None:
            command = redacted(" ".join(["dvc", *words]))
            tags = {
                "dmat.stage": "dvc",
                "dmat.command": command,
                **{k.replace("_", "."): str(v) for k, v in origin.git(home).items()},
            }
            about = {"name": command, "tags": tags, "settings": {}, "started": dvc.create_time(), "parent": None}
            record.update(about=about | {"root": open_runs.relative(home, root), "dvc": dvc.pid})
            open_runs.write(home, folder, dvc.pid, by_children=True)
            _start_watching(home, folder, dvc.pid, known)
    return folder


def tell(home: Path, error: BaseException) -> None:
    """A stage ended with an error, perhaps before it had a run of its own. So does the `dvc` process above it."""
    above = dvc_process.outermost() if "DVC_STAGE" in os.environ else None
    if above is None:
        return
    folder = _folder(home, above[0].pid, above[1])
    if folder.is_dir() and (record := RunRecord(folder, stores.identity(home)))["stopped"] is None:
        status = "KILLED" if isinstance(error, Interrupted) else "FAILED"
        record.update(stopped={"status": status, "error": f"{os.environ['DVC_STAGE']}: {first_line(error)}"})


def main() -> None:
    """The process that waits. What it needs to know is in its arguments: home, folder, pid and identity of `dvc`."""
    home, folder, pid = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    os.nice(_NICENESS)
    status = liveness.wait(pid, sys.argv[4])
    if not folder.is_dir():  # the project was deleted meanwhile: nothing of it is made again
        return
    record = RunRecord(folder, stores.identity(home))
    if status == 0:
        record.update(stopped=None)  # what a stage told was made good by another attempt
    elif status is None:
        record.note_a_kill(home)  # now, as the next `dvc` clears the signs of it away
    elif os.WIFSIGNALED(status):
        record.update(stopped={"status": "KILLED", "error": f"dvc was killed by signal {os.WTERMSIG(status)}"})
    elif status and record["stopped"] is None:
        record.update(stopped={"status": "FAILED", "error": f"dvc ended with code {os.WEXITSTATUS(status)}"})
    warnings.simplefilter("ignore")  # nobody reads them
    open_runs.sync(home, wait=60)


def _folder(home: Path, pid: int, known: str) -> Path:
    return home / "mlruns" / "parents" / f"{pid}-{files.fingerprint([known, stores.identity(home)])}"


def _start_watching(home: Path, folder: Path, pid: int, known: str) -> None:
    words = [str(home), str(folder), str(pid), known]
    with contextlib.suppress(OSError):  # a machine that refuses another process: the next command ends the run
        quiet = subprocess.DEVNULL
        # `dvc` removes the folder of a queued experiment, so the process is not to stand in it
        options = sender.python("from dmat.tracking import parents; parents.main()", *words) | {"cwd": home}
        subprocess.Popen(**options, stdin=quiet, stdout=quiet, stderr=quiet)
