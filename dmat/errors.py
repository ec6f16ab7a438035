"""The errors of dmat that a user can fix.

A `DmatError` is printed as its message, without a traceback, and ends the command with exit code 2.
Any other exception that escapes is a defect of dmat and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

from dmat.redaction import redacted

_MAX_LINE_LENGTH = 300  # characters


class DmatError(Exception):
    """An error that a user can fix. The message says what was found, what was expected and what to do, in this order.

    It names the path or key.
    """


class ConfigError(DmatError):
    """All problems of a parameter file together."""

    def __init__(self, path: str, problems: Iterable[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{path}: {count}", *(f"  - {line}" for line in self.problems)]))


class UnfitError(DmatError):
    """Values are valid on their own but do not fit each other, the data or the machine.

    In a study it fails one trial only.
    """


class Interrupted(Exception):
    """A signal stopped the run; its state is saved. `exit_code` is 75 to ask for a requeue, else 128 + signal."""

    def __init__(self, exit_code: int, sentence: str):
        self.exit_code = exit_code
        super().__init__(sentence)


class Pruned(Exception):
    """The watcher of a run ended it early; its reports so far remain valid."""


class Diverged(DmatError):
    """Training met a NaN or infinite loss. The run ends as FAILED and its last good checkpoint stays."""


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean X?" with the nearest name, empty if none is near."""
    nearest = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def first_line(error: BaseException, *urls: str) -> str:
    """Returns the first line of another library's error, for one of our messages; if empty, the class of the error.

    At most 300 characters. Secrets are masked. urls: addresses that the error may contain; their secrets are masked
    everywhere in the text.
    """
    return (redacted(str(error), *urls).splitlines() or [type(error).__name__])[0][:_MAX_LINE_LENGTH]
