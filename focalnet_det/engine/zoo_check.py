"""Train small recipes on generated data, and check that each reaches a minimum score."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.score_tables import render_table, two_decimals


@dataclass(frozen=True)
class Bar:
    """Recipe below ``configs``, a metric of its last evaluation, and its minimum, percent."""

    config: str
    metric: str
    least: float


BARS = (
    Bar(
        "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py",
        "shapes_panoptic_val/panoptic_seg/PQ",
        60,
    ),
    Bar(
        "Shapes-InstanceSegmentation/cascade_mask_rcnn_focalnet_nano_fpn_small.py",
        "shapes_val/segm/AP",
        50,
    ),
    Bar("Shapes-Detection/retinanet_focalnet_nano_fpn_small.py", "shapes_val/bbox/AP", 50),
)


@dataclass(frozen=True)
class Outcome:
    """Score of a recipe, percent, and CPU time of its run, seconds."""

    bar: Bar
    score: float
    cpu_seconds: float

    @property
    def passed(self) -> bool:
        """Whether the score reaches the minimum."""
        return self.score >= self.bar.least


def check_zoo(output: Path, *, only: str = "", bars: Sequence[Bar] = BARS) -> list[Outcome]:
    """Train recipes sequentially, each in a separate process.

    Args:
        output: folder for one subfolder per recipe.
        only: substring of the paths of the recipes to train; "" for all.
        bars: recipes.
    Raises: ValueError if no recipe matches, subprocess.CalledProcessError if a run fails.
    """
    chosen = [bar for bar in bars if only in bar.config]
    if not chosen:
        raise ValueError(
            f"No recipe matches {only!r}. Known: {', '.join(bar.config for bar in bars)}."
        )
    return [run_bar(bar, output / Path(bar.config).stem) for bar in chosen]


def run_bar(bar: Bar, folder: Path) -> Outcome:
    """Train one recipe; raises as ``check_zoo``."""
    before = _children_seconds()
    command = [sys.executable, "-m", "focalnet_det", "train", "--output", str(folder)]
    subprocess.run([*command, "--config-file", bar.config], check=True)
    *_, last = (folder / "metrics.json").read_text().splitlines()
    return Outcome(bar, float(json.loads(last)[bar.metric]), _children_seconds() - before)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(outcomes: Sequence[Outcome]) -> str:
    """Format a table with one row per recipe."""
    rows = [
        [
            Path(o.bar.config).stem.partition("_focalnet")[0],
            o.bar.metric.rpartition("/")[2],
            two_decimals(o.score),
            f"{o.bar.least:g}",
            f"{o.cpu_seconds / 60:.1f}",
            "passed" if o.passed else "FAILED",
        ]
        for o in outcomes
    ]
    return render_table(["recipe", "metric", "score", "least", "CPU min", ""], rows)
