"""One command per stage, made from the table `STAGES`."""

import contextlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmat.errors import DmatError
from dmat.pipeline import STAGES, Stage

if TYPE_CHECKING:
    from dmat.workspace import Workspace

_PLANNED = "DMAT_PLANNED"  # fingerprint of what several processes compute together
_INSTANCE_OPTIONS = {
    "generator": (str, "Name in `generators` of params.yaml."),
    "image_set": (str, "Name in `image_sets` of params.yaml."),
    "selection": (str, "Name in `selections` of params.yaml."),
    "arm": (str, "Name in `arms` of params.yaml."),
    "seed": (int, "One of `seeds` of params.yaml."),
}


def add_to(app: typer.Typer, own: Mapping[str, Callable[[typer.Typer], None]]) -> None:
    """own: stages whose commands offer more than those made here."""
    for stage in STAGES.values():
        if stage.name in own:
            own[stage.name](app)
            continue
        app.command(stage.command, help=f"{stage.summary}\n\nExample: {stage.example}")(_command(stage))


def _command(stage: Stage) -> Callable[..., None]:
    """A function whose signature Typer reads: the stage's own options, then those of every stage."""

    def command(fresh: bool, dry_run: bool, as_json: bool, params: Path, **instance: Any) -> None:
        run(stage, instance, params, fresh, dry_run, as_json)

    own = [
        _parameter(name, Annotated[kind, typer.Option(help=text)])
        for name, (kind, text) in _INSTANCE_OPTIONS.items()
        if name in stage.keys
    ]
    shared = [
        _parameter(
            "fresh", Annotated[bool, typer.Option("--fresh", help="Set earlier work aside and start over.")], False
        ),
        _parameter("dry_run", Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")], False),
        _parameter(
            "as_json", Annotated[bool, typer.Option("--json", help="No progress bar; the result as JSON.")], False
        ),
        _parameter("params", Annotated[Path, typer.Option(help="Parameter file.")], Path("params.yaml")),
    ]
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return command


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run(
    stage: Stage, instance: dict[str, Any], path: Path, fresh: bool, dry_run: bool, as_json: bool, worker: bool = False
) -> None:
    """One instance of a stage, as its command does it. worker: helps the process that will publish it."""
    from dmat import tracking
    from dmat.workspace import find_workspace

    workspace = find_workspace(path.resolve().parent)
    try:
        _run(stage, instance, path, workspace, fresh, dry_run, as_json, worker)
    except Exception as error:
        with contextlib.suppress(Exception):  # what went wrong is to be said, whatever becomes of the record
            tracking.tell(workspace.home, error)
        raise


def _run(
    stage: Stage, instance: dict[str, Any], path: Path, workspace: "Workspace", fresh: bool, dry_run: bool, as_json: bool,
    worker: bool,
) -> None:  # fmt: skip
    from dmat import config, processes
    from dmat.pipeline import execution, planning

    params = config.load(path)
    plan = planning.plan(stage, instance, params, workspace)
    if "RANK" in os.environ and os.environ.get(_PLANNED, plan.fingerprint) != plan.fingerprint:
        raise DmatError(
            f"parameters or inputs of {stage.name} {stage.instance_name(instance)} changed since it was started in several "
            f"processes; expected no change until it ended; run the same command again for what is there now"
        )
    if dry_run:
        typer.echo(json.dumps(plan.describe() | execution.estimate(plan, params, workspace), indent=2))
        return
    if worker:
        execution.run_worker(plan, params, workspace, quiet=as_json)
        return
    wanted = params.compute.processes
    if wanted > 1 and stage.processes == "together" and "RANK" not in os.environ:
        os.environ[_PLANNED] = plan.fingerprint  # torchrun starts all again where one fails: never another training
        _start_together(wanted)
    started = time.monotonic()
    metrics = execution.execute(
        plan, params, workspace, fresh=fresh, quiet=as_json, read_again=lambda: config.load(path)
    )
    if not processes.world().is_main_process:
        return
    if as_json:
        typer.echo(json.dumps(metrics, sort_keys=True))
    else:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in _headline(metrics))
        typer.echo(f"{stage.name} {stage.instance_name(instance)}: {numbers} ({time.monotonic() - started:.0f} s)")
    for note in (plan.finished or {}).get("notes", []):
        typer.echo(note, err=True)


def _start_together(count: int) -> None:
    """Becomes `torchrun` with this very command in `count` processes: who started this one notices nothing."""
    from dmat import processes

    os.environ |= processes.OWN_MODULES
    os.execv(sys.executable, [sys.executable, *processes.launcher(count), "-m", "cli.main", *sys.argv[1:]])


def _headline(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    """Plain numbers, and the value of each accuracy."""
    found = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            found += [
                (f"{name}.{inner}", number)
                for inner, number in _headline(
                    {key: v["value"] if isinstance(v, dict) and "value" in v else v for key, v in value.items()}
                )
            ]
        elif isinstance(value, (int, float)):
            found.append((name, value))
    return found
