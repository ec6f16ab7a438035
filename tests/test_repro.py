"""`dmat repro` on small pipelines of DVC without dmat's stages: order, failures, signals, one worker.

The whole pipeline, compared with `dvc repro`, is in tests/test_pipeline.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from dmat import recipes, tracking
from dmat.engine import EngineOptions, Outcome, Task
from dmat.errors import DmatError, Interrupted
from dmat.pipeline import dvc_graph, repro
from dmat.tracking import dvc_process, parents
from tests import forked

ROOT = Path(__file__).parent.parent
WORK = "import sys, pathlib, time; name = sys.argv[1]; pathlib.Path(name).write_text(name)"
FAIL = "import sys; print('error: b is broken', file=sys.stderr); sys.exit(3)"
SAVE = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path("begun").touch()
while True:
    time.sleep(0.02)
"""
WRITES_WHEN_ANOTHER_WAITS = """
import pathlib, time
log, count = pathlib.Path(".dvc/tmp/repro/a.log"), pathlib.Path("begun")
with count.open("a") as file:
    file.write("x")
while b"blocked" not in log.read_bytes():
    time.sleep(0.002)
print("x" * 5000, flush=True)
time.sleep(1)
pathlib.Path("a").touch()
"""
DIVIDE = """
import pathlib
from dmat.engine import EngineOptions, Task, open_engine
from tests import engine_tasks
tasks, results = [Task(str(k), engine_tasks.add, (k, 1)) for k in range(3)], []
with open_engine(EngineOptions(workers=2)) as engine:
    engine.run(lambda: tasks.pop() if tasks else None, on_outcome=lambda outcome: results.append(outcome.result))
pathlib.Path("set").write_text(str(sorted(results)))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes the stages of dvc.yaml: name -> script, what it reads; each writes the file of its name."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")

    def write(**stages):
        entries = {}
        for name, (script, *deps) in stages.items():
            Path(f"{name}.py").write_text(script, encoding="utf-8")
            outs = ["set"] if script == DIVIDE else [name]
            entries[name] = {"cmd": f"{sys.executable} {name}.py {name}", "deps": [f"{name}.py", *deps], "outs": outs}
        Path("dvc.yaml").write_text(yaml.safe_dump({"stages": entries}), encoding="utf-8")
        return tmp_path

    return write


IN_THIS_PROCESS = EngineOptions()


def run(root, options=IN_THIS_PROCESS):
    """States of the instances in the order in which they were reported, and the first failure."""
    states = []
    waits = dvc_graph.instances_to_run(root, [])
    failure = repro.run(root, waits, options, lambda progress: states.append((progress.instance, progress.state)))
    return states, failure


def test_what_is_independent_of_a_failure_still_runs(project):
    root = project(a=(WORK,), b=(FAIL, "a"), c=(WORK, "a"), d=(WORK, "b", "c"))
    states, failure = run(root)
    assert states == [
        ("a", "started"), ("a", "done"), ("b", "started"), ("b", "failed"), ("c", "started"), ("c", "done"),
        ("d", "skipped"),
    ]  # fmt: skip
    assert (failure.instance, failure.exit_code, failure.sentence) == ("b", 3, "error: b is broken")
    project(a=(WORK,), b=(WORK, "a"), c=(WORK, "a"), d=(WORK, "b", "c"))
    states, failure = run(root)
    assert states == [("b", "started"), ("b", "done"), ("d", "started"), ("d", "done")]
    assert failure is None
    assert run(root) == ([], None)
    assert {*yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"]} == {*"abcd"}
    Path("c").unlink()
    assert run(root)[0][:2] == [("c", "started"), ("c", "restored")]


def test_a_signal_reaches_the_stage_which_saves(project):
    root = project(a=(SAVE,), b=(WORK, "a"))

    def stop():
        forked.until(Path("begun").exists)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted) as interrupted:
        run(root)
    thread.join()
    assert interrupted.value.exit_code == 75
    assert Path("saved").exists()


def test_a_stage_that_divides_its_work_leaves_the_only_worker_free(project):
    """It asks for two workers of its own, and gets those of its parent."""
    root = project(generate_images=(DIVIDE,), a=(WORK, "set"))
    states, failure = run(root, EngineOptions(workers=1))
    assert failure is None
    assert states[-1] == ("a", "done")
    assert Path("set").read_text(encoding="utf-8") == "[1, 2, 3]"


def test_a_project_of_released_images_has_no_generator(tmp_path, monkeypatch):
    """DVC resolves an empty list, and makes or has all that the stages read."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = True\n")
    for name in ("dvc.yaml", "code.yaml"):
        shutil.copy(ROOT / name, name)
    recipes.use("cifar10-wrn28-1m", Path("params.yaml"))
    waits = dvc_graph.instances_to_run(tmp_path, [])
    assert [*waits][-1] == "write_report"
    assert len(waits) == 10
    assert waits["write_report"] == {*waits} - {"write_report"}
    assert waits["generate_images@released"] == {"prepare_data"}
    made = {path for stage in Repo().index.stages for path in map(str, stage.outs)}
    read = {path for stage in Repo().index.stages for dep in stage.deps if not (path := str(dep)).endswith(".yaml")}
    missing = {path for path in read if not any(f"{name}/".startswith(f"{path}/") for name in made)}
    assert missing == {"plugins", "sources/none", "sources/cifar10", "sources/wang-cifar10-1m.npz"}


class NeverStopped:
    def check_interruption(self):
        pass


def test_an_instance_waits_for_the_command_of_a_worker_that_was_killed(project):
    """Which runs on, and writes into the log as before; nothing runs twice."""
    root = str(project(a=(WRITES_WHEN_ANOTHER_WAITS,)))
    ends = []
    thread = threading.Thread(target=lambda: ends.append(repro.run_instance(NeverStopped(), root, "a", {})))
    thread.start()
    forked.until(Path("begun").exists, 100)
    ends.append(repro.run_instance(NeverStopped(), root, "a", {}))
    thread.join()
    assert [end.exit_code for end in ends] == [0, 0]
    assert sorted(end.progress("a").state for end in ends) == ["done", "unchanged"]
    assert Path("begun").read_text("utf-8") == "x"


def test_a_stage_finds_the_programs_beside_its_interpreter(project, monkeypatch):
    """A worker that a service manager started has no PATH of an activated environment."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    states, _ = run(project(a=("import os, pathlib; pathlib.Path('a').write_text(os.environ['PATH'])",)))
    assert states[-1] == ("a", "done")
    assert Path("a").read_text(encoding="utf-8") == f"/usr/bin:/bin:{Path(sys.executable).parent}"


def test_targets_that_dvc_does_not_have_are_refused(project):
    root = project(a=(WORK,))
    with pytest.raises(DmatError, match="dvc cannot plan nothing"):
        dvc_graph.instances_to_run(root, ["nothing"])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (set(), {}),
        ({"b"}, {"b": set(), "d": {"b"}}),
        ({"a", "c"}, {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"a", "b", "c"}}),
    ],
)
def test_what_may_run_and_what_it_waits_for(changed, expected):
    edges = [("b", "a"), ("c", "a"), ("d", "b"), ("d", "c"), ("elsewhere", "a")]
    assert dvc_graph._waits(["a", "b", "c", "d"], edges, changed) == expected


class _Engine:
    size, environment = 2, {"DMAT_CLUSTER": "file"}


@pytest.fixture
def scheduler():
    readers = ("generate_images@x", "score_images@x", "train_robust@y-1")
    waits = {"prepare_data": frozenset(), "evaluate_robust@y-1": frozenset()}
    waits |= dict.fromkeys(readers, frozenset({"prepare_data"}))
    return repro._Scheduler(Path("root"), waits, _Engine, {"DMAT_PARENT": "p"}, lambda progress: None)


def test_only_stages_with_shards_are_in_the_driver_and_know_the_cluster(scheduler):
    first, second = scheduler.next_task(), scheduler.next_task()
    assert (first.name, first.in_driver, first.arguments[2]) == ("prepare_data", False, {"DMAT_PARENT": "p"})
    assert (second.name, second.in_driver) == ("evaluate_robust@y-1", True)
    assert second.arguments[2] == {"DMAT_PARENT": "p", "DMAT_CLUSTER": "file"}
    assert scheduler.next_task() is None
    scheduler.end(Outcome(first, repro._CommandEnd(0, 1.0, "")))
    names = [scheduler.next_task().name for _ in range(2)]
    assert names == ["generate_images@x", "train_robust@y-1"]  # no third coordinator beside two workers
    assert scheduler.next_task() is None
    scheduler.end(Outcome(second, repro._CommandEnd(0, 1.0, "")))
    assert scheduler.next_task().name == "score_images@x"


@pytest.mark.parametrize(
    ("run_", "state", "exit_code", "sentence"),
    [
        (repro._CommandEnd(0, 1.0, "Running stage 'a':"), "done", 0, ""),
        (repro._CommandEnd(0, 1.0, "Stage 'a' didn't change, skipping"), "unchanged", 0, ""),
        (repro._CommandEnd(0, 1.0, "Stage 'a' is cached - skipping run, checking out outputs"), "restored", 0, ""),
        (repro._CommandEnd(255, 1.0, "error: a\nERROR: failed to run: dmat, exited with 2"), "failed", 2, "error: a"),
        (repro._CommandEnd(255, 1.0, "ERROR: no disk"), "failed", 255, "ERROR: no disk"),
        (repro._CommandEnd(-9, 1.0, ""), "failed", -9, "it wrote nothing"),
    ],
)
def test_what_is_said_of_the_end_of_a_command(run_, state, exit_code, sentence):
    progress = run_.progress("a")
    assert (progress.state, progress.exit_code, progress.sentence) == (state, exit_code, sentence)


def test_the_progress_bar_in_the_log_of_a_command_is_told_when_it_moves(monkeypatch, tmp_path, scheduler):
    log, told, lines = tmp_path / "log", [], []
    begun, nearly = "evaluate:  10%|#   | 1/9", "evaluate:  90%|### | 8/9"
    states = ["DVC says 10%", f"\r{begun}", f"\r{begun}", f"\r{nearly}", "\n"]
    log.write_text("")

    class Command:
        def __init__(self, *arguments, **options):
            pass

        def poll(self):
            if not states:
                return 0
            with open(log, "a", encoding="utf-8") as file:
                file.write(states.pop(0))
            return None

    class Context:
        def check_interruption(self):
            pass

        def ask(self, message):
            told.append(message)
            return {}

    monkeypatch.setattr(subprocess, "Popen", Command)
    monkeypatch.setattr(repro, "_TELL_SECONDS", 0)
    monkeypatch.setattr(repro, "_POLL_SECONDS", 0.001)
    assert repro._run_command(Context(), "root", "a", {}, 0, log) == 0
    assert [message["bar"] for message in told] == [begun, nearly]
    scheduler._report = lines.append
    assert scheduler.tell(Task("a", print), told[1]) == {}
    assert (lines[0].instance, lines[0].state, lines[0].sentence) == ("a", "running", nearly)


def test_a_command_in_the_way_of_another_dvc_runs_again(monkeypatch, tmp_path):
    texts = ["ERROR: Unable to acquire lock. Most likely another", "'x' is busy, it is being blocked by:", ""]

    def run_command(context, root, name, environment, log, path):
        os.write(log, texts[0].encode())
        return 255 if texts.pop(0) else 0

    monkeypatch.setattr(repro, "_run_command", run_command)
    monkeypatch.setattr(repro, "_RETRY_SECONDS", 0.01)

    class Context:
        def check_interruption(self):
            pass

    assert repro.run_instance(Context(), str(tmp_path), "a", {}).exit_code == 0
    assert texts == []


@pytest.mark.parametrize(
    ("threads", "gpus", "instances", "expected"),
    [
        *((1, 0, 14, 8), (2, 0, 14, 4), (3, 0, 14, 2), (0, 0, 14, 1), (16, 0, 14, 1)),
        *((1, 4, 14, 4), (1, 0, 3, 3), (1, 0, 0, 1)),
    ],
)
def test_how_many_run_at_once(monkeypatch, threads, gpus, instances, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    assert repro.default_workers(threads, gpus, instances) == expected


def test_the_command_prints_a_line_for_each_start_and_end(project, call, monkeypatch, tiny_params):
    monkeypatch.setenv("DMAT_TRACKING", "off")
    project(a=(WORK,), b=(FAIL, "a"))
    tiny_params["compute"]["device"] = "cpu"
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params), encoding="utf-8")
    code, out, err = call("repro", "--json", "--workers", "1")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 3, err
    assert [(line["instance"], line["state"]) for line in lines] == [
        ("a", "started"), ("a", "done"), ("b", "started"), ("b", "failed")
    ]  # fmt: skip
    assert lines[-1]["exit_code"] == 3
    code, out, err = call("repro", "--workers", "1")
    assert "b: failed in " in out
    assert err.splitlines() == ["b: error: b is broken"]


def test_stages_find_the_run_of_their_driver_by_its_name(tmp_path, monkeypatch):
    """Also on another machine, where no `dmat repro` is above them. An error of theirs is that of the run."""
    monkeypatch.setenv("DMAT_TRACKING", "off")
    assert tracking.begin_parent(tmp_path, tmp_path, "dmat repro") == {}
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.setattr(parents, "_start_watching", lambda *_: None, raising=False)
    environment = tracking.begin_parent(tmp_path, tmp_path, "dmat repro --workers 2")
    assert tracking.begin_parent(tmp_path, tmp_path, "dmat repro --workers 2") == environment
    monkeypatch.setattr(dvc_process, "outermost", lambda: None)
    assert parents.folder_above(tmp_path, tmp_path) is None
    for name, value in (environment | {"DVC_STAGE": "train_robust@generated-1"}).items():
        monkeypatch.setenv(name, value)
    folder = parents.folder_above(tmp_path, tmp_path)
    assert json.loads((folder / "tracking.json").read_text())["about"]["name"] == "dmat repro --workers 2"
    tracking.record_stage_error(tmp_path, DmatError("no images"))
    stopped = json.loads((folder / "tracking.json").read_text())["stopped"]
    assert stopped == {"status": "FAILED", "error": "train_robust@generated-1: no images"}
