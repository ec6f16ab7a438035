"""`dmat runs` and `dmat ui`: what MLflow holds."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dmat.errors import DmatError

_STATUS = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED")
_TELLING = (
    *("best_auto_attack", "best_auto_attack_subset", "best_auto_attack_nonstandard", "best_auto_attack_unchecked"),
    *("auto_attack", "best_pgd", "best_validation_robust", "validation_robust", "validation_clean"),
    *("scorer_frechet_distance", "best_validation_clean", "kept", "loss", "generated"),
)


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Tracked runs.\n\nExample: dmat runs sync")
    group.command(
        "sync",
        help="Bring MLflow up to date: send what an outage kept back, end runs whose process is gone.\n\n"
        "Example: dmat runs sync",
    )(_sync)
    group.command(
        "reap",
        help="End runs that died on a machine that is gone for good, or of which nothing but the run is left.\n\n"
        "Example: dmat runs reap gpu-node-7",
    )(_reap)
    group.command(
        "list",
        help="The newest runs, or the best by a metric.\n\nExample: dmat runs list --stage evaluate_robust --sort "
        "best_auto_attack",
    )(_list)
    group.command("show", help="Everything about one run.\n\nExample: dmat runs show evaluate_robust/generated-1")(
        _show
    )
    group.command(
        "compare",
        help="What differs between runs: parameters, data, code, numbers; of two evaluations, or two trials that "
        "AutoAttack ranked, the paired difference too.\n\n"
        "Example: dmat runs compare evaluate_robust/real_only-1 evaluate_robust/generated-1",
    )(_compare)
    group.command(
        "lineage",
        help="What a result comes from: every stage instance behind it with hashes, runs and commits; exit code 2 "
        "where something changed since.\n\nExample: dmat runs lineage generated-1 --draw lineage.png",
    )(_lineage)
    group.command(
        "reproduce",
        help="Check out the commit, changes, parameters and data of a run into a new work tree, compare the "
        "environment, and say the command.\n\nExample: dmat runs reproduce train_robust/generated-1",
    )(_reproduce)
    app.add_typer(group, name="runs")
    app.command("ui", help="Open the MLflow UI on 127.0.0.1.\n\nExample: dmat ui --port 5000")(_ui)


def _sync() -> None:
    from dmat import tracking

    for line in tracking.sync(_home(), report=True):
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
    stage: Annotated[str | None, typer.Option(help="Only this stage, such as train_robust.")] = None,
    status: Annotated[str | None, typer.Option(help="RUNNING, FINISHED, FAILED or KILLED.")] = None,
    sort: Annotated[str | None, typer.Option(help="A metric: the largest first. [default: the newest first]")] = None,
    limit: Annotated[int, typer.Option(help="At most so many; 0: all.", min=0)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat.tracking import queries

    if status is not None and status not in _STATUS:
        raise DmatError(f"--status is {status!r}; expected one of {', '.join(_STATUS)}")
    home = _home()
    if sort is None:
        found = queries.recent(home, stage, status, limit)
    else:
        found = [run for run in queries.best(home, sort, stage, 0) if status in (None, run.status)][: limit or None]
    if as_json:
        typer.echo(json.dumps([run.plain() for run in found], indent=2, sort_keys=True))
        return
    for run in found:
        spent = f"{run.seconds:7.0f} s" if run.seconds is not None else "        …"
        what = f"{run.stage} {run.instance_name}".strip() or run.name
        typer.echo(
            f"{queries.short(run.id)}  {run.status:9s}{_moment(run.started)} {spent}  {what:34s} "
            f"{_summary(run.metrics, run.tags, sort)}".rstrip()
        )
    if not found:
        typer.echo("no runs")


def _show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of an id, or stage/instance: the newest.")],
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    from dmat.tracking import queries

    home = _home()
    found = queries.one(home, run)
    if as_json:
        typer.echo(json.dumps(found.plain(), indent=2, sort_keys=True))
        return
    reason = f": {found.tags['dmat.error']}" if "dmat.error" in found.tags else ""
    lines = {
        "run": found.id,
        "name": found.name,
        "status": found.status + reason,
        "started": _moment(found.started),
        "seconds": "" if found.seconds is None else f"{found.seconds:.0f}",
        "work folder": str(queries.work_folder(home, found) or "is not here"),
    }
    for name, text in lines.items():
        typer.echo(f"{name:14s}{text}")
    sections: dict[str, Mapping[str, object]] = {
        "parameters": found.params, "tags": found.tags, "metrics": found.metrics,
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
    found = [queries.one(workspace.home, run) for run in runs]
    differing, same = queries.differences(found)
    paired = {}
    if len(found) == 2 and all(run.stage == "evaluate_robust" or "optuna.trial" in run.tags for run in found):
        from dmat.upkeep import comparing  # numpy and pyarrow only where they are needed

        paired = comparing.paired(workspace, *found)
    if as_json:
        ids = [run.id for run in found]
        typer.echo(json.dumps({"runs": ids, "differences": differing, "same": same, "paired": paired}, indent=2))
        return
    width = max([*map(len, differing), 12]) + 2
    typer.echo(f"{'':{width}s}" + "".join(f"{queries.short(run.id):26s}" for run in found))
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
    draw: Annotated[Path | None, typer.Option(help="A .png file to draw it to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
    params: Annotated[Path, typer.Option(help="Parameter file.")] = Path("params.yaml"),
) -> None:
    from dmat import config
    from dmat.pipeline import results
    from dmat.report import lineage
    from dmat.workspace import find_workspace

    found = results.chain(result, config.load(params), find_workspace(params.resolve().parent))
    if draw is not None and draw.suffix != ".png":
        raise DmatError(f"--draw is {draw}; expected a file whose name ends with .png")
    if draw is not None:
        lineage.draw([found], draw, f"What {found.title} comes from")
    if as_json:
        typer.echo(json.dumps({"steps": found.plain(), "broken": found.broken}, indent=2))
    else:
        for line in lineage.lines([found]):
            typer.echo(line)
        for sentence in found.broken:
            typer.echo(f"broken: {sentence}", err=True)
    raise typer.Exit(2 if found.broken else 0)


def _reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The start of an id, or stage/instance: the newest.")],
    to: Annotated[Path | None, typer.Option(help="The new work tree. [default: beside the project]")] = None,
) -> None:
    from dmat.upkeep import reproducing
    from dmat.workspace import current_workspace

    found = reproducing.reproduce(current_workspace(), run, to)
    for line in found.lines:
        typer.echo(line)
    for line in found.differences:
        typer.echo(f"differs: {line}", err=True)
    raise typer.Exit(0 if found.whole else 2)


def _home() -> Path:
    from dmat.workspace import current_workspace

    return current_workspace().home


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _summary(metrics: Mapping[str, float], tags: Mapping[str, str], sort: str | None) -> str:
    """The numbers that tell most about a run, and whether its accuracy is a headline."""
    names = [*([sort] if sort else []), *(name for name in _TELLING if name != sort)]
    told = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics][:3]
    return ", ".join(told) + ("; no headline" if tags.get("evaluation.headline") == "no" else "")


def _ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="An address of this machine alone.")] = "127.0.0.1",
) -> None:
    from dmat import tracking
    from dmat.tracking import stores

    if host not in ("127.0.0.1", "localhost"):
        raise DmatError(
            f"--host is {host!r}; expected 127.0.0.1, because whoever reaches the UI may read and delete every run; "
            f"tunnel to it (ssh -L {port}:127.0.0.1:{port} MACHINE), or start the server of docs/services.md"
        )
    home = _home()
    if tracking.store(home).startswith("http"):
        typer.echo(f"MLFLOW_TRACKING_URI names a server, which has the UI: {stores.shown(home)}")
        return
    _expect_free(host, port)
    _, experiment = stores.reach(home)
    # by the bare address MLflow opens its side for language models, where runs are hard to find
    page = f"http://{host}:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
    typer.echo(f"MLflow UI: {page} (store {stores.shown(home)}); Ctrl-C ends it")
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
        "1",  # for one person; each takes seconds to start
    ]
    # by the environment: everybody on this machine sees the words of a command, and the address may hold a password
    raise typer.Exit(_until_told(command, {"MLFLOW_BACKEND_STORE_URI": tracking.store(home)}))


def _expect_free(host: str, port: int) -> None:
    """Before an address is said: behind a taken port answers somebody else's server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise DmatError(f"port {port} is taken; expected a free one; name another with --port") from None


def _until_told(command: list[str], environment: Mapping[str, str]) -> int:
    """Runs a server that has processes of its own; a signal that ends this process ends all of them."""
    server = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)

    def end(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    code = server.wait()
    with contextlib.suppress(ProcessLookupError):  # what the server left in its session
        os.killpg(server.pid, signal.SIGTERM)
    return 128 - code if code < 0 else code
