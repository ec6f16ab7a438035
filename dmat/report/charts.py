"""Interactive charts of the report, as plotly figures in plain JSON. An arm has one colour in all of them.

Colours of text and grid are the page's (it has a dark side), so they are left to `page.js`. Accuracies are in per cent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dmat.metrics.pictures import PALETTE
from dmat.report.comparison import HEADLINE, MEASURES
from dmat.report.costs import Cost

Chart = dict[str, Any]  # data and layout, as Plotly.newPlot takes them
History = Sequence[Mapping[str, float]]
_DASHES = ("solid", "dot", "dash", "dashdot", "longdash")


def accuracies(comparison: Mapping[str, Any]) -> Chart:
    """Bars of each measure with 95 % intervals."""
    import plotly.graph_objects as go

    arms = comparison["arms"]
    traces = []
    for arm, colour in _colours(arms).items():
        shown = [(heading, arms[arm][m]) for m, heading in MEASURES.items() if m in arms[arm]]
        traces.append(
            go.Bar(
                name=arm,
                x=[heading for heading, _ in shown],
                y=[100 * value["value"] for _, value in shown],
                error_y=_error([value for _, value in shown]),
                marker_color=colour,
                hovertemplate="%{x}: %{y:.1f} %<extra>" + arm + "</extra>",
            )
        )
    order = {"categoryorder": "array", "categoryarray": list(MEASURES.values())}
    layout = {"barmode": "group", "xaxis": order, "yaxis": {"title": "test images, %", "range": [0, 100]}}
    return _chart(traces, layout)


def differences(comparison: Mapping[str, Any]) -> Chart | None:
    """Paired differences from the baseline, in points; None without another arm."""
    import plotly.graph_objects as go

    colours = _colours(comparison["arms"])
    traces = []
    for arm, values in comparison["differences"].items():
        shown = [(MEASURES[m], value) for m, value in values.items()]
        traces.append(
            go.Scatter(
                name=f"{arm} − {comparison['baseline']}",
                y=[heading for heading, _ in shown],
                x=[100 * value["value"] for _, value in shown],
                error_x=_error([value for _, value in shown]),
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
    return _chart(traces, layout)


def curves(
    names: Mapping[str, Sequence[str]],
    histories: Mapping[str, History],
    measure: str,
    best: Mapping[str, float] | None = None,
    unit: str = "accuracy, %",
) -> Chart | None:
    """A value of each run over images seen. best: run -> images seen by its best weights; they are marked, and the last
    ones: the way down from one to the other is what training too long took away. None if no run has the value."""
    import plotly.graph_objects as go

    factor = 100 if unit.endswith("%") else 1
    form = ".1f" if factor == 100 else ".4g"
    traces = []
    colours = _colours(names)
    for arm, runs in names.items():
        for k, run in enumerate(runs):
            points = [(row["images_seen"], factor * row[measure]) for row in histories[run] if measure in row]
            if not points:
                continue
            seen, values = zip(*points, strict=True)
            line = {"color": colours[arm], "width": 2, "dash": _DASHES[k % len(_DASHES)]}
            hover = f"%{{x:,}} images: %{{y:{form}}}<extra>{run}</extra>"
            traces.append(go.Scatter(x=seen, y=values, name=run, legendgroup=run, line=line, hovertemplate=hover))
            for word, at, symbol in _marks(seen, (best or {}).get(run)):
                marker = {"color": colours[arm], "size": 12, "symbol": symbol}
                value = values[seen.index(at)]
                traces.append(
                    go.Scatter(
                        x=[at], y=[value], mode="markers", marker=marker, legendgroup=run, showlegend=False,
                        hovertemplate=f"{word} weights: %{{y:{form}}}<extra>{run}</extra>",
                    )
                )  # fmt: skip
    return _chart(traces, {"xaxis": {"title": "images seen"}, "yaxis": {"title": unit}}) if traces else None


def _marks(seen: Sequence[float], best: float | None) -> list[tuple[str, float, str]]:
    return [] if best is None else [("best", best, "star"), ("last", seen[-1], "circle-open")]


def against_epsilon(
    names: Mapping[str, Sequence[str]],
    sweeps: Mapping[str, Sequence[Mapping[str, float]]],
    comparison: Mapping[str, Any],
    threat: Mapping[str, str],
    epsilon: float,
) -> Chart:
    """PGD accuracy of the best weights over the radius of the attack, and each arm's AutoAttack accuracy at epsilon.

    sweeps: run -> points with epsilon, value, low, high. epsilon: as a number; threat: norm and epsilon as written.
    """
    import plotly.graph_objects as go

    of_255 = threat["epsilon"].endswith("/255")  # then the axis counts 255ths, as people do
    unit = 255 if of_255 else 1
    traces: list[Any] = []
    colours = _colours(names)
    for arm, runs in names.items():
        for k, run in enumerate(runs):
            points = sorted(sweeps[run], key=lambda point: point["epsilon"])
            traces.append(
                go.Scatter(
                    name=f"{run}, PGD",
                    x=[unit * point["epsilon"] for point in points],
                    y=[100 * point["value"] for point in points],
                    error_y=_error(points),
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
                    error_y=_error([value]),
                    mode="markers",
                    marker={"color": colours[arm], "size": 10, "symbol": "diamond"},
                    hovertemplate="AutoAttack: %{y:.1f} %<extra>" + arm + "</extra>",
                )
            )
    title = f"radius of the attack ({threat['norm']}{', × 255' if of_255 else ''})"
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
    return _chart(traces, layout)


def quality(
    comparison: Mapping[str, Any], distances: Mapping[str, float], kept: Mapping[str, int]
) -> tuple[Chart, str] | None:
    """Robust accuracy of each arm over the distance of its generated images from real ones, and the measure's heading.
    Arms without generated images are lines. distances, kept: arm -> Fréchet distance, number of images."""
    import plotly.graph_objects as go

    arms = comparison["arms"]
    measure = HEADLINE if all(HEADLINE in values for values in arms.values()) else "best_pgd"
    if not distances:
        return None
    colours = _colours(arms)
    across = [0.0, 1.1 * max(distances.values())]
    lines = [
        go.Scatter(
            name=f"{arm}: no generated images",
            x=across,
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
            name=f"{arm}: {kept[arm]:,} images",
            x=[distance],
            y=[100 * arms[arm][measure]["value"]],
            error_y=_error([arms[arm][measure]]),
            mode="markers",
            marker={"color": colours[arm], "size": 12},
            hovertemplate="distance %{x:.3g}: %{y:.1f} %<extra>" + arm + "</extra>",
        )
        for arm, distance in distances.items()
    ]
    layout = {
        "xaxis": {"title": "Fréchet distance (scorer's features)", "rangemode": "tozero"},
        "yaxis": {"title": f"{MEASURES[measure]}, %"},
        "showlegend": True,
    }
    return _chart([*lines, *points], layout), MEASURES[measure]


def hours(costs: Sequence[Cost], order: Sequence[str]) -> Chart:
    """Device hours of each arm, by stage. order: all stages, in theirs."""
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
        "height": 220 + 60 * len(costs),
    }
    return _chart(traces, layout)


def _colours(arms: Mapping[str, Any]) -> dict[str, str]:
    return {arm: PALETTE[k % len(PALETTE)] for k, arm in enumerate(arms)}


def _error(values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """From intervals around shares of 1, in per cent."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (one["high"] - one["value"]) for one in values],
        "arrayminus": [100 * (one["value"] - one["low"]) for one in values],
        "thickness": 1.2,
        "width": 4,
    }


def _chart(traces: Sequence[Any], layout: Mapping[str, Any]) -> Chart:
    """dragmode is off, so that a finger on a chart scrolls the page."""
    import plotly.graph_objects as go

    common = {
        "height": 380,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "dragmode": False,
        "template": "none",
    }
    figure = go.Figure(list(traces), {**common, **layout})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    plain: Chart = figure.to_plotly_json()
    return plain
