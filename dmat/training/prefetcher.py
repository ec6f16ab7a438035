"""A thread that prepares the inputs of the next steps while the device computes the current one."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_DEPTH = 2  # steps ahead: one in preparation, one ready (assumed; more only costs memory)

Inputs = TypeVar("Inputs")


class Prefetcher(Generic[Inputs]):
    """Calls make(step) before the inputs of the step are needed. `make` must depend on nothing but the step.

    Steps are requested in order; after a jump (a resumed run, a roll-back) prepared inputs are dropped. An exception of
    `make` is raised where its step is requested. The thread ends with the object.
    """

    def __init__(self, make: Callable[[int], Inputs], end: int):
        """end: the first step that is never requested."""
        self._make, self._end = make, end
        self._pending: deque[tuple[int, Future[Inputs]]] = deque()
        self._thread = ThreadPoolExecutor(1, "prefetcher")

    def at(self, step: int) -> Inputs:
        """Returns the inputs of a step, waiting for them if necessary, and starts on the next steps."""
        if self._pending and self._pending[0][0] != step:
            self._drop()
        first = self._pending[-1][0] + 1 if self._pending else step
        for next_step in range(first, max(step + 1, min(step + 1 + _DEPTH, self._end))):
            self._pending.append((next_step, self._thread.submit(self._make, next_step)))
        return self._pending.popleft()[1].result()

    def _drop(self) -> None:
        for _, future in self._pending:
            future.cancel()
        self._pending.clear()
