"""Sends runs to MLflow from a separate process: the import of MLflow and its work must not slow a training down.
A thread would slow it down, because Python runs one thread at a time.

`shared_sender` is the side of the training: it writes orders to a pipe and reads answers. `serve` is the side of the
sending process. All data are in the work folder (`RunRecord`), so an order holds little more than the name of a folder.
If the sending process dies, nothing is lost: the next command sends it. If the training dies, the sending process ends
its runs as KILLED.
"""

import contextlib
import dataclasses
import json
import os
import queue
import site
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmat.errors import first_line
from dmat.tracking import open_runs
from dmat.tracking.run_record import RunRecord, RunUploader

SEND_EVERY = 5.0  # seconds
_MAX_RETRY_SECONDS = 60.0  # longest interval between two attempts at a store that does not answer
_PARENT_CHECK_SECONDS = 1.0  # interval of checks whether the training still runs
_NICENESS = 5
Order = dict[str, Any]  # to: folder; what: open (home, store), system (values, seconds), close
# of: folder, "" for all; what: reached, failed, ended, warned, gone (the sending process has ended); text
Answer = dict[str, str]


class MlflowSender:
    """The side of the training: sends orders, and passes each answer on to the run that it is about."""

    def __init__(self, write_order: Callable[[Order], None]):
        self._write_order = write_order
        self._listeners: dict[str, Callable[[str, str], None]] = {}
        self.has_ended = False
        self.owner = os.getpid()

    def open(self, home: Path, folder: Path, store: str, on_answer: Callable[[str, str], None]) -> None:
        """Starts to send the run in `folder`, until `close`.

        on_answer: is called from another thread with `what` and `text` of an Answer.
        """
        self._listeners[str(folder)] = on_answer
        self._order(folder, "open", home=str(home), store=store)

    def send_system_metrics(self, folder: Path, values: Mapping[str, float], seconds: float) -> None:
        """Sends a sample of system metrics. seconds: time since the start of the run."""
        self._order(folder, "system", values=dict(values), seconds=seconds)

    def close(self, folder: Path) -> None:
        """Sends the end of the run, as its record has it. The answer `ended` follows after the first attempt."""
        self._order(folder, "close")

    def dispatch(self, answer: Answer) -> None:
        """Passes an answer on to the runs that it is about; a warning about all of them to one."""
        if answer["what"] == "gone":
            self.has_ended = True
        folders = [folder for folder in list(self._listeners) if answer["of"] in (folder, "")]
        for folder in folders[:1] if answer["what"] == "warned" else folders:
            self._listeners[folder](answer["what"], answer["text"])
            if answer["what"] in ("ended", "gone"):
                self._listeners.pop(folder, None)

    def _order(self, folder: Path, command: str, **values: Any) -> None:
        try:
            self._write_order({"to": str(folder), "what": command, **values})
        except OSError as error:  # the pipe broke
            self.dispatch({"of": "", "what": "gone", "text": f"the process that sends to MLflow ended ({error})"})


_shared: MlflowSender | None = None


def shared_sender() -> MlflowSender:
    """The sender of this process. Starts it for the first run, after its death, and after a fork."""
    global _shared
    if _shared is None or _shared.has_ended or _shared.owner != os.getpid():
        _shared = _start_process_sender()
    return _shared


def start_thread_sender() -> MlflowSender:
    """Starts a sender in a thread: for machines where no further process can be started, and for tests."""
    orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    thread_sender = MlflowSender(orders.put)
    threading.Thread(target=serve, args=(orders, thread_sender.dispatch), daemon=True).start()
    return thread_sender


def popen_options(statement: str, *arguments: str) -> dict[str, Any]:
    """Options of `subprocess.Popen` that run a Python statement in this interpreter with this code of dmat.

    The process gets its own session, so that Ctrl-C reaches only the process that starts it.
    """
    package = str(Path(__file__).parents[2])
    if package in (*site.getsitepackages(), site.getusersitepackages()):
        package = ""  # importable anyway; in PYTHONPATH, installed packages would hide modules of Python itself
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, "-P", "-c", statement, *arguments],
        "env": os.environ | {"PYTHONPATH": path},
        "start_new_session": True,
    }


def _start_process_sender() -> MlflowSender:
    try:
        child = subprocess.Popen(
            **popen_options("from dmat.tracking import sender; sender.main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # otherwise a reader of the command's output would wait for this process too
        )
    except OSError:
        return start_thread_sender()
    order_pipe, answer_pipe = child.stdin, child.stdout
    assert order_pipe is not None and answer_pipe is not None

    def write_order(order: Order) -> None:
        order_pipe.write(json.dumps(order).encode() + b"\n")
        order_pipe.flush()

    process_sender = MlflowSender(write_order)

    def read_answers() -> None:
        for line in answer_pipe:
            process_sender.dispatch(json.loads(line))
        text = f"the process that sends to MLflow ended with code {child.wait()}"
        process_sender.dispatch({"of": "", "what": "gone", "text": text})

    threading.Thread(target=read_answers, daemon=True).start()
    return process_sender


def main() -> None:
    """The sending process: reads orders from standard input and writes answers to standard output."""
    os.nice(_NICENESS)
    orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    answer_fd, parent = os.dup(1), os.getppid()
    os.dup2(2, 1)  # output of libraries must not mix with answers

    def send_answer(answer: Answer) -> None:
        with contextlib.suppress(OSError):  # the training does not read any more
            os.write(answer_fd, json.dumps(answer).encode() + b"\n")

    def forward_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        send_answer({"of": "", "what": "warned", "text": str(message)})

    def read_orders() -> None:
        for line in sys.stdin.buffer:
            orders.put(json.loads(line))
        orders.put(None)

    warnings.showwarning = forward_warning
    threading.Thread(target=read_orders, daemon=True).start()
    serve(orders, send_answer, parent)


def serve(orders: "queue.SimpleQueue[Order | None]", send_answer: Callable[[Answer], None], parent: int = 0) -> None:
    """Sends runs until the orders end with None or the parent process ends.

    parent: pid of the parent process; 0: its end is not checked.
    """
    followed: dict[str, _FollowedRun] = {}
    while True:
        order = _next_order(orders, followed, parent)
        if order is None:
            break
        if order["what"] == "open":
            followed[order["to"]] = _FollowedRun(Path(order["home"]), Path(order["to"]), order["store"])
        elif (run := followed.get(order["to"])) and order["what"] == "system":
            run.samples.append((order["values"], order["seconds"]))
        elif run and order["what"] == "close":
            run.is_closing, run.next_attempt = True, 0.0
        for folder in [folder for folder, run in followed.items() if run.next_attempt <= time.monotonic()]:
            run = followed[folder]
            event, text = run.step()
            send_answer({"of": folder, "what": event, "text": text})
            if run.is_closing:
                del followed[folder]
                send_answer({"of": folder, "what": "ended", "text": ""})
    for run in followed.values():  # their process ended without closing them
        _wait_for_end(parent)
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")  # nobody reads them
            open_runs.sync(run.home)


def _next_order(
    orders: "queue.SimpleQueue[Order | None]", followed: "Mapping[str, _FollowedRun]", parent: int
) -> Order | None:
    """The next order; an order without folder when a run is due; None at the end of the orders or of the parent."""
    while True:
        next_attempt = min((run.next_attempt for run in followed.values()), default=float("inf"))
        wait = max(0.0, min(next_attempt - time.monotonic(), _PARENT_CHECK_SECONDS if parent else 3600.0))
        try:
            return orders.get(timeout=wait)
        except queue.Empty:
            if parent and os.getppid() != parent:  # processes that it forked may keep its pipe open
                return None
            if next_attempt <= time.monotonic():
                return {"to": "", "what": "send"}


def _wait_for_end(parent: int) -> None:
    """Waits for the end of the parent: the pipe of a killed process closes shortly before the process ends."""
    deadline = time.monotonic() + 10
    while parent and os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.02)


@dataclasses.dataclass
class _FollowedRun:
    """State of one run in the sending process."""

    home: Path
    folder: Path
    store: str  # see `stores.identity`
    samples: deque[tuple[dict[str, float], float]] = dataclasses.field(default_factory=lambda: deque(maxlen=1000))
    is_closing: bool = False
    next_attempt: float = 0.0  # time on the monotonic clock
    connected: bool = False
    sync_others: bool = True  # at the start and after an outage, other runs may have to be synced
    interval: float = 0.0  # seconds until the next attempt

    def __post_init__(self) -> None:
        self.uploader = RunUploader(self.home, RunRecord(self.folder, self.store))

    def step(self) -> tuple[str, str]:
        """Sends new data; doubles the interval while the store does not answer. Returns `what` and `text` of Answer."""
        try:
            self._send()
            if self.sync_others:
                open_runs.sync(self.home)
            self.sync_others, self.interval = False, SEND_EVERY
            return "reached", ""
        except Exception as error:  # any failure of tracking must leave the run alone
            self.sync_others, self.interval = True, min(max(2 * self.interval, SEND_EVERY), _MAX_RETRY_SECONDS)
            return "failed", first_line(error)
        finally:
            self.next_attempt = time.monotonic() + self.interval

    def _send(self) -> None:
        """Sends new metrics, tags and samples, and the end of a closing run. Raises any exception of MLflow."""
        uploader, record = self.uploader, self.uploader.record
        with uploader.exclusive():
            if not open_runs.exists(self.home, self.folder):  # another process sent its end after an outage
                return
            if not self.connected:
                uploader.connect(live=True)
                self.connected = True
            uploader.send_new_metrics()
            uploader.send_tags()
            while self.samples:
                uploader.send_system_metrics(*self.samples[0])
                self.samples.popleft()
            if self.is_closing:
                uploader.send_end(record["ending"]["status"], record["ending"])
                open_runs.remove(self.home, self.folder)
