"""What `dmat doctor` looks at: everything that a run needs from this machine and this project.

Looks only, but for `fix`: it makes no folder, no lock and no database. A check that fails by itself is a finding like
any other.
"""

import dataclasses
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmat import ARTIFACTS, config, dvc_lock, tracking
from dmat.config import Params
from dmat.errors import ConfigError, DmatError
from dmat.pipeline import STAGES, code_identity
from dmat.redaction import redacted
from dmat.tracking import open_runs, stores
from dmat.upkeep import dvc_files, machine, recorded, work_folders
from dmat.upkeep.machine import NOTE, OK, PROBLEM, Marked
from dmat.upkeep.work_folders import WorkFolder
from dmat.workspace import FINISHED, Workspace

_PATIENCE = 3.0  # seconds for a tracking server to answer


@dataclasses.dataclass(frozen=True)
class Finding:
    mark: str  # OK, NOTE or PROBLEM
    check: str
    found: str
    do: str  # "" if it is OK


@dataclasses.dataclass(frozen=True)
class ProjectState:
    """What is looked at. params: None where params.yaml is missing or wrong."""

    workspace: Workspace
    params: Params | None

    @property
    def compute(self) -> Any:
        return self.params.compute if self.params else config.ComputeSettings()


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Every finding, each as soon as it is known."""
    try:
        project = ProjectState(workspace, config.load(workspace.at("params.yaml")))
    except (DmatError, OSError, ValueError):
        project = ProjectState(workspace, None)  # the check of params.yaml says why
    for name, check in CHECKS.items():
        try:
            for mark, found, do in check(project):
                yield Finding(mark, name, redacted(found), do)
        except DmatError as error:
            found, _, do = str(error).rpartition("; ")  # an error ends with what to do
            yield Finding(PROBLEM, name, redacted(found or do), do)
        except Exception as error:  # whatever one check meets must not hide what the others find
            do = "mend what it names; if nothing is wrong with that, it is a defect of dmat"
            yield Finding(PROBLEM, name, f"the check itself failed: {type(error).__name__}: {redacted(str(error))}", do)


def fix(workspace: Workspace) -> list[str]:
    """Repairs what a kill left damaged, and keeps what lay there. Returns a sentence for each repair."""
    if any(claim.state == "alive" for claim in dvc_files.claims(workspace.root)) or dvc_files.repository_holder(
        workspace.root
    ):
        return [
            "dvc is at work, which may be writing its lock file now: nothing was touched; call this again afterwards"
        ]
    return [*dvc_lock.restore(workspace.root, workspace.home), *recorded.set_aside(workspace)]


def _device(project: ProjectState) -> Iterator[Marked]:
    yield from machine.device(project.compute.device, project.compute.precision, project.compute.threads)


def _git(project: ProjectState) -> Iterator[Marked]:
    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]  # else `git status` writes its index
        return subprocess.run(command, cwd=project.workspace.root, capture_output=True, text=True, check=True).stdout

    unknown = "results will not say which code made them; "
    try:
        ask("rev-parse", "--git-dir")
    except (OSError, subprocess.CalledProcessError):
        yield NOTE, "no repository here, or no git", f"{unknown}`git init` and commit"
        return
    try:
        commit = ask("rev-parse", "HEAD").strip()
    except subprocess.CalledProcessError:
        yield NOTE, "a repository without a commit", f"{unknown}commit"
        return
    changed = len(ask("status", "--porcelain", "--untracked-files=no").splitlines())
    if changed:
        yield (
            NOTE,
            f"commit {commit[:12]}, changed files: {changed}",
            "commit, or results are marked as of changed code",
        )
    else:
        yield OK, f"commit {commit[:12]}, nothing changed", ""


def _params(project: ProjectState) -> Iterator[Marked]:
    try:
        params = config.load(project.workspace.at("params.yaml"))
    except ConfigError as error:
        wrong = "; ".join(error.problems)
        yield PROBLEM, f"{len(error.problems)} wrong: {wrong}", "mend it; docs/parameters.md explains every key"
        return
    lists = [f"{name}: {len(getattr(params, name))}" for name in config.LISTS]
    yield OK, ", ".join([*lists, f"seeds: {len(params.seeds)}"]), ""


def _code(project: ProjectState) -> Iterator[Marked]:
    locked = code_identity.read(project.workspace.root)
    changed = [
        stage_name for stage_name in STAGES if not locked.accepts(stage_name, code_identity.of_stage(stage_name))
    ]
    if changed:
        do = "`dmat lock`, and they rerun; `dmat lock --same STAGE --why ...` for one that computes the same"
        yield PROBLEM, f"not the code that {code_identity.NAME} names: {', '.join(changed)}", do
    else:
        yield OK, f"as {code_identity.NAME} names it", ""


def _dvc(project: ProjectState) -> Iterator[Marked]:
    root = project.workspace.root
    alone = "stages run one by one as dmat commands; for `dvc repro` "
    if not (root / ".dvc").is_dir():
        yield NOTE, "no .dvc folder", f"{alone}make a project with `dmat init`"
    elif not (root / "dvc.yaml").exists():
        yield NOTE, "no dvc.yaml", f"{alone}make a project with `dmat init` and take its file"
    else:
        stages = len(dvc_files.read_pipeline(root)["stages"])
        found = (
            f"stages in dvc.yaml: {stages}, instances in dvc.lock: {len(dvc_files.read_lock(root).get('stages', {}))}"
        )
        if shutil.which("dmat"):
            yield OK, found, ""
        else:
            yield PROBLEM, f"{found}; `dmat`, which they start, is not on PATH", "activate the virtual environment"


def _dvc_locks(project: ProjectState) -> Iterator[Marked]:
    root = project.workspace.root
    claims = dvc_files.claims(root)
    for claim in claims:
        held = f"process {claim.pid} (`{claim.command}`) claims {claim.paths} paths"
        if claim.state == "alive":
            yield OK, f"{held} and runs", ""
        elif claim.state == "gone":
            do = "nothing: the next dvc command drops the claim; if one says it is blocked, delete .dvc/tmp/rwlock"
            yield NOTE, f"{held}, but is gone", do
        else:
            do = "delete .dvc/tmp/rwlock while no dvc runs: DVC waits for that program in vain"
            yield NOTE, f"{held}, but its number belongs to another program by now", do
    if holder := dvc_files.repository_holder(root):
        yield OK, f"{holder} holds the repository", ""
    elif not claims:
        yield OK, "nobody holds one", ""


def _dvc_results(project: ProjectState) -> Iterator[Marked]:
    """Whether dvc.lock and the run cache name each result by the parameters that it was computed with."""
    wrong = list(recorded.mismatches(project.workspace))
    for one in [one for one in wrong if one.result.locked]:
        yield (
            PROBLEM,
            f"{one.name} in dvc.lock: {'; '.join(one.differences)}",
            f"params.yaml changed while it ran: `dmat doctor --fix`, then `dvc repro --force --single-item {one.name}`",
        )
    cached = [one for one in wrong if not one.result.locked]
    if cached:
        names = ", ".join(sorted({one.name for one in cached}))
        yield (
            PROBLEM,
            f"wrong entries of DVC's run cache: {len(cached)} ({names})",
            "`dmat doctor --fix` sets them aside",
        )
    if not wrong:
        yield OK, "named by the parameters that they were computed with", ""


def _mlflow(project: ProjectState) -> Iterator[Marked]:
    address = tracking.store(project.workspace.home)
    shown = stores.shown(project.workspace.home)
    if os.environ.get("DMAT_TRACKING") == "off":
        yield NOTE, "off, by DMAT_TRACKING=off", "unset it to track runs"
    elif address.startswith(("http://", "https://")):
        yield _server(address, shown)
    elif address.startswith("sqlite:///"):
        yield _database(Path(address.removeprefix("sqlite:///")))
    else:
        yield NOTE, f"{shown}: a kind of store that is not looked at", "start a run to see whether it answers"


def _server(address: str, shown: str) -> Marked:
    parts = urllib.parse.urlsplit(address)
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health").geturl()
    do = "start it (docs/services.md) or unset MLFLOW_TRACKING_URI; runs go on, and `dmat runs sync` sends them later"
    started = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE):
            return OK, f"{shown} answers after {time.monotonic() - started:.1f} s", ""
    except urllib.error.HTTPError as error:
        error.close()
        return PROBLEM, f"{shown} answers {error.code} {error.reason} at /health", do
    except OSError as error:
        return PROBLEM, f"{shown} does not answer ({getattr(error, 'reason', error)})", do


def _database(path: Path) -> Marked:
    if not path.exists():
        return OK, f"{path}: not made yet; the first run makes it", ""
    with open(path, "r+b") as file:  # fails where it cannot be written; writes nothing
        header = file.read(20)
    # In WAL mode, a database that nobody has open can be read without making files beside it only as immutable.
    alone = header[18:19] == b"\2" and not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' * alone}"
    connection = sqlite3.connect(address, uri=True, timeout=_PATIENCE)
    try:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        runs = connection.execute("select count(*) from runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.OperationalError as error:
        return NOTE, f"{path}: {error}", "look again when nothing is being written there"
    except sqlite3.DatabaseError as error:
        return PROBLEM, f"{path}: {error}", "move it away; the next run makes a new one, and no result depends on it"
    finally:
        connection.close()
    if not {"alembic_version", "experiments", "runs"} <= tables:
        return (
            NOTE,
            f"{path}: not a store of MLflow yet",
            "start a run, which makes the rest; if that fails, move it away",
        )
    return OK, f"{path}: {runs} runs", ""


def _tracked_runs(project: ProjectState) -> Iterator[Marked]:
    known = [marker for _, marker in open_runs.read(project.workspace.home)]
    away = sum(open_runs.elsewhere(marker) for marker in known)
    running = [open_runs.alive(marker) for marker in known if not open_runs.elsewhere(marker)]
    gone = running.count(False)
    found = f"running: {len(running) - gone}"
    if gone:
        yield NOTE, f"{found}; process gone: {gone}", "`dmat runs sync` sends what they owe and ends them"
    else:
        yield OK, found, ""
    if away:
        yield NOTE, f"of other machines: {away}", "`dmat runs sync` says how to end those of one that is gone"
    for path in open_runs.damaged(project.workspace.home):
        yield NOTE, f"{path}: no note of a run", "delete it"


def _work(project: ProjectState) -> Iterator[Marked]:
    finished = 0
    for work in work_folders.all_of(project.workspace.home):
        name = f"{work.stage_name} {work.instance_name}"
        if holder := work.holder:
            yield OK, f"{name}: {holder} computes it{_checkpoint(work)}", ""
        elif work.stage_name == work_folders.STUDY and (cut := sorted(work.path.glob("trial-*/checkpoint.dmat"))):
            # a trial that ended has no checkpoint
            do = "`dmat tune start` goes on if nothing it needs was changed"
            yield NOTE, f"{name}: stopped in {cut[-1].parent.name}", do
        elif (work.path / FINISHED).exists():
            finished += 1
        elif work.stage_name == work_folders.STUDY:
            yield (
                NOTE,
                f"{name}: stopped between two trials",
                "`dmat tune start` goes on if nothing it needs was changed",
            )
        elif work.progress:
            yield NOTE, f"{name}: stopped{_checkpoint(work)}", _continuation(project, work)
    yield OK, f"finished in runs/: {finished}", ""


def _checkpoint(work: WorkFolder) -> str:
    path = work.path / "checkpoint.dmat"
    try:
        with open(path, "rb") as file:
            seen = json.loads(file.readline())["images_seen"]
        return f", checkpoint at {seen:,} images, {(time.time() - path.stat().st_mtime) / 60:.0f} minutes old"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ", its checkpoint cannot be read"


def _continuation(project: ProjectState, work: WorkFolder) -> str:
    """The command that goes on with a stopped run. Whether its settings are still those is the command's to find."""
    stage = STAGES[work.stage_name]
    for instance in stage.choices(project.params) if project.params else ():
        if stage.instance_name(instance) == work.instance_name:
            command = " ".join(["dmat", stage.command, *stage.options(instance)])
            return f"`{command}` goes on if nothing it needs was changed; `dmat clean --unfinished` removes it"
    return "params.yaml does not name it; `dmat clean --unfinished` removes it"


CHECKS: dict[str, Callable[[ProjectState], Iterator[Marked]]] = {
    "versions": lambda project: machine.versions(project.workspace.root),
    "device": _device,
    "threads": lambda project: machine.threads(project.compute.threads),
    "memory": lambda project: machine.memory(),
    "disk": lambda project: machine.disks(
        {"the project": project.workspace.root, "runs/": project.workspace.home / "runs"}
    ),
    "writable": lambda project: machine.writable(
        {
            "the project": project.workspace.root,
            f"{ARTIFACTS}/": project.workspace.at(ARTIFACTS),
            "runs/": project.workspace.home / "runs",
            "mlruns/": project.workspace.home / "mlruns",
            "the temporary folder": Path(os.environ.get("TMPDIR") or tempfile.gettempdir()),
        }
    ),
    "git": _git,
    "params.yaml": _params,
    "code": _code,
    "dvc": _dvc,
    "dvc locks": _dvc_locks,
    "dvc results": _dvc_results,
    "mlflow": _mlflow,
    "tracked runs": _tracked_runs,
    "work": _work,
}
