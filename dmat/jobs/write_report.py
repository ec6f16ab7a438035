"""write_report: all measurements -> one self-contained HTML page, a Markdown table, and data for `dvc plots`.

Reads per-image tables, so every comparison is paired. Of the stages only this one reads provenance.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmat import NONE, files
from dmat.config import Report, WrittenNumber
from dmat.data.mixing import MIX
from dmat.evaluation.table import PER_IMAGE, PROTOCOL, SUMMARY, read_table
from dmat.job import Job, Result
from dmat.metrics import pictures
from dmat.metrics.image_measures import MEASURES, MeasureRecord
from dmat.report import ablation, charts, comparison, costs, image_table, lineage, page
from dmat.report.ablation import Ablation
from dmat.report.comparison import Comparison
from dmat.training import HISTORY
from dmat.workspace import Provenance, find_workspace

if TYPE_CHECKING:
    from dmat.evaluation.evaluate import EvaluationProtocol, Summary

WeightsSummaries = dict[str, "Summary"]  # best, last -> summary of these weights of a run
Histories = Mapping[str, pictures.History]  # run -> its training history


class ReportInputs:
    """Reads the files of the report and records which they were.

    folder: a name in `job.inputs`. name: of the file below that folder.
    """

    def __init__(self, job: Job):
        self._job = job
        self.sources: list[page.SourceFile] = []

    def json(self, folder: str, name: str) -> Any:
        """The content of a JSON file."""
        return files.read_json(self._path(folder, name))

    def table(self, folder: str, name: str) -> dict[str, np.ndarray]:
        """The columns [N] of a per-image table."""
        return read_table(self._path(folder, name))

    def _path(self, folder: str, name: str) -> Path:
        path = self._job.inputs[folder] / name
        relative = path.relative_to(self._job.root).as_posix()
        self.sources.append(page.SourceFile(relative, files.sha256(path)))
        return path


def run(settings: Report, job: Job) -> Result:
    """Compares the arms and writes comparison.json, history.csv, table.md and report.html."""
    inputs = ReportInputs(job)
    runs_by_arm = settings.arms
    runs = [run for arm_runs in runs_by_arm.values() for run in arm_runs]
    tables = {run: inputs.table("evaluate_robust", f"{run}/{PER_IMAGE}") for run in runs}
    summaries: dict[str, WeightsSummaries] = {run: inputs.json("evaluate_robust", f"{run}/{SUMMARY}") for run in runs}
    histories = {run: inputs.json("train_robust", f"{run}/{HISTORY}") for run in runs}
    origin = _origin(settings, job, inputs)
    arm_comparison = comparison.compare(runs_by_arm, tables, settings)
    for arm, arm_runs in runs_by_arm.items():
        best_gap, last_gap = (
            float(np.mean([summaries[run][weights_name]["train_test_gap"] for run in arm_runs]))
            for weights_name in ("best", "last")
        )
        arm_comparison["arms"][arm] |= {"best_gap": best_gap, "last_gap": last_gap}
    for key in ("no_headline", "notes"):
        arm_comparison[key] = {run: summaries[run]["best"][key] for run in runs if summaries[run]["best"].get(key)}
    if origin.ablation is not None:
        arm_comparison["varied"] = {"key": origin.ablation.key, "values": dict(origin.ablation.values)}
    arm_costs = _costs(settings, inputs, origin, summaries)
    arm_comparison["costs"] = {cost.arm: costs.record(cost) for cost in arm_costs}
    folder = job.result / "report"
    files.write_json(folder / "comparison.json", arm_comparison)
    files.write_text(folder / "history.csv", _history_csv(histories))
    files.write_text(folder / "table.md", comparison.markdown(arm_comparison))
    _draw(job, settings, arm_comparison, histories, origin.ablation)
    content = _content(settings, job, inputs, runs_by_arm, arm_comparison, summaries, histories, origin, arm_costs)
    files.write_text(folder / "report.html", page.render(content))
    groups = arm_comparison["arms"] | {
        f"{arm}_minus_baseline": difference for arm, difference in arm_comparison["differences"].items()
    }
    return Result(
        {
            group: {measure: value["value"] for measure, value in values.items() if isinstance(value, dict)}
            for group, values in groups.items()
        },
        description=comparison.markdown(arm_comparison),
        attachments=[folder / "report.html", folder / "table.md"],
    )


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the numbers come from.

    provenance: "stage instance" -> its record. evaluations: run -> lineage of its evaluation. ancestors: arm ->
    records of all that its evaluations come from. mixes: arm -> its mix. ablation: what the arms vary, or None.
    """

    provenance: dict[str, Provenance]
    evaluations: dict[str, lineage.LineageStep]
    ancestors: dict[str, list[Provenance]]
    mixes: dict[str, Any]
    ablation: Ablation | None


def _origin(settings: Report, job: Job, inputs: ReportInputs) -> Origin:
    stage_instances = [(stage, name) for stage, instances in settings.instances.items() for name in instances]
    provenance: dict[str, Provenance] = {
        f"{stage} {name}": inputs.json(f"provenance/{stage}", f"{name}.json") for stage, name in stage_instances
    }
    makers = {
        path: (stage, name) for stage, name in stage_instances for path in provenance[f"{stage} {name}"]["outputs"]
    }
    # Not verified: DVC has just compared the inputs of this stage, and there may be millions of images.
    chain = lineage.Chain(makers, find_workspace(job.root), verify=False)
    evaluations = {run: chain.step("evaluate_robust", run) for runs in settings.arms.values() for run in runs}
    ancestors = {
        arm: [provenance[step.title] for step in lineage.ancestors([evaluations[run] for run in runs])]
        for arm, runs in settings.arms.items()
    }
    mixes = {arm: inputs.json("mix_images", f"{arm}/{MIX}") for arm in settings.arms}
    image_counts = {arm: mix["generated_images"] for arm, mix in mixes.items()}
    return Origin(provenance, evaluations, ancestors, mixes, ablation.varied(ancestors, image_counts))


def _costs(
    settings: Report, inputs: ReportInputs, origin: Origin, summaries: dict[str, WeightsSummaries]
) -> list[costs.Cost]:
    """The cost of every arm."""
    arm_costs = []
    for arm, runs in settings.arms.items():
        metrics: list[dict[str, float]] = [inputs.json("metrics/train_robust", f"{run}.json") for run in runs]
        arm_costs.append(
            costs.arm_cost(
                arm,
                origin.ancestors[arm],
                sum(int(summaries[run]["last"]["images_seen"]) for run in runs),
                [values.get("training_flops") for values in metrics],
                [
                    _evaluation_flops(origin.provenance[f"evaluate_robust {run}"], summaries[run]["best"], values)
                    for run, values in zip(runs, metrics, strict=True)
                ],
                _flops_of(origin.ancestors[arm], "train_diffusion", "training_flops", inputs),
                _flops_of(origin.ancestors[arm], "generate_images", "sampling_flops", inputs),
            )
        )
    return costs.with_common_peak(arm_costs)


def _flops_of(records: list[Provenance], stage: str, metric: str, inputs: ReportInputs) -> list[float | None]:
    """Operations of every instance of a stage among the records; None where the stage did not count them."""
    names = [record["instance"] for record in records if record["stage"] == stage]
    return [inputs.json(f"metrics/{stage}", f"{name}.json").get(metric) for name in names]


def _evaluation_flops(record: Provenance, best: "Summary", training_metrics: Mapping[str, float]) -> float | None:
    """Operations of an evaluation; None where the training did not count those of a forward pass, and for another suite
    than the standard one."""
    evaluation: Mapping[str, Any] = record["settings"]
    if evaluation["auto_attack"] not in ("standard", NONE):
        return None
    forward, images = training_metrics.get("forward_flops"), best["clean"]["n"]
    robust_share = best["broken_by"].get("none", 0) / images if "broken_by" in best else None
    passes = costs.evaluation_passes(evaluation["pgd_steps"], len(evaluation["sweep"]), robust_share)
    return None if forward is None else forward * passes * images


def _history_csv(histories: Histories) -> str:
    columns = list(dict.fromkeys(name for history in histories.values() for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": run, **row} for run, history in histories.items() for row in history)
    return text.getvalue()


def _draw(
    job: Job, settings: Report, arm_comparison: Comparison, histories: Histories, arm_ablation: Ablation | None
) -> None:
    """Draws PNG pictures for MLflow and for readers of the folder. The page draws its own charts."""
    bars = {
        arm: {
            heading: (values[measure]["value"], values[measure]["low"], values[measure]["high"])
            for measure, heading in comparison.MEASURES.items()
            if all(measure in others for others in arm_comparison["arms"].values())
        }
        for arm, values in arm_comparison["arms"].items()
    }
    pictures.bars(job.pictures / "comparison.png", bars, settings.title)
    for name, title in (
        ("validation_robust", "PGD accuracy of the EMA weights on the validation split"),
        ("train_robust", "Accuracy under the training attack on training batches"),
    ):
        pictures.arms(job.pictures / f"{name}.png", histories, name, title, "accuracy")
    if arm_ablation is not None:
        panels = {
            comparison.MEASURES[measure]: ablation.panel(arm_ablation, arm_comparison, measure)
            for measure in ablation.measures(arm_comparison)
        }
        pictures.ablation(
            job.pictures / "ablation.png",
            panels,
            arm_ablation.ticks,
            arm_ablation.scale,
            arm_ablation.key,
            settings.title,
        )


def _content(
    settings: Report,
    job: Job,
    inputs: ReportInputs,
    runs_by_arm: dict[str, list[str]],
    arm_comparison: Comparison,
    summaries: dict[str, WeightsSummaries],
    histories: Histories,
    origin: Origin,
    arm_costs: list[costs.Cost],
) -> page.PageContent:
    mixes = origin.mixes
    quality: dict[str, list[MeasureRecord]] = {
        name: inputs.json("measure_images", f"{name}/{MEASURES}") for name in settings.instances["measure_images"]
    }
    protocols: dict[str, EvaluationProtocol] = {
        run: inputs.json("evaluate_robust", f"{run}/{PROTOCOL}") for runs in runs_by_arm.values() for run in runs
    }
    protocol = next(iter(protocols.values()))
    comparable = [{key: value for key, value in entry.items() if key != "computed"} for entry in protocols.values()]
    warnings = (
        []
        if all(entry == comparable[0] for entry in comparable)
        else ["The evaluations have different protocols: do not compare their numbers."]
    )
    notes = [f"{run}: {'; '.join(notes_of_run)}." for run, notes_of_run in arm_comparison["notes"].items()]
    chain = page.Picture(job.pictures / "lineage.png", "Each arrow points from a result to the stage that read it.")
    lineage.draw(list(origin.evaluations.values()), chain.path, "What the numbers of this report come from")
    # The images of a mixture are measured by their selections alone, so its arm is no point of the chart.
    selections = {arm: Path(mix["selection"]["path"]).name for arm, mix in mixes.items() if mix["selection"]}
    quality_chart = charts.quality(
        arm_comparison,
        {arm: image_table.frechet_distance(quality[selection]) for arm, selection in selections.items()},
        {arm: mixes[arm]["generated_images"] for arm in selections},
    )
    best = {run: summary["best"]["images_seen"] for run, summary in summaries.items()}
    sweeps = {run: summary["best"]["sweep"] for run, summary in summaries.items()}
    first_runs = [runs[0] for runs in runs_by_arm.values()]
    return page.PageContent(
        title=settings.title,
        sentences=[*warnings, *comparison.sentences(arm_comparison), *notes],
        comparison=arm_comparison,
        measures=comparison.measures_of(arm_comparison),
        protocol=protocol,
        seeds=settings.seeds,
        mixes=mixes,
        quality=image_table.rows(quality),
        selections=list(quality),
        quality_measure=quality_chart[1] if quality_chart else "",
        checks={run: summary["best"]["checks"] for run, summary in summaries.items()},
        costs=arm_costs,
        charts={
            "accuracies": charts.accuracies(arm_comparison),
            "differences": charts.differences(arm_comparison),
            **_ablation_charts(origin.ablation, arm_comparison),
            "validation_robust": charts.curves(runs_by_arm, histories, "validation_robust", best),
            "train_robust": charts.curves(runs_by_arm, histories, "train_robust"),
            "validation_clean": charts.curves(runs_by_arm, histories, "validation_clean", best),
            "loss": charts.curves(runs_by_arm, histories, "train_loss", unit="loss"),
            "learning_rate": charts.curves(runs_by_arm, histories, "learning_rate", unit="learning rate"),
            "against_epsilon": charts.against_epsilon(
                runs_by_arm, sweeps, arm_comparison, protocol["threat"], WrittenNumber(protocol["threat"]["epsilon"])
            ),
            "quality": quality_chart[0] if quality_chart else None,
            "hours": charts.hours(arm_costs, list(settings.instances)),
        },
        sheets=_pictures(settings, job, "measure_images") + _pictures(settings, job, "train_diffusion"),
        attacked=[
            picture
            for picture in _pictures(settings, job, "evaluate_robust")
            if picture.path.parent.name in first_runs and picture.path.stem != "accuracy_against_epsilon"
        ],
        chain=chain,
        chain_lines=lineage.lines(list(origin.evaluations.values())),
        provenance=origin.provenance,
        sources=inputs.sources,
    )


def _ablation_charts(arm_ablation: Ablation | None, arm_comparison: Comparison) -> dict[str, charts.Chart | None]:
    """A chart of clean and one of robust accuracy, by the names that the template uses."""
    names = ("ablation_clean", "ablation_robust")
    return {
        name: None if arm_ablation is None else charts.against_varied(arm_ablation, arm_comparison, measure)
        for name, measure in zip(names, ablation.measures(arm_comparison), strict=True)
    }


def _pictures(settings: Report, job: Job, stage: str) -> list[page.Picture]:
    """The pictures of all instances of a stage, with captions."""
    folders = [job.inputs[f"pictures/{stage}"] / name for name in settings.instances[stage]]
    paths = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    return [page.Picture(path, f"{path.parent.name}: {path.stem.replace('_', ' ')}") for path in paths]
