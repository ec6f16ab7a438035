"""Pictures of a tuning study: values of trials, their learning curves, their positions in the search space."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dmat.metrics.pictures import PALETTE, new_figure, save, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# state -> name for people, colour, marker, filled
_STYLES = {
    "COMPLETE": ("complete", PALETTE[0], "o", True),
    "PRUNED": ("pruned, at its last report", "#868e96", "o", False),
}
_MIN_SURFACE_POINTS = 6  # different points, below which no surface is interpolated
_Y_LABEL = "PGD accuracy on validation"


class TrialPoint(NamedTuple):
    """A trial as the pictures need it."""

    number: int
    state: str  # COMPLETE, PRUNED or FAIL
    parameters: Mapping[str, Any]
    value: float | None  # in [0, 1]; None for a trial that failed before its first report
    reports: Mapping[int, float]  # images seen -> value


def history(path: Path, trials: Sequence[TrialPoint]) -> None:
    """Plots the value of every trial, and the best complete one so far."""
    figure, axes = new_figure(7, 3.6)
    for state in _STYLES:
        _dots(axes, [(t.number, t.value) for t in trials if t.state == state and t.value is not None], state)
    complete = [t for t in trials if t.state == "COMPLETE" and t.value is not None]
    if complete:
        best = np.maximum.accumulate([t.value for t in complete if t.value is not None])
        end = [t.number for t in complete] + [trials[-1].number]
        axes.step(end, [*best, best[-1]], where="post", color=PALETTE[1], linewidth=1.5, label="best so far")
    for k, trial in enumerate(t for t in trials if t.state == "FAIL"):
        axes.axvline(trial.number, color=PALETTE[4], linestyle=":", linewidth=1, label=None if k else "failed")
    style_axes(axes, "Trials in their order", "trial", _Y_LABEL)
    save(figure, path)


def curves(path: Path, trials: Sequence[TrialPoint]) -> None:
    """Plots the reports of all trials over images seen."""
    figure, axes = new_figure(7, 3.6)
    complete = [t for t in trials if t.state == "COMPLETE"]
    best = max(complete, key=lambda t: t.value or 0.0, default=None)
    labelled = set[str]()
    for trial in trials:
        if not trial.reports:
            continue
        name, colour, width = "complete", PALETTE[0], 1.0
        if trial.state != "COMPLETE":
            name, colour = "stopped early", "#adb5bd"
        if trial is best:
            name, colour, width = f"best: trial {trial.number}", PALETTE[1], 2.2
        points = sorted(trial.reports.items())
        label = None if name in labelled else name
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker=".", markersize=4, label=label)
        labelled.add(name)
    style_axes(axes, "Reports of every trial", "images seen", _Y_LABEL, legend=bool(labelled))
    save(figure, path)


def slices(path: Path, trials: Sequence[TrialPoint], scales: Mapping[str, str]) -> None:
    """Plots the value over each parameter.

    scales: parameter -> "linear" or "log", or "names" for values without an order.
    """
    figure, grid = new_figure(3.1 * len(scales), 3.4, columns=len(scales))
    for axes, (name, scale) in zip(np.atleast_1d(grid), scales.items(), strict=True):
        for state in _STYLES:
            points = [(t.parameters[name], t.value) for t in trials if t.state == state and t.value is not None]
            _dots(axes, [(str(x), y) for x, y in points] if scale == "names" else points, state)
        if scale == "log":
            _log_axis(axes, [t.parameters[name] for t in trials if name in t.parameters])
        first = name == next(iter(scales))
        title = "filled: complete; hollow: pruned, at its last report" if first else ""
        style_axes(axes, title, name.replace("_", " "), _Y_LABEL if first else "", legend=False)
    save(figure, path)


def contour(path: Path, trials: Sequence[TrialPoint], pair: tuple[str, str], scales: Mapping[str, str]) -> None:
    """Plots the value over two parameters.

    Filled dots are complete trials; with enough of them, the colours between are interpolated. Hollow dots were pruned;
    their values are of shorter trainings. At least one trial must be complete.
    """
    figure, axes = new_figure(5.6, 4.4)
    complete = [t for t in trials if t.value is not None and t.state == "COMPLETE"]
    pruned = [t for t in trials if t.state == "PRUNED"]
    x, y = (np.array([float(t.parameters[name]) for t in complete]) for name in pair)
    values = np.array([100 * t.value for t in complete if t.value is not None])
    u, v = (np.log(w) if scales[name] == "log" else w for name, w in zip(pair, (x, y), strict=True))
    colours: dict[str, object] = {"cmap": "viridis", "vmin": values.min(), "vmax": values.max()}
    if len({*zip(u.round(9), v.round(9), strict=True)}) >= _MIN_SURFACE_POINTS:
        levels = np.linspace(values.min(), values.max() + 1e-6, 12)
        axes.tricontourf(x, y, _triangles(u, v), values, levels=levels, alpha=0.55, **colours)
    dots = axes.scatter(x, y, c=values, s=34, edgecolors="white", linewidths=0.7, **colours)
    _dots(axes, [(t.parameters[pair[0]], t.parameters[pair[1]]) for t in pruned], "PRUNED")
    bar = figure.colorbar(dots, ax=axes)
    bar.set_label(f"{_Y_LABEL}, %", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    axes.use_sticky_edges = False  # else dots at the edge are cut
    axes.margins(0.06)
    for axis_name, name in zip("xy", pair, strict=True):
        if scales[name] == "log":
            _log_axis(axes, [float(t.parameters[name]) for t in [*complete, *pruned]], axis_name)
    labels = [name.replace("_", " ") for name in pair]
    style_axes(axes, "Filled: complete; hollow: pruned", labels[0], labels[1], legend=False)
    save(figure, path)


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Triangulates P points (u [P], v [P]) in the plotted scale. Returns corner indices, int [triangles, 3]."""
    from matplotlib.tri import Triangulation

    widths = [np.ptp(w) or 1.0 for w in (u, v)]
    return np.asarray(Triangulation(u / widths[0], v / widths[1]).triangles)


def importances(path: Path, shares: Mapping[str, float], complete: int) -> None:
    """Plots the fraction of the variance among complete trials that each parameter explains.

    shares: parameter -> fraction, in [0, 1]; complete: number of complete trials.
    """
    figure, axes = new_figure(6, 0.6 * len(shares) + 1.1)
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names], color=PALETTE[0], height=0.6)
    for k, name in enumerate(names):
        axes.text(shares[name] + 0.01, k, f"{shares[name]:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlim(0, 1.1)
    style_axes(axes, f"Importance for PGD accuracy among {complete} complete trials", "share", "", legend=False)
    axes.grid(visible=False)
    save(figure, path)


def _dots(axes: "Axes", points: Sequence[tuple[float | str, float]], state: str) -> None:
    if not points:
        return
    name, colour, marker, filled = _STYLES[state]
    face = colour if filled else "none"
    x, y = zip(*points, strict=True)
    axes.scatter(x, y, s=26, marker=marker, facecolors=face, edgecolors=colour, label=name)


def _log_axis(axes: "Axes", values: Sequence[float], axis_name: str = "x") -> None:
    """Makes an axis, "x" or "y", logarithmic with a few plain numbers.

    matplotlib's own labels overlap within one decade.
    """
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    getattr(axes, f"set_{axis_name}scale")("log")
    axis = getattr(axes, f"{axis_name}axis")
    steps = [digit * 10.0**power for power in range(-8, 5) for digit in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([s for s in steps if min(values) / 2 <= s <= max(values) * 2]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
