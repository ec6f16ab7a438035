"""Tasks, what they see of their engine and how they end; the engine that runs them in this process."""

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dmat.errors import DmatError, Interrupted, first_line

CLUSTER_VARIABLE = "DMAT_CLUSTER"  # environment variable: the cluster of the parent process, as `--cluster` names it

Message = dict[str, Any]  # JSON values


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Where tasks run, and how much patience there is. Times are in seconds.

    workers: number of processes of this machine; 0: none. cluster: address of a scheduler, or path of the file that
    holds it; "": none. dashboard: address of the local cluster's dashboard, such as "127.0.0.1:8787"; "": none.
    allowed_failures: how often a task runs again after its worker was killed. patience: a task that hears nothing of
    its driver for so long saves and stops. time_to_save: what tasks get between the request to stop and the end of the
    local workers. environments: worker k of a local cluster gets the variables `environments[k % len(environments)]`.
    """

    workers: int = 0
    cluster: str = ""
    dashboard: str = ""
    allowed_failures: int = 3
    patience: float = 30.0
    time_to_save: float = 120.0
    environments: tuple[Mapping[str, str], ...] = ({},)

    @property
    def joined_cluster(self) -> str:
        """The cluster to join, "" for none. That of the parent process comes first: its children must not use two."""
        return os.environ.get(CLUSTER_VARIABLE) or self.cluster

    @property
    def has_workers(self) -> bool:
        """Whether tasks run outside this process."""
        return bool(self.joined_cluster or self.workers)


@dataclasses.dataclass(frozen=True)
class Task:
    """A call of a function.

    name: for messages, such as "trial 7"; unique among the tasks of one `Engine.run`. function: of a module, because a
    worker imports it; called as `function(context, *arguments)`. Its result and its arguments are picklable and small.
    in_driver: it runs in a thread of the driver's process and occupies no worker, because it waits for workers itself.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    in_driver: bool = False


class TaskContext(Protocol):
    """What a task sees of the engine, wherever it runs."""

    def ask(self, message: Message) -> Message:
        """Sends a message of JSON values to the driver and waits for the answer of its `on_message`.

        Raises Interrupted if the driver asks to stop or is gone.
        """

    def check_interruption(self) -> None:
        """Raises Interrupted if the driver asks to stop or is gone. Cheap: call it in every step."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended.

    result: what its function returned. error: what it raised. An error of dmat keeps its class, sentence and exit code;
    any other exception is a DmatError with its last line, and its traceback is on stderr where it happened.
    lost_workers: how often the task's worker was killed.
    """

    task: Task
    result: Any = None
    error: DmatError | Interrupted | None = None
    lost_workers: int = 0


def refuse_message(task: Task, message: Message) -> Message:
    """The answer to the messages of tasks that should have none."""
    raise AssertionError(f"{task.name} sends messages, but nobody answers them")


def ignore(*arguments: object) -> None:
    """Does nothing."""


class Engine(Protocol):
    """Runs tasks, and talks with them."""

    @property
    def size(self) -> int:
        """How many tasks run at once."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables with which child processes use this engine's cluster."""

    def run(
        self,
        next_task: Callable[[], Task | None],
        *,
        on_outcome: Callable[[Outcome], None],
        on_message: Callable[[Task, Message], Message] = refuse_message,
        on_lost: Callable[[Task], None] = ignore,
        check_interruption: Callable[[], None] = ignore,
    ) -> None:
        """Runs tasks until `next_task` returns None while none runs.

        next_task: called when a worker is idle. After None it is called again when a task has ended.
        on_outcome: called once per task. on_message: its return value is the answer.
        on_lost: called when a task's worker was killed; the task runs again.
        check_interruption: may raise. Then every task is asked to stop, saves, and has its outcome; after that the
        exception is raised. If another callback raises, the tasks stop too, without outcomes.
        All callbacks are called in the calling thread, one at a time.
        """

    def close(self) -> None:
        """Ends the workers of a local cluster."""


class InProcessEngine:
    """Runs one task after the other in this process. A task's messages and checks are plain calls."""

    size = 1
    environment: Mapping[str, str] = {}

    def run(
        self,
        next_task: Callable[[], Task | None],
        *,
        on_outcome: Callable[[Outcome], None],
        on_message: Callable[[Task, Message], Message] = refuse_message,
        on_lost: Callable[[Task], None] = ignore,
        check_interruption: Callable[[], None] = ignore,
    ) -> None:
        """See `Engine.run`. A task that was interrupted ends the run."""
        check_interruption()
        while (task := next_task()) is not None:
            context = _InProcessContext(task, on_message, check_interruption)
            outcome = run_task(task, context)
            on_outcome(outcome)
            if isinstance(outcome.error, Interrupted):  # a signal, which is meant for the driver too
                raise outcome.error
            check_interruption()

    def close(self) -> None:
        """Does nothing: there are no workers."""


@dataclasses.dataclass(frozen=True)
class _InProcessContext:
    task: Task
    on_message: Callable[[Task, Message], Message]
    check_interruption: Callable[[], None]

    def ask(self, message: Message) -> Message:
        self.check_interruption()
        return self.on_message(self.task, message)


def run_task(task: Task, context: TaskContext) -> Outcome:
    """Calls the function of a task in this thread."""
    try:
        return Outcome(task, task.function(context, *task.arguments))
    except (DmatError, Interrupted) as error:
        return Outcome(task, error=error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Outcome(task, error=DmatError(f"{task.name}: {type(error).__name__}: {first_line(error)}"))
