"""The one error family of dmat: what the person at the keyboard can mend.

A `DmatError` is printed as its message, without a traceback, and ends the command with exit code 2.
Anything else that escapes is a defect of dmat and keeps its traceback.
"""

from collections.abc import Iterable

from dmat.redaction import redacted

_LONGEST_LINE = 300


class DmatError(Exception):
    """What was found, what was expected, what to do: in this order, naming the path or key."""


class ConfigError(DmatError):
    """All problems of one parameter file at once."""

    def __init__(self, path: str, problems: Iterable[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{path}: {count}", *(f"  - {line}" for line in self.problems)]))


class UnfitError(DmatError):
    """Values that are possible by themselves and do not fit each other, the data or the machine. Of a study's trial: a
    fault of this trial alone."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. `exit_code` is 75 for "requeue me", else 128 + signal."""

    def __init__(self, exit_code: int, sentence: str):
        self.exit_code = exit_code
        super().__init__(sentence)


class Pruned(Exception):
    """Whoever watches a run asked it to end early; what it reported so far stands."""


class Diverged(DmatError):
    """Training met a number that is not finite; the run ends FAILED and its last good checkpoint stays."""


def first_line(error: BaseException, *urls: str) -> str:
    """Of what another library says, for a sentence of ours: its first line, or the error's name if it says nothing.

    Secrets are masked. urls: addresses that the error may be about; secrets in them are masked wherever they stand.
    """
    return (redacted(str(error), *urls).splitlines() or [type(error).__name__])[0][:_LONGEST_LINE]
