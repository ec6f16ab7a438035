"""Pictures as PNG files: sheets of images by class, curves over images seen or over the radius of an attack, accuracies
by class, confusion under attack, images with their perturbation.

matplotlib is loaded where it is used and writes no date or version, so equal input gives equal files.
Shapes: N images, H height, W width, C channels, K classes.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]  # of a training: a record per evaluation, with images_seen
PALETTE = ("#0b6e8f", "#d9480f", "#5f3dc4", "#2b8a3e", "#a61e4d", "#495057")
_PNG_METADATA = {"Software": None, "Creation Time": None}
_MAX_ROOMY_CLASSES = 20  # classes up to which rows are high and the cells of a confusion matrix hold numbers
_MAX_LEVEL_TICK = 7  # characters of a tick beside others
_MAX_UPRIGHT_BARS = 20  # of a picture whose numbers, written above them, do not touch
_MAX_CLASS_NAMES = 100  # that fit beside a picture; with more classes every second, third, ... gets its name


def sheet(path: Path, images: np.ndarray, labels: np.ndarray | None, title: str, columns: int = 20) -> None:
    """Draws the first `columns` images of each class, one row per class; without labels, all images row by row.

    images uint8 [N, H, W, C], labels [N].
    """
    _, height, width, channels = images.shape
    classes = [] if labels is None else [str(label) for label in np.unique(labels)]
    if labels is None:
        rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    else:
        rows = [images[np.flatnonzero(labels == label)[:columns]] for label in np.unique(labels)]
        title = f"{title}, one row per class"
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (height + 1), columns * (width + 1), channels), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            canvas[r * (height + 1) : r * (height + 1) + height, c * (width + 1) : c * (width + 1) + width] = image
    figure, axes = new_figure(columns * 0.45, len(rows) * 0.47 + 0.4)
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_yticks([(height + 1) * r + height / 2 for r in range(len(classes))], classes, fontsize=8)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    save(figure, path)


def pairs(
    path: Path, images: np.ndarray, others: np.ndarray, distances: np.ndarray, title: str, columns: int = 10
) -> None:
    """Draws each image beside its counterpart, with their distance below, `columns` pairs per row.

    images, others: uint8 [N, H, W, C]. distances: [N].
    """
    _, height, width, channels = images.shape
    gap = -(-width // 8)  # between the two of a pair; twice as much between pairs
    pitch, rows = 2 * width + 3 * gap, -(-len(images) // columns)
    columns = min(columns, len(images))
    line = height + -(-height // 2)  # with room for the distance
    canvas = np.full((rows * line, columns * pitch - 2 * gap, channels), 255, dtype=np.uint8)
    across = columns * 1.05  # inches
    figure, axes = new_figure(across, across * canvas.shape[0] / canvas.shape[1] + 0.3)
    for k, (image, other, distance) in enumerate(zip(images, others, distances, strict=True)):
        top, left = k // columns * line, k % columns * pitch
        canvas[top : top + height, left : left + width] = image
        canvas[top : top + height, left + width + gap : left + 2 * width + gap] = other
        place = left + width + gap / 2 - 0.5, top + height + height * 0.2
        axes.text(*place, f"{distance:.3g}", ha="center", va="center", fontsize=7)
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_axis_off()
    save(figure, path)


def curves(
    path: Path,
    history: History,
    names: Sequence[str],
    title: str,
    y_label: str,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Plots values of a history over images seen.

    names: values to plot. marks: label -> images seen, for example of the best and the last weights. Each mark is a
    vertical line with the first curve's value there, so that the drop between two marks can be read.
    """
    figure, axes = new_figure(7, 3.6)
    lines = {name: [(row["images_seen"], row[name]) for row in history if name in row] for name in names}
    lines = {name: points for name, points in lines.items() if points}
    for colour, (name, points) in zip(PALETTE, lines.items(), strict=False):
        marker = "." if len(points) == 1 else ""  # a line of one point cannot be seen
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=colour, linewidth=1.6, marker=marker)
    for k, (mark, images_seen) in enumerate((marks or {}).items()):
        axes.axvline(images_seen, color="#868e96", linestyle=("--", ":")[k % 2], linewidth=1)
        value = dict(next(iter(lines.values()), [])).get(images_seen)
        if value is not None:
            axes.plot(images_seen, value, "o", color=PALETTE[0], markersize=5, label=f"{mark}: {value:.4g}")
    style_axes(axes, title, "images seen", y_label)
    save(figure, path)


def arms(path: Path, histories: Mapping[str, History], name: str, title: str, y_label: str) -> None:
    """Plots the value `name` of several runs over images seen.

    histories: run -> its history. Runs of one arm (text before the last "-") share a colour.
    """
    figure, axes = new_figure(7, 3.8)
    groups = list(dict.fromkeys(run.rpartition("-")[0] for run in histories))
    for run, history in histories.items():
        group = run.rpartition("-")[0]
        first = next(other for other in histories if other.rpartition("-")[0] == group) == run
        points = [(row["images_seen"], row[name]) for row in history if name in row]
        axes.plot(
            *zip(*points, strict=True),
            color=PALETTE[groups.index(group) % len(PALETTE)],
            linewidth=1.5,
            marker="." if len(points) == 1 else "",
            label=group.replace("_", " ") if first else None,
        )
    style_axes(axes, title, "images seen", y_label)
    save(figure, path)


def bars(path: Path, table: dict[str, dict[str, tuple[float, float, float]]], title: str) -> None:
    """Plots accuracies with intervals as bars: table[arm][measure] = (value, low, high), in [0, 1]."""
    figure, axes = new_figure(7, 3.8)
    measures = list(next(iter(table.values())))
    rotation = 90 if len(table) * len(measures) > _MAX_UPRIGHT_BARS else 0
    width = 0.8 / len(table)
    for k, (arm, values) in enumerate(table.items()):
        x = np.arange(len(measures)) + (k - (len(table) - 1) / 2) * width
        middle, low, high = (100 * np.array([values[m][i] for m in measures]) for i in range(3))
        axes.bar(x, middle, width * 0.92, color=PALETTE[k % len(PALETTE)], label=arm.replace("_", " "))
        axes.errorbar(x, middle, [middle - low, high - middle], fmt="none", ecolor="#212529", elinewidth=1, capsize=3)
        for position, value, top in zip(x, middle, high, strict=True):
            axes.text(position, top + 0.8, f"{value:.1f}", ha="center", fontsize=7.5, rotation=rotation)
    axes.set_xticks(range(len(measures)), measures, fontsize=8)
    axes.set_ylim(0, 113)  # bars start at 0; room for the numbers
    axes.set_yticks(range(0, 101, 20))
    style_axes(axes, title, "", "accuracy on test, % (95 % interval)", legend=False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=min(len(table), 4))
    save(figure, path)


def ablation(
    path: Path,
    panels: Mapping[str, tuple[Mapping[str, Sequence[tuple[float, float, float, float]]], Mapping[str, float]]],
    ticks: Sequence[tuple[float, str]],
    scale: str,
    x_label: str,
    title: str,
) -> None:
    """Plots accuracies against a quantity, one panel per measure, with intervals.

    panels: measure -> lines and references. Lines: name -> (x, value, low, high) of each point; references: name ->
    value, a horizontal line. Accuracies are in [0, 1]. ticks: positions and texts of the axis. scale: linear or log, or
    words, whose points no line connects.
    """
    figure, row = new_figure(9.5, 4.2, columns=len(panels))
    slanted = max(len(text) for _, text in ticks) > _MAX_LEVEL_TICK  # side by side such words would touch
    for axes, (measure, (lines, references)) in zip(np.atleast_1d(row), panels.items(), strict=True):
        for k, (name, points) in enumerate(lines.items()):
            x, middle, low, high = (np.array(column) for column in zip(*points, strict=True))
            middle, low, high = 100 * middle, 100 * low, 100 * high
            bars = [middle - low, high - middle]
            axes.errorbar(
                x,
                middle,
                bars,
                fmt="o" if scale == "words" else "o-",
                color=PALETTE[k],
                markersize=4,
                capsize=3,
                label=name,
            )
        for k, (name, value) in enumerate(references.items()):
            axes.axhline(100 * value, color=PALETTE[5], linestyle=("--", ":", "-.")[k % 3], linewidth=1.3, label=name)
        axes.set_xscale("log" if scale == "log" else "linear")
        axes.set_xticks([position for position, _ in ticks], [text for _, text in ticks])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.06, y=0.12)
        style_axes(axes, "", x_label, f"{measure}, % (95 % interval)", legend=False)
        if slanted:
            axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    figure.suptitle(title, fontsize=9.5)
    handles, labels = np.atleast_1d(row)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    save(figure, path)


def histogram(path: Path, values: np.ndarray, title: str, x_label: str) -> None:
    """Plots a histogram of values [N] in [0, 1]. Counts are on a log scale, since most scores are close to 1."""
    figure, axes = new_figure(7, 3.2)
    axes.hist(values, bins=50, range=(0, 1), color=PALETTE[0])
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    style_axes(axes, title, x_label, "images", legend=False)
    save(figure, path)


def against_epsilon(
    path: Path,
    curves: dict[str, list[tuple[float, float, float, float]]],
    epsilon: float,
    label: str,
    title: str,
) -> None:
    """Plots accuracy against the radius of the attack: curves[name] = [(radius, value, low, high), ...].

    Radii are in pixels of [0, 1] (or their l2 norm), accuracies in [0, 1].
    epsilon: radius of the threat model, in the unit of the curves; label: how people write it, such as "8/255".
    """
    figure, axes = new_figure(7, 3.6)
    in_255ths = label.endswith("/255")  # then the axis shows whole numbers of 255ths, not 0.0314
    unit = 255 if in_255ths else 1
    for k, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        radius, middle, low, high = np.array(sorted(points), dtype=float).T  # [points] each
        colour = PALETTE[k % len(PALETTE)]
        axes.fill_between(unit * radius, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
        if len(points) == 1:  # a band of no width
            axes.vlines(unit * radius, 100 * low, 100 * high, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(unit * radius, 100 * middle, color=colour, linewidth=1.6, marker=".", label=name.replace("_", " "))
    axes.axvline(unit * epsilon, color="#868e96", linestyle="--", linewidth=1, label=f"threat model: {label}")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    style_axes(
        axes, title, f"radius of the attack{' × 255' if in_255ths else ''}", "accuracy, % (95 % interval)", legend=False
    )
    _legend_outside(figure, axes)
    save(figure, path)


def per_class(
    path: Path, classes: Sequence[str], measures: dict[str, list[tuple[float, float, float]]], title: str
) -> None:
    """Plots the accuracy of each class, one row per class: measures[name][class] = (value, low, high), in [0, 1].

    classes: names of the K classes.
    """
    count = len(classes)
    row_height = 0.34 if count <= _MAX_ROOMY_CLASSES else 0.2  # inches
    figure, axes = new_figure(7, row_height * count + 1.1)
    step = 0.64 / max(len(measures), 1)  # the rest of a row is the gap to the next one
    for k, (name, values) in enumerate(measures.items()):
        y = np.arange(count) + (k - (len(measures) - 1) / 2) * step
        middle, low, high = 100 * np.array(values, dtype=float).reshape(count, 3).T  # [classes] each
        colour = PALETTE[k % len(PALETTE)]
        axes.hlines(y, low, high, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(
            middle,
            y,
            "o",
            color=colour,
            markersize=4 if count <= _MAX_ROOMY_CLASSES else 2.8,
            label=name.replace("_", " "),
        )
    axes.set_ylim(count - 0.5, -0.5)  # the first class on top
    axes.set_xlim(-1, 101)
    style_axes(axes, title, "accuracy, % (95 % interval)", "", legend=False)
    axes.set_yticks(range(count), [_shorten(name) for name in classes], fontsize=_font_size(count))
    axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axes.tick_params(axis="y", which="both", length=0)
    axes.tick_params(axis="x", labeltop=count > _MAX_ROOMY_CLASSES)  # a tall picture is read from both ends
    axes.grid(visible=False, axis="y")
    axes.grid(axis="y", which="minor", color="#dee2e6", linewidth=0.7)
    axes.grid(axis="x", color="#e9ecef", linewidth=0.7)
    _legend_outside(figure, axes)
    save(figure, path)


def confusion(path: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Plots a confusion matrix under attack. counts: int64 [K, K], rows are labels, columns are predictions.

    Numbers and colours are percentages of a row. The colour scale is a square root, so that a few per cent are visible
    beside a nearly full diagonal.
    """
    from matplotlib.colors import PowerNorm

    count = len(classes)
    percentages = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)  # [K, K]; rows without images are all 0
    side = 0.46 * count if count <= _MAX_ROOMY_CLASSES else 0.1 * min(count, _MAX_CLASS_NAMES)  # inches
    figure, axes = new_figure(max(side + 2.2, 4.6), max(side + 1.4, 2.8))
    heatmap = axes.imshow(percentages, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if count <= _MAX_ROOMY_CLASSES:
        for (row, column), number in np.ndenumerate(counts):
            colour = "#adb5bd" if number == 0 else "white" if percentages[row, column] > 35 else "#212529"
            axes.text(
                column, row, f"{percentages[row, column]:.0f}", ha="center", va="center", fontsize=7.5, color=colour
            )
    style_axes(axes, title, "prediction under attack", "label", legend=False)
    tick_classes = range(0, count, -(-count // _MAX_CLASS_NAMES))
    names, size = [_shorten(classes[k]) for k in tick_classes], _font_size(count)
    rotated = count > _MAX_ROOMY_CLASSES or max(map(len, names)) > 4
    axes.set_xticks(tick_classes, names, fontsize=size, rotation=90 if rotated else 0)
    axes.set_yticks(tick_classes, names, fontsize=size)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(heatmap, ax=axes, shrink=0.8, aspect=30, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the images of a label, %", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    save(figure, path)


def perturbations(
    path: Path,
    clean: np.ndarray,
    adversarial: np.ndarray,
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    epsilon: str,
    classes: Sequence[str] = (),
) -> None:
    """Draws clean images, perturbations (grey is none) and adversarial images, with the predictions before and after.

    clean and adversarial: float [N, H, W, C] in [0, 1]; labels and the predictions before and after: int [N]. All
    perturbations are magnified by one factor, which the picture states. epsilon: text for the title.
    classes: class names to write instead of their numbers.
    """
    count = len(clean)
    width = max(1.05 * count + 0.35, 4)
    figure, grid = new_figure(width, 4.1 if classes else 3.7, rows=3, columns=count)
    grid = np.reshape(grid, (3, count))
    change = adversarial - clean
    largest = float(np.abs(change).max())
    factor = 0.5 / max(largest, 1e-12)  # the largest change becomes black or white
    magnified = np.clip(0.5 + factor * change, 0, 1)  # against rounding
    kinds = ("image", f"perturbation\n× {factor:.3g}" if largest else "no\nperturbation", "adversarial")
    arrow = "\n→ " if classes else " → "
    for k in range(count):
        label, prediction, attacked = (_class_label(numbers[k], classes) for numbers in (labels, before, after))
        captions = (label if classes else f"label {label}", "", prediction + arrow + attacked)
        for row, image in enumerate((clean, magnified, adversarial)):
            axes = grid[row][k]
            axes.imshow(image[k].squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(captions[row], fontsize=7.5 if classes else 8)
            axes.set_ylabel("" if k else kinds[row], fontsize=8)
    title = f"Test images, perturbation (epsilon {epsilon}), adversarial images: prediction before → after"
    figure.suptitle(textwrap.fill(title, int(15 * width)), fontsize=9)
    save(figure, path)


def _class_label(number: int, classes: Sequence[str]) -> str:
    return _shorten(classes[int(number)], 16) if classes else str(number)


def _shorten(name: str, max_length: int = 24) -> str:
    return name if len(name) <= max_length else name[: max_length - 1] + "…"


def _font_size(count: int) -> float:
    """Returns the size of class names in points, so that `count` names do not touch."""
    return 8 if count <= _MAX_ROOMY_CLASSES else 5.5


def _legend_outside(figure: "Figure", axes: "Axes") -> None:
    """Puts the legend to the right of the axes, where it hides no point."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", Any]:
    """Returns a figure of `width` (at least 4) times `height` inches, and its axes: one, or an array of several."""
    # Before the import, which fails if the variable names a module of another environment, as notebooks do.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import pyplot

    pyplot.switch_backend("agg")  # if somebody else imported it before
    return pyplot.subplots(rows, columns, figsize=(max(width, 4), height), layout="constrained")


def style_axes(axes: "Axes", title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    """Sets title, labels and grid in the style of all pictures."""
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8, ncols=2)


def save(figure: "Figure", path: Path) -> None:
    """Writes the figure as PNG and closes it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata=_PNG_METADATA)
    pyplot.close(figure)
