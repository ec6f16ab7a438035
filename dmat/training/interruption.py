"""Signals as a question that a run asks between two steps, so that it stops only where its state is whole."""

import signal
from types import FrameType
from typing import Self

from dmat.errors import Interrupted

REQUEUE = 75  # exit code of SIGUSR1: the scheduler should start the same command again
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside the block SIGINT, SIGTERM and SIGUSR1 only set `asked`; a second SIGINT acts at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _ASKING}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)

    def raise_if_asked(self) -> None:
        """Raises Interrupted; call it after saving."""
        if self.asked is not None:
            code = REQUEUE if self.asked is signal.SIGUSR1 else 128 + self.asked
            raise Interrupted(code, f"stopped by {self.asked.name}; the same command goes on from here")
