"""The demo: generated data, a small Mask R-CNN, its AP table and its pictures."""

import json
import os
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.datasets import register_shapes
from ..data.shapes import default_root, make_shapes
from ..visualization.predictions import save_comparison
from .experiment import load_config, read_experiment
from .main import RunArguments, launch_run

CONFIG = (
    Path(__file__).parents[2]
    / "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"
)
PICTURES = 6


def run_demo(output: str, overrides: list[str], *, force: bool = False) -> None:
    """Generates the data, trains, evaluates on held-out images and draws some of them.

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
    picture = draw(output, overrides)
    metrics = json.loads((Path(output) / "evaluation/shapes_val/coco_metrics.json").read_text())
    print(
        f"\nHeld-out images: box AP {metrics['bbox']['AP']:.1f}, mask AP "
        f"{metrics['segm']['AP']:.1f}.\n"
        f"Pictures: {picture}\nWeights, logs and tables: {output}"
    )


def cpu_processes() -> int:
    """1, 2 or 4 processes, a core each; 0, meaning one process, where there is a GPU."""
    if torch.cuda.is_available():
        return 0
    # The batch of 4 must be divisible by the number of processes.
    return max(n for n in (1, 2, 4) if n <= max(os.cpu_count() or 1, 1))


def draw(output: str, overrides: list[str]) -> Path:
    """Draws some validation images with what the run's last weights predict; returns the PNG."""
    register_shapes()
    experiment = read_experiment(load_config(CONFIG, overrides))
    model = experiment.model().to(experiment.options.device).eval()
    DetectionCheckpointer(model).load(str(Path(output) / "model_final.pth"))
    records = DatasetCatalog.get("shapes_val")
    step = len(records) // PICTURES
    chosen = set(range(0, step * PICTURES, step))
    loader = experiment.test_loaders["shapes_val"]()
    inputs = [batch[0] for i, batch in enumerate(loader) if i in chosen]
    path = Path(output) / "predictions.png"
    with torch.inference_mode():
        save_comparison(
            model,
            [records[i] for i in sorted(chosen)],
            inputs,
            MetadataCatalog.get("shapes_val"),
            path,
        )
    return path
