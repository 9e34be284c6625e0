"""Save training curves, and predictions on test images beside the ground truth."""

import logging
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..experiment import Experiment
from ..heads.tta import TestTimeAugmentation
from ..visualization.curves import save_curves
from ..visualization.draw_classes import CLASSES, MASKED_IMAGES
from ..visualization.draw_instances import INSTANCES, RowDrawings, save_comparison
from ..visualization.draw_panoptic import PANOPTIC

logger = logging.getLogger("focalnet_det")

# evaluator_type of a dataset -> drawing functions.
DRAWINGS: dict[str, RowDrawings] = {
    "coco": INSTANCES,
    "coco_panoptic_seg": PANOPTIC,
    "classification": CLASSES,
    "unlabeled": MASKED_IMAGES,
}


def save_training_curves(experiment: Experiment) -> bool:
    """Plot losses, learning rate and test scores of a run to ``curves.png``.

    Returns: whether there was anything to plot.
    """
    folder = Path(experiment.options.output_dir)
    drawn = save_curves(folder / "metrics.json", folder / "curves.png")
    if drawn:
        logger.info("Saved training curves to %s.", folder / "curves.png")
    return drawn


def save_predictions(experiment: Experiment, model: nn.Module) -> Path | None:
    """Draw predictions on evenly spaced images of the first test set to ``predictions.png``.

    Args:
        experiment: provides the test sets and the number of images.
        model: in any mode, which is restored.
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
    # The dataset of the loader, because the loader yields only the share of this process.
    mapped = experiment.test_loaders[name]().dataset
    path = Path(options.output_dir) / "predictions.png"
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        save_comparison(
            # With test-time augmentation, samples have views instead of an image.
            TestTimeAugmentation(model),
            [records[i] for i in chosen],
            [mapped[i] for i in chosen],
            MetadataCatalog.get(name),
            path,
            drawings=drawings,
        )
    model.train(was_training)
    logger.info("Saved predictions to %s.", path)
    return path
