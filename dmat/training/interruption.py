"""Signals that a run polls between two steps, so that it stops only where its state is complete."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Self

from dmat.errors import Interrupted

REQUEUE = 75  # exit code after SIGUSR1: the scheduler should start the same command again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)  # instead of signals


@contextlib.contextmanager
def asking(check: Callable[[], None]) -> Iterator[None]:
    """Inside the block, in this thread, `Interruption` calls `check` instead of handling signals.

    Signals can be handled in the main thread only. check: raises Interrupted if the run has to stop.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


class Interruption:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only set `received`; a second SIGINT raises KeyboardInterrupt.

    at_once=True is for work without state to save: the first signal raises Interrupted immediately, and again at the
    end of the block if a library turned it into another exception. Blocks may be nested: a signal that an inner block
    received and did not raise is passed to the outer block, which stops at its next check.
    In a thread that `asking` wraps no signal is handled, and nothing is raised at once.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._at_once = at_once
        self._check = _check.get()
        self._stop: Interrupted | None = None  # what the check raised

    def __enter__(self) -> Self:
        if self._check is not None:
            return self
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        outer = self._outer()
        if outer is not None and not self._at_once:  # a callback may have swallowed what the outer block raised
            self.received = outer.received
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if self._check is not None:
            return
        outer = self._outer()
        if self.received is not None and outer is not None and kind is not Interrupted:
            outer.received = self.received
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self._at_once and self.received is not None and isinstance(error, Exception):
            self.raise_now()  # a library turned the exception that was raised inside it into another one

    def _outer(self) -> "Interruption | None":
        outer = getattr(self._previous_handlers[signal.SIGTERM], "__self__", None)
        return outer if isinstance(outer, Interruption) else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, signal.Signals(number)
        if self._at_once:
            self.raise_if_received()
        elif first:  # os.write, because the signal may have interrupted a print
            os.write(2, f"\n{self.received.name}: saving and stopping; Ctrl-C stops without saving\n".encode())

    @property
    def requested(self) -> bool:
        """Whether the run has to stop."""
        if self._check is not None and self._stop is None:
            try:
                self._check()
            except Interrupted as stop:
                self._stop = stop
        return self.received is not None or self._stop is not None

    def raise_if_received(self) -> None:
        """Raises Interrupted if the run has to stop. Call it after saving."""
        if self.requested:
            self.raise_now()

    def raise_now(self) -> None:
        """Raises Interrupted. Without a signal here, because another process received one, it is that of SIGTERM."""
        if self._stop is not None:
            raise self._stop
        self.received = self.received or signal.SIGTERM
        code = REQUEUE if self.received is signal.SIGUSR1 else 128 + self.received
        raise Interrupted(code, f"stopped by {self.received.name}; the same command resumes from here")
