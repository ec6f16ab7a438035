"""`dmat models`: classifiers as files, also those of other projects."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dmat.errors import DmatError

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A .safetensors file, its sidecar beside it.")]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        help="Classifiers as files, also those of other projects.\n\nExample: dmat models info weights.safetensors",
    )
    group.command(
        "import",
        help="Read published weights, running nothing that is in them, and write them as dmat does: safetensors and a "
        "sidecar. Knows checkpoints of Wang et al. 2023, scorers of Carmon et al. 2019 and RobustBench's DMWideResNet "
        "and DMPreActResNet."
        "\n\nExample: dmat models import weights-best.pt --args args.txt --to wang.safetensors",
    )(_import)
    group.command(
        "export",
        help="Write a model as RobustBench or the code of Wang et al. 2023 loads it."
        "\n\nExample: dmat models export best.safetensors --to robustbench best.pt",
    )(_export)
    group.command(
        "info",
        help="Say what a model is, where it comes from and whether its file is whole; exit code 2 if it is not."
        "\n\nExample: dmat models info best.safetensors",
    )(_info)
    group.command(
        "predict",
        help="Logits of images: uint8 [N, H, W, C], or float32 in [0, 1], [N, C, H, W] or [N, H, W, C]."
        "\n\nExample: dmat models predict best.safetensors images.npy --to logits.npy",
    )(_predict)
    group.command(
        "list",
        help="Evaluated models in MLflow's registry, by data set and threat model; a champion has the best AutoAttack "
        "accuracy of those that passed every check.\n\nExample: dmat models list",
    )(_list)
    group.command(
        "get",
        help="Fetch a registered model and verify it.\n\nExample: dmat models get digits-3f2a91c0-linf-1_5@champion",
    )(_get)
    app.add_typer(group, name="models")


def _import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pt, .pth or .safetensors file.")],
    args: Annotated[Path | None, typer.Option(help="The args.txt of its training.")] = None,
    data: Annotated[
        str | None, typer.Option(help="cifar10, cifar100, svhn or tinyimagenet, if no args.txt says it.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="averaged or raw, where a file has both.")] = None,
    activation: Annotated[str | None, typer.Option(help="silu or relu, if no args.txt says it.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, if you know it.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write. [default: FILE with .safetensors]")] = None,
) -> None:
    from dmat.models import importing
    from dmat.models.layouts import title

    done = importing.import_model(file, args, data, weights, activation, licence, to)
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    network = done.sidecar["network"]
    typer.echo(
        f"{done.path}: {title(network['name'], network['depth'], network['width'])} {network['activation']}, "
        f"{done.sidecar['classes']} classes, {done.sidecar['weights']} weights"
    )


def offer_plugins() -> None:
    """Networks that params.yaml here names by import path may be loaded. A broken one is told by who needs it."""
    from dmat import config

    if Path("params.yaml").is_file():
        with contextlib.suppress(DmatError):
            config.load(Path("params.yaml"))


def _export(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .pt file to write.")],
    to: Annotated[str, typer.Option(help="robustbench or published.")],
) -> None:
    from dmat.models import exporting

    offer_plugins()
    for note in exporting.export(model, to, file):
        typer.echo(f"note: {note}", err=True)
    typer.echo(str(file))


def _info(model: Model, as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False) -> None:
    from dmat.models import loading

    offer_plugins()
    found = loading.describe(model)
    if as_json:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
    else:
        for name, value in _lines(found):
            typer.echo(f"{name:16s}{value}")
    raise typer.Exit(0 if found["checksum_ok"] else 2)


def _predict(
    model: Model,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A .npy file.")],
    to: Annotated[Path | None, typer.Option(help="File to write. [default: IMAGES with -logits.npy]")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="A .npy file of integers, numbers of the model's classes: say how many are right."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    import torch

    from dmat import devices
    from dmat.models import predicting

    offer_plugins()
    compute = devices.resolve(device, "fp32", torch.get_num_threads())
    target = to or images.with_name(f"{images.stem}-logits.npy")
    done = predicting.predict(model, images, target, compute, labels, batch, quiet)
    typer.echo(f"{done.path}: {done.images} x {done.classes} logits")
    if done.correct is not None:
        typer.echo(f"accuracy: {100 * done.correct / done.images:.2f} % ({done.correct} of {done.images})")


def _list(as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False) -> None:
    from dmat.tracking import registry
    from dmat.workspace import current_workspace

    found = registry.listed(current_workspace().home)
    if as_json:
        typer.echo(json.dumps(found, indent=2, sort_keys=True))
        return
    for one in found:
        tags = one["tags"]
        accuracy = tags.get(f"accuracy.{tags.get('evaluation.measure')}", "not measured")
        mark = " champion" if one["champion"] else ""
        whose = " ".join(f"{name} {tags[f'dmat.{name}']}" for name in ("arm", "seed") if f"dmat.{name}" in tags)
        whose = f"  ({whose})" if whose else ""
        typer.echo(f"{one['name']}@{one['version']}  {tags.get('evaluation.measure')} {accuracy}{mark}{whose}")
    if not found:
        typer.echo("no model is registered; an evaluation registers its model")


def _get(
    wanted: Annotated[str, typer.Argument(metavar="MODEL", help="NAME@champion or NAME@VERSION.")],
    to: Annotated[Path | None, typer.Option(help="File to write. [default: NAME.safetensors]")] = None,
) -> None:
    from dmat.tracking import registry
    from dmat.workspace import current_workspace

    target = to or Path(f"{wanted.partition('@')[0]}.safetensors")
    if target.suffix != ".safetensors":
        raise DmatError(f"--to is {target}; expected a name that ends with .safetensors")
    found = registry.fetch(current_workspace().home, wanted, target)
    both = "weights and sidecar have the registered checksums"
    checked = both if registry.SIDECAR in found else "the weights have the registered checksum, the sidecar names it"
    typer.echo(f"{target}: version {found['version']}, run {found['run']}; {checked}")


def _lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What people read of `loading.describe`."""
    from dmat.models.layouts import title

    network, threat = found["network"], found.get("threat")
    height, width, channels = found["image_shape"]
    origin = found.get("origin")
    called = title(network["name"], network["depth"], network["width"])
    whole = "ok" if found["checksum_ok"] else f"{found['found_sha256'][:12]}, the sidecar says {found['sha256'][:12]}"
    lines = [
        ("file", found["file"]),
        ("network", f"{called} {network['activation']} ({network['name']})"),
        ("parameters", f"{found['parameters']:,}"),
        ("classes", str(found["classes"])),
        ("images", f"{height} x {width} x {channels}" + (f", {found['data']}" if "data" in found else "")),
        ("normalisation", f"mean {_numbers(found['mean'])}, std {_numbers(found['std'])}"),
        ("threat model", f"{threat['norm']} {threat['epsilon']}" if threat else "none is known"),
        ("weights", str(found.get("weights", "unknown"))),
        ("licence", str(found.get("licence") or "unknown")),
        ("checksum", whole),
    ]
    if origin:
        lines += [("from", f"{origin['file']} ({origin['format']}), sha256 {origin['sha256'][:12]}")]
        lines += [("note", note) for note in origin["notes"]]
    elif "arm" in found:
        lines += [
            ("from", f"a training here: arm {found['arm']}, seed {found['seed']}, {found['images_seen']:,} images")
        ]
    else:
        lines += [("from", "a training here")]
    return lines


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
