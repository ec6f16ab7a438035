"""The run of a whole `dvc repro`: it ends by itself, soon after `dvc`, with the same outcome.

Run alone: pytest tests/test_parents.py
"""

import hashlib
import queue
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dmat import files, liveness, tracking
from dmat.errors import DmatError, Interrupted
from dmat.tracking import dvc_process, open_runs, parents, queries, sender
from tests import forked, senders

_STAGE = """
import time
from pathlib import Path
from dmat import tracking
home = Path.cwd()
work = home / "runs" / "one"
work.mkdir(parents=True)
with tracking.open_run(home, work, stage="mix_images", instance_name="one", settings={}, inputs={}, compute={}) as run:
    run.provenance()
    (work / "begun").touch()
    while not (home / "end").exists():
        time.sleep(0.02)
(home / "out").touch()
"""


@pytest.fixture(autouse=True)
def tracked(tmp_path, monkeypatch, put_store):
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_store(tmp_path)


@pytest.fixture
def repro(tmp_path, monkeypatch):
    """`dvc repro` of a project with one stage, which runs until the file `end` exists."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (tmp_path / "stage.py").write_text(_STAGE)
    (tmp_path / "params.yaml").touch()
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {sys.executable} stage.py\n    outs:\n    - out\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")
    process = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-q"], cwd=tmp_path)
    forked.until((tmp_path / "runs" / "one" / "begun").exists)
    yield process
    (tmp_path / "end").touch()
    process.kill()
    process.wait()
    forked.until(lambda: not _at_work(tmp_path))


def _at_work(home):
    """Command lines of the tracking processes of this project; they end with their `dvc` and their stage."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if "dmat.tracking" in line and str(home) in line]


def _statuses(home):
    return {run.name.split()[0]: run.status for run in queries.recent(home)}


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_the_run_of_a_repro_ends_by_itself_as_dvc_did(repro, tmp_path, ends):
    assert _statuses(tmp_path) == {"dvc": "RUNNING", "mix_images": "RUNNING"}
    if ends == "well":
        (tmp_path / "end").touch()
        assert repro.wait(200) == 0
    else:
        repro.kill()
        repro.wait()
    forked.until(lambda: _statuses(tmp_path)["dvc"] != "RUNNING")
    assert _statuses(tmp_path)["dvc"] == {"well": "FINISHED", "killed": "KILLED"}[ends]
    assert open_runs.read(tmp_path) == [] or ends == "killed", "the stage that lost its dvc goes on"


@pytest.fixture
def fake_dvc(tmp_path, monkeypatch):
    """A process that passes for `dvc repro`; its stages run in this process."""
    monkeypatch.setenv("DVC_STAGE", "mix_images@one")
    monkeypatch.setattr(sender, "_start", senders.start_thread)
    process = subprocess.Popen(["sleep", "600"])
    dvc_identity = liveness.identity(process.pid)
    monkeypatch.setattr(dvc_process, "outermost", lambda: (psutil.Process(process.pid), dvc_identity, ["repro"]))
    process.status = queue.SimpleQueue()
    monkeypatch.setattr(liveness, "wait_for_end", lambda *_: process.status.get())
    yield process
    process.kill()
    process.wait()
    process.status.put(None)


def _stage(home, error=None, name="one"):
    """Runs a stage instance to its end and writes its provenance; returns the MD5 of the provenance file."""
    work = home / "runs" / name
    work.mkdir(parents=True, exist_ok=True)
    with tracking.open_run(
        home, work, stage="mix_images", instance_name=name, settings={}, inputs={}, compute={}
    ) as run:  # fmt: skip
        if error:
            raise error
        provenance = run.provenance()
    path = home / "artifacts" / "provenance" / "mix_images" / f"{name}.json"
    files.write_json(path, provenance)
    return hashlib.md5(path.read_bytes()).hexdigest()


def _end(home, process, status):
    """Ends `dvc`; returns status and error of the run of `dvc repro`. status: of `dvc`, as the system reports it."""
    process.kill()
    process.wait()
    process.status.put(status)
    forked.until(lambda: not open_runs.read(home))
    run = queries.find_run(home, "dvc repro")
    return run.status, run.tags.get("dmat.error", "")


_KILLED_BY_9, _CODE_255 = signal.SIGKILL.value, 255 << 8


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (0, ("FINISHED", "")),
        (None, ("FINISHED", "")),
        (_KILLED_BY_9, ("KILLED", "dvc was killed by signal 9")),  # between two stages, too
        (_CODE_255, ("FAILED", "dvc ended with code 255")),  # a stage that is not of dmat failed
    ],
)
def test_a_parent_of_finished_children_ends_as_its_process(tmp_path, fake_dvc, status, ending):
    (tmp_path / "dvc.lock").write_text(_stage(tmp_path))
    assert _end(tmp_path, fake_dvc, status) == ending


def test_without_an_exit_status_the_files_of_dvc_decide(tmp_path, fake_dvc):
    (tmp_path / "dvc.lock").write_text(_stage(tmp_path))
    entry = {"pid": fake_dvc.pid, "cmd": "dvc repro"}
    files.write_json(tmp_path / ".dvc" / "tmp" / "rwlock", {"read": {"in": [entry]}, "write": {}})
    ending = ("KILLED", "dvc was killed while it reproduced a stage")
    assert _end(tmp_path, fake_dvc, None) == ending


def test_a_result_that_dvc_did_not_record_is_a_failure(tmp_path, fake_dvc):
    (tmp_path / "dvc.lock").write_text(f"the one before: {_stage(tmp_path)}")
    _stage(tmp_path, name="two")
    ending = ("FAILED", "dvc did not record the result of mix_images two")
    assert _end(tmp_path, fake_dvc, None) == ending


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (DmatError("diverged"), ("FAILED", "")),
        (Interrupted(143, "stopped"), ("KILLED", "")),
    ],
)
def test_a_parent_ends_as_the_worst_of_its_children(tmp_path, fake_dvc, error, ending):
    with pytest.raises(type(error)):
        _stage(tmp_path, error)
    assert _end(tmp_path, fake_dvc, None) == ending


def test_a_stage_that_fails_before_it_has_a_run_fails_its_parent(tmp_path, fake_dvc, monkeypatch):
    (tmp_path / "dvc.lock").write_text(_stage(tmp_path))
    (tmp_path / "params.yaml").write_text("arms: 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dmat", "mix-images", "--arm", "one"])
    from cli.main import main

    with pytest.raises(SystemExit):
        main()
    status, reason = _end(tmp_path, fake_dvc, None)
    assert status == "FAILED"
    assert reason.startswith("mix_images@one: params.yaml: ")


def test_a_failure_that_another_attempt_fixed_does_not_count(tmp_path, fake_dvc):
    """As when torchrun restarts all processes after one was lost."""
    (tmp_path / "dvc.lock").write_text(_stage(tmp_path))
    parents.record_stage_error(tmp_path, DmatError("process 0 of 2 lost another one"))
    assert _end(tmp_path, fake_dvc, 0) == ("FINISHED", "")


def test_a_clock_step_starts_no_second_parent(tmp_path, fake_dvc, monkeypatch):
    linux = pytest.importorskip("psutil._pslinux")
    _stage(tmp_path)
    real = linux.boot_time
    monkeypatch.setattr(linux, "boot_time", lambda: real() + 5)
    _stage(tmp_path, name="two")
    assert len(list((tmp_path / "mlruns" / "parents").iterdir())) == 1


def test_a_deleted_project_is_not_recreated(tmp_path, monkeypatch):
    home = tmp_path / "gone"
    monkeypatch.setattr(liveness, "wait_for_end", lambda *_: 0)
    parents.watch(home, home / "mlruns" / "parents" / "1-a", 1, "started")
    sender.follow(home)
    assert not home.exists()
