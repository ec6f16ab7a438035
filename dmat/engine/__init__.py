"""Runs tasks in parallel: in this process, on workers of this machine, or on a cluster that runs already.

This is the only way in which dmat divides work in functions. The engine knows nothing of images, trials or stages. A
driver asks it to keep the workers busy, and answers the messages of its tasks. Dask is imported only where there are
workers.
"""

import contextlib
from collections.abc import Callable, Iterator

from dmat.engine.tasks import Engine, EngineOptions, InProcessEngine, Outcome, Task, TaskContext

__all__ = ["Engine", "EngineOptions", "Outcome", "Task", "TaskContext", "open_engine"]


@contextlib.contextmanager
def open_engine(options: EngineOptions, expect: Callable[[], None] | None = None) -> Iterator[Engine]:
    """Opens the engine that the options ask for, and closes it at the end of the block.

    The cluster that the environment variable DMAT_CLUSTER names comes first: it is that of a parent process, and its
    children must not start another. Then comes the cluster of the options, then a local cluster of `workers`, then this
    process.
    expect: called in a worker before each task; picklable. It raises DmatError where the worker cannot compute what the
    driver would; this becomes the error of the task's outcome. Never called in this process.
    Raises DmatError if the cluster does not answer or may not be used.
    """
    if not options.has_workers:
        yield InProcessEngine()
        return
    from dmat.engine import clusters  # loads Dask

    engine = clusters.join(options, expect) if options.joined_cluster else clusters.start(options, expect)
    try:
        yield engine
    finally:
        engine.close()
