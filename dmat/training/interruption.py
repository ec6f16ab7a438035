"""Signals as a question that a run asks between two steps, so that it stops only where its state is whole."""

import os
import signal
from types import FrameType
from typing import Self

from dmat.errors import Interrupted

REQUEUE = 75  # exit code of SIGUSR1: the scheduler should start the same command again
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only set `asked`; a second SIGINT acts at once.

    at_once: for work that has no state to save; the first signal already raises Interrupted, whatever else a library
    makes of it. Blocks may be nested: what an inner one was asked and did not raise, the outer one is asked too, so
    that it stops at its next chance.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.asked: signal.Signals | None = None
        self._at_once = at_once

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        outer = self._outer()
        if outer is not None and not self._at_once:  # what the outer one raised may have been lost in a callback
            self.asked = outer.asked
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        outer = self._outer()
        if self.asked is not None and outer is not None and kind is not Interrupted:
            outer.asked = self.asked
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._at_once and self.asked is not None and isinstance(error, Exception):
            self.raise_now()  # a library made another exception of the one that was raised into it

    def _outer(self) -> "Interruption | None":
        outer = getattr(self._before[signal.SIGTERM], "__self__", None)
        return outer if isinstance(outer, Interruption) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.asked = self.asked is None, signal.Signals(number)
        if self._at_once:
            self.raise_if_asked()
        elif first:  # os.write, because print may be at work where the signal came
            os.write(2, f"\n{self.asked.name}: saving and stopping; Ctrl-C stops without saving\n".encode())

    def raise_if_asked(self) -> None:
        """Raises Interrupted; call it after saving."""
        if self.asked is not None:
            self.raise_now()

    def raise_now(self) -> None:
        """The same where another process was asked: as if SIGTERM had come here."""
        self.asked = self.asked or signal.SIGTERM
        code = REQUEUE if self.asked is signal.SIGUSR1 else 128 + self.asked
        raise Interrupted(code, f"stopped by {self.asked.name}; the same command goes on from here")
