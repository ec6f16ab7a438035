"""`dmat doctor` and `dmat clean`: check the state of a project, and delete what it does not need."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.amounts import amount

if TYPE_CHECKING:
    from dmat.upkeep.cleaning import Survey
    from dmat.workspace import Workspace

AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]


def add_to(app: typer.Typer) -> None:
    """Adds `dmat doctor` and `dmat clean` to the app."""
    app.command(
        "doctor",
        help="Check versions, hardware, disk, parameters, DVC, MLflow and unfinished work, and say what to do. "
        "Changes nothing without --fix or --bench; exit code 2 if there is a PROBLEM.\n\nExample: dmat doctor",
    )(_doctor)
    app.command(
        "clean",
        help="Show what can be deleted: finished work that DVC has a copy of, work set aside, artifacts that "
        "params.yaml no longer names, leftovers of killed processes. Deletes only with --yes.\n\n"
        "Example: dmat clean --older-than 7",
    )(_clean)


def _doctor(
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Run no checks; repair what a kill or an edit during a run damaged, and say what was repaired.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="Run no checks; measure for a minute how fast this machine multiplies matrices, runs two processes "
            "at once and uses its disk. Estimates use it. Nothing else should run meanwhile.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    from dmat import machine_speed
    from dmat.upkeep import doctor, machine
    from dmat.workspace import find_workspace

    if measure:
        speed = doctor.measure_machine(find_workspace(Path.cwd()), lambda line: typer.echo(line, err=as_json))
        typer.echo(json.dumps(dataclasses.asdict(speed), indent=2) if as_json else f"written to {machine_speed.path()}")
        return
    if fix:
        repaired = doctor.fix(find_workspace(Path.cwd()))
        typer.echo(json.dumps(repaired) if as_json else "\n".join(repaired or ["nothing to repair"]))
        return
    findings = []
    for finding in doctor.examine(find_workspace(Path.cwd())):
        findings.append(finding)
        if not as_json:
            typer.echo(
                f"{finding.mark:8s}{finding.check:14s}{finding.found}"
                + (f"\n{'':22s}-> {finding.do}" if finding.do else "")
            )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    raise typer.Exit(2 if any(finding.mark == machine.PROBLEM for finding in findings) else 0)


def _clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is shown.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Include work that was stopped.")] = False,
    older_than: Annotated[
        float, typer.Option(help="Only what has not changed for this many days.", min=0.0, metavar="DAYS")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    from dmat import config
    from dmat.upkeep import cleaning
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    params = config.load(workspace.at("params.yaml"))
    survey = cleaning.survey(workspace, params, unfinished=unfinished, older_than=older_than)
    freed_bytes = cleaning.freed(path for candidate in survey.candidates for path in candidate.paths)
    if as_json:
        record = _record(survey)
    else:
        _show(workspace, survey, freed_bytes)
    undeleted: list[cleaning.KeptPath] = []
    if yes:
        freed_bytes, undeleted = cleaning.remove(survey.candidates)
    if as_json:
        not_deleted = [{"path": str(kept_path.path), "reason": kept_path.reason} for kept_path in undeleted]
        typer.echo(json.dumps({**record, "deleted": yes, "bytes": freed_bytes, "not_deleted": not_deleted}, indent=2))
    elif yes:
        for kept_path in undeleted:
            typer.echo(f"stays: {_short(workspace, kept_path.path)}: {kept_path.reason}", err=True)
        typer.echo(f"Deleted {len(survey.candidates) - len(undeleted)}; freed {amount(freed_bytes)}.")
    elif survey.candidates:
        typer.echo("Nothing was deleted; `dmat clean --yes` with the same options deletes what is shown.")
    raise typer.Exit(2 if undeleted else 0)


def _record(survey: "Survey") -> dict[str, object]:
    """A survey as JSON values."""
    from dmat.upkeep import cleaning

    return {
        "candidates": [
            {
                "paths": [str(path) for path in candidate.paths],
                "kind": candidate.kind,
                "reason": candidate.reason,
                "bytes": cleaning.freed(candidate.paths),
                "size": cleaning.size(candidate.paths),
            }
            for candidate in survey.candidates
        ],
        "kept": [{"path": str(kept_path.path), "reason": kept_path.reason} for kept_path in survey.kept],
        "reruns_report": survey.reruns_report,
    }


def _show(workspace: "Workspace", survey: "Survey", freed_bytes: int) -> None:
    """Prints a survey. freed_bytes: what deleting all candidates frees."""
    from dmat.upkeep import cleaning

    for kind, meaning in cleaning.KINDS.items():
        group = [candidate for candidate in survey.candidates if candidate.kind == kind]
        if group:
            typer.echo(f"{kind}: {meaning}")
        for candidate in group:
            sizes = f"{amount(cleaning.freed(candidate.paths))} of {amount(cleaning.size(candidate.paths))}"
            more = f" and {len(candidate.paths) - 1} more" if len(candidate.paths) > 1 else ""
            typer.echo(f"  {sizes:24s}{_short(workspace, candidate.paths[0])}{more}: {candidate.reason}")
    if survey.kept:
        typer.echo("kept:")
    for kept_path in survey.kept:
        typer.echo(f"  {_short(workspace, kept_path.path)}: {kept_path.reason}")
    typer.echo(
        f"{len(survey.candidates)} can be deleted, which frees {amount(freed_bytes)}; a file that has another name "
        f"frees nothing."
        if survey.candidates
        else "Nothing can be deleted."
    )
    if survey.reruns_report:
        typer.echo("write_report reads folders that lose files: the next `dvc repro` regenerates the report.")
    typer.echo("DVC's cache is not touched: `dvc gc -w` removes what the files here no longer name, for good.")


def _short(workspace: "Workspace", path: Path) -> str:
    """A path relative to the project or the main checkout, if it is below one of them."""
    for base in (workspace.root, workspace.home):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path)
