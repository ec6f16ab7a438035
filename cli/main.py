"""Entry point of `dmat`. A DmatError becomes its sentence on stderr and exit code 2; an interruption its own code."""

import contextlib
import errno
import re
import sys
import traceback
from typing import Any, TextIO, cast

import typer

from cli import evaluate, lock, models, project, recipes, runs, stages, tune, upkeep
from dmat import __version__
from dmat.errors import DmatError, Interrupted
from dmat.redaction import RedactingStream

# What the person at the keyboard can mend: a full, read-only, forbidden or wrong place.
_MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG),
}

_USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError, for which typer has no public name

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Does better generated data make classifiers more robust? Stages run by themselves here, or all "
    "together by `dvc repro`.\n\nExample: dmat train-robust --arm generated --seed 1",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"dmat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


stages.add_to(app, own={"evaluate_robust": evaluate.add_to})
tune.add_to(app)
project.add_to(app)
recipes.add_to(app)
runs.add_to(app)
models.add_to(app)
lock.add_to(app)
upkeep.add_to(app)


def main() -> None:
    """Runs the command line; never returns. What goes to stderr has no secrets in it, whoever writes it."""
    with contextlib.redirect_stderr(cast(TextIO, RedactingStream(sys.stderr))):
        try:
            _run()
        except Exception:  # a defect of dmat; printed here, where secrets are masked
            traceback.print_exc()
            sys.exit(1)


def _run() -> None:
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _USAGE as error:
        _explain(error)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except DmatError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ImportError as error:
        if (sentence := needed_extra(error)) is None:
            raise
        typer.echo(f"error: {sentence}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        typer.echo(
            f"error: {error.filename or 'a file'}: {error.strerror}; expected a place to read and write; free or "
            f"unlock it and run the same command again, it goes on",
            err=True,
        )
        sys.exit(2)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        sys.exit(stop.exit_code)


def needed_extra(error: ImportError) -> str | None:
    """The sentence for a package that an extra of dmat brings; None if no extra brings it."""
    import importlib.metadata

    missing = (error.name or "").partition(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a tree that was never installed
        for line in importlib.metadata.requires("dmat") or []:
            named = re.match(r"""([\w.-]+).*extra == ["'](\w+)""", line)
            if named and named[1].replace("-", "_") == missing:
                return f"dmat {' '.join(sys.argv[1:2])} needs {named[1]}; pip install 'dmat[{named[2]}]'"
    return None


def _explain(error: Any) -> None:
    """One sentence instead of usage, hint and frame; where no command was named, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    where = error.ctx.command_path if error.ctx else "dmat"
    typer.echo(f"error: {error.format_message().rstrip('.')}; see `{where} --help`", err=True)


if __name__ == "__main__":
    main()
