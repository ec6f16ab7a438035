"""Carries runs to MLflow from a process of its own, so that neither MLflow's import nor its work takes time from a
training: Python runs one thread at a time, and a sending thread would be paid by the steps beside it.

`of_this_process` is the training's end; it gives orders through a pipe and hears what became of them. `serve` is the
other end. All that is to be sent is in the work folder (`RunRecord`), so an order is little more than a folder's name, and
a sender that dies loses nothing: the next command sends it. One whose training dies ends its runs as KILLED.
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
_LONGEST_PAUSE = 60.0  # seconds between two attempts at a store that does not answer
_LOOK_UP = 1.0  # seconds between two looks whether the training still lives
_NICENESS = 5
Order = dict[str, Any]  # to: folder; what: open (home, store), system (values, seconds), close
Answer = dict[str, str]  # of: folder, "" for all; what: reached, failed, ended, warned, gone; text


class MlflowSender:
    """The training's end: gives orders, and tells what it hears to the run that it is about."""

    def __init__(self, give: Callable[[Order], None]):
        self._give = give
        self._listeners: dict[str, Callable[[str, str], None]] = {}
        self.gone = False
        self.owner = os.getpid()

    def open(self, home: Path, folder: Path, store: str, hear: Callable[[str, str], None]) -> None:
        """Follows the run in `folder` until `close`. hear: called by another thread with what happened and a text."""
        self._listeners[str(folder)] = hear
        self._order(folder, "open", home=str(home), store=store)

    def system(self, folder: Path, values: Mapping[str, float], seconds: float) -> None:
        """A sample of what the machine is busy with, so many seconds into the run."""
        self._order(folder, "system", values=dict(values), seconds=seconds)

    def close(self, folder: Path) -> None:
        """The memory of the run says how it ended; `ended` is heard once it was tried to send that."""
        self._order(folder, "close")

    def answer(self, answer: Answer) -> None:
        """What the other end says."""
        if answer["what"] == "gone":
            self.gone = True
        meant = [folder for folder in list(self._listeners) if answer["of"] in (folder, "")]
        for folder in meant[:1] if answer["what"] == "warned" else meant:
            self._listeners[folder](answer["what"], answer["text"])
            if answer["what"] in ("ended", "gone"):
                self._listeners.pop(folder, None)

    def _order(self, folder: Path, what: str, **more: Any) -> None:
        try:
            self._give({"to": str(folder), "what": what, **more})
        except OSError as error:  # the pipe broke
            self.answer({"of": "", "what": "gone", "text": f"the process that sends to MLflow ended ({error})"})


_mine: MlflowSender | None = None


def of_this_process() -> MlflowSender:
    """Started by the first run of a process, and again if it died."""
    global _mine
    if _mine is None or _mine.gone or _mine.owner != os.getpid():
        _mine = _start()
    return _mine


def in_this_process() -> MlflowSender:
    """A sender that is a thread: for a machine that refuses another process, and for tests."""
    orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    mlflow_sender = MlflowSender(orders.put)
    threading.Thread(target=serve, args=(orders, mlflow_sender.answer), daemon=True).start()
    return mlflow_sender


def python(statement: str, *words: str) -> dict[str, Any]:
    """Options of `subprocess.Popen` for a statement in this interpreter with this code, whatever is installed.

    It has a session of its own: Ctrl-C is for the process that starts it.
    """
    package = str(Path(__file__).parents[2])
    if package in (*site.getsitepackages(), site.getusersitepackages()):
        package = ""  # found anyway; in PYTHONPATH, all that is installed would come before Python's own modules
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, "-P", "-c", statement, *words],
        "env": os.environ | {"PYTHONPATH": path},
        "start_new_session": True,
    }


def _start() -> MlflowSender:
    try:
        child = subprocess.Popen(
            **python("from dmat.tracking import sender; sender.main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # else whoever reads all that a command prints would wait for this process too
        )
    except OSError:
        return in_this_process()
    orders, answers = child.stdin, child.stdout
    assert orders is not None and answers is not None

    def give(order: Order) -> None:
        orders.write(json.dumps(order).encode() + b"\n")
        orders.flush()

    mlflow_sender = MlflowSender(give)

    def listen() -> None:
        for line in answers:
            mlflow_sender.answer(json.loads(line))
        text = f"the process that sends to MLflow ended with code {child.wait()}"
        mlflow_sender.answer({"of": "", "what": "gone", "text": text})

    threading.Thread(target=listen, daemon=True).start()
    return mlflow_sender


def main() -> None:
    """The process: orders come by standard input, answers go by standard output."""
    os.nice(_NICENESS)
    orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    out, parent = os.dup(1), os.getppid()
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(said: Answer) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(out, json.dumps(said).encode() + b"\n")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        answer({"of": "", "what": "warned", "text": str(message)})

    def read() -> None:
        for line in sys.stdin.buffer:
            orders.put(json.loads(line))
        orders.put(None)

    warnings.showwarning = show
    threading.Thread(target=read, daemon=True).start()
    serve(orders, answer, parent)


def serve(orders: "queue.SimpleQueue[Order | None]", answer: Callable[[Answer], None], parent: int = 0) -> None:
    """Follows runs until the orders end with None, or the process `parent` above this one is gone (0: nobody looks)."""
    followed: dict[str, _Followed] = {}
    while True:
        order = _next(orders, followed, parent)
        if order is None:
            break
        if order["what"] == "open":
            followed[order["to"]] = _Followed(Path(order["home"]), Path(order["to"]), order["store"])
        elif (one := followed.get(order["to"])) and order["what"] == "system":
            one.samples.append((order["values"], order["seconds"]))
        elif one and order["what"] == "close":
            one.closing, one.due = True, 0.0
        for folder in [folder for folder, one in followed.items() if one.due <= time.monotonic()]:
            one = followed[folder]
            what, text = one.step()
            answer({"of": folder, "what": what, "text": text})
            if one.closing:
                del followed[folder]
                answer({"of": folder, "what": "ended", "text": ""})
    for one in followed.values():  # their process ended without a word
        _wait_for_the_end(parent)
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")  # nobody is there to read it
            open_runs.sync(one.home)


def _next(orders: "queue.SimpleQueue[Order | None]", followed: "Mapping[str, _Followed]", parent: int) -> Order | None:
    """The next order; one for nobody when it is time to send."""
    while True:
        due = min((one.due for one in followed.values()), default=float("inf"))
        wait = max(0.0, min(due - time.monotonic(), _LOOK_UP if parent else 3600.0))
        try:
            return orders.get(timeout=wait)
        except queue.Empty:
            if parent and os.getppid() != parent:  # its pipe may be held open by processes that it forked
                return None
            if due <= time.monotonic():
                return {"to": "", "what": "send"}


def _wait_for_the_end(parent: int) -> None:
    """The pipe of a process that is killed closes a moment before it is gone."""
    ends = time.monotonic() + 10
    while parent and os.getppid() == parent and time.monotonic() < ends:
        time.sleep(0.02)


@dataclasses.dataclass
class _Followed:
    """One run as the sending side knows it."""

    home: Path
    folder: Path
    store: str  # its identity
    samples: deque[tuple[dict[str, float], float]] = dataclasses.field(default_factory=lambda: deque(maxlen=1000))
    closing: bool = False
    due: float = 0.0  # on the monotonic clock
    connected: bool = False
    owing: bool = True  # other runs may wait for the store to answer
    pause: float = 0.0

    def __post_init__(self) -> None:
        self.uploader = RunUploader(self.home, RunRecord(self.folder, self.store))

    def step(self) -> tuple[str, str]:
        """Sends what is new, more seldom while the store does not answer. Returns what happened and a text."""
        try:
            self._send()
            if self.owing:
                open_runs.sync(self.home)
            self.owing, self.pause = False, SEND_EVERY
            return "reached", ""
        except Exception as error:  # any failure of tracking must leave the run alone
            self.owing, self.pause = True, min(max(2 * self.pause, SEND_EVERY), _LONGEST_PAUSE)
            return "failed", first_line(error)
        finally:
            self.due = time.monotonic() + self.pause

    def _send(self) -> None:
        """One conversation with the store; raises whatever MLflow raises."""
        uploader, record = self.uploader, self.uploader.record
        with uploader.turn():
            if not open_runs.exists(self.home, self.folder):  # after an outage another process sent its end
                return
            if not self.connected:
                uploader.connect(live=True)
                self.connected = True
            uploader.send_new()
            uploader.send_tags()
            while self.samples:
                uploader.send_system(*self.samples[0])
                self.samples.popleft()
            if self.closing:
                uploader.send_end(record["ending"]["status"], record["ending"])
                open_runs.remove(self.home, self.folder)
