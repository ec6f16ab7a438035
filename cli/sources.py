"""`dmat sources`: the data sets that dmat knows, and their download."""

import json
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Adds the group `dmat sources` to the app."""
    group = typer.Typer(no_args_is_help=True, help="Published data sets that dmat reads.\n\nExample: dmat sources list")
    group.command(
        "list",
        help="Show what is published about each data set: images, threat model, augmentation, licence.\n\n"
        "Example: dmat sources list",
    )(_list)
    group.command(
        "download",
        help="Download a data set into sources/ of this project with torchvision, checksums compared.\n\n"
        "Example: dmat sources download cifar10",
    )(_download)
    app.add_typer(group, name="sources")


def _list(
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, normalisation and files too.")] = False,
) -> None:
    import dataclasses

    from dmat.data.data_sets import DATA_SETS

    if as_json:
        typer.echo(json.dumps({name: dataclasses.asdict(data_set) for name, data_set in DATA_SETS.items()}, indent=2))
        return
    head = ("source", "data set", "classes", "pixels", "train", "test", "threat", "augmentation", "licence", "download")
    rows = [
        (
            name,
            data_set.title,
            str(data_set.classes),
            f"{data_set.size}x{data_set.size}x{data_set.channels}",
            f"{data_set.train:,}",
            f"{data_set.test:,}",
            f"{data_set.norm} {data_set.epsilon}",
            data_set.augmentation,
            data_set.licence,
            "yes" if data_set.torchvision else "no",
        )
        for name, data_set in DATA_SETS.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _download(name: Annotated[str, typer.Argument(help="One of `dmat sources list`.")]) -> None:
    from dmat import SOURCES
    from dmat.data import downloads
    from dmat.workspace import current_workspace

    folder = current_workspace().at(SOURCES)
    existed = (folder / name).exists()
    downloads.download(name, folder)
    state = "exists already and stays as it is; move it away to download again" if existed else "is complete"
    typer.echo(f"{SOURCES}/{name} {state}; params.yaml names it by prepare_data: {{source: {name}, path: {name}}}")
