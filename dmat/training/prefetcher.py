"""What the next steps need, made by a thread while the device computes this one."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_DEPTH = 2  # steps ahead: one is being made, one is ready (assumed; more costs memory alone)

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """make(step), made before it is asked for. `make` must depend on nothing but the step.

    Steps are asked for in turn; after a jump (a resumed run, a roll-back) what was made is dropped. An exception of
    `make` is raised where its step is asked for. The thread ends with the object.
    """

    def __init__(self, make: Callable[[int], Made], end: int):
        """end: the first step that nobody will ask for."""
        self._make, self._end = make, end
        self._waiting: deque[tuple[int, Future[Made]]] = deque()
        self._thread = ThreadPoolExecutor(1, "ahead")

    def at(self, step: int) -> Made:
        if self._waiting and self._waiting[0][0] != step:
            self._drop()
        first = self._waiting[-1][0] + 1 if self._waiting else step
        for later in range(first, max(step + 1, min(step + 1 + _DEPTH, self._end))):
            self._waiting.append((later, self._thread.submit(self._make, later)))
        return self._waiting.popleft()[1].result()

    def _drop(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
