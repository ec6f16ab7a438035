"""docs/commands.md, made from the commands themselves: `python -m cli.reference > docs/commands.md`.

Says what `--help` says and nothing else; a test compares the file with it.
"""

import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

HEAD = """\
# Commands

Made by `python -m cli.reference > docs/commands.md` from the commands; a test compares the two. `dmat COMMAND --help`
shows the same.

Exit codes: 0 done; 2 something that you gave must change, and the sentence on stderr says what; 75 saved and stopped
because of SIGUSR1, so queue the same command again; 130 and 143 saved and stopped because of Ctrl-C and SIGTERM;
anything else is a defect of dmat and comes with a traceback.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command and group as (words that call it, command object), in the order of `dmat --help`."""
    from cli.main import app

    waiting: list[tuple[str, Any]] = [("dmat", get_command(app))]
    while waiting:
        words, command = waiting.pop(0)
        yield words, command
        waiting = [(f"{words} {name}", inner) for name, inner in getattr(command, "commands", {}).items()] + waiting


def markdown() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(words, command) for words, command in commands())])


def _section(words: str, command: Any) -> str:
    context = typer.Context(command, info_name=words)
    text, _, example = (command.help or "").partition("\n\nExample: ")
    usage = " ".join([words, *command.collect_usage_pieces(context)])
    lines = [f"## `{words}`", "", " ".join(text.split()), "", f"- Usage: `{usage}`", f"- Example: `{example}`", ""]
    options = [record for option in command.params if (record := option.get_help_record(context))]
    if options:
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {' '.join(meaning.split())} |" for name, meaning in options]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
