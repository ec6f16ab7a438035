"""`dmat tune`: a study over beta, learning rate and generated share."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command(
        "tune",
        help="Run or resume the study of params.yaml: short trials that differ in beta, learning rate and generated "
        "share, stopped early on validation PGD accuracy.\n\nExample: dmat tune --trials 20",
    )(_tune)


def _tune(
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier commands included.", min=1)],
    fresh: Annotated[bool, typer.Option("--fresh", help="Set the earlier study aside and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="No progress bar; the result as JSON.")] = False,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    from dmat import config, tuning
    from dmat.jobs import workspace

    loaded = config.load(params)
    place = workspace.find(params.resolve().parent)
    study = tuning.plan(loaded, place)
    if dry_run:
        typer.echo(json.dumps(study.describe(), indent=2))
        return
    started = time.monotonic()
    summary = tuning.run(study, loaded, place, trials, fresh=fresh, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(summary, sort_keys=True))
        return
    counts = ", ".join(f"{summary[state]} {state}" for state in ("complete", "pruned", "fail"))
    best = summary["best"]
    if summary["trials"] > trials:
        typer.echo(f"{summary['trials']} trials have ended already; --trials is the total, so none was added")
    found = ", ".join(f"{name} {value:.4g}" for name, value in best.items()) if best else "no trial completed"
    typer.echo(
        f"tune {study.settings.arm}: best {found}; {counts}, pruning saved "
        f"{100 * summary['images_saved_by_pruning']:.0f} % of the images ({time.monotonic() - started:.0f} s); "
        f"artifacts/tune/{study.settings.arm}"
    )
