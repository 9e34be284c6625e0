"""The demo: generated data, a small Mask R-CNN, its AP table and its pictures."""

import json
import os
from pathlib import Path

import torch

from ..data.shapes.generate import default_root, make_shapes
from .launch import launch_run
from .main import RunArguments

CONFIG = (
    Path(__file__).parents[2]
    / "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"
)


def run_demo(output: str, overrides: list[str], *, force: bool = False) -> None:
    """Generate the data, trains, evaluates on held-out images and draws some of them.

    Args:
        output: folder of the run; a finished run there is repeated, not continued.
        overrides: of the config, ``key=value``.
        force: draw the data anew.
    """
    if not CONFIG.is_file():
        raise ValueError(f"The demo runs from a clone of the repository: {CONFIG} is missing.")
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
        RunArguments(
            config_file=str(CONFIG), opts=overrides, output=output, num_cpus=cpu_processes()
        )
    )
    metrics = json.loads((Path(output) / "evaluation/shapes_val/coco_metrics.json").read_text())
    print(
        f"\nHeld-out images: box AP {metrics['bbox']['AP']:.1f}, mask AP "
        f"{metrics['segm']['AP']:.1f}.\n"
        f"Pictures: {output}/predictions.png\nWeights, logs and tables: {output}"
    )


def cpu_processes() -> int:
    """Return 1 or 2 processes, which share the cores; 0, meaning one, where there is a GPU."""
    if torch.cuda.is_available():
        return 0
    # Each takes one of the two images of a batch.
    return min(2, os.cpu_count() or 1)
