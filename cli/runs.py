"""`dmat runs` and `dmat ui`: what MLflow holds."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Tracked runs.\n\nExample: dmat runs sync")
    group.command(
        "sync",
        help="Bring MLflow up to date: send what an outage kept back, end runs whose process is gone.\n\n"
        "Example: dmat runs sync",
    )(_sync)
    app.add_typer(group, name="runs")
    app.command("ui", help="Open the MLflow UI on 127.0.0.1.\n\nExample: dmat ui --port 5000")(_ui)


def _sync(
    gone: Annotated[
        list[str] | None, typer.Option("--gone", help="A machine that is gone for good: end its runs too.")
    ] = None,
) -> None:
    from dmat import tracking
    from dmat.jobs import workspace

    for line in tracking.sync(workspace.find(Path.cwd()).home, report=True, gone=gone or ()):
        typer.echo(line)


def _ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000) -> None:
    from dmat import tracking
    from dmat.jobs import workspace

    home = workspace.find(Path.cwd()).home
    if tracking.store(home).startswith("http"):
        typer.echo(f"MLFLOW_TRACKING_URI names a server, which has the UI: {tracking.store(home)}")
        return
    tracking.connect(home)
    typer.echo(f"MLflow UI: http://127.0.0.1:{port} (store {tracking.store(home)}); Ctrl-C ends it")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking.store(home),
        "--artifacts-destination",
        tracking.artifact_folder(home).as_uri(),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",  # for one person; each takes seconds to start
    ]
    raise typer.Exit(_until_told(command))


def _until_told(command: list[str]) -> int:
    """Runs a server that has processes of its own; a signal that ends this process ends all of them."""
    server = subprocess.Popen(command, start_new_session=True)

    def end(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    code = server.wait()
    with contextlib.suppress(ProcessLookupError):  # what the server left in its session
        os.killpg(server.pid, signal.SIGTERM)
    return 128 - code if code < 0 else code
