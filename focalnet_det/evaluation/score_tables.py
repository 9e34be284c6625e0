"""Format metrics as plain-text tables of 80 columns for logs."""

import io
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
OVERALL_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASK_TITLES = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}

Results = Mapping[str, Mapping[str, float]]


def overall_table(results: Results) -> str:
    """Format one row per task, in percent.

    Args:
        results: {task: {metric: percent}}; missing metrics and NaN are shown as "-".
    """
    rows = [[task, *map(two_decimals, _select(metrics))] for task, metrics in results.items()]
    return render_table(["task", *OVERALL_METRICS], rows)


def per_class_table(results: Results, instance_counts: Mapping[str, int]) -> str:
    """Format one row per class: AP of each task in percent, and ground-truth instances.

    Args:
        results: {task: {"AP-<class>": percent}}.
        instance_counts: {class: instances}, in the order of the rows.
    """
    rows = [
        [name, *(two_decimals(m.get(f"AP-{name}")) for m in results.values()), str(count)]
        for name, count in instance_counts.items()
    ]
    titles = [TASK_TITLES.get(task, f"{task} AP") for task in results]
    return render_table(["class", *titles, "instances"], rows)


def _select(metrics: Mapping[str, float]) -> list[float | None]:
    return [metrics.get(name) for name in OVERALL_METRICS]


def two_decimals(value: float | None) -> str:
    """Format a number with two decimals; "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first column is text, the others are numbers."""
    table = Table(box=box.MARKDOWN)
    for index, title in enumerate(header):
        if index == 0:
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, because names may contain markup
    text = io.StringIO()
    Console(file=text, width=WIDTH, force_terminal=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
