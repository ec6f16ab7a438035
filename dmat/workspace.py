"""Where a project's files are: parameters and artifacts here, work in progress and tracking in the main checkout."""

import dataclasses
import os
from pathlib import Path

from dmat import ARTIFACTS
from dmat.errors import DmatError

# Names in a work folder: what is published, and the record of a complete result (metrics, notes, code, provenance, and
# the checksum of every file).
RESULT, PICTURES, METRICS = "result", "pictures", "metrics.json"
FINISHED = "finished.json"
EXPERIMENT_COPIES = "/.dvc/tmp/exps/"  # DVC runs queued experiments in copies of the project below this folder


@dataclasses.dataclass(frozen=True)
class Workspace:
    """root: the folder of params.yaml and artifacts/. home: the main checkout, which holds runs/ and tracking/."""

    root: Path
    home: Path

    def at(self, relative: str) -> Path:
        return self.root / relative

    def run_folder(self, stage_name: str, instance_name: str, fingerprint: str) -> Path:
        return self.home / "runs" / stage_name / f"{instance_name}-{fingerprint}"


def provenance_path(stage: str, instance_name: str) -> str:
    """Where a stage says what its result comes from, below the project."""
    return f"{ARTIFACTS}/provenance/{stage}/{instance_name}.json"


def current_workspace() -> Workspace:
    """That of the current folder. Raises DmatError where it is no project: reading there would only make an empty
    store."""
    workspace = find_workspace(Path.cwd())
    if not (workspace.home / "params.yaml").exists() and not (workspace.home / "mlruns").exists():
        raise DmatError(
            f"{workspace.home} is no project: it has neither params.yaml nor mlruns; expected one; go to its folder, or "
            f"make one with `dmat init DIR`"
        )
    return workspace


def find_workspace(start: Path) -> Workspace:
    """The workspace of a folder. A copy that DVC made for an experiment shares the main checkout's home, because the
    copy vanishes when the experiment ends. DMAT_HOME names another home."""
    root = start.resolve()
    head, found, _ = root.as_posix().partition(EXPERIMENT_COPIES)
    home = Path(os.environ["DMAT_HOME"]).resolve() if "DMAT_HOME" in os.environ else Path(head) if found else root
    return Workspace(root, home)
