"""Entry point of `dmat`. A DmatError is printed as its sentence on stderr with exit code 2. An interruption has its own
exit code."""

import contextlib
import errno
import re
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO, cast

import typer

from cli import (
    evaluate,
    images,
    interim,
    lock,
    models,
    plan,
    project,
    recipes,
    repro,
    runs,
    sources,
    stages,
    tune,
    upkeep,
)
from dmat import __version__
from dmat.errors import DmatError, Interrupted
from dmat.redaction import RedactingStream

# Errors that the user can fix: a disk or folder that is full, read-only, forbidden or not what the path says; too many
# open files; a file system without locks or out of order.
_FIXABLE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EIO, errno.ESTALE),
}

_USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError, for which typer has no public name

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Does better generated data make classifiers more robust? Each stage is a command; `dvc repro` runs all that "
    "are out of date.\n\nExample: dmat train-robust --arm generated --seed 1",
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


stages.add_to(app, specific_commands={"evaluate_robust": evaluate.add_to})
repro.add_to(app)
interim.add_to(app)
tune.add_to(app)
project.add_to(app)
recipes.add_to(app)
plan.add_to(app)
sources.add_to(app)
runs.add_to(app)
models.add_to(app)
images.add_to(app)
lock.add_to(app)
upkeep.add_to(app)


def main() -> None:
    """Runs the command line; never returns. Secrets are masked in everything that is written to stderr."""
    with contextlib.redirect_stderr(cast(TextIO, RedactingStream(sys.stderr))):
        try:
            Path.cwd()
        except FileNotFoundError:
            typer.echo("error: the working folder was deleted; expected one that exists; `cd` to a project", err=True)
            sys.exit(2)
        try:
            _run()
        except Exception:  # a defect of dmat; printed here, where secrets are masked
            traceback.print_exc()
            sys.exit(1)


def _run() -> None:
    try:
        code = app(prog_name="dmat", standalone_mode=False)  # also under `python -m`, for completion
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
        if error.errno not in _FIXABLE_ERRORS:
            raise
        typer.echo(
            f"error: {error.filename or 'a file'}: {error.strerror}; expected a file or folder that can be read and "
            f"written; free or unlock it and run the same command again; it resumes",
            err=True,
        )
        sys.exit(2)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        sys.exit(stop.exit_code)


def needed_extra(error: ImportError) -> str | None:
    """A sentence on the extra of dmat that installs the missing package; None if no extra does."""
    import importlib.metadata

    package = (error.name or "").partition(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a tree that was never installed
        for line in importlib.metadata.requires("dmat") or []:
            requirement = re.match(r"""([\w.-]+).*extra == ["'](\w+)""", line)
            if requirement and requirement[1].replace("-", "_") == package:
                return f"dmat {' '.join(sys.argv[1:2])} needs {requirement[1]}; pip install 'dmat[{requirement[2]}]'"
    return None


def _explain(error: Any) -> None:
    """Prints one sentence instead of usage, hint and frame; the help if no command was given."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    command = error.ctx.command_path if error.ctx else "dmat"
    typer.echo(f"error: {error.format_message().rstrip('.')}; see `{command} --help`", err=True)


if __name__ == "__main__":
    main()
