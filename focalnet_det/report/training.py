"""Curves of a training: losses, learning rate, validation."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# The metric of each task that is drawn.
MAIN_METRICS = ("AP", "mIoU", "PQ")
Points = Mapping[str, Sequence[tuple[int, float]]]


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(iteration, value) of each scalar in a file of JSON lines, in order of iteration."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        iteration = int(row.pop("iteration"))
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, {})[iteration + 1] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def smoothed(points: Sequence[tuple[int, float]], keep: float = 0.9) -> list[tuple[int, float]]:
    """Exponential moving average, free of the bias towards its start."""
    mean, weight, result = 0.0, 0.0, []
    for iteration, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        result.append((iteration, mean / weight))
    return result


def training_figure(curves: Points) -> Figure | None:
    """Losses and learning rate over the iterations, and validation metrics; None without losses."""
    losses = {name: points for name, points in curves.items() if "loss" in name}
    if not losses:
        return None
    metrics = {n: p for n, p in curves.items() if n.rpartition("/")[2] in MAIN_METRICS}
    panels = 3 if metrics else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.3 * panels, 3.6), layout="constrained")
    for name, points in sorted(losses.items(), key=lambda item: item[0] != "total_loss"):
        width = 2.0 if name == "total_loss" else 1.0
        axes[0].plot(*zip(*smoothed(points), strict=True), label=name, linewidth=width)
    axes[0].set_title("losses, smoothed")
    axes[1].plot(*zip(*curves.get("lr", [(0, math.nan)]), strict=True), color="tab:gray")
    axes[1].set_title("learning rate")
    for name, points in metrics.items():
        axes[2].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes[2].set_title("validation, percent")
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[1]:
            axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylim(bottom=0)
    return figure
