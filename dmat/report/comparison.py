"""Arms compared image by image, and the table that people quote."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dmat import seeds
from dmat.metrics import intervals

MEASURES = {  # column of the per-image table -> heading
    "best_clean": "clean, best",
    "best_pgd": "PGD, best",
    "best_auto_attack": "AutoAttack, best",
    "last_clean": "clean, last",
    "last_pgd": "PGD, last",
}
HEADLINE = "best_auto_attack"


class ComparisonSettings(Protocol):
    baseline: str
    bootstrap: int
    seed: int


def compare(
    names: Mapping[str, Sequence[str]], tables: Mapping[str, Mapping[str, np.ndarray]], settings: ComparisonSettings
) -> dict[str, Any]:
    """Accuracy of each arm and its paired difference from the baseline, for the measures that all its seeds have: an
    AutoAttack accuracy that is no headline has another name in the table, and none here.

    names: arm -> its runs. tables: run -> columns of its per-image table, boolean [n].
    """
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
    return {"baseline": settings.baseline, "arms": arms, "differences": differences, "no_headline": {}, "notes": {}}


def measures_of(comparison: Mapping[str, Any]) -> dict[str, str]:
    """The measures that some arm has, with their headings."""
    return {m: heading for m, heading in MEASURES.items() if any(m in values for values in comparison["arms"].values())}


def sentences(comparison: Mapping[str, Any]) -> list[str]:
    """What came out, in words: one sentence for each arm, by AutoAttack where there is a headline, else by PGD."""
    found = []
    for arm, values in comparison["arms"].items():
        measure = HEADLINE if HEADLINE in values else "best_pgd"
        said = f"{arm}: {per_cent(values[measure])} % of the test images stay right under "
        said += "AutoAttack" if measure == HEADLINE else "PGD (it has no AutoAttack headline)"
        difference = comparison["differences"].get(arm, {}).get(measure)
        if difference is not None:
            sure = difference["low"] > 0 or difference["high"] < 0
            said += f", {points(difference)} points against {comparison['baseline']}"
            better = "; it is the more robust one" if difference["low"] > 0 else "; it is the less robust one"
            said += better if sure else "; the interval holds 0, so these images do not tell the two apart"
        found.append(f"{said}.")
    return found


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table people quote: per cent with 95 % intervals, differences in points."""
    first = next(iter(comparison["arms"].values()))
    measures = list(measures_of(comparison))
    lines = [
        "| arm | " + " | ".join(MEASURES[m] for m in measures) + " | train − test PGD, best | last |",
        "|---" * (len(measures) + 3) + "|",
    ]
    for arm, values in comparison["arms"].items():
        cells = [per_cent(values[m]) if m in values else "—" for m in measures]
        lines.append(
            f"| {arm} | " + " | ".join(cells) + f" | {100 * values['best_gap']:.1f} | {100 * values['last_gap']:.1f} |"
        )
    for arm, values in comparison["differences"].items():
        cells = [f"**{points(values[m]).replace(' ', '** ', 1)}" if m in values else "—" for m in measures]
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


def per_cent(value: Mapping[str, float]) -> str:
    """71.1 [68.2, 73.8], with the standard deviation between seeds if there are several."""
    spread = f" ± {100 * value['spread']:.1f}" if value["seeds"] > 1 else ""
    return f"{100 * value['value']:.1f}{spread} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def points(value: Mapping[str, float]) -> str:
    """+5.1 [+3.3, +6.9]"""
    return f"{100 * value['value']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"
