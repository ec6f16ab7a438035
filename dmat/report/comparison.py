"""Comparison of arms image by image, and the table to quote."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypedDict, cast

import numpy as np

from dmat.metrics import intervals
from dmat.metrics.intervals import ArmAccuracy, PairedDifference
from dmat.report.costs import CostRecord

ArmMeasure = Literal["best_clean", "best_pgd", "best_auto_attack", "last_clean", "last_pgd"]
MEASURES: dict[ArmMeasure, str] = {  # column of the per-image table -> heading
    "best_clean": "clean, best",
    "best_pgd": "PGD, best",
    "best_auto_attack": "AutoAttack, best",
    "last_clean": "clean, last",
    "last_pgd": "PGD, last",
}
HEADLINE: Literal["best_auto_attack"] = "best_auto_attack"


class ArmMeasures(TypedDict, total=False):
    """Accuracies of an arm, means over its seeds. A measure is missing if a seed lacks it."""

    best_clean: ArmAccuracy
    best_pgd: ArmAccuracy
    best_auto_attack: ArmAccuracy
    last_clean: ArmAccuracy
    last_pgd: ArmAccuracy
    # PGD accuracy on the training split minus that on the test split, mean over seeds; `write_report` adds them
    best_gap: float
    last_gap: float


class Varied(TypedDict):
    """What the arms of an ablation vary (`report.ablation`)."""

    key: str
    values: dict[str, float | str]  # arm -> its value


class ComparisonExtras(TypedDict, total=False):
    """Keys that are missing where they would be empty."""

    varied: Varied
    costs: dict[str, CostRecord]  # by arm


class Comparison(ComparisonExtras):
    """The comparison of all arms, as comparison.json holds it."""

    baseline: str  # an arm
    arms: dict[str, ArmMeasures]
    differences: dict[str, dict[ArmMeasure, PairedDifference]]  # arm -> measure -> arm minus baseline
    no_headline: dict[str, list[str]]  # run -> why it has no headline; `write_report` adds it, and the notes
    notes: dict[str, list[str]]  # run -> what a reader of its result must know


class ComparisonSettings(Protocol):
    """baseline: an arm. bootstrap: number of resamples. seed: of the bootstrap."""

    baseline: str
    bootstrap: int
    seed: int


def compare(
    runs_by_arm: Mapping[str, Sequence[str]],
    tables: Mapping[str, Mapping[str, np.ndarray]],
    settings: ComparisonSettings,
) -> Comparison:
    """Accuracy of each arm and its paired difference from the baseline, with 95 % intervals, as shares of 1.

    A measure is compared if all seeds of the arm have it. An AutoAttack accuracy that is not a headline has another
    name in the table and is left out. runs_by_arm: arm -> its runs. tables: run -> columns of its per-image table,
    bool [N].
    """
    from dmat import seeds  # not above: it loads torch, which `dmat plan` does not need

    measured = {
        arm: [measure for measure in MEASURES if all(measure in tables[run] for run in runs)]
        for arm, runs in runs_by_arm.items()
    }
    generator = seeds.stream(settings.seed, "bootstrap")
    arms = {
        arm: cast(
            ArmMeasures,
            {
                measure: intervals.over_seeds([tables[run][measure] for run in runs], settings.bootstrap, generator)
                for measure in measured[arm]
            },
        )
        for arm, runs in runs_by_arm.items()
    }
    baseline = [tables[run] for run in runs_by_arm[settings.baseline]]
    differences = {
        arm: {
            measure: intervals.paired_difference(
                [tables[run][measure] for run in runs],
                [table[measure] for table in baseline],
                settings.bootstrap,
                generator,
            )
            for measure in measured[arm]
            if measure in measured[settings.baseline]
        }
        for arm, runs in runs_by_arm.items()
        if arm != settings.baseline
    }
    return {"baseline": settings.baseline, "arms": arms, "differences": differences, "no_headline": {}, "notes": {}}


def measures_of(comparison: Comparison) -> dict[ArmMeasure, str]:
    """Measure -> heading, for the measures that at least one arm has."""
    return {
        measure: heading
        for measure, heading in MEASURES.items()
        if any(measure in values for values in comparison["arms"].values())
    }


def sentences(comparison: Comparison) -> list[str]:
    """The result in words: one sentence per arm, by AutoAttack where the arm has a headline, else by PGD."""
    lines = []
    for arm, values in comparison["arms"].items():
        measure: ArmMeasure = HEADLINE if HEADLINE in values else "best_pgd"
        sentence = f"{arm}: {per_cent(values[measure])} % of the test images stay correct under "
        sentence += "AutoAttack" if measure == HEADLINE else "PGD (it has no AutoAttack headline)"
        difference = comparison["differences"].get(arm, {}).get(measure)
        if difference is not None:
            significant = difference["low"] > 0 or difference["high"] < 0
            sentence += f", {points(difference)} points against {comparison['baseline']}"
            verdict = "; it is the more robust one" if difference["low"] > 0 else "; it is the less robust one"
            sentence += (
                verdict if significant else "; the interval contains 0, so these images do not tell the two apart"
            )
        lines.append(f"{sentence}.")
    return lines


def markdown(comparison: Comparison) -> str:
    """The table to quote, as Markdown: accuracies in per cent with 95 % intervals, differences in points."""
    first = next(iter(comparison["arms"].values()))
    measures = list(measures_of(comparison))
    lines = [
        "| arm | " + " | ".join(MEASURES[measure] for measure in measures) + " | train − test PGD, best | last |",
        "|---" * (len(measures) + 3) + "|",
    ]
    for arm, values in comparison["arms"].items():
        cells = [per_cent(values[measure]) if measure in values else "—" for measure in measures]
        lines.append(
            f"| {arm} | " + " | ".join(cells) + f" | {100 * values['best_gap']:.1f} | {100 * values['last_gap']:.1f} |"
        )
    for arm, differences in comparison["differences"].items():
        cells = [
            f"**{points(differences[measure]).replace(' ', '** ', 1)}" if measure in differences else "—"
            for measure in measures
        ]
        lines.append(f"| {arm} − {comparison['baseline']} | " + " | ".join(cells) + " | | |")
    n, count = first["best_clean"]["n"], first["best_clean"]["seeds"]
    lines += [
        "",
        f"Per cent of n = {n} test images, {count} seed{'s' if count > 1 else ''}, 95 % intervals in brackets; "
        f"differences are paired by image, in points.",
    ]
    for run, reasons in comparison["no_headline"].items():
        lines += ["", f"No AutoAttack accuracy of {run}: {' '.join(reasons)}"]
    for run, notes in comparison["notes"].items():
        lines += ["", f"{run}: {'; '.join(notes)}."]
    return "\n".join(lines) + "\n"


def per_cent(value: ArmAccuracy) -> str:
    """An accuracy as "71.1 [68.2, 73.8]", with the standard deviation between seeds if there are several."""
    spread = f" ± {100 * value['spread']:.1f}" if value["seeds"] > 1 else ""
    return f"{100 * value['value']:.1f}{spread} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def points(value: PairedDifference) -> str:
    """A difference in points as "+5.1 [+3.3, +6.9]"."""
    return f"{100 * value['value']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
