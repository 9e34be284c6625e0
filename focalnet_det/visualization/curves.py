"""Plot training curves from the JSON lines of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray

from .figures import save_figure

# Main metric of each task.
HEADLINES = ("AP", "mIoU", "PQ")

Curve = tuple[list[int], list[float]]


def read_curves(path: Path) -> dict[str, Curve]:
    """Read iterations and values of each metric from a file of JSON lines; skip damaged lines."""
    curves: dict[str, Curve] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            iteration = int(row.pop("iteration"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
        for name, value in row.items():
            if isinstance(value, int | float):
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(float(value))
    return curves


def smoothed(values: Sequence[float], width: int) -> NDArray[np.float64]:
    """Smooth values with a centered moving average over ``width // 2`` neighbors on each side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - width // 2, 0)
    last = np.minimum(index + width // 2 + 1, len(values))
    means: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)
    return means


def save_curves(metrics: Path, path: Path) -> bool:
    """Save a PNG of losses, learning rate and test scores over the iterations of a run.

    Args:
        metrics: ``metrics.json`` of the run.
        path: PNG to write.
    Returns: False if there are no losses, so that nothing is written.
    """
    curves = read_curves(metrics) if metrics.is_file() else {}
    losses = {k: v for k, v in curves.items() if k == "total_loss" or k.startswith("loss_")}
    if not losses:
        return False
    scores = {k: v for k, v in curves.items() if k.rpartition("/")[2] in HEADLINES and "/" in k}
    panels = 2 + bool(scores)
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.8), layout="constrained")
    for name, (iterations, values) in sorted(losses.items(), key=lambda item: -item[1][1][0]):
        width = max(1, len(values) // 25)
        label = name.removeprefix("loss_").replace("total_loss", "total")
        axes[0].plot(iterations, smoothed(values, width), label=label)
    # Losses of 0 cannot be shown on a logarithmic scale.
    if all(min(values) > 0 for _, values in losses.values()):
        axes[0].set_yscale("log")
    _format_axis(axes[0], "loss")
    _plot(axes[1], {"learning rate": curves["lr"]} if "lr" in curves else {}, "learning rate", "")
    if scores:
        _plot(axes[2], {k: scores[k] for k in sorted(scores)}, "test score, %", "o")
        axes[2].set_ylim(bottom=0)
    save_figure(figure, path)
    return True


def _plot(axis: Axes, curves: Mapping[str, Curve], title: str, marker: str) -> None:
    for name, (iterations, values) in curves.items():
        axis.plot(iterations, values, label=name, marker=marker, markersize=4)
    _format_axis(axis, title)


def _format_axis(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    if len(axis.get_lines()) > 1:
        axis.legend(fontsize=7, frameon=False)
