"""write_report: everything measured -> one self-contained HTML page, a Markdown table, and data for `dvc plots`.

Reads per-image tables, so every comparison is paired. Provenance is read here and nowhere else.
"""

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files, seeds
from dmat.config import WriteReport
from dmat.evaluation.table import read_table
from dmat.jobs.execution import Job
from dmat.jobs.stages import STAGES
from dmat.metrics import intervals, pictures

MEASURES = {  # column of the per-image table -> heading
    "best_clean": "clean, best",
    "best_pgd": "PGD, best",
    "best_auto_attack": "AutoAttack, best",
    "last_clean": "clean, last",
    "last_pgd": "PGD, last",
}


def run(settings: WriteReport, job: Job) -> dict[str, Any]:
    names = {arm: [f"{arm}-{seed}" for seed in job.params.seeds] for arm in job.params.arms}
    tables = {
        run: read_table(job.inputs["evaluate_robust"] / run / "per_image.parquet")
        for runs in names.values()
        for run in runs
    }
    comparison = compare(names, tables, settings)
    for arm, runs in names.items():
        summaries = [files.read_json(job.inputs["evaluate_robust"] / run / "summary.json") for run in runs]
        comparison["arms"][arm] |= {
            f"{which}_gap": float(np.mean([one[which]["train_test_gap"] for one in summaries]))
            for which in ("best", "last")
        }
        comparison["no_headline"] |= {
            run: one["best"]["no_headline"]
            for run, one in zip(runs, summaries, strict=True)
            if one["best"]["no_headline"]
        }
    histories = {
        run: files.read_json(job.inputs["train_robust"] / run / "history.json")
        for runs in names.values()
        for run in runs
    }
    folder = job.result / "report"
    files.write_json(folder / "comparison.json", comparison)
    files.write_text(folder / "history.csv", _history_csv(histories))
    files.write_text(folder / "table.md", markdown(comparison, settings.baseline))
    pictures.bars(job.pictures / "comparison.png", _bar_values(comparison), settings.title)
    pictures.arms(
        job.pictures / "validation_robust.png",
        histories,
        "validation_robust",
        "PGD accuracy of the averaged weights on the validation split",
        "accuracy",
    )
    pictures.arms(
        job.pictures / "train_robust.png",
        histories,
        "train_robust",
        "Accuracy under the training attack on training batches",
        "accuracy",
    )
    files.write_text(folder / "report.html", _page(settings, job, comparison, names))
    groups = comparison["arms"] | {f"{arm}_minus_baseline": v for arm, v in comparison["differences"].items()}
    return {
        group: {measure: value["value"] for measure, value in values.items() if isinstance(value, dict)}
        for group, values in groups.items()
    }


def compare(
    names: dict[str, list[str]], tables: dict[str, dict[str, np.ndarray]], settings: WriteReport
) -> dict[str, Any]:
    """Accuracy of each arm and its paired difference from the baseline, for the measures that all its seeds have: an
    AutoAttack accuracy that is no headline has another name in the table, and none here."""
    measured = {
        arm: [measure for measure in MEASURES if all(measure in tables[run] for run in runs)]
        for arm, runs in names.items()
    }
    draw = seeds.stream(settings.seed, "bootstrap")
    arms: dict[str, dict[str, Any]] = {
        arm: {
            measure: intervals.over_seeds([tables[run][measure] for run in runs], settings.bootstrap, draw)
            for measure in measured[arm]
        }
        for arm, runs in names.items()
    }
    baseline = [tables[run] for run in names[settings.baseline]]
    differences = {
        arm: {
            measure: intervals.paired_difference(
                [tables[run][measure] for run in runs], [table[measure] for table in baseline], settings.bootstrap, draw
            )
            for measure in measured[arm]
            if measure in measured[settings.baseline]
        }
        for arm, runs in names.items()
        if arm != settings.baseline
    }
    return {"baseline": settings.baseline, "arms": arms, "differences": differences, "no_headline": {}}


def measures_of(comparison: dict[str, Any]) -> dict[str, str]:
    """The measures that some arm has, with their headings."""
    return {m: heading for m, heading in MEASURES.items() if any(m in values for values in comparison["arms"].values())}


def markdown(comparison: dict[str, Any], baseline: str) -> str:
    """The table people quote: per cent with 95 % intervals, differences in points."""
    first = next(iter(comparison["arms"].values()))
    measures = list(measures_of(comparison))
    lines = [
        "| arm | " + " | ".join(MEASURES[m] for m in measures) + " | train − test PGD, best | last |",
        "|---" * (len(measures) + 3) + "|",
    ]
    for arm, values in comparison["arms"].items():
        cells = [_per_cent(values[m]) if m in values else "—" for m in measures]
        lines.append(
            f"| {arm} | " + " | ".join(cells) + f" | {100 * values['best_gap']:.1f} | {100 * values['last_gap']:.1f} |"
        )
    for arm, values in comparison["differences"].items():
        cells = [_points(values[m]) if m in values else "—" for m in measures]
        lines.append(f"| {arm} − {baseline} | " + " | ".join(cells) + " | | |")
    n, count = first["best_clean"]["n"], first["best_clean"]["seeds"]
    lines += [
        "",
        f"Per cent of n = {n} test images, {count} seed{'s' if count > 1 else ''}, 95 % intervals in brackets; "
        f"differences are paired by image, in points.",
    ]
    for run, reasons in comparison["no_headline"].items():
        lines += ["", f"No AutoAttack accuracy of {run}: {' '.join(reasons)}"]
    return "\n".join(lines) + "\n"


def _per_cent(value: dict[str, float]) -> str:
    spread = f" ± {100 * value['spread']:.1f}" if value["seeds"] > 1 else ""
    return f"{100 * value['value']:.1f}{spread} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _points(value: dict[str, float]) -> str:
    return f"**{100 * value['value']:+.1f}** [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def _history_csv(histories: dict[str, Sequence[dict[str, float]]]) -> str:
    names = list(dict.fromkeys(name for history in histories.values() for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": run, **row} for run, history in histories.items() for row in history)
    return text.getvalue()


def _bar_values(comparison: dict[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    return {
        arm: {
            heading: (values[m]["value"], values[m]["low"], values[m]["high"])
            for m, heading in MEASURES.items()
            if all(m in others for others in comparison["arms"].values())
        }
        for arm, values in comparison["arms"].items()
    }


def _page(settings: WriteReport, job: Job, comparison: dict[str, Any], names: dict[str, list[str]]) -> str:
    """Renders report.html.j2; pictures are embedded, so that the page needs no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"per_cent": _per_cent, "points": lambda value: _points(value).replace("**", "")}
    provenance = {
        f"{stage.word} {stage.instance(chosen)}": files.read_json(job.inputs[f"provenance/{stage.word}"] / name)
        for stage in STAGES.values()
        if stage.word != "write_report"
        for chosen in stage.choices(job.params)  # and not what an earlier params.yaml left behind
        for name in [f"{stage.instance(chosen)}.json"]
    }
    quality = {
        name: files.read_json(job.inputs["metrics/measure_images"] / f"{name}.json") for name in job.params.selections
    }
    mixes = {arm: files.read_json(job.inputs["mix_images"] / arm / "mix.json") for arm in names}
    first = next(iter(names.values()))[0]
    protocol = files.read_json(job.inputs["evaluate_robust"] / first / "protocol.json")
    own = [
        (job.pictures / f"{name}.png", text)
        for name, text in (
            ("comparison", "Accuracy of every arm on the test images"),
            ("validation_robust", "Selection curve; one line a seed"),
            ("train_robust", "Fit to the training attack"),
        )
    ]
    first_runs = tuple(runs[0] for runs in names.values())
    groups = {
        "What came out": own,
        "Generated images": _found(job, "measure_images") + _found(job, "train_diffusion"),
        "Adversarial images": [item for item in _found(job, "evaluate_robust") if item[1].startswith(first_runs)],
    }
    figures = {title: [(_embedded(path), text) for path, text in items] for title, items in groups.items()}
    return environment.get_template("report.html.j2").render(
        settings=settings,
        comparison=comparison,
        measures=measures_of(comparison),
        figures=figures,
        provenance=provenance,
        quality=quality,
        mixes=mixes,
        protocol=protocol,
        seeds=job.params.seeds,
    )


def _found(job: Job, word: str) -> list[tuple[Path, str]]:
    """Pictures of a stage with their captions."""
    folders = [job.inputs[f"pictures/{word}"] / STAGES[word].instance(c) for c in STAGES[word].choices(job.params)]
    paths = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    return [(path, f"{path.parent.name}: {path.stem.replace('_', ' ')}") for path in paths]


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
