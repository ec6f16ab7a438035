"""`dmat images`: image sets on disk: look at them, verify them, and exchange them with other projects."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.amounts import amount
from cli.completion import names_in
from dmat.errors import DmatError

if TYPE_CHECKING:
    from tqdm import tqdm

    from dmat.data.set_inspection import SetDescription
    from dmat.pipeline.image_plan import SetPlan
    from dmat.pipeline.image_sets import LocatedSet

Images = Annotated[
    str, typer.Argument(metavar="SET", help="An image set of params.yaml, or a folder with a manifest.json.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
ImageSet = Annotated[
    str,
    typer.Argument(metavar="SET", help="Name in `image_sets` of params.yaml.", autocompletion=names_in("image_sets")),
]
_MAX_ROWS = 100  # classes on a sheet


def add_to(app: typer.Typer) -> None:
    """Adds the command group `images` to the command line."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Inspect, verify, import and export image sets, and plan new ones.\n\nExample: dmat images info edm18",
    )
    group.command(
        "info",
        help="Show what a set is: images, classes, generator, sampler, licence. Reads its manifest alone."
        "\n\nExample: dmat images info edm18",
    )(_info)
    group.command(
        "verify",
        help="Compare every file of a set with its manifest, and every label with its classes; name each damaged "
        "shard. Exit code 2 if there is one.\n\nExample: dmat images verify edm18",
    )(_verify)
    group.command(
        "sheet",
        help="Draw a contact sheet: the first images of each class.\n\nExample: dmat images sheet edm18 -o edm18.png",
    )(_sheet)
    group.command(
        "export",
        help="Write a set for other projects: an .npz as Wang et al. 2023 released theirs, Parquet for Hugging Face's "
        "datasets, tar files for WebDataset, or a folder of PNG files per class; with a card that states the licence."
        "\n\nExample: dmat images export edm18 edm18.npz --format npz",
    )(_export)
    group.command(
        "import",
        help="Write released images (an .npz with `image` and `label`, or a folder of such parts) as a set: shards and "
        "a manifest. Run again, it keeps the shards that it finished."
        "\n\nExample: dmat images import 1m.npz wang1m --licence Apache-2.0",
    )(_import)
    group.command(
        "card",
        help="Write the card of a data set, Markdown as Hugging Face reads it: licence, generator, sampler, measures, "
        "and how to load it.\n\nExample: dmat images card edm18",
    )(_card)
    group.command(
        "plan",
        help="Say what a set of params.yaml costs before it is generated: disk, memory, and hours by a probe. Exit "
        "code 2 if the disk does not suffice.\n\nExample: dmat images plan edm18 --images 1000000",
    )(_plan)
    group.command(
        "make",
        help="Compute one image of a set again, with the others of its block, and compare it with its shard. Exit "
        "code 2 if they differ.\n\nExample: dmat images make edm18 57",
    )(_make)
    group.command(
        "seen",
        help="Say at which steps the training of an arm uses an image of a set.\n\nExample: dmat images seen edm18 57 "
        "--arm generated",
    )(_seen)
    app.add_typer(group, name="images")


def _info(images: Images, as_json: AsJson = False) -> None:
    from dmat.data import set_inspection

    description = set_inspection.describe(_find(images).folder)
    if as_json:
        typer.echo(json.dumps(description, indent=2, sort_keys=True))
        return
    for name, value in _description_lines(description):
        typer.echo(f"{name:14s}{value}")


def _verify(images: Images, as_json: AsJson = False, quiet: Quiet = False) -> None:
    from tqdm import tqdm

    from dmat.data import set_inspection, shards

    folder = _find(images).folder
    with tqdm(total=shards.read_manifest(folder)["count"], unit=" images", disable=quiet or as_json) as bar:
        check = set_inspection.verify(folder, bar.update)
    usable = [shard.entry for shard in check.shards if not shard.problems]
    damaged = [shard for shard in check.shards if shard.problems]
    if as_json:
        record = {
            "intact": check.intact,
            "usable": [entry["index"] for entry in usable],
            "damaged": {shard.entry["index"]: shard.problems for shard in damaged},
            "problems": check.problems,
        }
        typer.echo(json.dumps(record, indent=2, sort_keys=True))
    else:
        for shard in damaged:
            for problem in shard.problems:
                typer.echo(f"PROBLEM shard {shard.entry['index']}: {problem}")
        for problem in check.problems:
            typer.echo(f"PROBLEM {problem}")
        count = sum(entry["count"] for entry in usable)
        which = "all" if not damaged else _ranges([entry["index"] for entry in usable]) or "none"
        typer.echo(f"usable: {len(usable)} of {len(check.shards)} shards ({which}), {count:,} images")
    raise typer.Exit(0 if check.intact else 2)


def _sheet(
    images: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG file to write.")],
    columns: Annotated[int, typer.Option(help="Images per class.", min=1, max=100)] = 20,
) -> None:
    from dmat.data import set_inspection
    from dmat.metrics import pictures

    if output.suffix.lower() != ".png":
        raise DmatError(f"--output is {output}; expected a name that ends with .png")
    located = _find(images)
    opened = set_inspection.open_unverified(located.folder)
    indices = set_inspection.first_of_classes(opened, columns, _MAX_ROWS)
    sample, labels = opened.take(indices)
    pictures.sheet(output, sample, labels if opened.labelled else None, located.name, columns)
    typer.echo(f"{output}: {len(indices)} images")


def _export(
    images: Images,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File (npz) or folder to write.")],
    format_name: Annotated[str, typer.Option("--format", help="npz, parquet, webdataset or folder.")],
    first: Annotated[int | None, typer.Option(help="Only the first N images.", min=1, metavar="N")] = None,
    quiet: Quiet = False,
) -> None:
    from dmat.data import image_export
    from dmat.pipeline import image_sets
    from dmat.workspace import find_workspace

    located = _find(images)
    image_export.expect_format(format_name)
    card = image_sets.card(located, find_workspace(Path.cwd()), first, format_name)
    with _Progress(quiet) as progress:
        count = image_export.export(located.folder, output, format_name, card, first, progress)
    typer.echo(f"{output}: {count:,} images as {format_name}")


def _import(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An .npz file, or a folder of its parts.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    shard: Annotated[int, typer.Option(help="Images per shard.", min=1)] = 50_000,
    licence: Annotated[str, typer.Option(help="Licence of the images, if you know it.")] = "unknown",
    like: Annotated[
        Path | None,
        typer.Option(help="Folder of a set whose class names the images get, such as artifacts/prepare_data/train."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    from dmat.data import image_import

    with _Progress(quiet) as progress:
        released = image_import.import_released(source, output, shard, licence, like, progress)
    if released.ignored:
        typer.echo(f"note: not read: {', '.join(released.ignored)}", err=True)
    if licence == "unknown":
        typer.echo("note: the licence is unknown; --licence states it", err=True)
    typer.echo(f"{output}: {len(released):,} images in {released.classes} classes")


def _card(
    images: Images,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write. [default: shown instead]")
    ] = None,
) -> None:
    from dmat import files
    from dmat.pipeline import image_sets
    from dmat.workspace import find_workspace

    text = image_sets.card(_find(images), find_workspace(Path.cwd()))
    if output is None:
        typer.echo(text, nl=False)
    else:
        if os.path.lexists(output):
            raise DmatError(f"{output} exists; expected a new name; choose another, or move it away")
        files.write_text(output, text)
        typer.echo(str(output))


def _plan(
    image_set: ImageSet,
    images: Annotated[
        int | None, typer.Option(help="Number of images. [default: that of params.yaml]", min=1, metavar="N")
    ] = None,
    probe: Annotated[
        float, typer.Option(help="Seconds in which blocks are generated, if the generator exists.", min=0, max=30)
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    from dmat import config
    from dmat.pipeline import image_plan
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    result = image_plan.plan(image_set, images, config.load(workspace.at("params.yaml")), workspace, probe)
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True))
    else:
        for name, value in _plan_lines(result):
            typer.echo(f"{name:14s}{value}")
    image_plan.expect_space(result)


Index = Annotated[int, typer.Argument(metavar="INDEX", help="Number of the image in the set, from 0.", min=0)]


def _make(
    image_set: ImageSet,
    index: Index,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG file to write the image to.")] = None,
) -> None:
    from dmat import config, files
    from dmat.data import image_export
    from dmat.pipeline import single_images
    from dmat.workspace import find_workspace

    if output is not None and output.suffix.lower() != ".png":
        raise DmatError(f"--output is {output}; expected a name that ends with .png")
    workspace = find_workspace(Path.cwd())
    remade = single_images.remake(image_set, index, config.load(workspace.at("params.yaml")), workspace)
    if output is not None:
        with files.writing(output) as file:
            file.write(image_export.png(remade.image))
    if remade.identical:
        typer.echo(f"{image_set} {index}: the same as in its shard, label {remade.label}")
        return
    typer.echo(
        f"{image_set} {index}: {remade.differing_pixels} values differ from those in its shard, by up to "
        f"{remade.largest_difference} grey levels; label {remade.label}, there {remade.stored_label}"
    )
    raise typer.Exit(2)


def _seen(
    image_set: ImageSet,
    index: Index,
    arm: Annotated[str, typer.Option(help="Name in `arms` of params.yaml.", autocompletion=names_in("arms"))],
    seed: Annotated[int | None, typer.Option(help="One of `seeds` of params.yaml. [default: the first]")] = None,
    as_json: AsJson = False,
) -> None:
    from dmat import config
    from dmat.pipeline import single_images
    from dmat.workspace import find_workspace

    workspace = find_workspace(Path.cwd())
    params = config.load(workspace.at("params.yaml"))
    used = single_images.usage(image_set, index, arm, params.seeds[0] if seed is None else seed, params, workspace)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(used), indent=2, sort_keys=True))
        return
    total = f"of {used.total_steps:,} steps" + ("" if used.finished else " that are planned")
    if not used.selected:
        typer.echo(f"{image_set} {index}: not selected for arm {arm}")
    elif not used.steps:
        typer.echo(f"{image_set} {index}: selected, in none {total}")
    else:
        typer.echo(f"{image_set} {index}: in {len(used.steps)} {total}: {', '.join(map(str, used.steps))}")


def _find(images: str) -> "LocatedSet":
    """The set that the user names."""
    from dmat.pipeline import image_sets
    from dmat.workspace import find_workspace

    return image_sets.find(images, find_workspace(Path.cwd()))


class _Progress:
    """A progress bar over images, which appears with the first report: nobody knows the total before."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._bar: tqdm | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        return self._report

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, images: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, unit=" images", unit_scale=True, disable=self._quiet)
        self._bar.update(images - self._bar.n)


def _description_lines(description: "SetDescription") -> list[tuple[str, str]]:
    """Names and values that `dmat images info` shows."""
    height, width, channels = description["shape"]
    counts = description["class_counts"]
    per_class = (
        f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts, default=0):,} to {max(counts, default=0):,}"
    )
    names = ", ".join(description["class_names"][:5]) + (", ..." if description["classes"] > 5 else "")
    labels = f"{per_class} images each" if description["labelled"] else "the images have no labels"
    sampler = description["sampler"]
    lines = [
        ("folder", description["path"]),
        ("images", f"{description['images']:,} of {height} x {width} x {channels}"),
        ("classes", f"{description['classes']} ({names}), {labels}"),
        ("shards", f"{description['shards']}, {amount(description['bytes'])}"),
        ("licence", description["licence"]),
        ("origin", description["origin"]),
        (
            "generator",
            description["generator_sha256"] and f"weights with SHA-256 {description['generator_sha256'][:12]}",
        ),
        ("sampler", sampler and ", ".join(f"{name} {value}" for name, value in sampler.items())),
        ("seed", description["seed"]),
        ("manifest", f"SHA-256 {description['manifest_sha256'][:12]}"),
        ("Croissant", description["croissant"] or "none"),
    ]
    return [(name, str(value)) for name, value in lines if value is not None]


def _plan_lines(result: "SetPlan") -> list[tuple[str, str]]:
    """Names and values that `dmat images plan` shows."""
    from dmat import machine_speed

    reused = f", {amount(result['reused_bytes'])} of them exist" if result["reused_bytes"] else ""
    lines = [
        ("images", f"{result['images']:,} in {result['shards']:,} shards"),
        ("disk", f"{amount(result['disk_bytes'])}{reused}; {amount(result['free_bytes'])} are free"),
    ]
    if result["hours"] is None or result["images_per_second"] is None or result["memory_bytes"] is None:
        return [*lines, ("time", f"not measured: {result['unmeasured']}")]
    lines.append(("memory", f"{amount(result['memory_bytes'])} at the peak"))
    if result["device_memory_bytes"] is not None:
        lines.append(("GPU memory", f"{amount(result['device_memory_bytes'])} at the peak"))
    speed = f"{result['images_per_second']:,.1f} images per second on {result['device']}"
    hours = f"{result['hours']:,.2f} hours of one process"
    machine = machine_speed.read()
    if machine is not None and machine.process_throughput is not None and result["device"] == "cpu":
        hours += f", {result['hours'] / machine.process_throughput:,.2f} of two at once (--workers 2)"
    return [*lines, ("time", f"{hours}, {speed}")]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: [0, 1, 2, 5] as "0-2, 5"."""
    spans = list[list[int]]()
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
