"""One command per stage, built from the table `STAGES`."""

import contextlib
import functools
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from cli import completion, parameter_file
from dmat.errors import DmatError
from dmat.pipeline import STAGES, Stage
from dmat.workspace import Instance

_PLANNED_FINGERPRINT = "DMAT_PLANNED"  # environment variable: fingerprint of what several processes compute together
SHARDS_HELP = "Compute only the shards A to B - 1, and publish nothing: for arrays of jobs that share runs/."
WORKERS_HELP = "Divide the shards over this many processes of this machine. [default: compute.workers of params.yaml]"
CLUSTER_HELP = "Divide the shards over the workers of this Dask cluster: address, or scheduler file."
_INSTANCE_OPTIONS = {
    "generator": (str, "Name in `generators` of params.yaml."),
    "image_set": (str, "Name in `image_sets` of params.yaml."),
    "selection": (str, "Name in `selections` of params.yaml."),
    "mixture": (str, "Name in `mixtures` of params.yaml."),
    "arm": (str, "Name in `arms` of params.yaml."),
    "seed": (int, "One of `seeds` of params.yaml."),
}


def add_to(app: typer.Typer, specific_commands: Mapping[str, Callable[[typer.Typer], None]]) -> None:
    """Adds the command of every stage. specific_commands: stage -> the function that adds its command, for stages with
    more options than those built here."""
    for stage in STAGES.values():
        if stage.name in specific_commands:
            specific_commands[stage.name](app)
            continue
        app.command(stage.command, help=f"{stage.summary}\n\nExample: {stage.example}")(_command(stage))


def _command(stage: Stage) -> Callable[..., None]:
    """A function whose signature Typer reads: the options of the stage's keys, then those of every stage."""

    def command(
        fresh: bool, dry_run: bool, as_json: bool, params: Path, shards: str = "", workers: int | None = None,
        cluster: str = "", **instance: str | int,
    ) -> None:  # fmt: skip
        run(stage, instance, params, fresh, dry_run, as_json, shard_numbers(shards, fresh), workers, cluster)

    instance_options = [
        _keyword_parameter(
            name, Annotated[kind, typer.Option(help=help_text, autocompletion=completion.names_in(f"{name}s"))]
        )
        for name, (kind, help_text) in _INSTANCE_OPTIONS.items()
        if name in stage.keys
    ]
    if stage.by_shards:
        instance_options += [
            _keyword_parameter("shards", Annotated[str, typer.Option(help=SHARDS_HELP, metavar="A:B")], ""),
            _keyword_parameter("workers", Annotated[int | None, typer.Option(help=WORKERS_HELP, min=0)], None),
            _keyword_parameter("cluster", Annotated[str, typer.Option(help=CLUSTER_HELP)], ""),
        ]
    common_options = [
        _keyword_parameter(
            "fresh", Annotated[bool, typer.Option("--fresh", help="Set earlier work aside and start over.")], False
        ),
        _keyword_parameter(
            "dry_run", Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")], False
        ),
        _keyword_parameter(
            "as_json", Annotated[bool, typer.Option("--json", help="No progress bar; the result as JSON.")], False
        ),
        _keyword_parameter("params", parameter_file.ParameterFile, parameter_file.DEFAULT),
    ]
    command.__signature__ = inspect.Signature([*instance_options, *common_options])  # type: ignore[attr-defined]
    return command


def _keyword_parameter(name: str, annotation: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run(
    stage: Stage, instance: Instance, path: Path, fresh: bool, dry_run: bool, as_json: bool,
    shards: range | None = None, workers: int | None = None, cluster: str = "",
) -> None:  # fmt: skip
    """Runs one instance of a stage, as its command does.

    path: the parameter file. shards: compute these, and publish nothing. workers, cluster: of what divides the shards;
    None: as the parameter file says.
    """
    from dmat import tracking
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    try:
        _run(stage, instance, path, fresh, dry_run, as_json, shards, workers, cluster)
    except Exception as error:
        with contextlib.suppress(Exception):  # the error must be shown even if recording it fails
            tracking.record_stage_error(workspace.home, error)
        raise


def _run(
    stage: Stage, instance: Instance, path: Path, fresh: bool, dry_run: bool, as_json: bool,
    shards: range | None, workers: int | None, cluster: str,
) -> None:  # fmt: skip
    from dmat import processes
    from dmat.engine import EngineOptions
    from dmat.evaluation.work import progress_lines
    from dmat.pipeline import division, execution, planning

    params, workspace = parameter_file.load(path)
    local_workers = (0 if cluster else params.compute.workers) if workers is None else workers
    options = EngineOptions(local_workers if stage.by_shards else 0, cluster)
    params = division.with_threads_divided(params, options)
    plan = planning.plan(stage, instance, params, workspace)
    if "RANK" in os.environ and os.environ.get(_PLANNED_FINGERPRINT, plan.fingerprint) != plan.fingerprint:
        raise DmatError(
            f"parameters or inputs of {stage.name} {stage.instance_name(instance)} changed since it was started in "
            f"several processes; expected no change until it ended; run the same command again for the current ones"
        )
    if dry_run:
        typer.echo(json.dumps(plan.describe() | execution.estimate(plan, params, workspace), indent=2))
        return
    if shards is not None:
        execution.run_shards(plan, params, workspace, shards, quiet=as_json)
        name = f"{stage.name} {stage.instance_name(instance)}"
        text = f"{name}: shards {shards.start} to {shards.stop - 1} are in the pool"
        typer.echo(json.dumps({"shards": [shards.start, shards.stop]}) if as_json else text)
        return
    process_count = params.compute.processes
    if process_count > 1 and stage.processes == "together" and "RANK" not in os.environ:
        # torchrun restarts all if one fails: it must stay the same training.
        os.environ[_PLANNED_FINGERPRINT] = plan.fingerprint
        start_together(process_count)
    started = time.monotonic()
    with progress_lines(execution.monitor(plan, params, workspace) if as_json else None):
        metrics = execution.execute(
            plan,
            params,
            workspace,
            fresh=fresh,
            quiet=as_json,
            reload_params=lambda: parameter_file.load(path)[0],
            compute_shards=functools.partial(division.compute_shards, workspace=workspace, path=path, options=options)
            if stage.by_shards and options.has_workers
            else None,
        )
    if not processes.world().is_main_process:
        return
    if as_json:
        typer.echo(json.dumps(metrics, sort_keys=True))
    else:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in _flat_numbers(metrics))
        typer.echo(f"{stage.name} {stage.instance_name(instance)}: {numbers} ({time.monotonic() - started:.0f} s)")
    if (finished := plan.finished) is not None:
        for note in finished.get("notes", []):
            typer.echo(note, err=True)


def shard_numbers(text: str, fresh: bool) -> range | None:
    """The range that `--shards` names; None without it. Raises DmatError for anything but two whole numbers."""
    if not text:
        return None
    if fresh:
        raise DmatError(
            "--fresh came with --shards, which only adds shards; say --fresh in the command without --shards"
        )
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise DmatError(f"--shards is {text!r}; expected the first number and the number after the last, such as 0:10")
    return range(int(first), int(end))


def start_together(process_count: int) -> None:
    """Replaces this process by `torchrun`, which runs the same command in several processes. The parent of this process
    sees no difference."""
    from dmat import processes

    os.environ |= processes.OWN_MODULES
    os.execv(sys.executable, [sys.executable, *processes.launcher(process_count), "-m", "cli.main", *sys.argv[1:]])


def _flat_numbers(metrics: Mapping[str, object]) -> list[tuple[str, float]]:
    """Numbers by dotted name, for the terminal. Of an accuracy with an interval only the value is shown."""
    numbers = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers += [
                (f"{name}.{inner_name}", number)
                for inner_name, number in _flat_numbers(
                    {
                        key: entry["value"] if isinstance(entry, dict) and "value" in entry else entry
                        for key, entry in value.items()
                    }
                )
            ]
        elif isinstance(value, (int, float)):
            numbers.append((name, value))
    return numbers
