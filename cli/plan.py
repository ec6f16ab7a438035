"""`dmat plan`: how many test images and seeds a small difference needs."""

import json
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Adds `dmat plan` to the app."""
    app.command(
        "plan",
        help="Say how many test images and seeds it takes to see a difference of so many points between arms, from the "
        "paired variance of their evaluations: docs/evaluation.md.\n\nExample: dmat plan --detect 0.5",
    )(_plan)


def _plan(
    detect: Annotated[float, typer.Option(help="Difference of accuracies to see, in points of per cent.")],
    power: Annotated[float, typer.Option(help="Probability of seeing it.")] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat import config
    from dmat.pipeline import detection
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    results = detection.plan(config.load(workspace.at("params.yaml")), workspace, detect / 100, power)
    if as_json:
        records = [{**result._asdict(), "components": result.components._asdict()} for result in results]
        typer.echo(json.dumps(records, indent=2))
        return
    for result in results:
        between = "not estimated, as there is one seed"
        if result.components.seed is not None:
            between = f"{100 * result.components.seed**0.5:.2f} points"
        typer.echo(
            f"{result.arm} against {result.baseline}, {result.measure}: {100 * result.difference:+.1f} points, "
            f"{result.images:,} images, {result.seeds} seed{'s' if result.seeds > 1 else ''}"
        )
        typer.echo(f"  standard deviation between seeds: {between}; between images: "
                   f"{(result.components.image + result.components.residual) ** 0.5:.3f} of a flag")  # fmt: skip
        typer.echo(f"  seeds  test images to see {detect:g} points")
        for seeds, images in result.needed.items():
            typer.echo(f"  {seeds:5d}  {'more seeds are needed' if images is None else f'{images:,}'}")
