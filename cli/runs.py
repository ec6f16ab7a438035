"""`dmat runs` and `dmat ui`: the tracked runs in MLflow."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from cli import parameter_file
from cli.completion import stage_names
from cli.parameter_file import ParameterFile
from dmat.errors import DmatError

_POLL_SECONDS = 0.2  # between two looks whether the UI answers
_STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED")
_SUMMARY_METRICS = (  # the first three that a run has are listed; a name that ends in _ begins several
    *("best_auto_attack", "best_auto_attack_subset", "best_auto_attack_nonstandard", "best_auto_attack_unchecked"),
    "best_auto_attack_quick",
    *("auto_attack", "best_pgd", "best_validation_robust", "validation_robust", "validation_clean"),
    *("frechet_distance_", "best_validation_clean", "kept", "loss", "generated"),
)


def add_to(app: typer.Typer) -> None:
    """Adds the group `dmat runs` and `dmat ui` to the app."""
    group = typer.Typer(
        no_args_is_help=True, help="List, inspect, compare and reproduce tracked runs.\n\nExample: dmat runs sync"
    )
    group.command(
        "sync",
        help="Bring MLflow up to date: send what could not be sent before, and end runs whose process has ended.\n\n"
        "Example: dmat runs sync",
    )(_sync)
    group.command(
        "reap",
        help="End runs of machines that are gone for good, and runs that are in MLflow but have no marker file here."
        "\n\nExample: dmat runs reap gpu-node-7",
    )(_reap)
    group.command(
        "list",
        help="List the newest runs, or the best by a metric.\n\nExample: dmat runs list --stage evaluate_robust --sort "
        "best_auto_attack",
    )(_list)
    group.command(
        "show",
        help="Show the status, parameters, tags and metrics of one run.\n\n"
        "Example: dmat runs show evaluate_robust/generated-1",
    )(_show)
    group.command(
        "compare",
        help="Show what differs between runs: parameters, data, code and metrics; for two evaluations, or two trials "
        "that AutoAttack ranked, also the paired difference.\n\n"
        "Example: dmat runs compare evaluate_robust/real_only-1 evaluate_robust/generated-1",
    )(_compare)
    group.command(
        "lineage",
        help="Show what a result comes from: every earlier stage instance with hashes, runs and commits; exit code 2 "
        "if something changed since.\n\nExample: dmat runs lineage generated-1 --draw lineage.png",
    )(_lineage)
    group.command(
        "reproduce",
        help="Check out the commit, changes, parameters and data of a run into a new work tree, compare the "
        "environment, and print the command that repeats the run.\n\n"
        "Example: dmat runs reproduce train_robust/generated-1",
    )(_reproduce)
    app.add_typer(group, name="runs")
    app.command("ui", help="Open the MLflow UI on 127.0.0.1.\n\nExample: dmat ui --port 5000")(_ui)


def _sync() -> None:
    from dmat import tracking

    for line in tracking.sync(_home()):
        typer.echo(line)


def _reap(
    gone: Annotated[
        list[str] | None, typer.Argument(metavar="[MACHINE|RUN]...", help="Names of machines, or ids of runs.")
    ] = None,
) -> None:
    from dmat import tracking

    for line in tracking.reap(_home(), gone or []):
        typer.echo(line)


def _list(
    stage: Annotated[
        str | None, typer.Option(help="Only this stage, such as train_robust.", autocompletion=stage_names)
    ] = None,
    status: Annotated[str | None, typer.Option(help="RUNNING, FINISHED, FAILED or KILLED.")] = None,
    sort: Annotated[str | None, typer.Option(help="A metric: the largest first. [default: the newest first]")] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of runs; 0: all.", min=0)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat.tracking import queries

    if status is not None and status not in _STATUSES:
        raise DmatError(f"--status is {status!r}; expected one of {', '.join(_STATUSES)}")
    home = _home()
    if sort is None:
        listed = queries.recent(home, stage, status, limit)
    else:
        listed = [run for run in queries.best(home, sort, stage, 0) if status in (None, run.status)][: limit or None]
    if as_json:
        typer.echo(json.dumps([run.plain() for run in listed], indent=2, sort_keys=True))
        return
    for run in listed:
        spent = f"{run.seconds:7.0f} s" if run.seconds is not None else "        …"
        title = f"{run.stage} {run.instance_name}".strip() or run.name
        typer.echo(
            f"{queries.short_id(run.id)}  {run.status:9s}{_local_time(run.started)} {spent}  {title:34s} "
            f"{_summary(run.metrics, run.tags, sort)}".rstrip()
        )
    if not listed:
        typer.echo("no runs")


def _show(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The start of a run id, or stage/instance for the newest run of it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat.tracking import queries

    home = _home()
    tracked_run = queries.find_run(home, run)
    if as_json:
        typer.echo(json.dumps(tracked_run.plain(), indent=2, sort_keys=True))
        return
    reason = f": {tracked_run.tags['dmat.error']}" if "dmat.error" in tracked_run.tags else ""
    lines = {
        "run": tracked_run.id,
        "name": tracked_run.name,
        "status": tracked_run.status + reason,
        "started": _local_time(tracked_run.started),
        "seconds": "" if tracked_run.seconds is None else f"{tracked_run.seconds:.0f}",
        "work folder": str(queries.work_folder(home, tracked_run) or "is not here"),
    }
    for name, text in lines.items():
        typer.echo(f"{name:14s}{text}")
    sections: dict[str, Mapping[str, object]] = {
        "parameters": tracked_run.params, "tags": tracked_run.tags, "metrics": tracked_run.metrics,
    }  # fmt: skip
    for title, values in sections.items():
        typer.echo(f"\n{title}")
        for name, value in sorted(values.items()):
            if not name.startswith(("mlflow.", "system/")):
                typer.echo(f"  {name:42s}{f'{value:.6g}' if isinstance(value, float) else value}")


def _compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two or more, named as for `runs show`.")],
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat.tracking import queries
    from dmat.workspace import current_workspace

    if len(runs) < 2:
        raise DmatError(f"there is {len(runs)} run to compare; expected two or more; name another")
    workspace = current_workspace()
    selected = [queries.find_run(workspace.home, run) for run in runs]
    differing, same = queries.differences(selected)
    paired = {}
    if len(selected) == 2 and all(run.stage == "evaluate_robust" or "optuna.trial" in run.tags for run in selected):
        from dmat.upkeep import comparing  # numpy and pyarrow only where they are needed

        paired = comparing.paired(workspace, *selected)
    if as_json:
        ids = [run.id for run in selected]
        typer.echo(json.dumps({"runs": ids, "differences": differing, "same": same, "paired": paired}, indent=2))
        return
    width = max([*map(len, differing), 12]) + 2
    typer.echo(f"{'':{width}s}" + "".join(f"{queries.short_id(run.id):26s}" for run in selected))
    for name, values in differing.items():
        cells = "".join(f"{(value if value is not None else '–')[:24]:26s}" for value in values)
        typer.echo(f"{name:{width}s}{cells}".rstrip())
    typer.echo(f"the same: {', '.join(same)}")
    for name, value in paired.items():
        typer.echo(
            f"{name}: second − first {100 * value['value']:+.1f} points [{100 * value['low']:+.1f}, "
            f"{100 * value['high']:+.1f}], paired, n = {value['n']:,}"
        )


def _lineage(
    result: Annotated[str, typer.Argument(metavar="RESULT", help="arm-seed, stage/instance, or a path in artifacts/.")],
    draw: Annotated[Path | None, typer.Option(help="Draw it to this .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    params: ParameterFile = parameter_file.DEFAULT,
) -> None:
    from dmat.pipeline import results
    from dmat.report import lineage

    step = results.chain(result, *parameter_file.load(params))
    if draw is not None and draw.suffix != ".png":
        raise DmatError(f"--draw is {draw}; expected a file whose name ends with .png")
    if draw is not None:
        lineage.draw([step], draw, f"What {step.title} comes from")
    if as_json:
        typer.echo(json.dumps({"steps": step.plain(), "broken": step.broken}, indent=2))
    else:
        for line in lineage.lines([step]):
            typer.echo(line)
        for sentence in step.broken:
            typer.echo(f"broken: {sentence}", err=True)
    raise typer.Exit(2 if step.broken else 0)


def _reproduce(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The start of a run id, or stage/instance for the newest run of it.")
    ],
    to: Annotated[Path | None, typer.Option(help="The new work tree. [default: beside the project]")] = None,
) -> None:
    from dmat.upkeep import reproducing
    from dmat.workspace import current_workspace

    reproduction = reproducing.reproduce(current_workspace(), run, to)
    for line in reproduction.lines:
        typer.echo(line)
    for line in reproduction.differences:
        typer.echo(f"differs: {line}", err=True)
    raise typer.Exit(0 if reproduction.whole else 2)


def _home() -> Path:
    from dmat.workspace import current_workspace

    return current_workspace().home


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _summary(metrics: Mapping[str, float], tags: Mapping[str, str], sort: str | None) -> str:
    """The most important metrics of a run, `sort` first, and whether its accuracy is not a headline."""
    listed = [
        name
        for entry in _SUMMARY_METRICS
        for name in metrics
        if name == entry or (entry.endswith("_") and name.startswith(entry))
    ]
    names = dict.fromkeys([*([sort] if sort else []), *listed])
    numbers = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics][:3]
    return ", ".join(numbers) + ("; no headline" if tags.get("evaluation.headline") == "no" else "")


def _ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="A loopback address.")] = "127.0.0.1",
) -> None:
    from dmat import tracking
    from dmat.tracking import stores

    if host not in ("127.0.0.1", "localhost"):
        raise DmatError(
            f"--host is {host!r}; expected 127.0.0.1, because whoever reaches the UI may read and delete every run; "
            f"tunnel to it (ssh -L {port}:127.0.0.1:{port} MACHINE), or start the server of docs/services.md"
        )
    home = _home()
    if tracking.store_uri(home).startswith("http"):
        typer.echo(f"MLFLOW_TRACKING_URI names a server, which has the UI: {stores.masked_uri(home)}")
        return
    _expect_free_port(host, port)
    _, experiment = stores.connect_or_raise(home)
    # the bare address opens MLflow's pages for language models, where runs are hard to find
    page = f"http://{host}:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    typer.echo("the MLflow UI starts; its address follows when it answers", err=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--artifacts-destination",
        tracking.artifact_folder(home).as_uri(),
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",  # for one person; each worker takes seconds to start
    ]
    environment = {
        # not an argument: every user of this machine sees those, and the URI may hold a password
        "MLFLOW_BACKEND_STORE_URI": tracking.store_uri(home),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes, 1.1 GB, for language models
    }
    ready = f"MLflow UI: {page} (store {stores.masked_uri(home)}); Ctrl-C ends it"
    raise typer.Exit(_run_server(command, environment, (host, port), ready))


def _expect_free_port(host: str, port: int) -> None:
    """Raises DmatError if the port is taken: another server would answer there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise DmatError(f"port {port} is taken; expected a free one; name another with --port") from None


def _run_server(command: list[str], environment: Mapping[str, str], address: tuple[str, int], ready: str) -> int:
    """Runs a server that starts processes of its own, until it ends or a signal comes; returns the exit code.

    Prints `ready` when it answers at `address`. A signal that ends this process ends all processes of the server.
    """
    server = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)

    def stop(signal_number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM if signal_number == signal.SIGHUP else signal_number)

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    threading.Thread(target=_announce, args=(server, address, ready), daemon=True).start()
    code = server.wait()
    with contextlib.suppress(ProcessLookupError):  # what the server left in its session
        os.killpg(server.pid, signal.SIGTERM)
    return 128 - code if code < 0 else code


def _announce(server: "subprocess.Popen[bytes]", address: tuple[str, int], ready: str) -> None:
    """Prints `ready` when MLflow answers at this host and port; nothing if the server ends before."""
    import http.client  # it would slow down every start of the command line

    while server.poll() is None:
        connection = http.client.HTTPConnection(*address, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                typer.echo(ready)
                return
        time.sleep(_POLL_SECONDS)
