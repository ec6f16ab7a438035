"""`dmat evaluate-robust`: a stage of the pipeline, or any model on any images."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from cli import parameter_file, stages
from cli.completion import names_in
from cli.models import offer_plugins
from dmat.engine import EngineOptions
from dmat.errors import DmatError
from dmat.pipeline import STAGES
from dmat.workspace import Instance

_STAGE = STAGES["evaluate_robust"]


def add_to(app: typer.Typer) -> None:
    """Adds the command `evaluate-robust` to the command line."""
    app.command(
        _STAGE.command,
        help=f"{_STAGE.summary}\n\nGive either an arm and a seed of params.yaml, or --model and --images for files "
        f"that no stage made. --workers and --cluster divide the work; jobs of an array may each compute --shards."
        f"\n\nExample: {_STAGE.example}\n\nExample: dmat evaluate-robust --model wang.safetensors --images "
        f"cifar-10-batches-py --against robustbench",
    )(_evaluate)


def _evaluate(
    arm: Annotated[
        str | None, typer.Option(help="Name in `arms` of params.yaml.", autocompletion=names_in("arms"))
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="One of `seeds` of params.yaml.", autocompletion=names_in("seeds"))
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A .safetensors file with its sidecar beside it, or what `models import` reads.")
    ] = None,
    args: Annotated[
        Path | None, typer.Option(help="The args.txt of the model's training, as for `models import`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set of the model's training, as for `models import`, for example cifar10.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="Activation of the model, as for `models import`: silu or relu.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Published files of a data set, a folder with one sub-folder of images per class, a folder of shards, "
            ".npz or Parquet files, or the word digits."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Which split the images are: test or train. If the source does not say it, your statement is used. "
            "[default: test, if any]"
        ),
    ] = None,
    classes_in_order: Annotated[
        bool,
        typer.Option(
            "--classes-in-order",
            help="State that label k of the images is class k of the model, although the class names differ.",
        ),
    ] = False,
    norm: Annotated[str | None, typer.Option(help="linf or l2. [default: what the model was trained for]")] = None,
    epsilon: Annotated[str | None, typer.Option(help="Radius for pixels in [0, 1], such as 8/255.")] = None,
    first: Annotated[
        int | None,
        typer.Option(help="Evaluate only the first N images; the result is then no headline. [default: 0, all]", min=0),
    ] = None,
    attacks: Annotated[
        str | None,
        typer.Option(help="standard, quick, none, or names such as apgd-ce,square; only standard can give a headline."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images at a time. [default: 250]", min=1)] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the results. [default: MODEL-evaluation]")] = None,
    against: Annotated[str | None, typer.Option(help="robustbench: compare with its leaderboard.")] = None,
    entry: Annotated[
        str | None, typer.Option(help="Row of the leaderboard. [default: the name of the model's file]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; only with --model. [default: auto]")] = None,
    shards: Annotated[str, typer.Option(help=stages.SHARDS_HELP, metavar="A:B")] = "",
    workers: Annotated[int | None, typer.Option(help=stages.WORKERS_HELP, min=0)] = None,
    cluster: Annotated[str, typer.Option(help=stages.CLUSTER_HELP)] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Set earlier work aside and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and the time left.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as JSON; progress as lines of JSON on stderr.")
    ] = False,
    params: Annotated[
        Path | None,
        typer.Option(help="Parameter file. [default: params.yaml; with --model: none]"),
    ] = None,
) -> None:
    stage_options: dict[str, object] = {"--arm": arm, "--seed": seed}
    model_options: dict[str, object] = {"--model": model, "--images": images}
    direct_options: dict[str, object] = {"--norm": norm, "--epsilon": epsilon, "--first": first, "--attacks": attacks,
                  "--batch": batch, "--to": to, "--against": against, "--entry": entry, "--args": args,
                  "--data": data, "--activation": activation, "--split": split, "--device": device,
                  "--classes-in-order": classes_in_order or None}  # fmt: skip
    numbers = stages.shard_numbers(shards, fresh)
    if model is None and images is None:
        unexpected = [name for name, value in direct_options.items() if value is not None]
        missing = [name for name, value in stage_options.items() if value is None]
        if missing:
            raise DmatError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; expected --arm and --seed of "
                f"params.yaml, or --model and --images"
            )
        if unexpected:
            raise DmatError(
                f"{', '.join(unexpected)} came with --arm; expected --model and --images; change params.yaml"
            )
        instance = cast(Instance, {"arm": arm, "seed": seed})  # both were given
        path = params or parameter_file.DEFAULT
        stages.run(_STAGE, instance, path, fresh, dry_run, as_json, numbers, workers, cluster)
        return
    for name, value in model_options.items():
        if value is None:
            raise DmatError(f"{name} is missing; expected --model FILE and --images SOURCE together")
    for name, value in stage_options.items():
        if value is not None:
            raise DmatError(f"{name} came with --model; expected either an arm and a seed, or a model and images")
    if against not in (None, "robustbench"):
        raise DmatError(f"--against is {against!r}; expected robustbench")
    if entry is not None and against is None:
        raise DmatError("--entry came without --against; expected --against robustbench with it")
    assert model is not None
    assert images is not None
    folder = to or Path(f"{model.stem}-evaluation")
    model_source = (model, args, data, activation)
    import_options: dict[str, object] = {"--args": args, "--data": data, "--activation": activation}
    if model.suffix == ".safetensors" and (
        unexpected := [name for name, value in import_options.items() if value is not None]
    ):
        raise DmatError(
            f"{', '.join(unexpected)} came with {model}, whose sidecar says this already; expected a .safetensors file "
            f"alone, or a published file that is to be imported"
        )
    overrides: dict[str, int | str | list[str]] = {} if first is None else {"images": first}
    if attacks is not None:
        overrides["auto_attack"] = attacks if attacks in ("standard", "quick", "none") else attacks.split(",")
    if batch is not None:
        overrides |= {"batch": batch}
    _evaluate_model(
        model_source, images, split, classes_in_order, (norm, epsilon), overrides, folder, (against, entry),
        device or "auto", numbers, EngineOptions(workers or 0, cluster), fresh, dry_run, as_json, params,
    )  # fmt: skip


def _evaluate_model(
    model_source: tuple[Path, Path | None, str | None, str | None],
    images: str,
    split: str | None,
    classes_in_order: bool,
    threat: tuple[str | None, str | None],
    overrides: dict[str, int | str | list[str]],
    folder: Path,
    against: tuple[str | None, str | None],
    device: str,
    shards: range | None,
    options: EngineOptions,
    fresh: bool,
    dry_run: bool,
    as_json: bool,
    params: Path | None,
) -> None:
    from dmat import config
    from dmat.evaluation import work
    from dmat.pipeline import direct_evaluation
    from dmat.workspace import find_workspace

    base = config.load(params, Path.cwd()).evaluate_robust.plain() if params else {}
    if not params:
        offer_plugins()
    in_project = Path("params.yaml").is_file()
    request = direct_evaluation.Request(
        direct_evaluation.ensure_safetensors(*model_source, folder),
        images,
        split,
        *threat,
        config.evaluation(base | overrides),
        folder,
        find_workspace(Path()).home if in_project else None,
        classes_in_order,
    )
    direct = direct_evaluation.DirectEvaluation(request, direct_evaluation.resolve_compute(device))
    row = direct_evaluation.leaderboard_entry(direct, against[1] or model_source[0].stem) if against[0] else None
    if dry_run:
        typer.echo(json.dumps(direct.estimate(), indent=2))
        return
    if shards is not None:
        direct.run_shards(shards, quiet=as_json)
        return
    with work.progress_lines(work.Monitor(direct.evaluation.tasks) if as_json else None):
        result = direct.run(fresh, as_json, options)
    comparison = direct_evaluation.compare_with_robustbench(direct, result, row) if row else []
    if as_json:
        typer.echo(json.dumps(result.summary | ({"against": comparison} if comparison else {}), sort_keys=True))
        return
    for line in [*direct_evaluation.result_lines(result), *comparison]:
        typer.echo(line)
    typer.echo(f"{request.folder}: per_image.parquet, summary.json, protocol.json and pictures")
    if request.home is None:
        typer.echo("not tracked: no params.yaml here", err=True)
