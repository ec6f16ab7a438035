"""Pictures as PNG files: sheets of images by class, curves over images seen, images with their perturbation.

matplotlib is loaded where it is used and told to write no date or version, so equal input gives equal files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PALETTE = ("#0b6e8f", "#d9480f", "#5f3dc4", "#2b8a3e", "#a61e4d", "#495057")
_PLAIN = {"Software": None, "Creation Time": None}


def sheet(path: Path, images: np.ndarray, labels: np.ndarray, title: str, columns: int = 20) -> None:
    """The first `columns` images of each class, one row a class. images uint8 [N, H, W, C]."""
    _, height, width, channels = images.shape
    classes = np.unique(labels)
    rows = [images[labels == label][:columns] for label in classes]
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (height + 1), columns * (width + 1), channels), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            canvas[r * (height + 1) : r * (height + 1) + height, c * (width + 1) : c * (width + 1) + width] = image
    figure, axes = new_figure(columns * 0.45, len(rows) * 0.47 + 0.4)
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_yticks(
        [(height + 1) * r + height / 2 for r in range(len(rows))], [str(label) for label in classes], fontsize=8
    )
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    save(figure, path)


def curves(
    path: Path,
    history: Sequence[dict[str, float]],
    names: Sequence[str],
    title: str,
    y_label: str,
    mark: float | None = None,
) -> None:
    """Values of a history over images seen; `mark`: a dashed line at the best weights."""
    figure, axes = new_figure(7, 3.6)
    for colour, name in zip(PALETTE, names, strict=False):
        points = [(row["images_seen"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=colour, linewidth=1.6)
    if mark is not None:
        axes.axvline(mark, color="#868e96", linestyle="--", linewidth=1, label="best")
    dress(axes, title, "images seen", y_label)
    save(figure, path)


def arms(path: Path, histories: dict[str, Sequence[dict[str, float]]], name: str, title: str, y_label: str) -> None:
    """One value of several runs over images seen; runs of one arm (text before the last "-") share a colour."""
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
            label=group.replace("_", " ") if first else None,
        )
    dress(axes, title, "images seen", y_label)
    save(figure, path)


def bars(path: Path, table: dict[str, dict[str, tuple[float, float, float]]], title: str) -> None:
    """Accuracies with intervals: table[arm][measure] = (value, low, high) in shares of 1."""
    figure, axes = new_figure(7, 3.8)
    measures = list(next(iter(table.values())))
    width = 0.8 / len(table)
    for k, (arm, values) in enumerate(table.items()):
        x = np.arange(len(measures)) + (k - (len(table) - 1) / 2) * width
        middle, low, high = (100 * np.array([values[m][i] for m in measures]) for i in range(3))
        axes.bar(x, middle, width * 0.92, color=PALETTE[k % len(PALETTE)], label=arm.replace("_", " "))
        axes.errorbar(x, middle, [middle - low, high - middle], fmt="none", ecolor="#212529", elinewidth=1, capsize=3)
        for at, value, top in zip(x, middle, high, strict=True):
            axes.text(at, top + 0.8, f"{value:.1f}", ha="center", fontsize=7.5)
    axes.set_xticks(range(len(measures)), measures, fontsize=8)
    axes.set_ylim(0, 118)  # bars start at 0; room for the legend
    axes.set_yticks(range(0, 101, 20))
    dress(axes, title, "", "accuracy on test, % (95 % interval)")
    save(figure, path)


def perturbations(
    path: Path,
    natural: np.ndarray,
    adversarial: np.ndarray,
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    epsilon: str,
) -> None:
    """Rows: image, perturbation (grey is none), adversarial image, with the predictions before and after.

    natural and adversarial: float [N, H, W, C] in [0, 1].
    """
    figure, grid = new_figure(1.05 * len(natural), 3.6, rows=3, columns=len(natural))
    change = adversarial - natural
    scaled = 0.5 + change / (2 * max(float(np.abs(change).max()), 1e-12))
    for k in range(len(natural)):
        captions = (f"label {labels[k]}", "", f"{before[k]} → {after[k]}")
        for row, image in enumerate((natural, scaled, adversarial)):
            axes = grid[row][k]
            axes.imshow(image[k].squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(captions[row], fontsize=8)
    figure.suptitle(
        f"Test images, perturbation (epsilon {epsilon}), adversarial images: prediction before → after", fontsize=9
    )
    save(figure, path)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """A figure of so many inches, and its axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(max(width, 4), height), layout="constrained")


def dress(axes: Any, title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    """Title, labels and grid as in all pictures."""
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dee2e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=8, ncols=2)


def save(figure: Any, path: Path) -> None:
    """Writes the figure and lets it go."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata=_PLAIN)
    pyplot.close(figure)
