"""`dmat init`: makes a project."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.completion import recipe_names


def add_to(app: typer.Typer) -> None:
    """Adds `dmat init` to the app."""
    app.command(
        "init",
        help="Make a folder a project: write params.yaml from a recipe, the stages and DVC's settings, and make a git "
        "repository if there is none. Commits nothing.\n\nExample: dmat init digits --recipe digits-3-seeds",
    )(_init)


def _init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder, or one that has none of the files of a project.")
    ],
    recipe: Annotated[str, typer.Option(help="One of `dmat recipes list`.", autocompletion=recipe_names)] = "digits",
) -> None:
    from dmat import project

    path = project.make(folder, recipe)
    commit = f"cd {shlex.quote(str(folder))} && git add --all . && git commit --message 'The recipe {recipe}'"
    typer.echo(f"commit it:  {commit}")
    typer.echo("run it:     dvc repro")
    typer.echo(f"read:       {path / 'README.md'}, and the comparison in artifacts/write_report/report/report.html")
