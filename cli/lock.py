"""`dmat lock`: says which code the results of each stage are of."""

from typing import Annotated

import typer

from dmat.errors import DmatError
from dmat.pipeline import STAGES


def add_to(app: typer.Typer) -> None:
    app.command(
        "lock",
        help="Write code.yaml: which code the results of each stage are of. DVC reads it as parameters, so a stage "
        "whose code changed reruns. With --same it does not: part of a finished result is made again and must be equal "
        "byte for byte.\n\nExample: dmat lock",
    )(_lock)


def _lock(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit code 2 if the code changed.")] = False,
    same: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Keep the results of a stage whose new code computes the same."),
    ] = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Why it computes the same; needed by --same.")] = "",
) -> None:
    from dmat.pipeline import code_identity
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    if bool(same) != bool(why.strip()) or (same and check):
        raise DmatError("expected --same and --why together, and --check alone; add what is missing, or leave out both")
    if unknown := [stage_name for stage_name in same or [] if stage_name not in STAGES]:
        raise DmatError(f"--same is {unknown[0]!r}; expected one of {', '.join(STAGES)}; name a stage")
    if same:
        _accept(same, why)
        return
    there = check or (workspace.root / code_identity.NAME).exists()
    before = code_identity.read(workspace.root) if there else code_identity.CodeLock({}, {})
    now = code_identity.up_to_date(before)
    for stage_name, identity in now.identities.items():
        old = before.identities.get(stage_name, "none")
        typer.echo(
            f"{stage_name:18s}" + ("unchanged" if old == identity else f"{old[:12]} -> {identity[:12]} (it reruns)")
        )
    if check and now != before:
        raise DmatError(
            f"{code_identity.NAME} is of other code; expected the code that is here; run `dmat lock` (the stages with "
            f"an arrow rerun) or `dmat lock --same STAGE --why ...` for one that computes the same"
        )
    if now != before or not there:
        code_identity.write(workspace.root, now)


def _accept(same: list[str], why: str) -> None:
    from dmat import config
    from dmat.upkeep import locking
    from dmat.workspace import current_workspace

    workspace = current_workspace()
    params = config.load(workspace.at("params.yaml"))
    for stage_name in same:
        typer.echo(f"{stage_name:18s}the same: {locking.accept(workspace, params, STAGES[stage_name], why)}")
