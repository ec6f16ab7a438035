"""The engine on Dask: workers of this machine, or a cluster that runs already. Only this module imports Dask.

Driver and task exchange messages through queues on the scheduler, so that each needs a connection to the scheduler
alone: all tasks write to the queue of the driver, and each attempt to run a task reads an inbox of its own. The driver
sends a pulse to each inbox: a task that gets none for too long knows that its driver is gone. A task runs in a thread
of its worker, where signals cannot be handled, and which nobody can cancel; so the inbox is also how a task learns that
it has to stop.
"""

import contextlib
import dataclasses
import ipaddress
import logging
import queue
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NotRequired, Self

import dask
from distributed import Client, Future, KilledWorker, Nanny, Queue, Scheduler, SpecCluster, get_client
from distributed.protocol.pickle import dumps, loads
from distributed.security import Security
from typing_extensions import TypedDict

from dmat import files
from dmat.engine.tasks import (
    CLUSTER_VARIABLE,
    EngineOptions,
    Message,
    Outcome,
    Task,
    ignore,
    refuse_message,
    run_task,
)
from dmat.errors import Diverged, DmatError, Interrupted, UnfitError, first_line
from dmat.training import interruption

_LOOPBACK = "127.0.0.1"
_NO_DASHBOARD = f"{_LOOPBACK}:0"  # Dask serves HTTP in any case, by default on all interfaces
_CONNECT_TIMEOUT = 30.0  # seconds
_POLL_SECONDS = 0.2  # between two looks of the driver at what has no message: signals, killed workers
_PULSES = 10  # per patience of a task
_SIZE_SECONDS = 5.0  # between two questions for the number of workers
_MAX_FILE_BYTES = 1 << 20  # of a file that names a cluster
_STOPPED = 128 + signal.SIGTERM  # exit code of a task that stops without a signal of its own
_BECAUSE_OF_ERROR = "stopped because its driver ended with an error; the same command resumes from here"
_KINDS: dict[str, type[DmatError]] = {kind.__name__: kind for kind in (DmatError, Diverged, UnfitError)}
_CONFIGURATION: dict[str, object] = {  # of a local cluster
    # What wakes a worker's other threads makes its task wait for the interpreter: samples of every thread each 10 ms, a
    # clock of the event loop each 20 ms, figures of the machine each 500 ms.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "2s",
    "distributed.admin.tick.cycle": "10s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.scheduler.worker-saturation": 1.0,  # a worker that is killed then takes no waiting task along
    "distributed.nanny.pre-spawn-environ": {},  # the default sets OMP_NUM_THREADS, which the driver decides
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.http.routes": [],  # HTTP has no certificates: every local user could read
    "distributed.admin.system-monitor.gil.enabled": False,
}


def start(options: EngineOptions, expect: Callable[[], None] | None = None) -> "DaskEngine":
    """Starts a cluster of `options.workers` processes on this machine, which end with this process.

    Its certificates exist in memory alone, and it listens on the loopback interface. Raises DmatError if it does not
    start.
    """
    folder = Path(tempfile.mkdtemp(prefix="dmat-cluster-"))
    security = Security.temporary()
    common = {"host": _LOOPBACK, "protocol": "tls://", "security": security}
    scheduler = {
        **common,
        "port": 0,
        "allowed_failures": options.allowed_failures,
        "dashboard": bool(options.dashboard),
        "dashboard_address": options.dashboard or _NO_DASHBOARD,
    }
    worker = {
        **common,
        "nthreads": 1,
        "memory_limit": 0,  # shards in mapped memory count as the worker's, which would be paused
        "dashboard": False,
        "dashboard_address": _NO_DASHBOARD,
        "local_directory": str(folder),
        "preload": [__name__],
        "silence_logs": logging.CRITICAL,
    }
    environments = options.environments
    workers = {
        number: {"cls": Nanny, "options": {**worker, "env": dict(environments[number % len(environments)])}}
        for number in range(options.workers)
    }
    try:
        routes: dict[str, object] = {} if options.dashboard else {"distributed.scheduler.http.routes": []}
        with dask.config.set(_CONFIGURATION | routes):
            cluster = SpecCluster(
                workers=workers,
                scheduler={"cls": Scheduler, "options": scheduler},
                security=security,
                silence_logs=logging.CRITICAL,
                name=folder.name,
            )
            client = Client(cluster, timeout=_CONNECT_TIMEOUT)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DmatError(
            f"{options.workers} workers did not start on this machine ({first_line(error)}); expected all of them; "
            f"look at the limits on processes and memory, or ask for fewer"
        ) from error
    return DaskEngine(client, options, expect, cluster, folder)


def dask_setup(worker: object) -> None:
    """Called by Dask in each local worker. A signal to the process group is for the driver, which tells its tasks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by the processes that a task starts


def join(options: EngineOptions, expect: Callable[[], None] | None = None) -> "DaskEngine":
    """Connects to the scheduler of the cluster `options.joined_cluster`.

    That is its address, or the path of a JSON file with the key `address`: a scheduler file of Dask, or the file of a
    parent process. Raises DmatError if it does not answer, and if it is another machine without TLS.
    """
    address, security = _read_cluster(options.joined_cluster)
    try:
        client = Client(address, security=security, timeout=_CONNECT_TIMEOUT)
    except (OSError, ValueError, RuntimeError) as error:
        raise DmatError(
            f"no cluster answers at {address} ({first_line(error)}); expected a Dask scheduler that takes this client; "
            f"start it, or look at the address{' and the certificates' if address.startswith('tls') else ''}"
        ) from error
    return DaskEngine(client, options, expect)


def _read_cluster(cluster: str) -> tuple[str, Security]:
    """Address and certificates of a cluster. Raises DmatError for a file that is not one, and for a lack of TLS."""
    address, security = cluster, Security()  # as Dask is configured
    if "://" not in cluster and not cluster.rpartition(":")[2].isdecimal():
        path = Path(cluster)
        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            raise DmatError(
                f"--cluster is {cluster!r}, which is neither an address nor a scheduler file; expected one, such as "
                f"tls://HOST:8786 or the file that `dask scheduler --scheduler-file FILE` writes"
            )
        record = files.read_record(path, _SchedulerFile)
        address, tls = record["address"], record.get("tls", {})
        if tls.keys() == _certificates(security).keys():
            security = Security(**{f"tls_{name}": text for name, text in tls.items()})
    protocol, _, location = address.rpartition("://")
    if protocol == "tls":
        if not all(_certificates(security).values()):
            raise DmatError(
                f"the cluster at {address} uses TLS, and Dask's configuration names no certificates of a client; "
                f"expected distributed.comm.tls.ca-file and .client.cert and .client.key; set them"
            )
    elif not _is_loopback(location.rpartition(":")[0]):
        raise DmatError(
            f"the cluster at {address} has no TLS: everybody who reaches it could run code in its workers; expected "
            f"tls://... with certificates of clients, or an address of this machine"
        )
    return address, security


def _certificates(security: Security) -> dict[str, str | None]:
    """What a client proves itself with: texts, or paths of files; None where there is none."""
    return {name: getattr(security, f"tls_{name}") for name in ("ca_file", "client_cert", "client_key")}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class DaskEngine:
    """Runs tasks on the workers of a cluster. See `Engine`.

    cluster, folder: of a local cluster, which `close` ends; None: the cluster stays.
    """

    def __init__(
        self,
        client: Client,
        options: EngineOptions,
        expect: Callable[[], None] | None,
        cluster: SpecCluster | None = None,
        folder: Path | None = None,
    ):
        self._client, self._options, self._expect = client, options, expect
        self._cluster, self._folder = cluster, folder

    @property
    def size(self) -> int:
        """How many threads the workers have together; 1 while there is no worker yet."""
        return max(1, sum(self._client.nthreads().values()))

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables with which child processes use this engine's cluster."""
        assert self._client.scheduler is not None
        record = {"address": self._client.scheduler.address, "tls": _certificates(self._client.security)}
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="dmat-cluster-"))
        path = self._folder / "cluster.json"  # in a folder that only this user may read
        files.write_json(path, record)
        return {CLUSTER_VARIABLE: str(path)}

    def run(
        self,
        next_task: Callable[[], Task | None],
        *,
        on_outcome: Callable[[Outcome], None],
        on_message: Callable[[Task, Message], Message] = refuse_message,
        on_lost: Callable[[Task], None] = ignore,
        check_interruption: Callable[[], None] = ignore,
    ) -> None:
        """See `Engine.run`."""
        callbacks = _Callbacks(on_outcome, on_message, on_lost)
        try:
            with _Conversation(self._client, self._options, self._expect, callbacks) as conversation:
                self._keep_busy(conversation, next_task, check_interruption)
        except OSError as error:
            raise DmatError(
                f"the scheduler does not answer any more ({first_line(error)}); expected it to run until all tasks "
                f"have ended; start it and run the same command again: it resumes"
            ) from error

    def _keep_busy(
        self,
        conversation: "_Conversation",
        next_task: Callable[[], Task | None],
        check_interruption: Callable[[], None],
    ) -> None:
        size, asked_size, ended = 0, -_SIZE_SECONDS, -1
        while True:
            _check(check_interruption, conversation)
            if time.monotonic() - asked_size > _SIZE_SECONDS:
                size, asked_size = self.size, time.monotonic()
            while conversation.occupied < size and ended != conversation.ended:
                if (task := next_task()) is None:
                    ended = conversation.ended
                else:
                    conversation.submit(task)
            if not conversation.running and ended == conversation.ended:
                return
            conversation.receive(_POLL_SECONDS)

    def close(self) -> None:
        """Ends the workers of a local cluster, and the connection to any other."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _check(check_interruption: Callable[[], None], conversation: "_Conversation") -> None:
    """Checks for signals to the driver. After one, tells all tasks to stop, and waits for their outcomes."""
    try:
        check_interruption()
    except BaseException as error:
        conversation.stop(error, outcomes=True)
        raise


@dataclasses.dataclass(frozen=True)
class _Callbacks:
    on_outcome: Callable[[Outcome], None]
    on_message: Callable[[Task, Message], Message]
    on_lost: Callable[[Task], None]


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """What a worker gets. channel: name of the driver's queue in this call of `Engine.run`."""

    task: Task
    number: int
    channel: str
    patience: float
    expect: Callable[[], None] | None


class _SchedulerFile(TypedDict):
    """What the file of a scheduler holds, as far as it is used."""

    address: str
    tls: NotRequired[dict[str, str]]  # certificates, if this dmat started the scheduler


class _Note(TypedDict):
    """A message of an attempt to run a task. The driver answers all but the last."""

    event: str  # "started", any number of "message", "ended"; of a thread of the driver "question" and "outcome"
    number: int  # of the task
    attempt: str
    content: Any


class _Ending(TypedDict):
    """The content of the message "ended"."""

    result: bytes
    error: tuple[str, str, int] | None  # name of the class, sentence, exit code
    abandoned: bool  # the task stopped because it heard nothing of the driver


class _Letter(TypedDict):
    """What is in the inbox of an attempt: a pulse if both are None."""

    answer: Message | None
    stop: tuple[int, str] | None  # exit code and sentence


_PULSE: _Letter = {"answer": None, "stop": None}
_FAILED = ("error", "cancelled", "lost")  # states of a future without a result


@dataclasses.dataclass
class _Running:
    """A task that has no outcome yet.

    future: None for a task in a thread of this process. attempt: the one that counts; "" before the task started.
    """

    task: Task
    future: Future[None] | None
    attempt: str = ""
    lost_workers: int = 0

    @property
    def failed(self) -> bool:
        """Whether Dask gave up the task."""
        return self.future is not None and self.future.status in _FAILED


class _Conversation:
    """The driver's side of one call of `Engine.run`. ended: number of tasks that have an outcome."""

    def __init__(
        self, client: Client, options: EngineOptions, expect: Callable[[], None] | None, callbacks: _Callbacks
    ):
        self._client, self._options, self._expect, self._callbacks = client, options, expect, callbacks
        self._channel = f"dmat-{secrets.token_hex(8)}"
        self._queue = Queue(self._channel, client=client)
        self._notes: queue.SimpleQueue[_Note | Exception] = queue.SimpleQueue()
        self._inboxes: dict[str, Queue] = {}  # attempt -> inbox
        self.running: dict[int, _Running] = {}
        self.ended, self._submitted = 0, 0
        self.stop_request: tuple[int, str] | None = None
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._send_pulses)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        try:
            if error is not None and not isinstance(error, OSError):
                self.stop(error, outcomes=False)
        finally:
            self._closed.set()
            with contextlib.suppress(OSError):
                self._queue.put(None)  # ends the listening thread
                for thread in self._threads:
                    thread.join()
                for closing in (self._queue, *self._inboxes.values()):
                    closing.close()

    def _listen(self) -> None:
        """Passes the notes of the tasks on to the main thread. Inboxes are opened here, as it may be busy for long."""
        try:
            while (note := self._queue.get()) is not None:
                if note["event"] == "started":
                    self._inboxes[note["attempt"]] = Queue(note["attempt"], client=self._client)
                self._notes.put(note)
        except Exception as error:  # the connection to the scheduler is lost
            self._notes.put(error)

    def _send_pulses(self) -> None:
        while not self._closed.wait(self._options.patience / _PULSES):
            for attempt in list(self._inboxes):
                with contextlib.suppress(OSError):  # the listening thread meets the same error
                    self._send(attempt, _PULSE)

    def _send(self, attempt: str, letter: _Letter) -> None:
        if (inbox := self._inboxes.get(attempt)) is not None:
            inbox.put(letter)

    def _forget(self, attempt: str) -> None:
        if (inbox := self._inboxes.pop(attempt, None)) is not None:
            inbox.close()

    @property
    def occupied(self) -> int:
        """How many workers have a task."""
        return sum(not running.task.in_driver for running in self.running.values())

    def submit(self, task: Task, lost_workers: int = 0) -> None:
        """Hands a task to the cluster, or starts it in a thread."""
        self._submitted += 1
        number = self._submitted
        if task.in_driver:
            self.running[number] = _Running(task, None)
            threading.Thread(target=self._run_here, args=(number, task), daemon=True).start()
            return
        assignment = _Assignment(task, number, self._channel, self._options.patience, self._expect)
        future = self._client.submit(_run_assignment, assignment, key=f"{self._channel}-{number}", pure=False)
        self.running[number] = _Running(task, future, lost_workers=lost_workers)

    def _run_here(self, number: int, task: Task) -> None:
        context = _ThreadContext(self, number)
        with interruption.asking(context.check_interruption):
            outcome = run_task(task, context)
        self._notes.put({"event": "outcome", "number": number, "attempt": "", "content": outcome})

    def question(self, number: int, message: Message, answers: "queue.Queue[Message]") -> None:
        """Hands a message of a thread to the driver's own thread, which puts the answer into the queue."""
        self._notes.put({"event": "question", "number": number, "attempt": "", "content": (message, answers)})

    def receive(self, timeout: float) -> None:
        """Waits for one message, at most `timeout` seconds, and handles it; then looks for killed workers."""
        with contextlib.suppress(queue.Empty):
            self._handle(self._notes.get(timeout=timeout))
        for number, running in [pair for pair in self.running.items() if pair[1].failed]:
            with contextlib.suppress(queue.Empty):
                while True:  # the outcome of this task may wait
                    self._handle(self._notes.get_nowait())
            if self.running.get(number) is running:
                self._handle_failure(number, running)

    def _handle(self, note: _Note | Exception) -> None:
        if isinstance(note, Exception):
            raise note
        number, attempt = note["number"], note["attempt"]
        running = self.running.get(number)
        if note["event"] == "outcome":
            if running is not None:
                self._finish(number, note["content"])
            return
        if note["event"] == "question":
            message, answers = note["content"]
            if running is not None and self.stop_request is None:
                answers.put(self._callbacks.on_message(running.task, message))
            return
        if note["event"] == "started" and running is not None and self.stop_request is None:
            if running.attempt:  # the scheduler runs the task again
                self._lose(running)
            running.attempt = attempt
            if running.lost_workers > self._options.allowed_failures:
                self._fail_after_losses(number, running)
        counts = running is not None and running.attempt == attempt and number in self.running
        if note["event"] == "ended":
            self._forget(attempt)
            if running is not None and counts:
                self._end(number, running, note["content"])
        elif self.stop_request is not None or running is None or not counts:
            stop = self.stop_request or (_STOPPED, "another worker computes this task, or it is no longer needed")
            self._send(attempt, {"answer": None, "stop": stop})
        else:
            answer = {} if note["event"] == "started" else self._callbacks.on_message(running.task, note["content"])
            self._send(attempt, {"answer": answer, "stop": None})

    def _end(self, number: int, running: _Running, ending: _Ending) -> None:
        if ending["abandoned"] and self.stop_request is None:  # this process stood still, or the network did
            self._run_again(number, running)
            return
        error = None if ending["error"] is None else _rebuilt(*ending["error"])
        result = None if error else loads(ending["result"])
        self._finish(number, Outcome(running.task, result, error, running.lost_workers))

    def _finish(self, number: int, outcome: Outcome) -> None:
        future = self.running.pop(number).future
        if future is not None:
            future.release()
        self.ended += 1
        self._callbacks.on_outcome(outcome)

    def _handle_failure(self, number: int, running: _Running) -> None:
        assert running.future is not None
        error = running.future.exception() if running.future.status == "error" else None
        if self.stop_request is not None:
            self._finish(number, self._interrupted(running))
        elif error is None or isinstance(error, KilledWorker):
            self._run_again(number, running)
        else:
            sentence = (
                f"{running.task.name} could not start in a worker ({type(error).__name__}: {first_line(error)}); "
                f"expected a worker with the same dmat and Python as this process; install them there"
            )
            self._finish(number, Outcome(running.task, error=DmatError(sentence), lost_workers=running.lost_workers))

    def _run_again(self, number: int, running: _Running) -> None:
        self._lose(running)
        if running.lost_workers > self._options.allowed_failures:
            self._fail_after_losses(number, running)
        else:
            del self.running[number]
            self.submit(running.task, running.lost_workers)

    def _lose(self, running: _Running) -> None:
        running.lost_workers += 1
        self._forget(running.attempt)
        self._callbacks.on_lost(running.task)

    def _fail_after_losses(self, number: int, running: _Running) -> None:
        sentence = (
            f"{running.task.name} lost its worker {running.lost_workers} times; expected at most "
            f"{self._options.allowed_failures} times; look for what kills it: memory, or a limit of time"
        )
        self._finish(number, Outcome(running.task, error=DmatError(sentence), lost_workers=running.lost_workers))

    def stop(self, error: BaseException, *, outcomes: bool) -> None:
        """Tells all tasks to stop, and waits until they did, or for `time_to_save`. outcomes: whether to pass them on.

        A second Ctrl-C raises KeyboardInterrupt here: then nothing is waited for.
        """
        if self.stop_request is not None:
            return
        self.stop_request = (
            (error.exit_code, str(error)) if isinstance(error, Interrupted) else (_STOPPED, _BECAUSE_OF_ERROR)
        )
        if not outcomes:
            self._callbacks = _Callbacks(ignore, refuse_message, ignore)
        for number, running in list(self.running.items()):
            if running.attempt:
                self._send(running.attempt, {"answer": None, "stop": self.stop_request})
            elif running.future is not None:
                running.future.cancel()
                self._finish(number, self._interrupted(running))
        deadline = time.monotonic() + self._options.time_to_save
        while self.running and time.monotonic() < deadline:
            self.receive(_POLL_SECONDS)
        for number, running in list(self.running.items()):
            self._finish(number, self._interrupted(running))

    def _interrupted(self, running: _Running) -> Outcome:
        assert self.stop_request is not None
        return Outcome(running.task, error=Interrupted(*self.stop_request), lost_workers=running.lost_workers)


def _rebuilt(kind: str, sentence: str, exit_code: int) -> DmatError | Interrupted:
    """The error of a task as it was in the worker."""
    return Interrupted(exit_code, sentence) if kind == Interrupted.__name__ else _KINDS.get(kind, DmatError)(sentence)


class _ThreadContext:
    """What a task in a thread of the driver sees of the engine."""

    def __init__(self, conversation: _Conversation, number: int):
        self._conversation, self._number = conversation, number

    def ask(self, message: Message) -> Message:
        answers: queue.Queue[Message] = queue.Queue()
        self._conversation.question(self._number, message, answers)
        while True:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=_POLL_SECONDS)
            self.check_interruption()

    def check_interruption(self) -> None:
        if (stop := self._conversation.stop_request) is not None:
            raise Interrupted(*stop)


# In a worker


def _run_assignment(assignment: _Assignment) -> None:
    """Runs a task in a worker. Its outcome is a message to the driver, not the result of this function."""
    with _WorkerContext(assignment) as context:
        context.end(_attempt(assignment, context))


def _attempt(assignment: _Assignment, context: "_WorkerContext") -> Outcome:
    """Runs the task, if the driver still waits for this attempt and this worker is what it expects."""
    try:
        context.start()
        if assignment.expect is not None:
            assignment.expect()
    except (DmatError, Interrupted) as error:
        return Outcome(assignment.task, error=error)
    with interruption.asking(context.check_interruption):
        return run_task(assignment.task, context)


class _WorkerContext:
    """The task's side of the conversation. A thread reads the inbox."""

    def __init__(self, assignment: _Assignment):
        client = get_client()
        self._assignment, self._attempt = assignment, secrets.token_hex(8)
        self._notes = Queue(assignment.channel, client=client)
        self._inbox = Queue(self._attempt, client=client)
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._heard, self._stop = time.monotonic(), (0, "")
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._inbox.put(None)  # ends the thread
            self._thread.join()
            self._inbox.close()

    def _listen(self) -> None:
        with contextlib.suppress(Exception):  # without a connection nothing is heard, and patience ends
            while (letter := self._inbox.get()) is not None:
                self._heard = time.monotonic()
                if letter["stop"] is not None:
                    self._stop = (letter["stop"][0], letter["stop"][1])
                elif letter["answer"] is not None:
                    self._answers.put(letter["answer"])

    def _is_abandoned(self) -> bool:
        return time.monotonic() - self._heard > self._assignment.patience

    def check_interruption(self) -> None:
        if self._stop[1]:
            raise Interrupted(*self._stop)
        if self._is_abandoned():
            raise Interrupted(
                _STOPPED,
                f"{self._assignment.task.name} heard nothing of its driver for {self._assignment.patience:.0f} s; run "
                f"the driver's command again: it resumes from here",
            )

    def start(self) -> None:
        """Reports to the driver, and waits until it accepts this attempt."""
        self._request("started", {})

    def ask(self, message: Message) -> Message:
        return self._request("message", message)

    def _request(self, event: str, content: Message) -> Message:
        self.check_interruption()
        self._send(event, content)
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=_POLL_SECONDS)
            self.check_interruption()

    def end(self, outcome: Outcome) -> None:
        """Sends the outcome to the driver."""
        error, result = outcome.error, b""
        try:
            result = dumps(outcome.result)
        except Exception as refusal:
            error = DmatError(f"the result of {outcome.task.name} cannot travel to the driver: {first_line(refusal)}")
        described = (type(error).__name__, str(error), getattr(error, "exit_code", 0)) if error is not None else None
        abandoned = isinstance(error, Interrupted) and not self._stop[1] and self._is_abandoned()
        ending: _Ending = {"result": result, "error": described, "abandoned": abandoned}
        with contextlib.suppress(OSError):  # nobody waits for it any more
            self._send("ended", ending)

    def _send(self, event: str, content: Any) -> None:
        note: _Note = {
            "event": event, "number": self._assignment.number, "attempt": self._attempt, "content": content
        }  # fmt: skip
        self._notes.put(note)
