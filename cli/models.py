"""`dmat models`: classifiers and diffusion models as files, also those of other projects."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dmat.errors import DmatError

if TYPE_CHECKING:
    from dmat.models.averaging import AveragedSidecar
    from dmat.models.denoisers import DenoiserDescription
    from dmat.models.loading import ModelDescription
    from dmat.training.weights import DenoiserSidecar, ImportOrigin, Sidecar

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A .safetensors file with its sidecar beside it.")]


def add_to(app: typer.Typer) -> None:
    """Adds the command group `models` to the command line."""
    group = typer.Typer(
        no_args_is_help=True,
        help="Import, export, inspect and run models as files, also those of other projects.\n\n"
        "Example: dmat models info weights.safetensors",
    )
    group.command(
        "import",
        help="Read published weights without executing anything in them, and write them in dmat's format: safetensors "
        "and a sidecar. Reads checkpoints of Wang et al. 2023, scorers of Carmon et al. 2019, RobustBench's "
        "DMWideResNet and DMPreActResNet, diffusion models of Karras et al. 2022 (.pkl) and of diffusers (a folder)."
        "\n\nExample: dmat models import weights-best.pt --args args.txt --to wang.safetensors",
    )(_import)
    group.command(
        "export",
        help="Write a model in the format that RobustBench or the code of Wang et al. 2023 loads."
        "\n\nExample: dmat models export best.safetensors --to robustbench best.pt",
    )(_export)
    group.command(
        "average",
        help="Average the weights of several classifiers of one network: a model soup. It is a good model only where "
        "the trainings continue from the same weights.\n\nExample: dmat models average a/best.safetensors "
        "b/best.safetensors --to soup.safetensors",
    )(_average)
    group.command(
        "info",
        help="Show what a model is, where it comes from and whether its file is intact; exit code 2 if it is not."
        "\n\nExample: dmat models info best.safetensors",
    )(_info)
    group.command(
        "predict",
        help="Write the logits of images. The images are uint8 [N, H, W, C], or float32 in [0, 1] as [N, C, H, W] or "
        "[N, H, W, C]."
        "\n\nExample: dmat models predict best.safetensors images.npy --to logits.npy",
    )(_predict)
    group.command(
        "list",
        help="List evaluated models in MLflow's registry, by data set and threat model. A champion has the best "
        "AutoAttack accuracy of the models that passed every check.\n\nExample: dmat models list",
    )(_list)
    group.command(
        "get",
        help="Fetch a registered model and verify it.\n\nExample: dmat models get digits-3f2a91c0-linf-1_5@champion",
    )(_get)
    app.add_typer(group, name="models")


def _import(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .pt, .pth, .safetensors or .pkl file, or a folder that diffusers saved."
        ),
    ],
    args: Annotated[Path | None, typer.Option(help="The args.txt of its training.")] = None,
    data: Annotated[
        str | None, typer.Option(help="cifar10, cifar100, svhn or tinyimagenet, if no args.txt says it.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Which weights to read from a file that has both: averaged (EMA) or raw.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="silu or relu, if no args.txt says it.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights, if you know it.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write. [default: FILE with the ending .safetensors]")] = None,
) -> None:
    from dmat.models import importing, published_denoisers
    from dmat.models.layouts import title

    if published_denoisers.is_denoiser(file):
        of_classifiers = {"--args": args, "--data": data, "--weights": weights, "--activation": activation}
        if useless := [option for option, value in of_classifiers.items() if value is not None]:
            raise DmatError(
                f"{useless[0]} has no effect on a diffusion model such as {file}; expected --licence and --to alone; "
                f"omit it"
            )
        published = importing.import_denoiser(file, licence, to)
        for note in published.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{to or importing.default_target(file)}: {_denoiser_title(published.sidecar)}")
        return
    imported = importing.import_model(file, args, data, weights, activation, licence, to)
    for note in imported.notes:
        typer.echo(f"note: {note}", err=True)
    network = imported.sidecar["network"]
    typer.echo(
        f"{imported.path}: {title(network['name'], network['depth'], network['width'])} {network['activation']}, "
        f"{imported.sidecar['classes']} classes, {imported.sidecar['weights']} weights"
    )


def offer_plugins() -> None:
    """Allows the networks that params.yaml in this folder names by import path.

    Errors in params.yaml are ignored here; whoever needs the network reports them.
    """
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


def _average(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Two or more .safetensors files.")],
    to: Annotated[Path, typer.Option(help="File to write.")],
    shares: Annotated[
        str, typer.Option(help="Share of each, such as 0.7,0.3; they sum to 1. [default: equal ones]")
    ] = "",
) -> None:
    from dmat.models import averaging

    offer_plugins()
    try:
        numbers = [float(share) for share in shares.split(",")] if shares else []
    except ValueError:
        raise DmatError(f"--shares is {shares!r}; expected numbers such as 0.7,0.3") from None
    for part in averaging.average(models, to, numbers)["soup"]:
        typer.echo(f"{part['share']:.3g} of {part['file']} ({part['sha256'][:12]})")
    typer.echo(f"{to}; evaluate it: dmat evaluate-robust --model {to} --images FOLDER")


def _info(model: Model, as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False) -> None:
    from dmat.models import denoisers, loading

    offer_plugins()
    description: ModelDescription | DenoiserDescription
    if loading.kind(model) == "denoiser":
        description = denoisers.describe(model)
        lines = _denoiser_lines(description)
    else:
        description = loading.describe(model)
        lines = _description_lines(description)
    if as_json:
        typer.echo(json.dumps(description, indent=2, sort_keys=True))
    else:
        for name, value in lines:
            typer.echo(f"{name:16s}{value}")
    raise typer.Exit(0 if description["checksum_ok"] else 2)


def _predict(
    model: Model,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A .npy file.")],
    to: Annotated[
        Path | None, typer.Option(help="File to write. [default: IMAGES with the ending -logits.npy]")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A .npy file of integers, class numbers of the model: show how many predictions are correct."
        ),
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
    prediction = predicting.predict(model, images, target, compute, labels, batch, quiet)
    typer.echo(f"{prediction.path}: {prediction.images} x {prediction.classes} logits")
    if prediction.correct is not None:
        typer.echo(
            f"accuracy: {100 * prediction.correct / prediction.images:.2f} % "
            f"({prediction.correct} of {prediction.images})"
        )


def _list(as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False) -> None:
    from dmat.tracking import registry
    from dmat.workspace import current_workspace

    versions = registry.list_versions(current_workspace().home)
    if as_json:
        typer.echo(json.dumps(versions, indent=2, sort_keys=True))
        return
    for version in versions:
        tags = version["tags"]
        accuracy = tags.get(f"accuracy.{tags.get('evaluation.measure')}", "not measured")
        champion_mark = " champion" if version["champion"] else ""
        arm_and_seed = " ".join(f"{name} {tags[f'dmat.{name}']}" for name in ("arm", "seed") if f"dmat.{name}" in tags)
        arm_and_seed = f"  ({arm_and_seed})" if arm_and_seed else ""
        typer.echo(
            f"{version['name']}@{version['version']}  {tags.get('evaluation.measure')} {accuracy}{champion_mark}"
            f"{arm_and_seed}"
        )
    if not versions:
        typer.echo("no model is registered; an evaluation registers its model")


def _get(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME@champion or NAME@VERSION.")],
    to: Annotated[Path | None, typer.Option(help="File to write. [default: NAME.safetensors]")] = None,
) -> None:
    from dmat.tracking import registry
    from dmat.workspace import current_workspace

    target = to or Path(f"{model.partition('@')[0]}.safetensors")
    if target.suffix != ".safetensors":
        raise DmatError(f"--to is {target}; expected a name that ends with .safetensors")
    fetched = registry.fetch(current_workspace().home, model, target)
    verified_pair = "weights and sidecar have the registered checksums"
    verified = (
        verified_pair
        if registry.SIDECAR_TAG in fetched
        else "the weights have the registered checksum, the sidecar names it"
    )
    typer.echo(f"{target}: version {fetched['version']}, run {fetched['run']}; {verified}")


def _description_lines(sidecar: "ModelDescription") -> list[tuple[str, str]]:
    """Names and values that `dmat models info` shows. sidecar: result of `loading.describe`."""
    from dmat.models.layouts import title

    network, threat = sidecar["network"], sidecar.get("threat")
    height, width, channels = sidecar["image_shape"]
    origin = sidecar.get("origin")
    model_title = title(network["name"], network["depth"], network["width"])
    checksum = _checksum_line(sidecar)
    lines = [
        ("file", sidecar["file"]),
        ("network", f"{model_title} {network['activation']} ({network['name']})"),
        ("parameters", f"{sidecar['parameters']:,}"),
        ("classes", str(sidecar["classes"])),
        ("images", f"{height} x {width} x {channels}" + (f", {sidecar['data']}" if "data" in sidecar else "")),
        ("normalisation", f"mean {_format_numbers(sidecar['mean'])}, std {_format_numbers(sidecar['std'])}"),
        ("threat model", f"{threat['norm']} {threat['epsilon']}" if threat else "unknown"),
        ("weights", str(sidecar.get("weights", "unknown"))),
        *_licence_lines(sidecar),
        ("checksum", checksum),
    ]
    if origin:
        lines += _origin_lines(origin)
    elif "soup" in sidecar:
        soup = cast("AveragedSidecar", sidecar)["soup"]
        parts = [f"{part['share']:.3g} of {part['file']} ({part['sha256'][:12]})" for part in soup]
        lines += [("from", f"an average: {' + '.join(parts)}")]
    elif "arm" in sidecar:
        lines += [
            (
                "from",
                f"a training here: arm {sidecar['arm']}, seed {sidecar['seed']}, {sidecar['images_seen']:,} images",
            )
        ]
    else:
        lines += [("from", "a training here")]
    return lines


def _denoiser_title(sidecar: "DenoiserSidecar") -> str:
    network, classes = sidecar["network"], sidecar["label_dim"]
    height, width, channels = sidecar["image_shape"]
    if "block_out_channels" in network:
        widths = f"{network['block_out_channels']} channels"
    else:
        widths = f"{network['channels']} channels x {network['multipliers']}"
    return (
        f"{network['name']} with {widths}, images {height} x {width} "
        f"x {channels}, {f'{classes} classes' if classes else 'unconditional'}"
    )


def _denoiser_lines(sidecar: "DenoiserDescription") -> list[tuple[str, str]]:
    """Names and values that `dmat models info` shows. sidecar: result of `denoisers.describe`."""
    lowest, highest = sidecar["sigma_range"]
    lines = [
        ("file", sidecar["file"]),
        ("network", _denoiser_title(sidecar)),
        ("parameters", f"{sidecar['parameters']:,}"),
        ("formulation", sidecar["formulation"]),
        ("noise levels", f"{lowest} to {'any' if highest is None else highest}, sigma_data {sidecar['sigma_data']}"),
        *_licence_lines(sidecar),
        ("checksum", _checksum_line(sidecar)),
    ]
    if "origin" in sidecar:
        return lines + _origin_lines(sidecar["origin"])
    return [*lines, ("from", f"a training here, {sidecar['training']['images_seen']:,} images")]


def _checksum_line(sidecar: "ModelDescription | DenoiserDescription") -> str:
    if sidecar["checksum_ok"]:
        return "ok"
    return f"{sidecar['found_sha256'][:12]}, the sidecar says {sidecar['sha256'][:12]}"


def _licence_lines(sidecar: "Sidecar") -> list[tuple[str, str]]:
    from dmat.training.weights import licences

    stated = licences(sidecar)
    of_data = [("of its images", stated["licence_of_data"])] if "licence_of_data" in stated else []
    return [("licence", stated.get("licence", "unknown")), *of_data]


def _origin_lines(origin: "ImportOrigin") -> list[tuple[str, str]]:
    from_file = f"{origin['file']} ({origin['format']}), sha256 {origin['sha256'][:12]}"
    return [("from", from_file), *(("note", note) for note in origin["notes"])]


def _format_numbers(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
