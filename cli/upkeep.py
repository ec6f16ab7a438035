"""`dmat doctor` and `dmat clean`: the state of a project, and what it can do without."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dmat.upkeep.cleaning import Survey
    from dmat.workspace import Workspace

AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


def add_to(app: typer.Typer) -> None:
    app.command(
        "doctor",
        help="Look at versions, hardware, disk, parameters, DVC, MLflow and unfinished work, and say what to do. "
        "Changes nothing without --fix; exit code 2 if there is a PROBLEM.\n\nExample: dmat doctor",
    )(_doctor)
    app.command(
        "clean",
        help="Show what the project can do without: finished work that DVC has a copy of, work set aside, artifacts "
        "that params.yaml no longer names, leftovers of killed processes. Deletes only with --yes.\n\n"
        "Example: dmat clean --older-than 7",
    )(_clean)


def _doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Only repair what a kill left damaged, and say what that was.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    from dmat.upkeep import doctor, machine
    from dmat.workspace import find_workspace

    if fix:
        repaired = doctor.fix(find_workspace(Path.cwd()))
        typer.echo(json.dumps(repaired) if as_json else "\n".join(repaired or ["nothing to repair"]))
        return
    found = []
    for one in doctor.examine(find_workspace(Path.cwd())):
        found.append(one)
        if not as_json:
            typer.echo(f"{one.mark:8s}{one.check:14s}{one.found}" + (f"\n{'':22s}-> {one.do}" if one.do else ""))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    raise typer.Exit(2 if any(one.mark == machine.PROBLEM for one in found) else 0)


def _clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is shown.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Offer work that was stopped too.")] = False,
    older_than: Annotated[
        float, typer.Option(help="Only what nobody changed for this many days.", min=0.0, metavar="DAYS")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    from dmat import config
    from dmat.upkeep import cleaning
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    params = config.load(workspace.at("params.yaml"))
    survey = cleaning.survey(workspace, params, unfinished=unfinished, older_than=older_than)
    frees = cleaning.freed(path for one in survey.candidates for path in one.paths)
    if as_json:
        record = _record(survey)
    else:
        _show(workspace, survey, frees)
    stayed: list[cleaning.KeptPath] = []
    if yes:
        frees, stayed = cleaning.remove(survey.candidates)
    if as_json:
        left = [{"path": str(one.path), "reason": one.reason} for one in stayed]
        typer.echo(json.dumps({**record, "deleted": yes, "bytes": frees, "not_deleted": left}, indent=2))
    elif yes:
        for one in stayed:
            typer.echo(f"stays: {_short(workspace, one.path)}: {one.reason}", err=True)
        typer.echo(f"Deleted {len(survey.candidates) - len(stayed)}; {_amount(frees)} came free.")
    elif survey.candidates:
        typer.echo("Nothing was deleted; `dmat clean --yes` with the same options deletes what is shown.")
    raise typer.Exit(2 if stayed else 0)


def _record(survey: "Survey") -> dict[str, object]:
    from dmat.upkeep import cleaning

    return {
        "candidates": [
            {
                "paths": [str(path) for path in one.paths],
                "kind": one.kind,
                "reason": one.reason,
                "bytes": cleaning.freed(one.paths),
                "size": cleaning.size(one.paths),
            }
            for one in survey.candidates
        ],
        "kept": [{"path": str(one.path), "reason": one.reason} for one in survey.kept],
        "reruns_report": survey.reruns_report,
    }


def _show(workspace: "Workspace", survey: "Survey", frees: int) -> None:
    from dmat.upkeep import cleaning

    for kind, meaning in cleaning.KINDS.items():
        group = [one for one in survey.candidates if one.kind == kind]
        if group:
            typer.echo(f"{kind}: {meaning}")
        for one in group:
            amount = f"{_amount(cleaning.freed(one.paths))} of {_amount(cleaning.size(one.paths))}"
            more = f" and {len(one.paths) - 1} more" if len(one.paths) > 1 else ""
            typer.echo(f"  {amount:24s}{_short(workspace, one.paths[0])}{more}: {one.reason}")
    if survey.kept:
        typer.echo("kept:")
    for kept in survey.kept:
        typer.echo(f"  {_short(workspace, kept.path)}: {kept.reason}")
    typer.echo(
        f"{len(survey.candidates)} can go, which frees {_amount(frees)}; what another name still has frees nothing."
        if survey.candidates
        else "Nothing can go."
    )
    if survey.reruns_report:
        typer.echo("write_report reads folders that lose something: the next `dvc repro` makes the report again.")
    typer.echo("DVC's cache is not touched: `dvc gc -w` removes what the files here no longer name, for good.")


def _short(workspace: "Workspace", path: Path) -> str:
    for base in (workspace.root, workspace.home):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)


def _amount(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
