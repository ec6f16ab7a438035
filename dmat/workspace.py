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

    def run_folder(self, word: str, instance: str, fingerprint: str) -> Path:
        return self.home / "runs" / word / f"{instance}-{fingerprint}"


def provenance_path(stage: str, instance: str) -> str:
    """Where a stage says what its result comes from, below the project."""
    return f"{ARTIFACTS}/provenance/{stage}/{instance}.json"


def here() -> Workspace:
    """That of the current folder. Raises DmatError where it is no project: reading there would only make an empty
    store."""
    place = find(Path.cwd())
    if not (place.home / "params.yaml").exists() and not (place.home / "mlruns").exists():
        raise DmatError(
            f"{place.home} is no project: it has neither params.yaml nor mlruns; expected one; go to its folder, or "
            f"make one with `dmat init DIR`"
        )
    return place


def find(start: Path) -> Workspace:
    """The workspace of a folder. A copy that DVC made for an experiment shares the main checkout's home, because the
    copy vanishes when the experiment ends. DMAT_HOME names another home."""
    root = start.resolve()
    head, found, _ = root.as_posix().partition(EXPERIMENT_COPIES)
    home = Path(os.environ["DMAT_HOME"]).resolve() if "DMAT_HOME" in os.environ else Path(head) if found else root
    return Workspace(root, home)
