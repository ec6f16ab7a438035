"""Where the files of a project are: parameters and artifacts in its folder, work and tracking in the main checkout."""

import dataclasses
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from dmat import ARTIFACTS
from dmat.errors import DmatError

# Names in a work folder. RESULT: what is published. FINISHED: the record of a complete result (metrics, notes, code,
# provenance, and the checksum of every file).
RESULT, PICTURES, METRICS = "result", "pictures", "metrics.json"
FINISHED = "finished.json"
POOLS = "pools"  # folder in runs/ for shards that several sets share
EXPERIMENT_COPIES = "/.dvc/tmp/exps/"  # below this folder DVC runs queued experiments in copies of the project

_SQLITE = "sqlite:///"

Instance = Mapping[str, str | int]  # of a stage: key -> value, such as {"arm": "generated", "seed": 1}


class InputRecord(TypedDict):
    """An input as it was read."""

    path: str  # below the project; of images and a model that no stage made: as the user wrote it
    sha256: str


class ComputeRecord(TypedDict):
    """A device and precision as JSON."""

    device: str  # name of the GPU, or "cpu" with the capability of the CPU
    precision: str  # "fp32" or "bf16"
    precision_reason: str
    threads: int  # of torch on the CPU
    processes: int  # that compute together
    torch: str  # version
    compiled: NotRequired[bool]  # of the result of a training: its steps were compiled


class CodeOrigin(TypedDict, total=False):
    """Which code was loaded."""

    git_commit: str  # missing outside a repository, as the next key
    git_dirty: bool  # whether tracked files differed from the commit
    dmat: str  # version; missing where the project holds the code of dmat


class RunOrigin(CodeOrigin):
    """Where, when and by which code a result was computed. No hash covers it."""

    mlflow_run: str | None  # id; None without tracking, and if the store was unreachable when the result was finished
    mlflow_parent: str | None
    work: str  # the work folder, below `Workspace.home`
    finished: str  # end time in UTC, such as 2026-11-24T12:00:00Z
    host_cores: int | None


class ProvenanceExtras(TypedDict, total=False):
    """Keys of a provenance record that are missing where they would be empty."""

    plugins: dict[str, str]  # import path -> identity of that code of the project
    pools: list[str]  # names of the pools whose shards the result holds


class Provenance(RunOrigin, ProvenanceExtras):
    """The provenance record of a result: what it was computed from, with what, where and how long."""

    stage: str
    instance: str  # its name
    fingerprint: str
    code: str  # identity of the stage's code, as in code.yaml
    settings: Mapping[str, object]
    inputs: dict[str, InputRecord]  # by name
    compute: ComputeRecord
    seconds: float  # of all attempts together
    measured: dict[str, float]  # what differs from run to run, such as speed
    outputs: dict[str, str]  # path below the project -> checksum


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folders of a project.

    root: the folder of params.yaml and artifacts/. home: the main checkout, which holds runs/ and mlruns/.
    """

    root: Path
    home: Path

    def at(self, relative: str) -> Path:
        """The path of a file below `root`."""
        return self.root / relative

    def run_folder(self, stage_name: str, instance_name: str, fingerprint: str) -> Path:
        """The work folder of a stage instance with these inputs and settings."""
        return self.home / "runs" / stage_name / f"{instance_name}-{fingerprint}"


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file for SQLAlchemy, to which % begins the code of a character, and ? ends the path."""
    return _SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(url: str) -> Path | None:
    """The file of a URL of SQLite; None for another database, and for one in memory."""
    name = urllib.parse.unquote(url.removeprefix(_SQLITE).partition("?")[0])
    return Path(name) if url.startswith(_SQLITE) and name and name != ":memory:" else None


def provenance_path(stage_name: str, instance_name: str) -> str:
    """Path, relative to the project, of the provenance record that a stage writes."""
    return f"{ARTIFACTS}/provenance/{stage_name}/{instance_name}.json"


def current_workspace() -> Workspace:
    """The workspace of the current folder.

    Raises DmatError where the folder is not a project: reading there would only create an empty MLflow store.
    """
    workspace = find_workspace(Path.cwd())
    if not (workspace.home / "params.yaml").exists() and not (workspace.home / "mlruns").exists():
        raise DmatError(
            f"{workspace.home} is not a project: it has neither params.yaml nor mlruns; expected one of them; go to "
            f"the folder of a project, or create one with `dmat init DIR`"
        )
    return workspace


def find_workspace(start: Path) -> Workspace:
    """The workspace of a folder.

    A copy that DVC made for an experiment uses the home of the main checkout, because the copy vanishes when the
    experiment ends. The environment variable DMAT_HOME names another home.
    """
    root = start.resolve()
    head, is_copy, _ = root.as_posix().partition(EXPERIMENT_COPIES)
    home = Path(os.environ["DMAT_HOME"]).resolve() if "DMAT_HOME" in os.environ else Path(head) if is_copy else root
    return Workspace(root, home)
