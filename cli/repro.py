"""`dmat repro`: what `dvc repro` runs, side by side."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dmat.pipeline.repro import InstanceProgress


def add_to(app: typer.Typer) -> None:
    """Adds the command `repro` to the command line."""
    app.command(
        "repro",
        help="Reproduce the pipeline as `dvc repro` does, with stages side by side.\n\nA stage starts when all that it "
        "reads is there. DVC decides what is out of date, and writes dvc.lock. What the stages write to the terminal "
        "is in .dvc/tmp/repro.\n\nExample: dmat repro --workers 2",
    )(_repro)


def _repro(
    targets: Annotated[list[str] | None, typer.Argument(help="As for `dvc repro`. [default: all of dvc.yaml]")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="How many processes compute at once. [default: one per GPU, or the number of cores divided by "
            "compute.threads]",
            min=1,
        ),
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="Compute on the workers of this Dask cluster: address, or scheduler file.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    from dmat import config, tracking
    from dmat.engine import EngineOptions
    from dmat.pipeline import division, dvc_graph, repro
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    compute = config.load(workspace.at("params.yaml")).compute
    waits = dvc_graph.instances_to_run(workspace.root, targets or [])
    environments = division.gpu_environments() if compute.device != "cpu" else ({},)
    gpus = len(environments) if environments[0] else 0
    count = workers or repro.default_workers(compute.threads, gpus, len(waits))
    options = EngineOptions(
        workers=0 if cluster or count == 1 else count, cluster=cluster, environments=environments
    )  # one process at a time needs no workers
    command = " ".join(["dmat", *sys.argv[1:]])
    if not as_json and any(instance.startswith("evaluate_robust") for instance in waits):
        typer.echo("meanwhile, `dmat interim` compares the arms so far")
    failure = repro.run(
        workspace.root,
        waits,
        options,
        lambda progress: _show(progress, as_json),
        lambda: tracking.begin_parent(workspace.home, workspace.root, command),
    )
    if not waits:
        typer.echo(json.dumps({"instances": 0}) if as_json else "data and pipelines are up to date")
    if failure is not None:
        raise typer.Exit(failure.exit_code)


def _show(progress: "InstanceProgress", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(progress)))
        return
    if progress.state == "running":
        typer.echo(f"{progress.instance}: {progress.sentence}")
        return
    seconds = f" in {progress.seconds:.0f} s" if progress.seconds else ""
    typer.echo(f"{progress.instance}: {progress.state}{seconds}")
    if progress.sentence:
        typer.echo(f"{progress.instance}: {progress.sentence}", err=True)
