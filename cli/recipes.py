"""`dmat recipes`: the parameter files that ship with dmat."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.amounts import amount
from cli.completion import recipe_names

if TYPE_CHECKING:
    from dmat.pipeline.cost_plan import StageCost

Name = Annotated[str, typer.Argument(metavar="NAME", help="One of `dmat recipes list`.", autocompletion=recipe_names)]


def add_to(app: typer.Typer) -> None:
    """Adds the group `dmat recipes` to the app."""
    group = typer.Typer(no_args_is_help=True, help="Parameter files that ship with dmat.\n\nExample: dmat recipes list")
    group.command("list", help="Name every recipe.\n\nExample: dmat recipes list")(_list)
    group.command(
        "show",
        help="Print a recipe as a complete parameter file, with the source of each value; or what it costs: disk, "
        "memory and hours of each stage, from counted operations.\n\n"
        "Example: dmat recipes show cifar10-wrn28-1m --plan --gpu h100",
    )(_show)
    group.command(
        "use",
        help="Write a recipe to params.yaml in this folder; an old file with other content is renamed and stays.\n\n"
        "Example: dmat recipes use digits-3-seeds",
    )(_use)
    group.command(
        "diff",
        help="Show the values in which a recipe differs from the one that it extends, from another, or from a file."
        "\n\nExample: dmat recipes diff cifar10-wrn28-20m",
    )(_diff)
    app.add_typer(group, name="recipes")


def _list() -> None:
    from dmat import recipes

    summaries = recipes.summaries()
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        typer.echo(f"{name:{width}s}  {summary}")


def _show(
    name: Name,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it costs instead.")] = False,
    gpu: Annotated[str, typer.Option(help="GPU of the plan; an unknown name is answered with all names.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    from dmat import recipes
    from dmat.recipes import flat_file

    if not plan:
        typer.echo(recipes.read(name), nl=False)
        return
    from dmat.pipeline import cost_plan

    experiment = recipes.load(name)
    costs = cost_plan.plan(experiment, gpu)
    if as_json:
        typer.echo(json.dumps([cost._asdict() for cost in costs], indent=2))
        return
    typer.echo(f"{name}: {experiment.summary}. {flat_file.published_sentence(experiment)}".rstrip())
    for row in _rows(costs):
        typer.echo(row.rstrip())
    for line in cost_plan.notes(gpu, costs):
        typer.echo(line)


def _rows(costs: "list[StageCost]") -> list[str]:
    """The table of a plan, and its sums."""
    head = ("stage", "runs", "disk", "GPU memory", "operations", "hours", "speed")
    cells = [
        (
            cost.stage,
            str(cost.runs),
            amount(cost.disk_bytes),
            amount(cost.memory_bytes) if cost.memory_bytes else "",
            f"{cost.flops:.1e}" if cost.flops else "",
            _hours(cost.hours) if cost.flops else "",
            cost.speed,
        )
        for cost in costs
    ]
    total = ("all", "", amount(sum(cost.disk_bytes for cost in costs)), "", f"{sum(cost.flops for cost in costs):.1e}",
             _hours(sum(cost.hours for cost in costs)), "")  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *cells, total, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *cells, total)
    ]


def _hours(hours: float) -> str:
    """Two digits at least: "0.0034", "0.12", "5.3", "1,204"."""
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _use(name: Name, to: Annotated[Path, typer.Option(help="File to write.")] = Path("params.yaml")) -> None:
    from dmat import recipes

    renamed = recipes.use(name, to)
    typer.echo(f"{to} is now the recipe {name}" + (f"; the old one is {renamed}" if renamed else ""))


def _diff(
    name: Name,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="A recipe or a parameter file; the one that it extends if left out.")
    ] = "",
) -> None:
    from dmat import recipes, yaml_file
    from dmat.errors import DmatError

    experiment = recipes.load(name)
    other = other or experiment.base or ""
    if not other:
        raise DmatError(f"recipe {name} extends no other; expected a recipe or a file to compare it with; name it")
    values = yaml_file.read(Path(other)).value if Path(other).is_file() else recipes.load(other).values
    typer.echo(f"{other} -> {name}")
    for key, (before, after) in recipes.differences(values, experiment.values).items():
        written = ["(none)" if value is None else json.dumps(value, ensure_ascii=False) for value in (before, after)]
        typer.echo(f"{key}: {' -> '.join(written)}")
