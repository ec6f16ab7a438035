"""MLflow: the true status however a run ends, nothing sent twice or lost, and no run stopped by a broken store."""

import contextlib
import getpass
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dmat import files, liveness, tracking
from dmat.errors import DmatError, Interrupted
from dmat.tracking import dvc_process, open_runs, origin, run_record, runs, sender, stores
from dmat.training.long_run import MetricsLog
from tests import forked, senders, servers


@pytest.fixture
def home(tmp_path, monkeypatch, put_store):
    monkeypatch.setenv("DMAT_TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sender, "_start", senders.start_thread)
    monkeypatch.setattr(sender, "SEND_EVERY", 0.05)
    monkeypatch.setattr(runs, "_unreachable_stores", set())
    put_store(tmp_path)
    return tmp_path


@pytest.fixture
def process(monkeypatch):
    """Sends from a process, as a user's run does."""
    monkeypatch.setattr(sender, "_start", _START)


_START = sender._start


def _open(home, name="one", parent=None):
    work = home / "runs" / name
    work.mkdir(parents=True, exist_ok=True)
    return tracking.open_run(
        home, work, stage="train_robust", instance_name=name, settings={"beta": 5.0, "threat": {"epsilon": "8/255"}},
        inputs={"train": {"path": "p", "sha256": "abc"}}, compute={"device": "cpu"}, parent=parent,
    )  # fmt: skip


@pytest.fixture
def warned(monkeypatch):
    """Collects the warnings of a run. A thread warns, and `pytest.warns` records warnings of other threads only while
    no library changes the warning filters, which belong to the whole process."""
    messages: list[str] = []
    monkeypatch.setattr(runs, "warnings", SimpleNamespace(warn=lambda text, stacklevel: messages.append(text)))
    return messages


@pytest.mark.parametrize("is_started_again", [False, True])
def test_a_run_deleted_in_the_ui_stops_no_other(home, is_started_again):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("one", "two"):  # their process was killed
        run = _open(home, name)
        run._record.update(about=run._about, ending=None, tags={})
        open_runs.write(home, run.folder, dead.pid)
        uploader = run_record.RunUploader(home, run._record)
        with uploader.exclusive():
            uploader.connect()
    client, experiment = stores.connect(home)
    deleted = files.read_json(home / "runs/one/tracking.json")["run"]
    client.delete_run(deleted)
    if is_started_again:
        with _open(home, "one"):
            pass
    else:
        assert "was deleted in MLflow" in tracking.sync(home)[0]
    tracking.sync(home)
    assert not open_runs.read(home)
    states = {run.info.run_name: run.info.status for run in client.search_runs([experiment])}
    again = {"train_robust one": "FINISHED"} if is_started_again else {}
    assert states == {"train_robust two": "KILLED", **again}
    client.delete_experiment(experiment)
    assert stores.connect(home)[1] == experiment


def _runs(home):
    client, experiment = tracking.connect(home)
    return client, client.search_runs([experiment])


def _metrics(run):
    """Metrics of a run without the system metrics, which a slow machine has time to sample."""
    return {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}


def _log(home, images_seen, name="one", **values):
    log = MetricsLog(home / "runs" / name / "metrics.jsonl")
    log.write(images_seen, values)
    log.close()


def test_a_killed_and_resumed_run_is_one_run_with_each_point_once(home):
    with pytest.raises(Interrupted), _open(home):
        _log(home, 10, loss=2.0)
        raise Interrupted(143, "stopped")
    client, runs = _runs(home)
    assert [run.info.status for run in runs] == ["KILLED"]
    with _open(home) as run:
        _log(home, 20, loss=1.0, bad=float("inf"))
        run.finish_with({"best": {"pgd": 0.5, "name": "text"}, "parameters": 77562, "accuracy": 1.0, "loss": 1.0}, [])
    client, runs = _runs(home)
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]
    assert runs[0].data.metrics["best.pgd"] == 0.5
    assert "bad" not in runs[0].data.metrics
    assert runs[0].data.metrics["accuracy"] == 1.0
    assert "parameters" not in runs[0].data.metrics  # the charts of MLflow would begin with constants
    assert runs[0].data.tags["constant.parameters"] == "77562"
    assert runs[0].data.metrics["nonfinite"] == 1.0
    assert runs[0].data.params == {"beta": "5", "threat.epsilon": "8/255"}
    assert runs[0].data.tags["input.train"] == "abc"


def test_a_run_answers_searches_by_its_context_and_says_who_ran_what(home, monkeypatch):
    monkeypatch.setattr(origin, "git", lambda folder: {"git_commit": 40 * "a", "git_dirty": False})
    work = home / "runs" / "evaluation"
    work.mkdir(parents=True)
    with tracking.open_run(
        home, work, stage="evaluate_robust", instance_name="generated-1", settings={"batch": 250}, inputs={},
        compute={}, context={"arm": "generated", "seed": 1, "generated_share": 0.7, "beta": 3.0, "batch": 128},
    ) as run:  # fmt: skip
        run.finish_with({"auto_attack": 0.6}, [])
    client, experiment = tracking.connect(home)
    condition = "params.beta = '3' and params.seed = '1' and metrics.auto_attack > 0.5"
    (answer,) = client.search_runs([experiment], condition)
    assert (answer.data.params["generated_share"], answer.data.params["batch"]) == ("0.7", "250")
    assert client.search_runs([experiment], condition.replace("0.5", "0.7")) == []
    tags = {name: answer.data.tags[f"mlflow.{name}"] for name in ("user", "source.name", "source.git.commit")}
    assert tags == {"user": getpass.getuser(), "source.name": "dmat evaluate-robust", "source.git.commit": 40 * "a"}


def test_a_user_without_a_name_is_left_out(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: {}["no such uid"])
    assert set(origin.user_and_source("dmat", {})) == {"mlflow.source.name", "mlflow.source.type"}


def test_inputs_are_data_sets_of_the_run(home):
    with _open(home):
        pass
    (run,) = _runs(home)[1]
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("p", "abc")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "train")]


def test_processor_and_memory_are_sampled_during_a_run(home, monkeypatch):
    monkeypatch.setattr(runs, "_SAMPLE_EVERY", 0.2)
    monkeypatch.setattr(runs, "_LOOK_EVERY", 0.2)
    with _open(home) as run:
        run.provenance()  # waits for the store
        samples = run.folder / "system.jsonl"
        while not samples.exists() or samples.read_text().count("\n") < 3:
            sum(range(100_000))
    client, (stored_run,) = _runs(home)
    history = client.get_metric_history(stored_run.info.run_id, "system/process_memory_megabytes")
    assert len(history) >= 3
    assert all(10 < point.value < 100_000 for point in history)
    busy = client.get_metric_history(stored_run.info.run_id, "system/process_cpu_percentage_of_a_core")
    assert max(point.value for point in busy) > 1  # others may have most of the processor


def test_an_error_ends_failed(home):
    with pytest.raises(DmatError), _open(home):
        raise DmatError("diverged")
    (run,) = _runs(home)[1]
    assert run.info.status == "FAILED"
    assert run.data.tags["dmat.error"] == "diverged"


@pytest.fixture(scope="module")
def dead_pid():
    """The id of a process that has ended."""
    script = "import os; print(os.getpid())"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def _as_if_dead(home, pid):
    """Turns every tracked run of this process into one of a process that has ended."""
    for path in (home / "mlruns" / "active").glob("*.json"):
        files.write_json(path, files.read_json(path) | {"pid": pid, "started": "gone"})


_KILLED = """
import os, psutil, signal, sys
from pathlib import Path
from dmat import tracking
from dmat.tracking import runs
from dmat.training.long_run import MetricsLog
runs._SENDER_TIMEOUT = 300.0
home = Path(sys.argv[1])
work = home / "runs" / "one"
work.mkdir(parents=True)
names = {"stage": "train_robust", "instance_name": "one"}
with tracking.open_run(home, work, **names, settings={}, inputs={}, compute={}) as run:
    MetricsLog(work / "metrics.jsonl").write(10, {"loss": 2.0})
    run.provenance()
    (sender,) = psutil.Process().children()
    if sys.argv[2] == "both":
        sender.kill()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", ["training", "both"])
def test_a_run_killed_with_9_is_ended_as_killed_with_all_its_metrics(home, killed):
    """By its sender, which notices the end by itself; if the sender was killed too, by the next command."""
    subprocess.run([sys.executable, "-c", _KILLED, str(home), killed], check=False, timeout=400)
    if killed == "both":
        assert [run.info.status for run in _runs(home)[1]] == ["RUNNING"]
        with _open(home, "two"):
            pass
    else:
        forked.until(lambda: not open_runs.read(home))
    runs = {run.info.run_name: run for run in _runs(home)[1]}
    assert runs["train_robust one"].info.status == "KILLED"
    assert runs["train_robust one"].data.tags["dmat.error"] == open_runs.LOST
    assert _metrics(runs["train_robust one"]) == {"loss": 2.0}
    assert all(run.info.status == "FINISHED" for name, run in runs.items() if name != "train_robust one")
    assert tracking.sync(home) == []


@pytest.mark.parametrize("look", ["while it continues", "at its end"])
def test_a_sender_that_dies_loses_nothing_and_another_takes_over(home, process, warned, monkeypatch, look):
    monkeypatch.setattr(runs, "_LOOK_EVERY", 0.2 if look == "while it continues" else 1000.0)
    with _open(home) as run:
        run.provenance()  # waits until it sends
        (child,) = _senders(home)
        _log(home, 10, loss=2.0)
        child.kill()
        if look == "while it continues":
            forked.until(lambda: files.read_json(home / "runs" / "one" / "tracking.json")["sent"] > 0)
    assert ["MLflow ended; the run continues, and another one" in line for line in warned] == [True]
    (stored_run,) = _runs(home)[1]
    assert (stored_run.info.status, _metrics(stored_run)) == ("FINISHED", {"loss": 2.0})
    forked.until(lambda: not _senders(home))


def test_a_sender_that_always_dies_stops_no_run(home, warned, monkeypatch):
    """As where MLflow crashes at its import."""
    monkeypatch.setattr(sender, "_start", lambda home: subprocess.Popen(["true"]).pid)
    with _open(home) as run:
        _log(home, 10, loss=2.0)
        assert run.provenance()["mlflow_run"] is None
    assert len(warned) == runs._MAX_SENDERS
    assert tracking.sync(home) == ["train_robust one: FINISHED"]
    assert [_metrics(run) for run in _runs(home)[1]] == [{"loss": 2.0}]


def test_a_project_has_one_sender_that_ends_with_its_last_run(home, process):
    with _open(home) as first:
        first.provenance()
        with _open(home, "two") as second:
            second.provenance()
            (child,) = _senders(home)
        assert _senders(home) == [child]
    forked.until(lambda: not _senders(home))
    assert [run.info.status for run in _runs(home)[1]] == ["FINISHED", "FINISHED"]
    assert not list((home / "mlruns" / "active").glob(".sender-*"))


def test_a_run_that_begins_while_the_sender_ends_is_sent(home, monkeypatch):
    """The sender finds no run, and before it gives up, one begins."""
    read, second, begins = sender._markers, _open(home, "two"), []

    def begin_meanwhile(home):
        markers = read(home)
        if not markers and not begins:
            begins.append(threading.Thread(target=second.__enter__))
            begins[0].start()
            record = home / "runs" / "two" / "tracking.json"
            forked.until(lambda: record.exists() and files.read_json(record)["about"])
        return markers

    monkeypatch.setattr(sender, "_markers", begin_meanwhile)
    with _open(home):
        pass
    forked.until(lambda: begins and not begins[0].is_alive())
    assert second.provenance()["mlflow_run"]
    second.__exit__(None, None, None)
    assert [run.info.status for run in _runs(home)[1]] == ["FINISHED", "FINISHED"]


def _senders(home):
    """Sending processes of this project."""
    running = [process for process in psutil.process_iter(["cmdline", "status"]) if process.info["cmdline"]]
    return [
        process
        for process in running
        if "sender.main" in " ".join(process.info["cmdline"]) and str(home) in process.info["cmdline"]
    ]


def test_where_no_process_can_be_started_a_thread_sends(home, process, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(sender.subprocess, "Popen", refuse)
    with _open(home):
        _log(home, 10, loss=2.0)
    monkeypatch.undo()
    (stored_run,) = _runs(home)[1]
    assert (stored_run.info.status, _metrics(stored_run)) == ("FINISHED", {"loss": 2.0})


def test_a_zombie_process_is_not_alive(home):
    with servers.running(["sleep", "600"]) as child:
        (home / "runs" / "one").mkdir(parents=True)
        open_runs.write(home, home / "runs" / "one", child.pid)
        ((_, marker),) = open_runs.read(home)
        assert open_runs.alive(marker)
        psutil.Process(child.pid).kill()  # which does not wait for its end, as `child.kill` would
        forked.until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
        assert not open_runs.alive(marker)


@pytest.fixture
def step_clock(monkeypatch):
    """Returns a function that steps the clock by some seconds as processes see it: Linux moves its boot time."""
    linux = pytest.importorskip("psutil._pslinux")
    real = linux.boot_time

    def step(seconds):
        monkeypatch.setattr(linux, "boot_time", lambda: real() + seconds)

    return step


@pytest.mark.parametrize("seconds", [2, -5, 3600])
def test_a_clock_step_ends_no_living_run(home, step_clock, seconds):
    open_runs.write(home, home / "runs" / "one", os.getpid())
    before = psutil.Process().create_time()
    step_clock(seconds)
    assert abs(psutil.Process().create_time() - before) > 1, "the step is one"
    ((_, marker),) = open_runs.read(home)
    assert open_runs.alive(marker)
    assert tracking.sync(home) == []


def test_a_process_id_means_another_process_after_a_boot_whatever_the_process_name(home, monkeypatch):
    script = "open('/proc/self/comm', 'w').write(') Z (1 2'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        child_identity = liveness.identity(child.pid)
        assert liveness.is_running(child.pid, child_identity)
        assert not liveness.is_running(os.getpid(), child_identity)
        monkeypatch.setattr(liveness, "boot_id", lambda: "another boot")
        assert not liveness.is_running(child.pid, child_identity)
        monkeypatch.undo()
        child.communicate("\n")
    assert liveness.identity(child.pid) == ""
    assert not liveness.is_running(child.pid, "")


def test_the_end_of_a_process_started_elsewhere_is_awaited():
    child = subprocess.Popen(["sleep", "0.3"])
    child_identity = liveness.identity(child.pid)
    threading.Thread(target=child.wait, daemon=True).start()
    assert liveness.wait_for_end(child.pid, child_identity) in (0, None)  # where the system tells its status
    assert not liveness.is_running(child.pid, child_identity)


def test_a_training_does_not_import_mlflow(home):
    """The import would cost every stage seconds and memory."""
    script = "import sys, tests.test_tracking as t, pathlib\nwith t._open(pathlib.Path(sys.argv[1])) as run:\n"
    script += "    run.provenance()\nprint('mlflow' in sys.modules)"
    command = [sys.executable, "-c", script, str(home)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert result.stdout == "False\n"


def test_a_parent_ends_as_its_children_did(home, dead_pid):
    parent = home / "mlruns" / "parents" / "study"
    record = runs.RunRecord(parent, stores.identity(home))
    record.update(about={"name": "study", "tags": {}, "settings": {}, "started": 1.0, "parent": None})
    open_runs.write(home, parent, os.getpid(), by_children=True)
    with _open(home, parent=parent) as run:
        run.describe("the table")
        run.finish_with({"generated_minus_baseline": {"best_auto_attack": 0.083}}, [])
    with pytest.raises(DmatError), _open(home, "two", parent=parent) as run:
        run.finish_with({"other": 1.0}, [])
        raise DmatError("diverged")
    _as_if_dead(home, dead_pid)
    assert tracking.sync(home) == ["study: FAILED"]
    stored_runs = _runs(home)[1]
    ids = {run.info.run_name: run.info.run_id for run in stored_runs}
    assert {run.data.tags.get("mlflow.parentRunId") for run in stored_runs if run.info.run_name != "study"} == {
        ids["study"]
    }
    (study,) = [run for run in stored_runs if run.info.run_name == "study"]
    assert study.data.metrics == {"generated_minus_baseline.best_auto_attack": 0.083}  # of the child with a description


def test_a_parent_is_not_ended_before_its_children_were_sent(home, dead_pid, monkeypatch):
    """The store fails when the end of the child is sent, and answers again right after."""
    folders = [home / "runs" / name for name in ("study", "one")]
    for folder, parent in zip(folders, (None, "runs/study"), strict=True):
        record = runs.RunRecord(folder, stores.EMBEDDED)
        record.update(about={"name": folder.name, "tags": {}, "settings": {}, "started": 1.0, "parent": parent})
        open_runs.write(home, folder, os.getpid(), by_children=parent is None)
    record.update(ending={"status": "FAILED", "error": "", "metrics": {}, "pictures": [], "ended": 2.0})
    _as_if_dead(home, dead_pid)
    answers, real_connect = iter([_unreachable]), stores.connect
    monkeypatch.setattr(stores, "connect", lambda home: next(answers, real_connect)(home))
    sender.follow(home)
    assert len(open_runs.read(home)) == 2
    sender.follow(home)
    assert open_runs.read(home) == []
    assert {run.info.run_name: run.info.status for run in _runs(home)[1]} == {"study": "FAILED", "one": "FAILED"}


def test_markers_of_another_store_and_of_living_processes_are_left_alone(home, dead_pid, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (home / "runs" / "x" / "elsewhere").mkdir(parents=True)
    open_runs.write(home, home / "runs" / "x" / "elsewhere", os.getpid())
    _as_if_dead(home, dead_pid)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    open_runs.write(home, home / "runs" / "x" / "alive", os.getpid())
    assert tracking.sync(home) == [
        "1 of another store, http://127.0.0.1:9: set MLFLOW_TRACKING_URI to it and run this again"
    ]
    assert [path.name for path, _ in open_runs.read(home)] == ["x-alive.json", "x-elsewhere.json"]


@pytest.mark.parametrize("known_before", [False, True], ids=["never reached", "lost on the way"])
@pytest.mark.parametrize("process_ends", [False, True], ids=["in its process", "by another"])
def test_an_outage_loses_no_metric(home, monkeypatch, warned, dead_pid, known_before, process_ends):
    """`dmat runs sync` sends what an outage held back: points, final metrics and status, each once."""
    if known_before:
        with pytest.raises(Interrupted), _open(home):
            _log(home, 5, loss=3.0)
            raise Interrupted(143, "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(stores, "connect", _unreachable)
        started = time.monotonic()
        with _open(home) as run:
            _log(home, 10, loss=2.0)
            run.tag("optuna.state", "COMPLETE")
            run.finish_with({"best": 1.0}, [])
        assert time.monotonic() - started < runs._SENDER_TIMEOUT, "the run waited until the end"
        _until_given_up(home)  # a run does not wait for a silent server; its last attempt must fall into the outage
        assert ["cannot be reached (nobody answers); the run continues" in line for line in warned] == [True]
        with pytest.raises(DmatError, match=r"cannot be reached .nobody answers.; 0 of 1 runs .* run the same command"):
            tracking.sync(home)
    if process_ends:
        _as_if_dead(home, dead_pid)
    assert tracking.sync(home) == ["train_robust one: FINISHED"]
    assert tracking.sync(home) == []
    client, stored_runs = _runs(home)
    assert [run.info.status for run in stored_runs] == ["FINISHED"]
    steps = [point.step for point in client.get_metric_history(stored_runs[0].info.run_id, "loss")]
    assert steps == ([5, 10] if known_before else [10])
    assert stored_runs[0].data.metrics["best"] == 1.0
    assert stored_runs[0].data.tags["optuna.state"] == "COMPLETE"


def _until_given_up(home):
    """Waits until the sender has ended: no run is active, and the end of each was attempted."""
    forked.until(lambda: not sender._process_file(home).exists())


def _unreachable(home):
    raise ConnectionError("nobody answers")


def test_a_stage_waits_for_a_slow_server_only_until_it_answers(home, monkeypatch, warned):
    """With a shorter timeout a stage gave up on a busy machine, and its provenance never had a run."""
    assert runs._SENDER_TIMEOUT >= 60
    real_connect = stores.connect
    monkeypatch.setattr(stores, "connect", lambda home: time.sleep(1) or real_connect(home))
    with _open(home) as run:
        recorded = run.provenance()
    assert recorded["mlflow_run"] == _runs(home)[1][0].info.run_id
    assert recorded["work"] == "runs/one"


def test_only_the_first_run_waits_for_a_server_that_does_not_answer(home, monkeypatch, warned):
    """As for the trials of a study, which are runs of one process."""

    is_awaited, waiting, real_wait = threading.Event(), [], runs.Run._wait_until

    def connect(home):
        is_awaited.wait()
        raise ConnectionError("nobody answers")

    def wait_until(run, is_done):
        waiting.append(run.folder.name)
        is_awaited.set()
        real_wait(run, is_done)

    monkeypatch.setattr(stores, "connect", connect)
    monkeypatch.setattr(runs.Run, "_wait_until", wait_until)
    for name in ("one", "two", "three"):
        with _open(home, name):
            pass
    assert waiting == ["one"]
    assert ["cannot be reached" in line for line in warned] == [True]


def test_a_server_that_comes_back_gets_all_points_during_the_run(home, monkeypatch, warned):
    monkeypatch.setattr(sender, "SEND_EVERY", 1.0)
    monkeypatch.setattr(runs, "_LOOK_EVERY", 0.05)
    real_connect = stores.connect
    monkeypatch.setattr(stores, "connect", lambda home: (real_connect if warned else _unreachable)(home))
    with _open(home):
        _log(home, 10, loss=2.0)
        forked.until(lambda: files.read_json(home / "runs" / "one" / "tracking.json")["sent"])
        assert [_metrics(run) for run in _runs(home)[1]] == [{"loss": 2.0}]
    assert ["cannot be reached" in line for line in warned] == [True]
    # this reader may have been in the sender's way, which tries again
    forked.until(lambda: [run.info.status for run in _runs(home)[1]] == ["FINISHED"])


def test_a_point_that_was_sent_but_not_recorded_is_not_sent_again(home):
    with pytest.raises(Interrupted), _open(home):
        _log(home, 10, loss=2.0)
        raise Interrupted(143, "stopped")
    path = home / "runs" / "one" / "tracking.json"
    files.write_json(path, files.read_json(path) | {"sent": 0})  # killed after sending and before recording
    with _open(home):
        _log(home, 20, loss=1.0)
    client, stored_runs = _runs(home)
    history = client.get_metric_history(stored_runs[0].info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]


def test_a_password_in_the_address_of_the_server_is_neither_shown_nor_stored(home, monkeypatch, warned):
    """Nothing listens there, and errors of the library repeat the address. Another user or host is another store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:s3cret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with _open(home) as run:
        run.end_as("FAILED", "refused by http://alice:s3cret@127.0.0.1:9")
    messages = [*warned, *_failing_sync(home)]
    assert any("http://alice:***@127.0.0.1:9" in line for line in messages)
    assert [line for line in messages if "s3cret" in line] == []
    leaks = [path for path in home.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert leaks == []
    store_identity = stores.identity(home)
    for other in ("http://bob:s3cret@127.0.0.1:9", "http://alice:s3cret@127.0.0.2:9"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        assert stores.identity(home) != store_identity
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:changed@127.0.0.1:9")
    assert stores.identity(home) == store_identity


def _failing_sync(home):
    with pytest.raises(DmatError) as refused:
        tracking.sync(home)
    return [str(refused.value)]


def test_a_record_with_a_password_from_an_earlier_version_is_found_and_rewritten(home, monkeypatch):
    with_password = "http://alice:s3cret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    files.write_json(home / "runs/a/tracking.json", {"store": with_password, "run": "abc"})
    record = runs.RunRecord(home / "runs/a", stores.identity(home))
    assert record["run"] == "abc"
    record.update(sent=1)
    assert "s3cret" not in (home / "runs/a/tracking.json").read_text()
    open_runs.write(home, home / "runs/a", os.getpid())
    ((path, marker),) = open_runs.read(home)
    files.write_json(path, marker | {"store": with_password})
    assert open_runs.read(home) == [(path, marker)]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (line,) = tracking.sync(home)
    assert "http://alice:***@127.0.0.1:9: set MLFLOW_TRACKING_URI to it (its password for ***)" in line


def test_an_empty_address_is_the_embedded_store(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    client, experiment = tracking.connect(home)
    assert tracking.store_uri(home) == f"sqlite:///{home}/mlruns/mlflow.db"
    assert client.get_experiment(experiment).artifact_location == (home / "mlruns" / "artifacts").as_uri()


def test_two_records_of_one_run_keep_each_others_updates_and_create_it_once(home):
    """Both the thread of a study and its trials may be the first to need the run of the study."""
    folder = home / "runs" / "tune" / "study"
    first, second = (runs.RunRecord(folder, stores.identity(home)) for _ in range(2))
    first.update(about={"name": "study", "tags": {}, "settings": {}, "started": 1.0, "parent": None})
    for record in (first, second):
        uploader = sender.RunUploader(home, record)
        with uploader.exclusive():
            uploader.connect()
    assert first["run"] == second["run"]
    assert len(_runs(home)[1]) == 1
    first.update(seconds=5.0)
    second.update(ending=None)
    assert runs.RunRecord(folder, stores.identity(home))["seconds"] == 5.0


def test_a_run_that_was_set_aside_is_ended_too(home):
    """kill -9, then --fresh: two runs, and the first does not stay RUNNING."""
    subprocess.run([sys.executable, "-c", _KILLED, str(home), "both"], check=False, timeout=400)
    work = home / "runs" / "one"
    tracking.set_aside(home, work, work / "before-1")
    with _open(home):
        _log(home, 10, loss=1.0)
    metrics_by_status = {run.info.status: _metrics(run) for run in _runs(home)[1]}
    assert metrics_by_status == {"KILLED": {"loss": 2.0}, "FINISHED": {"loss": 1.0}}
    assert open_runs.read(home) == []


def test_a_study_set_aside_during_an_outage_takes_its_trials_with_it(home, dead_pid):
    """--fresh twice while nothing could be sent: three studies with a trial each, each trial below its own study."""
    study = home / "runs" / "tune" / "study"
    for attempt in range(3):
        if attempt:
            tracking.set_aside(home, study, study / f"before-{attempt}")
        for folder, parent in ((study, None), (study / "trial-0000", "runs/tune/study")):
            folder.mkdir(parents=True, exist_ok=True)
            about = {"name": folder.name, "tags": {}, "settings": {}, "started": 1.0, "parent": parent}
            runs.RunRecord(folder, stores.EMBEDDED).update(about=about)
            open_runs.write(home, folder, os.getpid())
        _log(home, attempt, "tune/study", best=float(attempt))
        _log(home, attempt, "tune/study/trial-0000", loss=float(attempt))
    assert sorted(path.parent.name for path in study.rglob("trial-0000")) == ["before-1", "before-2", "study"]
    _as_if_dead(home, dead_pid)
    assert len(tracking.sync(home)) == 6
    assert open_runs.read(home) == []
    stored_runs = _runs(home)[1]
    studies = {run.info.run_id: run.data.metrics["best"] for run in stored_runs if "best" in run.data.metrics}
    pairs = [
        (studies[run.data.tags["mlflow.parentRunId"]], run.data.metrics["loss"])
        for run in stored_runs
        if "loss" in run.data.metrics
    ]
    assert sorted(pairs) == [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)]
    assert {run.info.status for run in stored_runs} == {"KILLED"}


def test_a_run_that_was_started_again_is_not_ended_for_its_predecessor(home, dead_pid):
    """A sync noticed the end of its process; before it acts, the run is at work again."""
    with pytest.raises(Interrupted), _open(home):
        raise Interrupted(143, "stopped")
    work = home / "runs" / "one"
    open_runs.write(home, work, os.getpid())
    _as_if_dead(home, dead_pid)
    ((path, stale),) = open_runs.read(home)
    runs.RunRecord(work, stores.EMBEDDED).update(ending=None)
    open_runs.write(home, work, os.getpid())
    uploader = sender.RunUploader(home, runs.RunRecord(work, stores.EMBEDDED))
    assert open_runs.complete(uploader, path, stale) == []
    assert path.exists()
    open_runs._unlink_unchanged(home, path, stale)
    assert path.exists()


def test_a_run_resumed_while_its_end_is_sent_is_active_again(home, monkeypatch):
    """Its process was killed. Between two requests about that, the same command runs again."""
    with pytest.raises(Interrupted), _open(home):
        raise Interrupted(143, "stopped")
    work = home / "runs" / "one"
    runs.RunRecord(work, stores.EMBEDDED).update(ending=None)
    open_runs.write(home, work, 1, attempt=0.0)
    (marker_path,) = (home / "mlruns" / "active").glob("*.json")
    files.write_json(marker_path, files.read_json(marker_path) | {"started": "another boot"})
    real_connect, second = stores.connect, _open(home)

    def connect_after_the_second_began(home):
        monkeypatch.setattr(stores, "connect", real_connect)
        second.__enter__()
        return real_connect(home)

    monkeypatch.setattr(stores, "connect", connect_after_the_second_began)
    ((path, marker),) = open_runs.read(home)
    assert open_runs.complete(sender.RunUploader(home, runs.RunRecord(work, stores.EMBEDDED)), path, marker)
    second.provenance()
    (run,) = _runs(home)[1]
    assert (run.info.status, "dmat.error" in run.data.tags) == ("RUNNING", False)
    second.__exit__(None, None, None)
    (run,) = _runs(home)[1]
    assert (run.info.status, "dmat.error" in run.data.tags) == ("FINISHED", False)


def test_a_resumed_run_does_not_keep_the_reason_of_its_last_end(home):
    with pytest.raises(DmatError), _open(home):
        raise DmatError("diverged")
    with _open(home):
        pass
    (run,) = _runs(home)[1]
    assert run.info.status == "FINISHED"
    assert "dmat.error" not in run.data.tags


def test_damaged_markers_and_records_stop_nothing(home):
    with pytest.raises(Interrupted), _open(home):
        raise Interrupted(143, "stopped")
    active = home / "mlruns" / "active"
    (active / "a-empty.json").write_text("{}")
    (active / "b-cut.json").write_text('{"folder": ')
    record_path = home / "runs" / "one" / "tracking.json"
    for damage in ("[]", record_path.read_text()[:40]):
        record_path.write_text(damage)
        with pytest.warns(UserWarning, match="is damaged; MLflow gets a new run"), _open(home):
            pass
    assert sorted(run.info.status for run in _runs(home)[1]) == ["FINISHED", "FINISHED", "KILLED"]
    assert tracking.sync(home) == [
        f"{active / name} is not a readable marker file of a run; delete it" for name in ("a-empty.json", "b-cut.json")
    ]


def test_a_moved_project_keeps_its_run_and_gets_its_pictures_at_the_new_place(home, put_store):
    old, new = home / "old", home / "new"
    put_store(old)
    with pytest.raises(Interrupted), _open(old):
        _log(old, 10, loss=2.0)
        raise Interrupted(143, "stopped")
    old.rename(new)
    with _open(new) as run:
        _log(new, 20, loss=1.0)
        (new / "runs" / "one" / "picture.png").write_bytes(b"a picture")
        run.finish_with({}, [new / "runs" / "one" / "picture.png"])
    client, (stored_run,) = _runs(new)
    assert stored_run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(stored_run.info.run_id, "loss")] == [10, 20]
    assert len(list((new / "mlruns" / "artifacts").rglob("picture.png"))) == 1
    assert not old.exists()


def test_runs_of_another_machine_are_left_until_a_person_says_it_is_gone(home, dead_pid):
    with pytest.raises(Interrupted), _open(home):
        raise Interrupted(143, "stopped")
    open_runs.write(home, home / "runs" / "one", os.getpid())
    runs.RunRecord(home / "runs" / "one", stores.EMBEDDED).update(ending=None)
    _as_if_dead(home, dead_pid)
    ((path, marker),) = open_runs.read(home)
    files.write_json(path, marker | {"host": "elsewhere"})
    assert tracking.sync(home) == [
        "1 of machine elsewhere: if it is gone for good, `dmat runs reap elsewhere`"
    ]
    assert tracking.reap(home, []) == ["1 of machine elsewhere: if it is gone for good, `dmat runs reap elsewhere`"]
    assert tracking.reap(home, ["elsewhere"]) == ["train_robust one: KILLED"]
    assert [run.info.status for run in _runs(home)[1]] == ["KILLED"]
    assert open_runs.read(home) == []


def test_a_run_without_a_marker_file_is_ended_by_its_id(home):
    client, experiment = tracking.connect(home)
    lost = client.create_run(experiment, run_name="a stranger").info.run_id
    assert tracking.reap(home, []) == [
        f"a stranger ({lost[:8]}) is open and has no marker file here: if it died, `dmat runs reap {lost[:8]}`"
    ]
    for name in ("gone", lost[:3]):
        with pytest.raises(DmatError, match=rf"'{name}' is neither a machine with open runs \(none\) nor the start"):
            tracking.reap(home, [name])
    with pytest.raises(DmatError, match="is this machine; expected another; `dmat runs sync`"):
        tracking.reap(home, [platform.node()])
    assert tracking.reap(home, [lost[:8]]) == ["a stranger: KILLED"]
    assert client.get_run(lost).info.status == "KILLED"
    assert client.get_run(lost).data.tags["dmat.error"] == open_runs.LOST
    assert tracking.reap(home, []) == ["no run died elsewhere"]


def test_a_run_that_is_alive_is_not_reaped(home):
    with _open(home) as run:
        run.provenance()  # waits until the store has the run
        run_id = files.read_json(home / "runs" / "one" / "tracking.json")["run"]
        with pytest.raises(DmatError, match=rf"has a marker file of process {os.getpid()} on "):
            tracking.reap(home, [run_id])
    assert [stored_run.info.status for stored_run in _runs(home)[1]] == ["FINISHED"]


@contextlib.contextmanager
def _server(folder, port):
    arguments = ["-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    arguments += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    quiet = subprocess.DEVNULL
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with servers.running([sys.executable, *arguments], env=environment, stdout=quiet, stderr=quiet) as server:
        forked.until(lambda: servers.healthy(port))
        yield server


def test_a_server_killed_during_a_run_lacks_nothing_after_sync(home, monkeypatch, warned):
    port = servers.free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    record = home / "runs" / "one" / "tracking.json"
    with _server(home, port) as server, _open(home) as run:
        for step in range(10):
            _log(home, step, loss=1.0 / (step + 1))
        forked.until(lambda: files.read_json(record)["sent"] > 0)
        servers.kill(server)
        for step in range(10, 40):
            _log(home, step, loss=1.0 / (step + 1))
        run.finish_with({"best": 1.0}, [])
    _until_given_up(home)
    assert len(warned) == 1
    with _server(home, port):
        assert tracking.sync(home) == ["train_robust one: FINISHED"]
        client, (stored_run,) = _runs(home)
        points = client.get_metric_history(stored_run.info.run_id, "loss")
        assert [(point.step, point.value) for point in points] == [(step, 1.0 / (step + 1)) for step in range(40)]
        assert (stored_run.info.status, stored_run.data.metrics["best"]) == ("FINISHED", 1.0)


def test_a_lost_answer_does_not_duplicate_points(home, monkeypatch, warned):
    """The server stored the points, but its answer never arrived."""
    from mlflow import MlflowClient

    send, lost = MlflowClient.log_batch, []

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        if lost:
            forked.until(lambda: warned)
        send(self, run_id, metrics, params, tags)
        if metrics and not lost:
            lost.append(True)
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(sender, "SEND_EVERY", 1.0)
    monkeypatch.setattr(runs, "_LOOK_EVERY", 0.05)
    with _open(home):
        _log(home, 10, loss=2.0)
        forked.until(lambda: files.read_json(home / "runs" / "one" / "tracking.json")["sent"])
    assert ["the answer was lost" in line for line in warned] == [True]
    client, (run,) = _runs(home)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [10]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("dvc repro", ["repro"]),
        ("/venv/bin/python /venv/bin/dvc repro -s", ["repro", "-s"]),
        ("python3.11 -m dvc exp run", ["exp", "run"]),
        ("python -I -m dvc repro", ["repro"]),
        ("/venv/bin/python -P /venv/bin/dvc status", ["status"]),
        ("vim dvc", None),
        ("python train.py dvc", None),
        ("python -m pytest dvc", None),
        ("bash -c dvc", None),
        ("", None),
    ],
)
def test_only_dvc_itself_is_recognised_as_dvc(line, arguments):
    assert dvc_process.dvc_arguments(line.split()) == arguments
