"""`dmat tune`: runs a study over the parameters of an arm, shows it, and applies its best trial."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import parameter_file
from cli.parameter_file import ParameterFile
from cli.stages import start_together
from dmat.errors import DmatError

if TYPE_CHECKING:
    from dmat.config import Params
    from dmat.tuning import Study
    from dmat.workspace import Workspace

_STORAGE = Annotated[
    str,
    typer.Option(
        help="URL of the database with the studies, such as postgresql+psycopg://user@host/database. "
        "[default: the environment variable DMAT_STUDIES, else an SQLite file of the project]",
        show_default=False,
    ),
]
_WORKERS = Annotated[
    int | None,
    typer.Option(
        help="Compute trials side by side in this many processes of this machine, each with a GPU in turn; 0: one "
        "after the other, in this process. [default: compute.workers of params.yaml]",
        min=0,
    ),
]
_CLUSTER = Annotated[
    str, typer.Option(help="Compute trials in the workers of this Dask cluster: address, or scheduler file.")
]
_JSON = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


def add_to(app: typer.Typer) -> None:
    """Adds the group `dmat tune` to the app."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Run studies, which search for the values of an arm's parameters with the highest robust accuracy.\n\n"
        "Example: dmat tune start --trials 40",
    )
    group.command(
        "start",
        help="Run or resume the study of params.yaml: short trials, stopped early on validation PGD accuracy; "
        "the best are ranked by AutoAttack.\n\nExample: dmat tune start --trials 40 --workers 4",
    )(_start)
    group.command("status", help="Show the progress of the study and its best trial.\n\nExample: dmat tune status")(
        _status
    )
    group.command("best", help="Show the values of the best trial.\n\nExample: dmat tune best --json")(_best)
    group.command(
        "apply",
        help="Write the best trial into params.yaml as an arm, for `dvc repro` to train at full length.\n\nExample: "
        "dmat tune apply --name tuned --seed 1 --seed 2 --seed 3",
    )(_apply)
    group.command(
        "dashboard", help="Open optuna-dashboard on the studies, on this machine alone.\n\nExample: dmat tune dashboard"
    )(_dashboard)
    app.add_typer(group, name="tune")


def _start(
    trials: Annotated[
        int, typer.Option(help="Total number of trials, earlier ones included; 0: as in params.yaml.", min=0)
    ] = 0,
    workers: _WORKERS = None,
    cluster: _CLUSTER = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Set the earlier study aside and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="No progress bar; the result as JSON.")] = False,
    storage: _STORAGE = "",
    params: ParameterFile = parameter_file.DEFAULT,
) -> None:
    loaded, workspace, study = _study(params, storage)
    total = trials or study.settings.trials
    local_workers = (0 if cluster else loaded.compute.workers) if workers is None else workers
    if dry_run:
        typer.echo(json.dumps({**study.describe(), "trials": total, "workers": local_workers}, indent=2))
        return
    from dmat import processes, tuning  # not above: a dry run needs no torch
    from dmat.engine import EngineOptions
    from dmat.pipeline import division
    from dmat.tuning import studies

    engine = EngineOptions(local_workers, cluster)
    if loaded.compute.processes > 1 and processes.torchrun_processes() == 1:
        if engine.has_workers:
            raise DmatError(
                f"compute.processes is {loaded.compute.processes}, and trials would run in workers; expected either "
                f"one training on several processes or several trainings; leave one of them out"
            )
        start_together(loaded.compute.processes)
    started = time.monotonic()
    options = studies.StudyOptions(total, engine, fresh, quiet=as_json)
    summary = studies.run(study, division.with_threads_divided(loaded, engine), workspace, options)
    if not processes.world().is_main_process:
        return
    if as_json:
        typer.echo(json.dumps(summary, sort_keys=True))
        return
    ended = summary["trials"] - summary["imported"]
    if ended > total:
        typer.echo(f"{ended} trials have ended already; --trials is the total, so none was added")
    typer.echo(f"{_summary_line(study, summary)} ({time.monotonic() - started:.0f} s); {tuning.folder_of(study)}")


def _status(storage: _STORAGE = "", as_json: _JSON = False, params: ParameterFile = parameter_file.DEFAULT) -> None:
    from dmat import tuning

    _, _, study = _study(params, storage)
    summary = tuning.status(study)
    if as_json:
        typer.echo(json.dumps(summary, sort_keys=True))
        return
    typer.echo(_summary_line(study, summary))
    for line in summary["at_work"]:
        typer.echo(f"  {line}")
    typer.echo(f"  study {study.name}; storage {study.describe()['storage']}")


def _best(storage: _STORAGE = "", as_json: _JSON = False, params: ParameterFile = parameter_file.DEFAULT) -> None:
    from dmat import tuning

    _, _, study = _study(params, storage)
    summary = tuning.status(study)
    if summary["best"] is None:
        raise DmatError(f"study {study.name} has no complete trial; expected one; `dmat tune start` runs some")
    if as_json:
        typer.echo(json.dumps(summary["best"], sort_keys=True))
        return
    for name, value in summary["best"].items():
        typer.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    rank = summary["auto_attack"].get(str(summary["best"]["trial"]))
    if rank:
        typer.echo(f"auto_attack on validation: {rank['value']:.4f} [{rank['low']:.4f}, {rank['high']:.4f}]")


def _apply(
    name: Annotated[str, typer.Option(help="Name of the new arm.")] = "tuned",
    seed: Annotated[
        list[int] | None, typer.Option(help="A seed to write to `seeds` of params.yaml; repeat it for several.")
    ] = None,
    storage: _STORAGE = "",
    params: ParameterFile = parameter_file.DEFAULT,
) -> None:
    from dmat import tuning

    loaded, workspace, study = _study(params, storage)
    trial, keys_written = tuning.apply_best(params, study, loaded, name, seed or [], workspace.root)
    typer.echo(f"trial {trial} is in {params}: {', '.join(keys_written)}; `dvc repro` trains it at full length")


def _dashboard(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8080,
    storage: _STORAGE = "",
    params: ParameterFile = parameter_file.DEFAULT,
) -> None:
    from dmat import tuning
    from dmat.tuning import dashboard

    _, _, study = _study(params, storage)
    tuning.status(study)  # reports a storage that cannot be used, or has no such study, before a server starts
    message = f"http://{dashboard.ADDRESS}:{port}/ shows the studies in {study.describe()['storage']}; Ctrl-C ends it"
    dashboard.serve(study, port, lambda: typer.echo(message))


def _study(path: Path, storage: str) -> "tuple[Params, Workspace, Study]":
    from dmat import tuning

    loaded, workspace = parameter_file.load(path)
    return loaded, workspace, tuning.plan(loaded, workspace, storage or None)


def _summary_line(study: "Study", summary: dict[str, Any]) -> str:
    """One line: the best trial, the number of trials in each state, and the share of images that pruning saved."""
    counts = ", ".join(f"{summary[state]} {state}" for state in ("complete", "pruned", "fail"))
    best = summary["best"]
    values = ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in best.items()) if best else ""
    saved = f"pruning saved {100 * summary['images_saved_by_pruning']:.0f} % of the images"
    return f"tune {study.settings.arm}: {f'best {values}' if best else 'no trial completed'}; {counts}, {saved}"
