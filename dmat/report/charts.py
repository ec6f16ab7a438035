"""Interactive charts of the report, as plotly figures in plain JSON. An arm has the same colour in all charts.

`page.js` sets the colours of text and grid, because the page has a dark mode. Accuracies are in per cent.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dmat.metrics.intervals import Interval
from dmat.metrics.pictures import PALETTE, History
from dmat.report.ablation import Ablation
from dmat.report.comparison import HEADLINE, MEASURES, ArmMeasure, Comparison
from dmat.report.costs import Cost

if TYPE_CHECKING:  # importing them loads plotly and torch
    from plotly.basedatatypes import BaseTraceType

    from dmat.evaluation.evaluate import SweepPoint

Chart = dict[str, object]  # data and layout, the arguments of Plotly.newPlot
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash")
_LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


def accuracies(comparison: Comparison) -> Chart:
    """Bar chart of the accuracy of each arm by each measure, with 95 % intervals. comparison: of `compare`.

    The bars are horizontal, so that the names of the measures stand side by side at no width.
    """
    import plotly.graph_objects as go

    arms = comparison["arms"]
    traces = []
    for arm, colour in arm_colours(arms).items():
        labelled_values = [
            (heading, arms[arm][measure]) for measure, heading in MEASURES.items() if measure in arms[arm]
        ]
        traces.append(
            go.Bar(
                name=arm,
                y=[heading for heading, _ in labelled_values],
                x=[100 * value["value"] for _, value in labelled_values],
                error_x=error_bars([value for _, value in labelled_values]),
                orientation="h",
                marker_color=colour,
                hovertemplate="%{y}: %{x:.1f} %<extra>" + arm + "</extra>",
            )
        )
    order = {"categoryorder": "array", "categoryarray": list(MEASURES.values()), "autorange": "reversed"}
    layout = {"barmode": "group", "yaxis": order, "xaxis": {"title": "test images, %", "range": [0, 100]}}
    return chart(traces, layout)


def differences(comparison: Comparison) -> Chart | None:
    """Chart of the paired differences from the baseline, in points; None if there is no other arm."""
    import plotly.graph_objects as go

    colours = arm_colours(comparison["arms"])
    traces = []
    for arm, values in comparison["differences"].items():
        labelled_values = [(MEASURES[measure], value) for measure, value in values.items()]
        traces.append(
            go.Scatter(
                name=f"{arm} − {comparison['baseline']}",
                y=[heading for heading, _ in labelled_values],
                x=[100 * value["value"] for _, value in labelled_values],
                error_x=error_bars([value for _, value in labelled_values]),
                mode="markers",
                marker={"color": colours[arm], "size": 9},
                hovertemplate="%{y}: %{x:+.1f} points<extra>" + arm + "</extra>",
            )
        )
    if not traces:
        return None
    layout = {
        "xaxis": {"title": "points", "zeroline": True, "zerolinewidth": 2},
        "yaxis": {"autorange": "reversed", "title": None},
        "scattermode": "group",
        "showlegend": True,
    }
    return chart(traces, layout)


def curves(
    runs_by_arm: Mapping[str, Sequence[str]],
    histories: Mapping[str, History],
    measure: str,
    best: Mapping[str, float] | None = None,
    unit: str = "accuracy, %",
) -> Chart | None:
    """Line chart of one measure of each run over images seen; None if no run has the measure at two times.

    best: run -> images seen by its best weights. With it, best and last weights are marked: the drop between them is
    what overfitting cost. measure: a key of the history. unit: title of the axis; "%" at its end multiplies by 100.
    """
    import plotly.graph_objects as go

    factor = 100 if unit.endswith("%") else 1
    number_format = ".1f" if factor == 100 else ".4g"
    traces = []
    colours = arm_colours(runs_by_arm)
    for arm, runs in runs_by_arm.items():
        for k, run in enumerate(runs):
            points = [(row["images_seen"], factor * row[measure]) for row in histories[run] if measure in row]
            if not points:
                continue
            seen, values = zip(*points, strict=True)
            line = {"color": colours[arm], "width": 2, "dash": _DASHES[k % len(_DASHES)]}
            hover = f"%{{x:,}} images: %{{y:{number_format}}}<extra>{run}</extra>"
            traces.append(go.Scatter(x=seen, y=values, name=run, legendgroup=run, line=line, hovertemplate=hover))
            for weights_name, images_seen, symbol in _marks(seen, (best or {}).get(run)):
                marker = {"color": colours[arm], "size": 12, "symbol": symbol}
                value = values[seen.index(images_seen)]
                traces.append(
                    go.Scatter(
                        x=[images_seen], y=[value], mode="markers", marker=marker, legendgroup=run, showlegend=False,
                        hovertemplate=f"{weights_name} weights: %{{y:{number_format}}}<extra>{run}</extra>",
                    )
                )  # fmt: skip
    if not _has_line(trace["x"] for trace in traces):
        return None
    return chart(traces, {"xaxis": {"title": "images seen"}, "yaxis": {"title": unit, "rangemode": "nonnegative"}})


def _has_line(positions: Iterable[Iterable[float]]) -> bool:
    """Whether the traces of a chart have two points at different places of its horizontal axis. positions: by trace."""
    return len({position for trace in positions for position in trace}) > 1


def _marks(seen: Sequence[float], best: float | None) -> list[tuple[str, float, str]]:
    """Name, images seen and marker symbol of the weights to mark; empty without `best`."""
    return [] if best is None else [("best", best, "star"), ("last", seen[-1], "circle-open")]


def against_epsilon(
    runs_by_arm: Mapping[str, Sequence[str]],
    sweeps: "Mapping[str, Sequence[SweepPoint]]",
    comparison: Comparison,
    threat: Mapping[str, str],
    epsilon: float,
) -> Chart | None:
    """Chart of the PGD accuracy of the best weights against the attack radius, and of AutoAttack at epsilon.
    None if there is only one radius.

    sweeps: run -> points. epsilon: as a number. threat: norm and epsilon as written.
    """
    import plotly.graph_objects as go

    in_255ths = threat["epsilon"].endswith("/255")  # then the axis counts in 255ths too
    unit = 255 if in_255ths else 1
    traces: list[BaseTraceType] = []
    colours = arm_colours(runs_by_arm)
    for arm, runs in runs_by_arm.items():
        for k, run in enumerate(runs):
            points = sorted(sweeps[run], key=lambda point: point["epsilon"])
            traces.append(
                go.Scatter(
                    name=f"{run}, PGD",
                    x=[unit * point["epsilon"] for point in points],
                    y=[100 * point["value"] for point in points],
                    error_y=error_bars(points),
                    line={"color": colours[arm], "width": 2, "dash": _DASHES[k % len(_DASHES)]},
                    hovertemplate="radius %{x:.3g}: %{y:.1f} %<extra>" + run + "</extra>",
                )
            )
        if HEADLINE in comparison["arms"][arm]:
            value = comparison["arms"][arm][HEADLINE]
            traces.append(
                go.Scatter(
                    name=f"{arm}, AutoAttack",
                    x=[unit * epsilon],
                    y=[100 * value["value"]],
                    error_y=error_bars([value]),
                    mode="markers",
                    marker={"color": colours[arm], "size": 10, "symbol": "diamond"},
                    hovertemplate="AutoAttack: %{y:.1f} %<extra>" + arm + "</extra>",
                )
            )
    if not _has_line(trace["x"] for trace in traces):
        return None
    title = f"radius of the attack ({threat['norm']}{', × 255' if in_255ths else ''})"
    layout = {
        "xaxis": {"title": title, "rangemode": "tozero"},
        "yaxis": {"title": "test images, %", "range": [0, 100]},
        "shapes": [
            {
                "type": "line",
                "x0": unit * epsilon,
                "x1": unit * epsilon,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "#868e96", "dash": "dash", "width": 1},
            }
        ],
    }
    return chart(traces, layout)


def quality(
    comparison: Comparison, distances: Mapping[str, tuple[float, str]], image_counts: Mapping[str, int]
) -> tuple[Chart, str] | None:
    """Chart of robust accuracy against the distance of generated from real images, and the heading of its measure.

    Arms without generated images are horizontal lines. distances: arm -> Fréchet distance, and the network that made
    the features, which is the same for all arms. image_counts: arm -> number of generated images. None if the generated
    images of all arms have the same distance: a chart of one place shows no relation.
    """
    import plotly.graph_objects as go

    arms = comparison["arms"]
    measure: ArmMeasure = HEADLINE if all(HEADLINE in values for values in arms.values()) else "best_pgd"
    if not _has_line([[distance] for distance, _ in distances.values()]):
        return None
    colours = arm_colours(arms)
    x_range = [0.0, 1.1 * max(distance for distance, _ in distances.values())]
    lines = [
        go.Scatter(
            name=f"{arm}: no generated images",
            x=x_range,
            y=[100 * arms[arm][measure]["value"]] * 2,
            line={"color": colours[arm], "width": 1.5, "dash": "dash"},
            mode="lines",
            hovertemplate="%{y:.1f} %<extra>" + arm + "</extra>",
        )
        for arm in arms
        if arm not in distances
    ]
    points = [
        go.Scatter(
            name=f"{arm}: {image_counts[arm]:,} images",
            x=[distance],
            y=[100 * arms[arm][measure]["value"]],
            error_y=error_bars([arms[arm][measure]]),
            mode="markers",
            marker={"color": colours[arm], "size": 12},
            hovertemplate="distance %{x:.3g}: %{y:.1f} %<extra>" + arm + "</extra>",
        )
        for arm, (distance, _) in distances.items()
    ]
    (network,) = {network for _, network in distances.values()}
    layout = {
        "xaxis": {"title": f"Fréchet distance (features of {network})", "rangemode": "tozero"},
        "yaxis": {"title": f"{MEASURES[measure]}, %"},
        "showlegend": True,
    }
    return chart([*lines, *points], layout), MEASURES[measure]


def against_varied(ablation: Ablation, comparison: Comparison, measure: ArmMeasure) -> Chart:
    """Line chart of one measure against what the arms vary, with 95 % intervals. Arms without a value are lines."""
    import plotly.graph_objects as go

    arms, positions, ticks = comparison["arms"], ablation.positions, ablation.ticks
    traces: list[BaseTraceType] = [
        go.Scatter(
            name=name,
            x=[positions[arm] for arm in members],
            y=[100 * arms[arm][measure]["value"] for arm in members],
            error_y=error_bars([arms[arm][measure] for arm in members]),
            customdata=members,
            mode="markers" if ablation.scale == "words" else "lines+markers",
            marker={"size": 9, "color": PALETTE[k]},
            line={"color": PALETTE[k], "width": 2},
            hovertemplate="%{customdata}: %{y:.1f} %<extra></extra>",
        )
        for k, (name, members) in enumerate(ablation.series.items())
    ]
    traces += [
        go.Scatter(
            name=arm,
            x=[ticks[0][0], ticks[-1][0]],
            y=[100 * arms[arm][measure]["value"]] * 2,
            line={"color": PALETTE[5], "width": 1.5, "dash": _DASHES[1 + k % (len(_DASHES) - 1)]},
            mode="lines",
            hovertemplate="%{y:.1f} %<extra>" + arm + "</extra>",
        )
        for k, arm in enumerate(ablation.references)
    ]
    x_axis = {
        "title": ablation.key,
        "type": "log" if ablation.scale == "log" else "linear",
        "tickvals": [position for position, _ in ticks],
        "ticktext": [text for _, text in ticks],
    }
    return chart(traces, {"xaxis": x_axis, "yaxis": {"title": f"{MEASURES[measure]}, %"}, "showlegend": True})


def hours(costs: Sequence[Cost], order: Sequence[str]) -> Chart:
    """Stacked bar chart of the device hours of each arm, by stage. order: all stages, in the order of the pipeline."""
    import plotly.graph_objects as go

    stages = [stage for stage in order if any(cost.hours.get(stage) for cost in costs)]
    longest = max(cost.total for cost in costs)
    unit, factor = ("hours", 1.0) if longest >= 1 else ("minutes", 60.0)
    traces = [
        go.Bar(
            name=stage.replace("_", " "),
            y=[cost.arm for cost in costs],
            x=[factor * cost.hours.get(stage, 0.0) for cost in costs],
            orientation="h",
            marker_color=(*PALETTE, "#e8590c", "#1098ad", "#862e9c", "#74b816")[k % 10],
            hovertemplate="%{x:.2f} " + unit + "<extra>" + stage + "</extra>",
        )
        for k, stage in enumerate(stages)
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": f"device {unit}"},
        "yaxis": {"autorange": "reversed"},
        "height": 260 + 60 * len(costs),
        # high enough for one column of names on a phone, without a scroll bar
        "legend": {**_LEGEND, "font": {"size": 11}, "maxheight": 20 * len(stages) + 20},
    }
    return chart(traces, layout)


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """Arm -> colour."""
    return {arm: PALETTE[k % len(PALETTE)] for k, arm in enumerate(arms)}


def error_bars(values: Sequence[Interval]) -> dict[str, object]:
    """Plotly error bars in per cent, from accuracies or differences with intervals as shares of 1."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (value["high"] - value["value"]) for value in values],
        "arrayminus": [100 * (value["value"] - value["low"]) for value in values],
        "thickness": 1.2,
        "width": 4,
    }


def chart(traces: "Sequence[BaseTraceType]", layout: Mapping[str, object]) -> Chart:
    """A chart with the common layout. dragmode is off, so that a finger on a chart scrolls the page."""
    import plotly.graph_objects as go

    common = {
        "height": 380,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "legend": _LEGEND,
        "dragmode": False,
        "template": "none",
    }
    figure = go.Figure(list(traces), {**common, **layout})
    figure.update_xaxes(automargin=True, ticklabelstandoff=6)  # away from the lowest label of the other axis
    figure.update_yaxes(automargin=True)
    plain: Chart = figure.to_plotly_json()
    return plain
