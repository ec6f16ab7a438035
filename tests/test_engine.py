"""The engine: tasks in this process and in workers, their messages, errors, losses and stops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from distributed.comm import connect
from distributed.security import Security

from dmat import files
from dmat.engine import EngineOptions, Task, clusters, open_engine, tasks
from dmat.errors import ConfigError, Diverged, DmatError, Interrupted, UnfitError
from tests import engine_tasks, forked, servers

OPTIONS = EngineOptions(
    workers=2, patience=3.0, time_to_save=20.0, allowed_failures=1, environments=({"DEVICE": "a"}, {"DEVICE": "b"})
)


@pytest.fixture(scope="module")
def cluster():
    with open_engine(OPTIONS) as engine:
        yield engine


@pytest.fixture
def in_process():
    with open_engine(EngineOptions()) as engine:
        yield engine


@pytest.fixture(params=["in_process", "cluster"])
def engine(request):
    return request.getfixturevalue(request.param)


def outcomes(engine, *calls, **callbacks):
    """Runs tasks; returns their outcomes by name."""
    waiting, ended = list(calls), {}

    def on_outcome(outcome):
        ended[outcome.task.name] = outcome

    engine.run(lambda: waiting.pop(0) if waiting else None, on_outcome=on_outcome, **callbacks)
    return ended


def test_tasks_run_and_return(engine):
    ended = outcomes(engine, *(Task(f"sum {k}", engine_tasks.add, (k, 1)) for k in range(5)))
    assert {name: outcome.result for name, outcome in ended.items()} == {f"sum {k}": k + 1 for k in range(5)}
    assert all(outcome.error is None and outcome.lost_workers == 0 for outcome in ended.values())


def test_the_driver_is_asked_again_after_each_outcome(engine):
    """A task that becomes possible by the end of another one runs; None while one runs does not end the run."""
    results = []

    def next_task():
        return Task(f"sum {len(results)}", engine_tasks.add, (len(results), 1)) if len(results) < 3 else None

    engine.run(next_task, on_outcome=lambda outcome: results.append(outcome.result))
    assert {1, 2, 3} <= set(results)


def test_messages_are_answered_in_the_calling_thread(engine):
    seen = []

    def on_message(task, message):
        seen.append((task.name, message["step"], message["loss"] != message["loss"]))
        return {"prune": message["step"] == 2}

    ended = outcomes(engine, Task("trial 1", engine_tasks.report, (3,)), on_message=on_message)
    assert ended["trial 1"].result == [False, False, True]
    assert seen == [("trial 1", step, True) for step in range(3)]


@pytest.mark.parametrize(
    ("kind", "error_class", "sentence"),
    [
        ("DmatError", DmatError, "a; b; c"),
        ("UnfitError", UnfitError, "does not fit"),
        ("Diverged", Diverged, "NaN loss"),
        ("ConfigError", DmatError, "params.yaml: 2 problems\n  - a is 1\n  - b is 2"),
        ("ValueError", DmatError, "task: ValueError: first line"),
    ],
)
def test_errors_keep_their_kind_and_sentence(engine, kind, error_class, sentence):
    error = outcomes(engine, Task("task", engine_tasks.fail, (kind,)))["task"].error
    assert isinstance(error, error_class)
    assert type(error) in (error_class, ConfigError)
    assert str(error) == sentence


def test_an_interrupted_task_keeps_its_exit_code(cluster):
    error = outcomes(cluster, Task("task", engine_tasks.fail, ("Interrupted",)))["task"].error
    assert (type(error), error.exit_code, str(error)) == (Interrupted, 75, "stopped by SIGUSR1")


def test_a_signal_in_this_process_ends_the_run(in_process):
    ended = []
    with pytest.raises(Interrupted, match="SIGUSR1"):
        in_process.run(lambda: Task("task", engine_tasks.fail, ("Interrupted",)), on_outcome=ended.append)
    assert len(ended) == 1


def described(cluster):
    """What both workers say of themselves, by pid."""
    seen = {}
    while len(seen) < 2:
        ended = outcomes(cluster, *(Task(f"{k}", engine_tasks.describe) for k in range(4)))
        seen |= {outcome.result["pid"]: outcome.result for outcome in ended.values()}
    return seen


def test_workers_have_their_environment_and_no_signals(cluster):
    """Ctrl-C in a terminal goes to every process of the group: the workers must not die of it."""
    assert cluster.size == 2
    seen = described(cluster)
    for pid in seen:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert described(cluster) == seen
    assert {worker["device"] for worker in seen.values()} == {"a", "b"}
    assert not any(worker["torch"] for worker in seen.values())
    assert os.getpid() not in seen


def test_a_task_whose_worker_is_killed_runs_again(cluster, tmp_path):
    lost = []
    ended = outcomes(cluster, Task("task", engine_tasks.die_first, (str(tmp_path), 1)), on_lost=lost.append)
    assert (ended["task"].result, ended["task"].error, ended["task"].lost_workers) == (1, None, 1)
    assert [task.name for task in lost] == ["task"]


def test_a_task_that_kills_every_worker_ends(cluster, tmp_path):
    outcome = outcomes(cluster, Task("task", engine_tasks.die_first, (str(tmp_path), 99)))["task"]
    assert outcome.lost_workers == OPTIONS.allowed_failures + 1 == len(list(tmp_path.iterdir()))
    assert "task lost its worker 2 times; expected at most 1 times" in str(outcome.error)


def test_a_stop_lets_every_task_save(cluster, tmp_path):
    folders = [tmp_path / name for name in "abc"]  # the third waits for a worker
    for folder in folders:
        folder.mkdir()
    waiting, ended = [Task(folder.name, engine_tasks.run_until_asked, (str(folder),)) for folder in folders], []

    def check_interruption():
        if len(list(tmp_path.glob("*/started-*"))) == 2:
            raise Interrupted(75, "stopped by SIGUSR1")

    with pytest.raises(Interrupted, match="SIGUSR1"):
        cluster.run(
            lambda: waiting.pop(0) if waiting else None, on_outcome=ended.append, check_interruption=check_interruption
        )
    assert {outcome.task.name for outcome in ended} == {"a", "b"}
    assert all(type(outcome.error) is Interrupted for outcome in ended)
    assert {(outcome.error.exit_code, str(outcome.error)) for outcome in ended} == {(75, "stopped by SIGUSR1")}
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False]


def test_an_error_of_the_driver_stops_the_tasks(cluster, tmp_path):
    """Of a callback, as when its database is gone."""

    def on_outcome(outcome):
        raise DmatError("the database is gone")

    functions = (engine_tasks.wait_for_start, engine_tasks.run_until_asked)
    waiting = [Task(function.__name__, function, (str(tmp_path),)) for function in functions]
    with pytest.raises(DmatError, match="the database is gone"):
        cluster.run(lambda: waiting.pop() if waiting else None, on_outcome=on_outcome)
    assert (tmp_path / "saved").exists()


DRIVER = """
import sys
from dmat.engine import EngineOptions, Task, open_engine
from tests import engine_tasks
tasks = [Task("task", engine_tasks.run_until_asked, (sys.argv[1],))]
with open_engine(EngineOptions(workers=1, patience=2.0)) as engine:
    engine.run(lambda: tasks.pop() if tasks else None, on_outcome=print)
"""


def test_tasks_of_a_killed_driver_save_and_stop(cluster, tmp_path, root):
    """The driver is a child of this process and uses its cluster: it starts no second one, although it asks for one."""
    environment = os.environ | cluster.environment | {"PYTHONPATH": str(root)}
    pids = set(described(cluster))
    with servers.running([sys.executable, "-c", DRIVER, str(tmp_path)], env=environment):
        forked.until(lambda: list(tmp_path.glob("started-*")))
        assert int(next(tmp_path.glob("started-*")).name.partition("-")[2]) in pids
    forked.until((tmp_path / "saved").exists)  # the driver is killed
    assert outcomes(cluster, Task("sum", engine_tasks.add, (1, 2)))["sum"].result == 3  # the worker is free again




def test_a_worker_that_differs_refuses(cluster, monkeypatch):
    environment = cluster.environment
    monkeypatch.setenv(tasks.CLUSTER_VARIABLE, environment[tasks.CLUSTER_VARIABLE])
    with open_engine(EngineOptions(), engine_tasks.refuse) as engine:
        outcome = outcomes(engine, Task("sum", engine_tasks.add, (1, 2)))["sum"]
        assert str(outcome.error) == "this worker has other code; expected the driver's; install it"
    with open_engine(EngineOptions(), engine_tasks.accept) as engine:
        assert outcomes(engine, Task("sum", engine_tasks.add, (1, 2)))["sum"].result == 3


def test_the_file_of_a_cluster_is_private(cluster):
    path = Path(cluster.environment[tasks.CLUSTER_VARIABLE])
    assert json.loads(path.read_text(encoding="utf-8"))["address"].startswith("tls://127.0.0.1:")
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_task_in_the_driver_occupies_no_worker(cluster, tmp_path):
    """Both workers compute, and the task in this process waits for what they do."""
    here = Task("here", engine_tasks.wait_for_start, (str(tmp_path), 2), in_driver=True)
    calls = [here, *(Task(f"worker {k}", engine_tasks.start_and_wait, (str(tmp_path), 2)) for k in range(2))]
    ended = outcomes(cluster, *calls)
    assert ended.keys() == {"here", "worker 0", "worker 1"}
    assert not any(outcome.error for outcome in ended.values())
    assert ended["here"].result == os.getpid()
    assert os.getpid() not in {ended[f"worker {k}"].result for k in range(2)}


def test_a_task_in_the_driver_asks_the_thread_of_the_driver(cluster):
    here, asked = Task("here", engine_tasks.report, (3,), in_driver=True), []

    def answer(task, message):
        asked.append((task.name, message["step"], threading.current_thread() is threading.main_thread()))
        return {"prune": message["step"] == 1}

    waiting, ended = [here], []
    cluster.run(lambda: waiting.pop() if waiting else None, on_outcome=ended.append, on_message=answer)
    assert ended[0].result == [False, True, False]
    assert asked == [("here", step, True) for step in range(3)]


def test_a_stop_reaches_a_task_in_the_driver(cluster, tmp_path):
    waiting, ended = [Task("here", engine_tasks.run_until_asked, (str(tmp_path),), in_driver=True)], []

    def check_interruption():
        if list(tmp_path.glob("started-*")):
            raise Interrupted(75, "stopped by SIGUSR1")

    with pytest.raises(Interrupted, match="SIGUSR1"):
        cluster.run(
            lambda: waiting.pop() if waiting else None, on_outcome=ended.append, check_interruption=check_interruption
        )
    assert (tmp_path / f"started-{os.getpid()}").exists()
    assert (tmp_path / "saved").exists()
    assert (type(ended[0].error), ended[0].error.exit_code) == (Interrupted, 75)


def test_nothing_listens_but_on_the_loopback_interface(cluster):
    here = psutil.Process()
    processes = [here, *(process for process in here.children() if process.pid in described(cluster))]
    connections = [connection for process in processes for connection in process.net_connections("tcp")]
    sockets = [connection for connection in connections if connection.status == "LISTEN"]
    assert len(processes) == 3
    assert {socket.laddr.ip for socket in sockets} == {"127.0.0.1"}
    assert 8787 not in {socket.laddr.port for socket in sockets}


def test_a_result_that_cannot_travel_is_an_error(cluster):
    error = outcomes(cluster, Task("task", engine_tasks.unpicklable))["task"].error
    assert str(error).startswith("the result of task cannot travel to the driver: ")


@pytest.mark.parametrize(
    ("cluster_name", "sentence"),
    [
        ("tcp://10.0.0.3:8786", "the cluster at tcp://10.0.0.3:8786 has no TLS"),
        ("node7:8786", "the cluster at node7:8786 has no TLS"),
        ("tls://node7:8786", "names no certificates of a client"),
        ("nowhere.json", "neither an address nor a scheduler file"),
        ("tcp://127.0.0.1:1", "no cluster answers at tcp://127.0.0.1:1"),
    ],
)
def test_clusters_that_are_refused(cluster_name, sentence, monkeypatch):
    monkeypatch.setattr("dmat.engine.clusters._CONNECT_TIMEOUT", 0.5)
    with pytest.raises(DmatError) as raised, open_engine(EngineOptions(cluster=cluster_name)):
        pass
    assert sentence in str(raised.value)


def test_a_cluster_with_tls_refuses_clients_and_workers_without_its_certificates(cluster, tmp_path):
    """With none, with those of another authority, with that of another authority for a scheduler that they trust."""
    own = json.loads(Path(cluster.environment[tasks.CLUSTER_VARIABLE]).read_text(encoding="utf-8"))
    other = Security.temporary()
    certificates = {"client_cert": other.tls_client_cert, "client_key": other.tls_client_key}
    for authority in (other.tls_ca_file, own["tls"]["ca_file"]):
        record = {**own, "tls": {"ca_file": authority, **certificates}}
        files.write_json(tmp_path / "cluster.json", record)
        with pytest.raises(DmatError, match=r"; start it, or look at the address and the certificates$") as refused:
            clusters.join(EngineOptions(cluster=str(tmp_path / "cluster.json")))
        assert "TLS" in str(refused.value)
        security = Security(
            tls_ca_file=authority, tls_worker_cert=other.tls_worker_cert, tls_worker_key=other.tls_worker_key
        )
        with pytest.raises(OSError, match="TLS"):
            asyncio.run(connect(own["address"], **security.get_connection_args("worker")))
    with pytest.raises(DmatError, match="names no certificates of a client"):
        clusters.join(EngineOptions(cluster=own["address"]))
    with pytest.raises(DmatError, match="no cluster answers at tcp://"):
        clusters.join(EngineOptions(cluster=own["address"].replace("tls:", "tcp:")))
    assert cluster.size == 2


def test_no_dask_without_workers(root):
    script = (
        "import sys\nfrom dmat.engine import *\nfrom tests import engine_tasks\n"
        "waiting, ended = [Task('sum', engine_tasks.add, (1, 2))], []\n"
        "with open_engine(EngineOptions()) as engine:\n"
        "    engine.run(lambda: waiting.pop() if waiting else None, on_outcome=ended.append)\n"
        "print(ended[0].result, sorted({'dask', 'distributed', 'torch'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "3 []\n"
