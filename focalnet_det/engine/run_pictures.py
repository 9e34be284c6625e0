"""Pictures that a run leaves: what the model finds in some test images, beside the truth."""

import logging
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..experiment import Experiment
from ..heads.tta import TestTimeAugmentation
from ..visualization.curves import save_curves
from ..visualization.draw_instances import INSTANCES, save_comparison
from ..visualization.draw_panoptic import PANOPTIC

logger = logging.getLogger("focalnet_det")

# By the evaluator_type of a dataset.
DRAWINGS = {"coco": INSTANCES, "coco_panoptic_seg": PANOPTIC}


def save_training_curves(experiment: Experiment) -> bool:
    """Draw losses, learning rate and test scores of a run, into ``curves.png``.

    Returns: whether there was anything to draw.
    """
    folder = Path(experiment.options.output_dir)
    drawn = save_curves(folder / "metrics.json", folder / "curves.png")
    if drawn:
        logger.info("Training curves: %s", folder / "curves.png")
    return drawn


def save_predictions(experiment: Experiment, model: nn.Module) -> Path | None:
    """Draws images spread evenly over the first test set, into ``predictions.png``.

    Args:
        experiment: says how many images, and where to.
        model: in any mode; it is put back into it.
    Returns: the path, or None if there is nothing to draw.
    """
    options = experiment.options
    name = next(iter(experiment.test_loaders), None)
    drawings = DRAWINGS.get(MetadataCatalog.get(name).get("evaluator_type")) if name else None
    if name is None or drawings is None:
        return None
    records = DatasetCatalog.get(name)
    count = min(options.pictures, len(records))
    if count == 0:
        return None
    chosen = range(0, len(records) - len(records) % count, len(records) // count)
    # The set behind the loader: the loader itself would give each process its share alone.
    mapped = experiment.test_loaders[name]().dataset
    path = Path(options.output_dir) / "predictions.png"
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        save_comparison(
            # With test-time augmentation the set has views in place of images.
            TestTimeAugmentation(model),
            [records[i] for i in chosen],
            [mapped[i] for i in chosen],
            MetadataCatalog.get(name),
            path,
            drawings=drawings,
        )
    model.train(was_training)
    logger.info("Pictures: %s", path)
    return path
