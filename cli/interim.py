"""`dmat interim`: the arms so far, while trainings and evaluations run."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Adds the command `interim` to the command line."""
    app.command(
        "interim",
        help="Compare the arms as far as they are computed, while `dmat repro` or others compute them.\n\nUnfinished "
        "evaluations have bounds of their final accuracy, never a headline. Writes a page with the table and charts, "
        "which reloads itself.\n\nExample: dmat interim",
    )(_interim)


def _interim(
    out: Annotated[Path | None, typer.Option(help="The page. [default: runs/interim.html]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat import config, files
    from dmat.pipeline import interim
    from dmat.report import interim as page
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    params = config.load(workspace.at("params.yaml"))
    runs = interim.read(params, workspace)
    path = out or workspace.home / "runs" / "interim.html"
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    files.write_text(path, page.render(runs, params.write_report.title, written))
    if as_json:
        typer.echo(json.dumps({run.name: run.plain() for run in runs}, indent=2))
        return
    typer.echo(page.markdown(runs), nl=False)
    typer.echo(f"\nAccuracies in per cent; what is unfinished has bounds, not results. The page: {path}")
