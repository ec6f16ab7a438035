"""Pictures of a tuning study: what trials reached, how they got there, where in the space they were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmat.metrics.pictures import PALETTE, dress, new_figure, save

# state -> name for people, colour, marker, filled
_LOOK = {
    "COMPLETE": ("complete", PALETTE[0], "o", True),
    "PRUNED": ("pruned, at its last report", "#868e96", "o", False),
}
_Y_LABEL = "PGD accuracy on validation"


class Trial(NamedTuple):
    number: int
    state: str  # COMPLETE, PRUNED or FAIL
    parameters: Mapping[str, float]
    value: float | None  # share of 1; None of a trial that failed before its first report
    reports: Mapping[int, float]  # images seen -> value


def history(path: Path, trials: Sequence[Trial]) -> None:
    """Value of every trial, and the best complete one so far."""
    figure, axes = new_figure(7, 3.6)
    for state in _LOOK:
        _dots(axes, [(t.number, t.value) for t in trials if t.state == state and t.value is not None], state)
    complete = [t for t in trials if t.state == "COMPLETE" and t.value is not None]
    if complete:
        best = np.maximum.accumulate([t.value for t in complete if t.value is not None])
        end = [t.number for t in complete] + [trials[-1].number]
        axes.step(end, [*best, best[-1]], where="post", color=PALETTE[1], linewidth=1.5, label="best so far")
    for k, trial in enumerate(t for t in trials if t.state == "FAIL"):
        axes.axvline(trial.number, color=PALETTE[4], linestyle=":", linewidth=1, label=None if k else "failed")
    dress(axes, "Trials in their order", "trial", _Y_LABEL)
    save(figure, path)


def curves(path: Path, trials: Sequence[Trial]) -> None:
    """Reports over images seen."""
    figure, axes = new_figure(7, 3.6)
    complete = [t for t in trials if t.state == "COMPLETE"]
    best = max(complete, key=lambda t: t.value or 0.0, default=None)
    shown = set[str]()
    for trial in trials:
        if not trial.reports:
            continue
        name, colour, width = "complete", PALETTE[0], 1.0
        if trial.state != "COMPLETE":
            name, colour = "stopped early", "#adb5bd"
        if trial is best:
            name, colour, width = f"best: trial {trial.number}", PALETTE[1], 2.2
        points = sorted(trial.reports.items())
        label = None if name in shown else name
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker=".", markersize=4, label=label)
        shown.add(name)
    dress(axes, "Reports of every trial", "images seen", _Y_LABEL, legend=bool(shown))
    save(figure, path)


def slices(path: Path, trials: Sequence[Trial], scales: Mapping[str, str]) -> None:
    """Value over each parameter. scales: parameter -> "linear" or "log"."""
    figure, grid = new_figure(3.1 * len(scales), 3.4, columns=len(scales))
    for axes, (name, scale) in zip(np.atleast_1d(grid), scales.items(), strict=True):
        for state in _LOOK:
            points = [(t.parameters[name], t.value) for t in trials if t.state == state and t.value is not None]
            _dots(axes, points, state)
        if scale == "log":
            _log_axis(axes, [t.parameters[name] for t in trials if name in t.parameters])
        first = name == next(iter(scales))
        title = "filled: complete; hollow: pruned, at its last report" if first else ""
        dress(axes, title, name.replace("_", " "), _Y_LABEL if first else "", legend=False)
    save(figure, path)


def importances(path: Path, shares: Mapping[str, float], complete: int) -> None:
    """How much of the variance among complete trials each parameter explains. complete: their number."""
    figure, axes = new_figure(6, 0.6 * len(shares) + 1.1)
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names], color=PALETTE[0], height=0.6)
    for k, name in enumerate(names):
        axes.text(shares[name] + 0.01, k, f"{shares[name]:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlim(0, 1.1)
    dress(axes, f"Importance for PGD accuracy among {complete} complete trials", "share", "", legend=False)
    axes.grid(visible=False)
    save(figure, path)


def _dots(axes: Any, points: Sequence[tuple[float, float]], state: str) -> None:
    if not points:
        return
    name, colour, marker, filled = _LOOK[state]
    face = colour if filled else "none"
    axes.scatter(*zip(*points, strict=True), s=26, marker=marker, facecolors=face, edgecolors=colour, label=name)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic with a few plain numbers: matplotlib's own labels run into each other within one decade."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    steps = [digit * 10.0**power for power in range(-8, 5) for digit in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([s for s in steps if min(values) / 2 <= s <= max(values) * 2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
