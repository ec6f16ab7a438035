"""`dmat repro`: the stage instances that are out of date, side by side, each by `dvc repro --single-item`.

DVC decides what is out of date, restores from its run cache, and writes dvc.lock. This module decides only when an
instance may start: when all that it reads is there and a worker is idle. Stages that can divide their shards over
workers run in this process's threads and share the workers; the others occupy one worker each.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from dmat.engine import Engine, EngineOptions, Outcome, Task, TaskContext, open_engine
from dmat.engine.tasks import Message
from dmat.errors import Interrupted
from dmat.pipeline.dvc_graph import Waits
from dmat.pipeline.stages import STAGES
from dmat.training.interruption import Interruption

_LOGS = Path(".dvc") / "tmp" / "repro"  # what the commands wrote, below the root of the project
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_TELL_SECONDS = 10.0  # between two lines of an instance that runs
_MAX_BAR = 4096  # bytes of the end of a log in which a progress bar is looked for
_MAX_TAIL = 64 * 1024  # bytes of a log in which DVC's last words are looked for
_LOCKED = ("Unable to acquire lock", "is busy, it is being blocked by")  # of DVC 3: dvc/lock.py, dvc/rwlock.py

State = Literal["started", "running", "done", "unchanged", "restored", "failed", "stopped", "skipped"]


@dataclasses.dataclass(frozen=True)
class InstanceProgress:
    """A line for people and programs: what happens to an instance.

    state: "unchanged" if nothing was out of date, "restored" if it had the result in its cache, "skipped" if something
    that it reads failed. seconds: since its start. sentence: why it failed, or the progress bar of an instance that
    runs. exit_code: of the command of the stage.
    """

    instance: str
    state: State
    seconds: float = 0.0
    sentence: str = ""
    exit_code: int = 0


@dataclasses.dataclass(frozen=True)
class _CommandEnd:
    """How `dvc repro --single-item` ended. text: the end of what it wrote."""

    exit_code: int
    seconds: float
    text: str

    def progress(self, instance: str) -> InstanceProgress:
        """What to say of it."""
        if self.exit_code == 0:
            state: State = "unchanged" if "didn't change, skipping" in self.text else "done"
            state = "restored" if "is cached - skipping run" in self.text else state
            return InstanceProgress(instance, state, self.seconds)
        codes = re.findall(r"exited with (-?\d+)", self.text)
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("error: ", "ERROR: "))]
        return InstanceProgress(
            instance,
            "failed",
            self.seconds,
            (errors or lines or ["it wrote nothing"])[0],
            int(codes[-1]) if codes else self.exit_code,
        )


def run(
    root: Path,
    waits: Waits,
    options: EngineOptions,
    report: Callable[[InstanceProgress], None],
    start: Callable[[], Mapping[str, str]] = dict,
) -> InstanceProgress | None:
    """Runs instances until all have ended, or nothing more can start. Returns the first failure.

    waits: see `instances_to_run`. report: called when an instance starts and ends. start: called before the first
    instance; returns environment variables for all of them. An instance that failed stops only those that read its
    results. A signal reaches every stage, which saves; then Interrupted is raised.
    """
    if not waits:
        return None
    with Interruption() as interruption, open_engine(options) as engine:
        scheduler = _Scheduler(root, waits, engine, start(), report)
        engine.run(
            scheduler.next_task,
            on_outcome=scheduler.end,
            on_message=scheduler.tell,
            on_lost=lambda task: report(InstanceProgress(task.name, "started")),
            check_interruption=interruption.raise_if_received,
        )
    scheduler.skip_rest()
    return scheduler.failure


class _Scheduler:
    """Decides which instance may start. failure: the first one."""

    def __init__(
        self,
        root: Path,
        waits: Waits,
        engine: Engine,
        environment: Mapping[str, str],
        report: Callable[[InstanceProgress], None],
    ):
        self._root, self._waits, self._engine, self._environment = root, waits, engine, dict(environment)
        self._report = report
        self._waiting, self._ended = list(waits), set[str]()
        self._coordinating = 0  # tasks in this process
        self.failure: InstanceProgress | None = None

    def next_task(self) -> Task | None:
        """The first instance, in DVC's order, that reads nothing that is still to be made."""
        for name in self._waiting:
            in_driver = coordinates_workers(name)
            if self._waits[name] <= self._ended and not (in_driver and self._coordinating >= self._engine.size):
                self._waiting.remove(name)
                self._coordinating += in_driver
                environment = {**self._environment, **(self._engine.environment if in_driver else {})}
                self._report(InstanceProgress(name, "started"))
                return Task(name, run_instance, (str(self._root), name, environment), in_driver)
        return None

    def tell(self, task: Task, message: Message) -> Message:
        """Reports how far an instance is. message: seconds, and its progress bar."""
        self._report(InstanceProgress(task.name, "running", message["seconds"], message["bar"]))
        return {}

    def end(self, outcome: Outcome) -> None:
        """Takes note of the end of an instance."""
        name = outcome.task.name
        self._coordinating -= outcome.task.in_driver
        if isinstance(outcome.error, Interrupted):
            progress = InstanceProgress(name, "stopped", exit_code=outcome.error.exit_code)
        elif outcome.error is not None:
            progress = InstanceProgress(name, "failed", sentence=str(outcome.error), exit_code=2)
        else:
            progress = outcome.result.progress(name)
        if progress.state == "failed":
            self.failure = self.failure or progress
        elif progress.state != "stopped":
            self._ended.add(name)
        self._report(progress)

    def skip_rest(self) -> None:
        """Reports the instances that cannot start."""
        for name in self._waiting:
            self._report(InstanceProgress(name, "skipped"))


def coordinates_workers(instance: str) -> bool:
    """Whether the command of an instance may use workers itself: a stage with shards, a study, what is not dmat's."""
    stage = STAGES.get(instance.partition("@")[0])
    return stage is None or stage.by_shards


def run_instance(context: TaskContext, root: str, name: str, environment: Mapping[str, str]) -> _CommandEnd:
    """Runs `dvc repro --single-item` of an instance, again if another process of DVC was in its way.

    If the task is asked to stop, the command gets what Ctrl-C would send it, and saves. Raises Interrupted then.
    """
    path = Path(root) / _LOGS / f"{name.replace('/', '-')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **environment}
    # A worker may have been started by its path, in no activated environment; the stages call `dmat`.
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    started = time.monotonic()
    while True:
        path.unlink(missing_ok=True)  # the command of a worker that was killed may still write to it
        with open(path, "w", encoding="utf-8") as log:
            exit_code = _run_command(context, root, name, environment, log.fileno(), path)
        text = path.read_bytes()[-_MAX_TAIL:].decode(errors="replace")
        if exit_code == 0 or not any(sentence in text for sentence in _LOCKED):
            return _CommandEnd(exit_code, time.monotonic() - started, text)
        context.check_interruption()
        time.sleep(_RETRY_SECONDS)


def _run_command(
    context: TaskContext, root: str, name: str, environment: Mapping[str, str], log: int, path: Path
) -> int:
    """Exit code of the command, in a process group of its own: Ctrl-C in a terminal is not for it.

    log: descriptor of the file at `path`, which the command writes to; the driver gets its progress bar.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    started = reported = time.monotonic()
    bar = ""
    try:
        while (exit_code := process.poll()) is None:
            context.check_interruption()
            if time.monotonic() - reported > _TELL_SECONDS:
                reported, last = time.monotonic(), bar
                if (bar := latest_bar(path)) != last:
                    context.ask({"seconds": round(reported - started, 1), "bar": bar})
            time.sleep(_POLL_SECONDS)
        return exit_code
    except Interrupted:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


def latest_bar(log: Path) -> str:
    """The newest state of the progress bar that a command writes to its log; "" without one."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_BAR))
        text = file.read().decode(errors="replace")
    bars = [line.strip() for line in text.replace("\r", "\n").splitlines() if "%|" in line]
    return bars[-1] if bars else ""


def default_workers(threads: int, gpus: int, instances: int) -> int:
    """How many instances run at once: one per GPU, or as many as have their threads on the cores of this machine.

    threads: per process; 0: all cores. gpus: 0 without.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min(gpus or (cores // threads if threads else 1), instances))
