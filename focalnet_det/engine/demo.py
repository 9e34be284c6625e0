"""Run the demo: train a small Mask R-CNN on generated data, and evaluate and visualize it."""

import json
import os
from pathlib import Path

import torch

from ..data.shapes.generate import default_root, make_shapes
from .launch import launch_run
from .main import RunArguments

CONFIG = "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"


def run_demo(output: str, overrides: list[str], *, force: bool = False) -> None:
    """Generate the data, train, evaluate on validation images and draw some of them.

    Args:
        output: output folder; a finished run there is repeated, not resumed.
        overrides: of the config, ``key=value``.
        force: regenerate the data.
    """
    root = make_shapes(
        default_root(),
        train=1000,
        val=150,
        size=(192, 192),
        seed=0,
        workers=os.cpu_count() or 1,
        force=force,
    )
    print(f"Data: {root}, 1000 training and 150 validation images.", flush=True)
    launch_run(
        RunArguments(config_file=CONFIG, opts=overrides, output=output, num_cpus=cpu_processes())
    )
    metrics = json.loads((Path(output) / "evaluation/shapes_val/coco_metrics.json").read_text())
    print(
        f"\nValidation images: box AP {metrics['bbox']['AP']:.1f}, mask AP "
        f"{metrics['segm']['AP']:.1f}.\n"
        f"Predictions: {output}/predictions.png\nWeights, logs and tables: {output}"
    )


def cpu_processes() -> int:
    """Return the number of CPU processes: 1 or 2, or 0 if there is a GPU."""
    if torch.cuda.is_available():
        return 0
    # A batch has two images, so more processes would be idle.
    return min(2, os.cpu_count() or 1)
