"""`dmat doctor`: each check on a constructed state, and that examining changes nothing."""

import fcntl
import http.server
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cli.main import app
from dmat import files, liveness
from dmat.pipeline import code_identity
from dmat.upkeep import doctor, dvc_files, machine
from dmat.upkeep.doctor import Finding
from dmat.upkeep.machine import NOTE, OK, PROBLEM
from dmat.workspace import find_workspace
from tests import servers
from tests.projects import current_code_lock

GIB = 1 << 30


@pytest.fixture
def project(tmp_path, root, tiny_params, monkeypatch) -> Path:
    """Parameters, pipeline, .dvc and a commit; no stage has run."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    shutil.copy(root / "dvc.yaml", tmp_path)
    code_identity.write(tmp_path, current_code_lock())
    shutil.copy(root / "constraints.txt", tmp_path)
    (tmp_path / ".dvc").mkdir()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda *_, **__: [0.0] * 512)
    return tmp_path


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)


def look(folder: Path, *checks: str) -> list[Finding]:
    """Findings of some checks, run without the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in checks})
        return list(doctor.examine(find_workspace(folder)))


def only_finding(folder: Path, check: str) -> tuple[str, str, str]:
    (finding,) = look(folder, check)
    assert (finding.do == "") == (finding.mark == OK), finding
    return finding.mark, finding.found, finding.do


def state(folder: Path) -> dict[str, tuple[bool, float, bytes]]:
    """Everything below a folder; for folders only their existence, because a probe changes their time."""
    states = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file()
        states[str(path)] = (is_file, path.stat().st_mtime if is_file else 0.0, path.read_bytes() if is_file else b"")
    return states


# The whole


def test_a_sound_project_has_no_problems_and_is_not_changed(project, monkeypatch):
    os.utime(project / "dvc.yaml", (1, 1))  # `git status` would write the new time into its index
    before = state(project)
    monkeypatch.chdir(project)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    records = json.loads(result.output)
    assert {entry["check"] for entry in records} == set(doctor.CHECKS)
    assert [entry for entry in records if entry["mark"] == PROBLEM and entry["check"] not in ("memory", "disk")] == []
    assert result.exit_code in (0, 2)
    assert state(project) == before


def test_an_empty_folder_gets_a_finding_of_every_check(project, tmp_path_factory, monkeypatch):
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(empty)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    lines = result.output.splitlines()
    assert "PROBLEM params.yaml   " + f"{empty}/params.yaml does not exist" in lines
    assert any(line.strip().startswith("-> run in the folder of a project") for line in lines)
    for check, mark in {"git": NOTE, "dvc": NOTE, "mlflow": OK, "work": OK, "device": OK}.items():
        assert any(line.startswith(f"{mark:8s}{check:14s}") for line in lines), check
    assert list(empty.iterdir()) == []


def test_a_check_that_raises_is_a_finding_and_the_others_run(project, monkeypatch):
    def broken(site: doctor.ProjectState) -> Iterator[machine.CheckResult]:
        yield OK, "so far", ""
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "dvc locks": doctor.CHECKS["dvc locks"]})
    first, failed, last = doctor.examine(find_workspace(project))
    assert (first.mark, failed.mark, last.mark) == (OK, PROBLEM, OK)
    assert failed.found == "the check itself failed: ZeroDivisionError: by hand"
    monkeypatch.chdir(project)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 2


# The machine


def test_versions_that_differ_from_the_pins_are_named(project):
    assert only_finding(project, "versions")[0] == OK
    pins = (project / "constraints.txt").read_text()
    (project / "constraints.txt").write_text(pins.replace("optuna==", "optuna==1."))
    mark, message, _ = only_finding(project, "versions")
    assert mark == NOTE
    assert "other than in constraints.txt: optuna " in message
    assert "numpy" not in message  # of two pins for two Pythons one must match
    (project / "constraints.txt").unlink()
    assert "no constraints.txt" in only_finding(project, "versions")[1]


def test_a_build_of_the_pinned_version_is_that_version(project, monkeypatch):
    monkeypatch.setattr(machine, "_installed_version", lambda name: {"torch": "2.14.1+cpu"}.get(name, "1"))
    (project / "constraints.txt").write_text("torch==2.14.1\n")
    assert only_finding(project, "versions")[0] == OK


def test_a_missing_package_is_a_problem(project, monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    mark, message, _ = only_finding(project, "versions")
    assert mark == PROBLEM
    assert "no-such-package (missing)" in message


def test_a_plain_install_is_complete(project, monkeypatch):
    (project / "constraints.txt").unlink()
    monkeypatch.setattr(machine, "_installed_version", lambda name: None if name == "optuna" else "1")
    mark, message, _ = only_finding(project, "versions")
    assert mark == OK
    assert "optuna (not installed: dmat[tune])" in message
    monkeypatch.setattr(machine, "_installed_version", lambda name: None)
    assert only_finding(project, "versions")[2] == "install with `pip install dmat`"  # there is no checkout


def test_code_of_another_checkout_is_a_problem(project):
    """DVC would record checksums of this folder's modules although others computed."""
    (project / "dmat").mkdir()
    (project / "dmat/__init__.py").touch()
    assert [finding.mark for finding in look(project, "versions")] == [OK, PROBLEM]


def test_device_and_precision_are_those_of_params_yaml(project):
    before = torch.get_num_threads()
    mark, message, _ = only_finding(project, "device")
    assert mark in (OK, NOTE)
    assert "fp32 (asked for); asked: auto, fp32" in message
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is there")
def test_a_missing_device_is_a_problem(project, tiny_params):
    tiny_params["compute"]["device"] = "cuda"
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    mark, message, do = only_finding(project, "device")
    assert mark == PROBLEM
    assert "torch finds no CUDA device" in message
    assert "device: auto" in do


def test_emulated_bf16_is_noted(monkeypatch):
    monkeypatch.setattr(machine.devices, "_native_bf16", lambda kind: (False, "no native bfloat16 multiplication"))
    ((mark, _, _),) = machine.device("cpu", "auto", 1)
    assert mark == OK
    ((mark, message, _),) = machine.device("cpu", "bf16", 1)
    assert mark == NOTE
    assert "no native" in message


@pytest.mark.parametrize(
    ("threads", "cores", "quota", "others", "mark", "fragment"),
    [
        (1, 2, None, 0.0, OK, "1 on 2 cores"),
        (1, 2, None, 1.0, OK, "others use 1.0"),
        (1, 2, None, 1.8, NOTE, "twice as long"),
        (2, 2, None, 0.3, OK, ""),
        (2, 2, None, 1.0, PROBLEM, "compute.threads to 1"),
        (0, 8, None, 3.0, PROBLEM, "compute.threads to 5"),
        (0, 8, None, 0.0, OK, "8 on 8 cores"),
        (0, 64, 2.0, 0.0, PROBLEM, "compute.threads to 2"),
        (4, 2, None, 0.0, PROBLEM, "may use 2"),
        (1, 8, 0.5, 0.0, PROBLEM, "may use 0.5"),
    ],
)
def test_threads_are_compared_with_free_cores(threads, cores, quota, others, mark, fragment):
    finding = machine.rate_threads(threads, cores, quota, others)
    assert finding[0] == mark
    assert fragment in " ".join(finding)


def test_limits_of_a_container_are_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CONTROL_GROUP", tmp_path)
    assert machine._quota() is None
    free = next(machine.memory())[1]
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._quota() is None
    assert next(machine.memory())[1].split()[-3] == free.split()[-3]
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB + GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\nfile 2\n")
    assert machine._quota() == 1.5
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("M", (), {"available": 9e10, "total": 1e11}))
    assert next(machine.memory())[:2] == (NOTE, "1.5 of 4.0 GiB free")


@pytest.mark.parametrize(("free", "mark"), [(0.99, PROBLEM), (1.0, NOTE), (4.99, NOTE), (5.0, OK)])
def test_free_disk(tmp_path, monkeypatch, free, mark):
    usage = type("Usage", (), {"free": free * GIB})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    folders = {"the project": tmp_path, "runs/": tmp_path / "not/there/yet"}
    ((level, message, _),) = machine.disks(folders)
    assert level == mark
    assert message.endswith("free for the project and runs/")


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    folders = {"here": tmp_path, "runs/": tmp_path / "runs", "/proc": Path("/proc"), "mlruns/": tmp_path / "mlruns"}
    findings = list(machine.writable(folders))
    assert [mark for mark, _, _ in findings] == [PROBLEM, PROBLEM, OK]
    assert f"runs/ ({tmp_path}/runs) cannot be written: Not a directory" in findings[0][1]
    assert "/proc (/proc) cannot be written" in findings[1][1]
    assert findings[2][1] == "here; not existing yet: mlruns/"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# Git, parameters, DVC


def test_git_states(project):
    mark, message, _ = only_finding(project, "git")
    assert (mark, message.split(", ")[1]) == (OK, "nothing changed")
    (project / "dvc.yaml").write_text("stages: {}\n")
    (project / "untracked").touch()
    changed = message.replace(", nothing changed", ", and files differ from it")
    assert only_finding(project, "git")[:2] == (NOTE, changed)
    shutil.rmtree(project / ".git")
    assert "no git repository with a commit" in only_finding(project, "git")[1]
    git(project, "init", "-q")
    assert "no git repository with a commit" in only_finding(project, "git")[1]


def test_every_problem_of_the_parameters_is_listed(project, tiny_params):
    tiny_params["train_robust"]["bata"] = 5
    tiny_params["seeds"] = []
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params))
    mark, message, _ = only_finding(project, "params.yaml")
    assert mark == PROBLEM
    assert "bata" in message
    assert "seeds is []" in message
    assert look(project, "device", "threads", "work")[0].mark in (OK, NOTE)  # other checks run without valid parameters


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock"])
def test_unreadable_dvc_files_are_a_problem(project, name):
    (project / name).write_text("<<<<<<< HEAD\n: {")
    mark, message, do = only_finding(project, "dvc")
    assert mark == PROBLEM
    assert f"{project / name}" in message
    assert all(fragment in message for fragment in ("not valid YAML", "line ")), message
    assert "git" in do


def test_the_command_must_be_on_path(project, monkeypatch):
    assert only_finding(project, "dvc")[:2] == (OK, "stages in dvc.yaml: 12, instances in dvc.lock: 0")
    monkeypatch.setenv("PATH", "/usr/bin")
    assert "not on PATH" in only_finding(project, "dvc")[1]


def test_code_that_code_yaml_does_not_name_is_a_problem(project):
    assert only_finding(project, "code")[:2] == (OK, "as code.yaml names it")
    path = project / "code.yaml"
    locked = code_identity.read(project)
    code_identity.write(project, code_identity.CodeLock({**locked.identities, "mix_images": 32 * "0"}, {}))
    mark, message, do = only_finding(project, "code")
    assert (mark, message) == (PROBLEM, "not the code that code.yaml names: mix_images")
    assert "`dmat lock --same STAGE --why ...`" in do
    path.unlink()
    assert only_finding(project, "code")[::2] == (PROBLEM, "run `dmat lock`")


def test_locks_of_dvc_are_read(project, dead):
    """Locks written by DVC: while it holds them, after it was killed, and when another program has its number."""
    script = (
        "import sys\nfrom dvc.fs import localfs\nfrom dvc.lock import make_lock\nfrom dvc.rwlock import rwlock\n"
        "folder, command = sys.argv[1], 'dvc repro'\n"
        "with make_lock(folder + '/lock'), rwlock(folder, localfs, command, ['/a', '/b'], ['/c'], False):\n"
        "    print('held', flush=True)\n    sys.stdin.readline()\n"
    )
    folder = project / ".dvc/tmp"
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    dvc = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert dvc.stdout.readline() == "held\n"
    try:
        claim, repository = look(project, "dvc locks")
        assert (claim.mark, claim.found) == (OK, f"process {dvc.pid} (`dvc repro`) claims 3 paths and runs")
        assert (repository.mark, repository.found) == (OK, f"process {dvc.pid} holds the repository")
        rwlock_text = (folder / "rwlock").read_text()
    finally:
        dvc.kill()
        dvc.communicate()
    mark, message, do = only_finding(project, "dvc locks")
    assert (mark, message) == (NOTE, f"process {dvc.pid} (`dvc repro`) claims 3 paths, but is gone")
    assert "delete .dvc/tmp/rwlock" in do
    with servers.running(["sleep", "600"]) as other:
        (folder / "rwlock").write_text(rwlock_text.replace(str(dvc.pid), str(other.pid)))
        mark, message, _ = only_finding(project, "dvc locks")
        assert mark == NOTE
        assert "belongs to another program" in message
    (folder / "rwlock").write_text("")
    mark, message, do = only_finding(project, "dvc locks")
    assert mark == PROBLEM
    assert "every dvc command stops" in message
    assert do == "delete it while no dvc runs"
    (folder / "rwlock").unlink()
    assert only_finding(project, "dvc locks") == (OK, "nobody holds one", "")  # .dvc/tmp/lock itself stays, unheld


def test_a_lock_file_that_dvc_is_writing_is_read_again(project, monkeypatch):
    path = project / ".dvc/tmp/rwlock"
    path.parent.mkdir()
    path.write_text('{"write": {"/a": {"pi')
    monkeypatch.setattr(dvc_files.time, "sleep", lambda seconds: path.write_text("{}"))
    assert only_finding(project, "dvc locks")[0] == OK


# MLflow


def database(project: Path, *statements: str) -> Path:
    path = project / "mlruns/mlflow.db"
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


TABLES = ("create table runs (id)", "create table experiments (id)", "create table alembic_version (id)")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_the_embedded_store_is_only_read(project, mode):
    assert only_finding(project, "mlflow")[1].endswith("does not exist yet; the first run creates it")
    assert not (project / "mlruns").exists()
    database(project, f"pragma journal_mode = {mode}", *TABLES, "insert into runs values (1)")
    before = state(project / "mlruns")
    assert only_finding(project, "mlflow")[:2] == (OK, f"{project}/mlruns/mlflow.db: 1 runs")
    assert state(project / "mlruns") == before


def test_a_file_that_is_no_mlflow_store_is_reported(project):
    path = database(project, TABLES[0])
    assert only_finding(project, "mlflow")[0] == NOTE
    path.write_bytes(b"no database at all, but long enough to look at" * 9)
    mark, message, _ = only_finding(project, "mlflow")
    assert mark == PROBLEM
    assert "not a database" in message


class Server(http.server.BaseHTTPRequestHandler):
    """Answers /well/health, refuses other paths, and delays /slow until it is released."""

    waiting = threading.Event()

    def do_GET(self) -> None:
        if self.path.startswith("/slow"):
            self.waiting.wait()
        self.send_response(200 if self.path == "/well/health" else 503)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_the_health_of_a_server_is_checked(project, monkeypatch):
    monkeypatch.setattr(doctor, "_SERVER_TIMEOUT", 0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}/well")
        mark, message, _ = only_finding(project, "mlflow")
        assert mark == OK
        assert message.startswith(f"http://me:***@{address}/well answers after")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}/other/")
        assert only_finding(project, "mlflow")[:2] == (
            PROBLEM,
            f"http://{address}/other/ answers 503 Service Unavailable at /health",
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}/slow")
        mark, message, do = only_finding(project, "mlflow")
        assert mark == PROBLEM
        assert "does not answer (timed out)" in message
        assert "secret" not in message + do
    finally:
        Server.waiting.set()
        server.shutdown()
        server.server_close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
    mark, message, do = only_finding(project, "mlflow")
    assert mark == PROBLEM
    assert "refused" in message
    assert "docs/services.md" in do


def test_other_stores_and_no_tracking_are_noted(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/mlflow")
    mark, message, _ = only_finding(project, "mlflow")
    assert mark == NOTE
    assert message.startswith("postgresql://me:***@db/mlflow")
    monkeypatch.setenv("DMAT_TRACKING", "off")
    assert "DMAT_TRACKING=off" in only_finding(project, "mlflow")[1]


def test_tracked_runs_of_dead_processes(project, dead):
    record = {"folder": "runs/x", "host": platform.node(), "by_children": False, "store": "embedded"}
    alive = record | {"pid": os.getpid(), "started": liveness.identity(os.getpid())}
    folder = project / "mlruns/active"
    files.write_json(folder / "a.json", alive)
    assert only_finding(project, "tracked runs") == (OK, "running: 1", "")
    files.write_json(folder / "b.json", record | {"pid": dead, "started": alive["started"]})
    files.write_json(folder / "c.json", {**alive, "started": "another boot"})  # another process has the number now
    mark, message, do = only_finding(project, "tracked runs")
    assert (mark, message) == (NOTE, "running: 1; process gone: 2")
    assert "dmat runs sync" in do
    files.write_json(folder / "d.json", {**alive, "host": "elsewhere"})
    files.write_json(folder / "e.json", {})
    _, other, damaged = look(project, "tracked runs")
    assert (other.mark, other.found) == (NOTE, "of other machines: 1")
    assert (damaged.mark, damaged.do) == (NOTE, "delete it")


# Work in progress


def work(project: Path, instance_name: str, *names: str) -> Path:
    folder = project / f"runs/train_robust/{instance_name}-{'a' * 12}"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text('{"images_seen": 25600}\nrest')
    (folder / "lock").touch()
    return folder


def test_work_in_progress(project):
    work(project, "real_only-1", "finished.json", "checkpoint.dmat")
    work(project, "generated-1", "checkpoint.dmat")
    work(project, "gone-1", "checkpoint.dmat")
    work(project, "gone-2")  # locked once, nothing saved
    (project / "runs/train_robust/notes").mkdir()
    stopped, unlisted, finished = look(project, "work")
    assert (stopped.mark, unlisted.mark) == (NOTE, NOTE)
    assert "train_robust generated-1: stopped, checkpoint at 25,600 images, 0 minutes old" in stopped.found
    assert "`dmat train-robust --arm generated --seed 1` resumes it" in stopped.do
    assert "params.yaml does not name it" in unlisted.do
    assert (finished.mark, finished.found) == (OK, "finished in runs/: 1")


def test_studies(project):
    folder = project / f"runs/tune/generated-{'a' * 12}"
    for name in ("trial-0000/result/weights", "trial-0001/checkpoint.dmat", "study.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "lock").touch()
    stopped, _ = look(project, "work")
    assert (stopped.mark, stopped.found) == (NOTE, "tune generated: stopped in trial-0001")
    assert "`dmat tune start` resumes it" in stopped.do
    (folder / "trial-0001/checkpoint.dmat").unlink()
    assert look(project, "work")[0].found == "tune generated: stopped between two trials"
    (folder / "finished.json").touch()
    assert [finding.found for finding in look(project, "work")] == ["finished in runs/: 1"]
    with filelock.FileLock(folder / "lock"):
        assert "tune generated: an unknown process computes it" in look(project, "work")[0].found


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["ours", "nobody"])
def test_the_process_that_holds_a_work_folder_is_named(project, pid):
    folder = work(project, "generated-1", "checkpoint.dmat")
    files.write_json(folder / "holder.json", {"pid": pid})
    with filelock.FileLock(folder / "lock"):
        running, _ = look(project, "work")
    elsewhere = "" if pid == os.getpid() else " of another machine"
    assert running.mark == OK
    assert f"train_robust generated-1: process {pid}{elsewhere} computes it" in running.found
    assert look(project, "work")[0].mark == NOTE


def test_checking_a_lock_does_not_hold_it(tmp_path):
    """A job takes its lock without waiting, so the check must not hold it longer than necessary."""
    from dmat.upkeep import work_folders

    assert not work_folders.is_held(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").touch()
    assert not work_folders.is_held(tmp_path / "lock")
    with open(tmp_path / "lock", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert work_folders.is_held(tmp_path / "lock")


def test_a_lock_without_a_repository(tmp_path):
    assert dvc_files.rwlock_holders(tmp_path) == []
    assert dvc_files.repository_holder(tmp_path) is None
