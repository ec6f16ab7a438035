"""The comparison while it is computed: what is certain and what is likely about every run so far. Never a headline.

A run is one arm with one seed. Accuracies are shares of 1 in records and per cent in texts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dmat.metrics.intervals import AccuracyRecord
from dmat.metrics.pictures import History
from dmat.report import charts, page

if TYPE_CHECKING:  # importing it loads torch
    from dmat.evaluation.work import Bounds, WorkEstimate

COLUMNS = (
    *("run", "training", "validation: clean", "validation: PGD"),
    *("test: certain", "test: likely, 95 %", "evaluation"),
)
_NOTHING = "—"


@dataclasses.dataclass(frozen=True)
class InterimRun:
    """How far a run is.

    name: such as "generated-1". training: for people, such as "64 % of 256,000 images". history: of its training so
    far. measure: of its result, such as "AutoAttack". estimate: of an evaluation that has begun or can begin.
    result: the accuracy of a finished one; exact for these images, its interval is that of other images.
    """

    arm: str
    name: str
    training: str
    history: History
    measure: str
    estimate: "WorkEstimate | None" = None
    result: AccuracyRecord | None = None

    @property
    def bounds(self) -> "Bounds | None":
        """What is known of the accuracy under the suite while it runs; None before, and for a finished evaluation."""
        return self.estimate["bounds"] if self.estimate is not None else None

    def plain(self) -> dict[str, object]:
        """The record as JSON values."""
        return {**dataclasses.asdict(self), "history": list(self.history)}


def row(run: InterimRun) -> list[str]:
    """The cells of a run, by `COLUMNS`."""
    newest = next((record for record in reversed(run.history) if "validation_robust" in record), None)
    validation = [_NOTHING, _NOTHING]
    if newest is not None:
        validation = [f"{100 * newest[f'validation_{name}']:.1f}" for name in ("clean", "robust")]
    certain, likely = _NOTHING, _NOTHING
    if run.result is not None:
        certain = f"{100 * run.result['value']:.1f} ({run.measure}, n = {run.result['n']:,})"
        likely = f"[{100 * run.result['low']:.1f}, {100 * run.result['high']:.1f}]"
    elif run.bounds is not None:
        certain = f"{100 * run.bounds['low']:.1f} to {100 * run.bounds['high']:.1f} ({run.measure})"
        if run.bounds["likely_low"] is not None and run.bounds["likely_high"] is not None:
            likely = f"{100 * run.bounds['likely_low']:.1f} to {100 * run.bounds['likely_high']:.1f}"
    return [run.name, run.training, *validation, certain, likely, _progress(run)]


def _progress(run: InterimRun) -> str:
    if run.result is not None:
        return "finished"
    if run.estimate is None:
        return "waits for the training"
    done, left = run.estimate["passes_done"], run.estimate["passes_left"]
    if not done:
        return "not begun"
    seconds = run.estimate["seconds_left"]
    time_left = "" if seconds is None else f", {seconds / 60:.0f} min of one process left"
    return f"{100 * done / (done + left):.0f} %{time_left}"


def markdown(runs: Sequence[InterimRun]) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row(run))} |" for run in runs]
    return "\n".join(lines) + "\n"


def render(runs: Sequence[InterimRun], title: str, written: str) -> str:
    """The page as HTML. written: when, for people."""
    by_arm: dict[str, list[str]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run.name)
    histories = {run.name: run.history for run in runs}
    return page.render_template(
        "interim.html.j2",
        {
            "bounds": bounds_chart(runs),
            **{name: charts.curves(by_arm, histories, name) for name in ("validation_robust", "validation_clean")},
        },
        title=title,
        written=written,
        columns=COLUMNS,
        rows=[row(run) for run in runs],
    )


def bounds_chart(runs: Sequence[InterimRun]) -> charts.Chart | None:
    """Chart of what is certain (light), likely (dark) and finished (a point with its interval) about each run;
    None if nothing is."""
    import plotly.graph_objects as go

    colours = charts.arm_colours(dict.fromkeys(run.arm for run in runs))
    traces = []
    for run in runs:
        marks: list[tuple[float, float, float, str]] = []  # low, high, width, text
        if run.bounds is not None:
            marks.append((run.bounds["low"], run.bounds["high"], 0.55, "certain"))
            if run.bounds["likely_low"] is not None and run.bounds["likely_high"] is not None:
                marks.append((run.bounds["likely_low"], run.bounds["likely_high"], 0.25, "likely"))
        for low, high, width, text in marks:
            traces.append(
                go.Bar(
                    y=[run.name], base=[100 * low], x=[100 * (high - low)], orientation="h", width=width,
                    marker_color=colours[run.arm], opacity=0.35 if text == "certain" else 1, showlegend=False,
                    hovertemplate=f"{100 * low:.1f} to {100 * high:.1f} %, {text}<extra>{run.name}</extra>",
                )
            )  # fmt: skip
        if run.result is not None:
            traces.append(
                go.Scatter(
                    y=[run.name], x=[100 * run.result["value"]], error_x=charts.error_bars([run.result]),
                    mode="markers", marker={"color": colours[run.arm], "size": 11}, showlegend=False,
                    hovertemplate="%{x:.1f} %<extra>" + run.name + "</extra>",
                )
            )  # fmt: skip
    if not traces:
        return None
    names = [run.name for run in runs]
    layout: Mapping[str, object] = {
        "barmode": "overlay",
        "height": 140 + 44 * len(names),
        "xaxis": {"title": "test images, %", "range": [0, 100]},
        "yaxis": {"categoryorder": "array", "categoryarray": names, "autorange": "reversed"},
    }
    return charts.chart(traces, layout)
