"""`dmat recipes`: the parameter files that ship with dmat."""

from pathlib import Path
from typing import Annotated

import typer

from dmat import recipes


def add_to(app: typer.Typer) -> None:
    """Adds the group `dmat recipes` to the app."""
    group = typer.Typer(no_args_is_help=True, help="Parameter files that ship with dmat.\n\nExample: dmat recipes list")
    group.command("list", help="Name every recipe.\n\nExample: dmat recipes list")(_list)
    group.command(
        "use",
        help="Write a recipe to params.yaml in this folder; an old file with other content is renamed and stays.\n\n"
        "Example: dmat recipes use digits-3-seeds",
    )(_use)
    app.add_typer(group, name="recipes")


def _list() -> None:
    for name, summary in recipes.summaries().items():
        typer.echo(f"{name:18s} {summary}")


def _use(name: str, to: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml")) -> None:
    renamed = recipes.use(name, to)
    typer.echo(f"{to} is now the recipe {name}" + (f"; the old one is {renamed}" if renamed else ""))
