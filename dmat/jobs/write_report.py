"""write_report: everything measured -> one self-contained HTML page, a Markdown table, and data for `dvc plots`.

Reads per-image tables, so every comparison is paired. Provenance is read here and nowhere else.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmat import files
from dmat.config import Report, WrittenNumber
from dmat.data.mixing import MIX
from dmat.evaluation.table import PER_IMAGE, PROTOCOL, SUMMARY, read_table
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.report import charts, comparison, costs, lineage, page
from dmat.training import HISTORY
from dmat.workspace import find_workspace


class Files:
    """The files that the report reads, and which they were."""

    def __init__(self, job: Job):
        self._job = job
        self.sources: list[page.SourceFile] = []

    def json(self, folder: str, name: str) -> Any:
        return files.read_json(self._at(folder, name))

    def table(self, folder: str, name: str) -> dict[str, np.ndarray]:
        return read_table(self._at(folder, name))

    def _at(self, folder: str, name: str) -> Path:
        path = self._job.inputs[folder] / name
        relative = path.relative_to(self._job.root).as_posix()
        self.sources.append(page.SourceFile(relative, files.sha256(path)))
        return path


def run(settings: Report, job: Job) -> Result:
    read = Files(job)
    names = settings.arms
    runs = [run for own in names.values() for run in own]
    tables = {run: read.table("evaluate_robust", f"{run}/{PER_IMAGE}") for run in runs}
    summaries = {run: read.json("evaluate_robust", f"{run}/{SUMMARY}") for run in runs}
    histories = {run: read.json("train_robust", f"{run}/{HISTORY}") for run in runs}
    compared = comparison.compare(names, tables, settings)
    for arm, own in names.items():
        compared["arms"][arm] |= {
            f"{which}_gap": float(np.mean([summaries[run][which]["train_test_gap"] for run in own]))
            for which in ("best", "last")
        }
    for key in ("no_headline", "notes"):
        compared[key] = {run: summaries[run]["best"][key] for run in runs if summaries[run]["best"].get(key)}
    folder = job.result / "report"
    files.write_json(folder / "comparison.json", compared)
    files.write_text(folder / "history.csv", _history_csv(histories))
    files.write_text(folder / "table.md", comparison.markdown(compared))
    _draw(job, settings, compared, histories)
    content = _content(settings, job, read, names, compared, summaries, histories)
    files.write_text(folder / "report.html", page.render(content))
    groups = compared["arms"] | {f"{arm}_minus_baseline": v for arm, v in compared["differences"].items()}
    return Result(
        {
            group: {measure: value["value"] for measure, value in values.items() if isinstance(value, dict)}
            for group, values in groups.items()
        },
        description=comparison.markdown(compared),
        attachments=[folder / "report.html", folder / "table.md"],
    )


def _history_csv(histories: Mapping[str, Sequence[dict[str, float]]]) -> str:
    names = list(dict.fromkeys(name for history in histories.values() for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": run, **row} for run, history in histories.items() for row in history)
    return text.getvalue()


def _draw(
    job: Job, settings: Report, compared: dict[str, Any], histories: dict[str, Sequence[dict[str, float]]]
) -> None:
    """Pictures for MLflow and for who looks into the folder; the page draws its own."""
    bars = {
        arm: {
            heading: (values[m]["value"], values[m]["low"], values[m]["high"])
            for m, heading in comparison.MEASURES.items()
            if all(m in others for others in compared["arms"].values())
        }
        for arm, values in compared["arms"].items()
    }
    pictures.bars(job.pictures / "comparison.png", bars, settings.title)
    for name, title in (
        ("validation_robust", "PGD accuracy of the averaged weights on the validation split"),
        ("train_robust", "Accuracy under the training attack on training batches"),
    ):
        pictures.arms(job.pictures / f"{name}.png", histories, name, title, "accuracy")


def _content(
    settings: Report,
    job: Job,
    read: Files,
    names: dict[str, list[str]],
    compared: dict[str, Any],
    summaries: dict[str, Any],
    histories: dict[str, Any],
) -> page.PageContent:
    made = [(stage, name) for stage, instances in settings.instances.items() for name in instances]
    provenance = {f"{stage} {name}": read.json(f"provenance/{stage}", f"{name}.json") for stage, name in made}
    quality = {
        name: read.json("metrics/measure_images", f"{name}.json") for name in settings.instances["measure_images"]
    }
    mixes = {arm: read.json("mix_images", f"{arm}/{MIX}") for arm in names}
    protocols = {run: read.json("evaluate_robust", f"{run}/{PROTOCOL}") for runs in names.values() for run in runs}
    protocol = next(iter(protocols.values()))
    said = [{key: value for key, value in one.items() if key != "computed"} for one in protocols.values()]
    unlike = [] if all(one == said[0] for one in said) else ["The evaluations do not have one protocol: compare none."]
    notes = [f"{run}: {'; '.join(own)}." for run, own in compared["notes"].items()]
    makers = {path: (stage, name) for stage, name in made for path in provenance[f"{stage} {name}"]["outputs"]}
    # not verified: DVC has just compared what it hands on, and images may be millions
    steps = lineage.Chain(makers, find_workspace(job.root), verify=False)
    results = {run: steps.step("evaluate_robust", run) for runs in names.values() for run in runs}
    spent = []
    for arm, runs in names.items():
        trained = [read.json("metrics/train_robust", f"{run}.json") for run in runs]
        ancestors = [provenance[step.title] for step in lineage.ancestors([results[run] for run in runs])]
        seen = sum(int(summaries[run]["last"]["images_seen"]) for run in runs)
        spent.append(costs.of_arm(arm, ancestors, seen, [one.get("training_flops") for one in trained]))
    spent = costs.one_peak(spent)
    chain = page.Picture(job.pictures / "lineage.png", "Each arrow goes from what was made to what read it.")
    lineage.draw(list(results.values()), chain.path, "What the numbers of this report come from")
    used = {arm: Path(mix["selection"]["path"]).name for arm, mix in mixes.items() if mix["selection"]}
    drawn = charts.quality(
        compared,
        {arm: quality[selection]["scorer_frechet_distance"] for arm, selection in used.items()},
        {arm: mixes[arm]["generated_images"] for arm in used},
    )
    best = {run: summary["best"]["images_seen"] for run, summary in summaries.items()}
    sweeps = {run: summary["best"]["sweep"] for run, summary in summaries.items()}
    first_runs = [runs[0] for runs in names.values()]
    return page.PageContent(
        title=settings.title,
        sentences=[*unlike, *comparison.sentences(compared), *notes],
        comparison=compared,
        measures=comparison.measures_of(compared),
        protocol=protocol,
        seeds=settings.seeds,
        mixes=mixes,
        quality=quality,
        quality_measure=drawn[1] if drawn else "",
        checks={run: summary["best"]["checks"] for run, summary in summaries.items()},
        costs=spent,
        charts={
            "accuracies": charts.accuracies(compared),
            "differences": charts.differences(compared),
            "validation_robust": charts.curves(names, histories, "validation_robust", best),
            "train_robust": charts.curves(names, histories, "train_robust"),
            "validation_clean": charts.curves(names, histories, "validation_clean", best),
            "loss": charts.curves(names, histories, "train_loss", unit="loss"),
            "learning_rate": charts.curves(names, histories, "learning_rate", unit="learning rate"),
            "against_epsilon": charts.against_epsilon(
                names, sweeps, compared, protocol["threat"], WrittenNumber(protocol["threat"]["epsilon"])
            ),
            "quality": drawn[0] if drawn else None,
            "hours": charts.hours(spent, list(settings.instances)),
        },
        sheets=_found(settings, job, "measure_images") + _found(settings, job, "train_diffusion"),
        attacked=[
            one
            for one in _found(settings, job, "evaluate_robust")
            if one.path.parent.name in first_runs and one.path.stem != "accuracy_against_epsilon"
        ],
        chain=chain,
        chain_lines=lineage.lines(list(results.values())),
        provenance=provenance,
        sources=read.sources,
    )


def _found(settings: Report, job: Job, word: str) -> list[page.Picture]:
    """Pictures of a stage with their captions."""
    folders = [job.inputs[f"pictures/{word}"] / name for name in settings.instances[word]]
    paths = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    return [page.Picture(path, f"{path.parent.name}: {path.stem.replace('_', ' ')}") for path in paths]
