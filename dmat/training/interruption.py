"""Signals that a run polls between two steps, so that it stops only where its state is complete."""

import os
import signal
from types import FrameType
from typing import Self

from dmat.errors import Interrupted

REQUEUE = 75  # exit code after SIGUSR1: the scheduler should start the same command again
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only set `received`; a second SIGINT raises KeyboardInterrupt.

    at_once=True is for work without state to save: the first signal raises Interrupted immediately, and again at the
    end of the block if a library turned it into another exception. Blocks may be nested: a signal that an inner block
    received and did not raise is passed to the outer block, which stops at its next check.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._at_once = at_once

    def __enter__(self) -> Self:
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        outer = self._outer()
        if outer is not None and not self._at_once:  # a callback may have swallowed what the outer block raised
            self.received = outer.received
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
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

    def raise_if_received(self) -> None:
        """Raises Interrupted if a signal came. Call it after saving."""
        if self.received is not None:
            self.raise_now()

    def raise_now(self) -> None:
        """Raises Interrupted. Without a signal here, because another process received one, it is that of SIGTERM."""
        self.received = self.received or signal.SIGTERM
        code = REQUEUE if self.received is signal.SIGUSR1 else 128 + self.received
        raise Interrupted(code, f"stopped by {self.received.name}; the same command resumes from here")
