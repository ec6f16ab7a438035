"""`dmat lock`: records the identity of each stage's code."""

from typing import Annotated

import typer

from cli.completion import stage_names
from dmat.errors import DmatError, did_you_mean
from dmat.pipeline import STAGES


def add_to(app: typer.Typer) -> None:
    """Adds `dmat lock` to the app."""
    app.command(
        "lock",
        help="Write code.yaml, which holds the identity of the code of each stage. DVC reads it as parameters, so a "
        "stage whose code changed reruns. With --same the stage does not rerun: part of a finished result is computed "
        "again, and must equal the stored one byte for byte.\n\nExample: dmat lock",
    )(_lock)


def _lock(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit code 2 if the code changed.")] = False,
    same: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="Keep the results of a stage whose changed code still computes the same.",
            autocompletion=stage_names,
        ),
    ] = None,
    why: Annotated[
        str, typer.Option(metavar="TEXT", help="Why the changed code computes the same; required with --same.")
    ] = "",
) -> None:
    from dmat.pipeline import code_identity
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    if bool(same) != bool(why.strip()) or (same and check):
        raise DmatError("expected --same and --why together, and --check alone; add what is missing, or leave out both")
    if unknown_stages := [stage_name for stage_name in same or [] if stage_name not in STAGES]:
        raise DmatError(
            f"--same is {unknown_stages[0]!r}; expected one of {', '.join(STAGES)}"
            f"{did_you_mean(unknown_stages[0], STAGES)}; name a stage"
        )
    if same:
        _accept(same, why)
        return
    has_lock = check or (workspace.root / code_identity.NAME).exists()
    before = code_identity.read(workspace.root) if has_lock else code_identity.CodeLock({}, {})
    current = code_identity.lock_current_code(before)
    for stage_name, identity in current.identities.items():
        old = before.identities.get(stage_name, "none")
        typer.echo(
            f"{stage_name:17s} " + ("unchanged" if old == identity else f"{old[:12]} -> {identity[:12]} (it reruns)")
        )
    if check and current != before:
        raise DmatError(
            f"{code_identity.NAME} records other code; expected the loaded code; run `dmat lock` (the stages with an "
            f"arrow rerun) or `dmat lock --same STAGE --why ...` for one that computes the same"
        )
    if current != before or not has_lock:
        code_identity.write(workspace.root, current)


def _accept(same: list[str], why: str) -> None:
    """Keeps the results of stages whose new code computes the same. same: names of stages."""
    from dmat import config
    from dmat.upkeep import locking
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    params = config.load(workspace.at("params.yaml"))
    for stage_name in same:
        typer.echo(f"{stage_name:17s} the same: {locking.accept(workspace, params, STAGES[stage_name], why)}")
