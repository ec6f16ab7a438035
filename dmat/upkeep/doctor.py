"""The checks of `dmat doctor`: everything that a run needs from this machine and this project.

Only `fix` changes something; checks create no folder, no lock and no database. A check that fails itself is reported as
a finding.
"""

import dataclasses
import json
import os
import shutil
import sqlite3
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from dmat import ARTIFACTS, config, dvc_lock, machine_speed, tracking
from dmat.config import Params
from dmat.errors import ConfigError, DmatError
from dmat.machine_speed import MachineSpeed
from dmat.pipeline import STAGES, code_identity
from dmat.redaction import redacted
from dmat.tracking import open_runs, origin, stores
from dmat.upkeep import dvc_files, machine, recorded, work_folders
from dmat.upkeep.machine import NOTE, OK, PROBLEM, CheckResult
from dmat.upkeep.work_folders import WorkFolder
from dmat.workspace import FINISHED, Workspace, sqlite_path

_SERVER_TIMEOUT = 3.0  # seconds for a tracking server to answer


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of a check, as `dmat doctor --json` prints it."""

    mark: str  # OK, NOTE or PROBLEM
    check: str  # name of the check
    found: str
    do: str  # advice; "" if the mark is OK


@dataclasses.dataclass(frozen=True)
class ProjectState:
    """The project to examine. params: None if params.yaml is missing or invalid."""

    workspace: Workspace
    params: Params | None

    @property
    def compute(self) -> config.ComputeSettings:
        """Compute settings of params.yaml, else the defaults."""
        return self.params.compute if self.params else config.ComputeSettings()


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Runs all checks; yields each finding as soon as its check has it."""
    project = _read_project(workspace)
    for name, check in CHECKS.items():
        try:
            for mark, finding, advice in check(project):
                yield Finding(mark, name, redacted(finding), advice)
        except DmatError as error:
            finding, _, advice = str(error).rpartition("; ")  # an error ends with what to do
            yield Finding(PROBLEM, name, redacted(finding or advice), advice)
        except Exception as error:  # an error in one check must not hide the findings of others
            advice = "fix what the error names; if nothing is wrong with that, it is a defect of dmat"
            yield Finding(
                PROBLEM, name, f"the check itself failed: {type(error).__name__}: {redacted(str(error))}", advice
            )


def _read_project(workspace: Workspace) -> ProjectState:
    try:
        return ProjectState(workspace, config.load(workspace.at("params.yaml")))
    except (DmatError, OSError, ValueError):
        return ProjectState(workspace, None)  # the check of params.yaml reports why


def fix(workspace: Workspace) -> list[str]:
    """Repairs what a kill or an edit during a run damaged; keeps the damaged files. Returns a sentence per repair."""
    if any(
        process.state == "alive" for process in dvc_files.rwlock_holders(workspace.root)
    ) or dvc_files.repository_holder(workspace.root):
        return [
            "dvc is running and may be writing its lock file: nothing was changed; run this command again afterwards"
        ]
    return [*dvc_lock.restore(workspace.root, workspace.home), *recorded.set_aside(workspace)]


def measure_machine(workspace: Workspace, report: Callable[[str], None]) -> MachineSpeed:
    """Measures this machine, and writes the measurement for estimates. report: called with a sentence per part."""
    from dmat.upkeep.bench import measure  # loads torch

    compute = _read_project(workspace).compute
    speed = measure(compute.device, compute.threads, workspace.home, report)
    machine_speed.write(speed)
    return speed


def _device(project: ProjectState) -> Iterator[CheckResult]:
    yield from machine.device(project.compute.device, project.compute.precision, project.compute.threads)


def _speed(project: ProjectState) -> Iterator[CheckResult]:
    speed = machine_speed.read()
    if speed is None:
        yield NOTE, "not measured", "`dmat doctor --bench` on an idle machine, and estimates use what it finds"
        return
    peak = max(speed.matrix_peaks.values(), default=0.0)
    throughput = "" if speed.process_throughput is None else f", two processes {speed.process_throughput:.2f} times one"
    disk = f"disk {speed.disk_write / 1e6:,.0f} MB/s written, {speed.disk_read / 1e6:,.0f} read"
    yield OK, f"matrix products {peak / 1e9:,.0f} GFLOP/s{throughput}, {disk}; measured {speed.measured}", ""


def _git(project: ProjectState) -> Iterator[CheckResult]:
    git = origin.git(project.workspace.root)
    if origin.is_of_another_owner(project.workspace.root):
        advice = "`git config --global --add safe.directory DIR`, else results will not record which code computed them"
        yield NOTE, "the git repository belongs to another user, and git does not read it", advice
    elif not git:
        advice = "results will not record which code computed them; `git init` and commit"
        yield NOTE, "no git repository with a commit here, or no git", advice
    elif git["git_dirty"]:
        advice = "commit, or results are marked as of changed code"
        yield NOTE, f"commit {git['git_commit'][:12]}, and files differ from it", advice
    else:
        yield OK, f"commit {git['git_commit'][:12]}, nothing changed", ""


def _params(project: ProjectState) -> Iterator[CheckResult]:
    try:
        params = config.load(project.workspace.at("params.yaml"))
    except ConfigError as error:
        problem_list = "; ".join(error.problems)
        yield PROBLEM, f"{len(error.problems)} wrong: {problem_list}", "fix it; docs/parameters.md explains every key"
        return
    lists = [f"{name}: {len(getattr(params, name))}" for name in config.LISTS]
    yield OK, ", ".join([*lists, f"seeds: {len(params.seeds)}"]), ""


def _code(project: ProjectState) -> Iterator[CheckResult]:
    locked = code_identity.read(project.workspace.root)
    changed_stages = [
        stage_name for stage_name in STAGES if not locked.accepts(stage_name, code_identity.of_stage(stage_name))
    ]
    if changed_stages:
        advice = "`dmat lock`, and they rerun; `dmat lock --same STAGE --why ...` for one that computes the same"
        yield PROBLEM, f"not the code that {code_identity.NAME} names: {', '.join(changed_stages)}", advice
    else:
        yield OK, f"as {code_identity.NAME} names it", ""


def _dvc(project: ProjectState) -> Iterator[CheckResult]:
    root = project.workspace.root
    intro = "stages run one by one as dmat commands; for `dvc repro` "
    if not (root / ".dvc").is_dir():
        yield NOTE, "no .dvc folder", f"{intro}make a project with `dmat init`"
    elif not (root / "dvc.yaml").exists():
        yield NOTE, "no dvc.yaml", f"{intro}make a project with `dmat init` and take its file"
    else:
        stages = len(dvc_files.read_pipeline(root)["stages"])
        description = (
            f"stages in dvc.yaml: {stages}, instances in dvc.lock: {len(dvc_files.read_lock(root).get('stages', {}))}"
        )
        if shutil.which("dmat"):
            yield OK, description, ""
        else:
            yield (
                PROBLEM,
                f"{description}; `dmat`, which they start, is not on PATH",
                "activate the virtual environment",
            )


def _dvc_locks(project: ProjectState) -> Iterator[CheckResult]:
    root = project.workspace.root
    rwlock_holders = dvc_files.rwlock_holders(root)
    for process in rwlock_holders:
        description = f"process {process.pid} (`{process.command}`) claims {process.paths} paths"
        if process.state == "alive":
            yield OK, f"{description} and runs", ""
        elif process.state == "gone":
            advice = "nothing: the next dvc command drops the claim; if one says it is blocked, delete .dvc/tmp/rwlock"
            yield NOTE, f"{description}, but is gone", advice
        else:
            advice = "delete .dvc/tmp/rwlock while no dvc runs: DVC waits for that program in vain"
            yield NOTE, f"{description}, but its pid now belongs to another program", advice
    if holder := dvc_files.repository_holder(root):
        yield OK, f"{holder} holds the repository", ""
    elif not rwlock_holders:
        yield OK, "nobody holds one", ""


def _dvc_results(project: ProjectState) -> Iterator[CheckResult]:
    """Whether dvc.lock and the run cache have each result under the parameters that it was computed with."""
    wrong_results = list(recorded.mismatches(project.workspace))
    for mismatch in [mismatch for mismatch in wrong_results if mismatch.result.locked]:
        yield (
            PROBLEM,
            f"{mismatch.name} in dvc.lock: {'; '.join(mismatch.differences)}",
            "params.yaml changed while it ran: `dmat doctor --fix`, then "
            f"`dvc repro --force --single-item {mismatch.name}`",
        )
    in_run_cache = [mismatch for mismatch in wrong_results if not mismatch.result.locked]
    if in_run_cache:
        names = ", ".join(sorted({mismatch.name for mismatch in in_run_cache}))
        yield (
            PROBLEM,
            f"wrong entries of DVC's run cache: {len(in_run_cache)} ({names})",
            "`dmat doctor --fix` sets them aside",
        )
    if not wrong_results:
        yield OK, "recorded with the parameters that they were computed with", ""


def _mlflow(project: ProjectState) -> Iterator[CheckResult]:
    address = tracking.store_uri(project.workspace.home)
    masked_uri = stores.masked_uri(project.workspace.home)
    if os.environ.get("DMAT_TRACKING") == "off":
        yield NOTE, "off, by DMAT_TRACKING=off", "unset it to track runs"
    elif address.startswith(("http://", "https://")):
        yield _server(address, masked_uri)
    elif (path := sqlite_path(address)) is not None:
        yield _database(path)
    else:
        yield NOTE, f"{masked_uri}: a kind of store that is not checked", "start a run to see whether it answers"


def _server(address: str, masked_uri: str) -> CheckResult:
    parts = urllib.parse.urlsplit(address)
    url = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health").geturl()
    advice = (
        "start it (docs/services.md) or unset MLFLOW_TRACKING_URI; runs continue, and `dmat runs sync` sends them later"
    )
    started = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=_SERVER_TIMEOUT):
            return OK, f"{masked_uri} answers after {time.monotonic() - started:.1f} s", ""
    except urllib.error.HTTPError as error:
        error.close()
        return PROBLEM, f"{masked_uri} answers {error.code} {error.reason} at /health", advice
    except OSError as error:
        return PROBLEM, f"{masked_uri} does not answer ({getattr(error, 'reason', error)})", advice


def _database(path: Path) -> CheckResult:
    if not path.exists():
        return OK, f"{path}: does not exist yet; the first run creates it", ""
    with open(path, "r+b") as file:  # fails where it cannot be written; writes nothing
        header = file.read(20)
    # In WAL mode, a database that no process has open must be opened as immutable, or files are created beside it.
    is_immutable = header[18:19] == b"\2" and not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' * is_immutable}"
    connection = sqlite3.connect(address, uri=True, timeout=_SERVER_TIMEOUT)
    try:
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        runs = connection.execute("select count(*) from runs").fetchone()[0] if "runs" in tables else 0
    except sqlite3.OperationalError as error:
        return NOTE, f"{path}: {error}", "run this again when no process writes to it"
    except sqlite3.DatabaseError as error:
        return PROBLEM, f"{path}: {error}", "move it away; the next run creates a new one, and no result depends on it"
    finally:
        connection.close()
    if not {"alembic_version", "experiments", "runs"} <= tables:
        return (
            NOTE,
            f"{path}: not a store of MLflow yet",
            "start a run, which creates the rest; if that fails, move it away",
        )
    return OK, f"{path}: {runs} runs", ""


def _tracked_runs(project: ProjectState) -> Iterator[CheckResult]:
    markers = [marker for _, marker in open_runs.read(project.workspace.home)]
    other_machine_count = sum(open_runs.elsewhere(marker) for marker in markers)
    running = [open_runs.alive(marker) for marker in markers if not open_runs.elsewhere(marker)]
    ended = running.count(False)
    description = f"running: {len(running) - ended}"
    if ended:
        yield NOTE, f"{description}; process gone: {ended}", "`dmat runs sync` sends what is missing and ends them"
    else:
        yield OK, description, ""
    if other_machine_count:
        yield (
            NOTE,
            f"of other machines: {other_machine_count}",
            "`dmat runs sync` tells how to end those of one that is gone",
        )
    for path in open_runs.damaged(project.workspace.home):
        yield NOTE, f"{path}: not a readable marker file of a run", "delete it"


def _work(project: ProjectState) -> Iterator[CheckResult]:
    finished = 0
    for work in work_folders.list_work_folders(project.workspace.home):
        name = f"{work.stage_name} {work.instance_name}"
        if holder := work.holder:
            yield OK, f"{name}: {holder} computes it{_checkpoint(work)}", ""
        elif work.stage_name == work_folders.STUDY and (
            checkpoints := sorted(work.path.glob("trial-*/checkpoint.dmat"))
        ):
            # a trial that ended has no checkpoint
            advice = "`dmat tune start` resumes it if nothing it needs was changed"
            yield NOTE, f"{name}: stopped in {checkpoints[-1].parent.name}", advice
        elif (work.path / FINISHED).exists():
            finished += 1
        elif work.stage_name == work_folders.STUDY:
            yield (
                NOTE,
                f"{name}: stopped between two trials",
                "`dmat tune start` resumes it if nothing it needs was changed",
            )
        elif work.resumable_paths:
            yield NOTE, f"{name}: stopped{_checkpoint(work)}", _resume_command(project, work)
    yield OK, f"finished in runs/: {finished}", ""


def _checkpoint(work: WorkFolder) -> str:
    path = work.path / "checkpoint.dmat"
    try:
        with open(path, "rb") as file:
            images_seen = json.loads(file.readline())["images_seen"]
        return f", checkpoint at {images_seen:,} images, {(time.time() - path.stat().st_mtime) / 60:.0f} minutes old"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ", its checkpoint cannot be read"


def _resume_command(project: ProjectState, work: WorkFolder) -> str:
    """Advice with the command that resumes a stopped run. That command checks whether the settings are the same."""
    stage = STAGES[work.stage_name]
    for instance in stage.all_instances(project.params) if project.params else ():
        if stage.instance_name(instance) == work.instance_name:
            command = " ".join(["dmat", stage.command, *stage.options(instance)])
            return f"`{command}` resumes it if nothing it needs was changed; `dmat clean --unfinished` removes it"
    return "params.yaml does not name it; `dmat clean --unfinished` removes it"


CHECKS: dict[str, Callable[[ProjectState], Iterator[CheckResult]]] = {
    "versions": lambda project: machine.versions(project.workspace.root),
    "device": _device,
    "threads": lambda project: machine.threads(project.compute.threads),
    "speed": _speed,
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
