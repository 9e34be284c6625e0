"""Save training curves, the first training batch, and predictions beside the ground truth."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..experiment import Experiment, RunArguments, describe
from ..heads.tta import TestTimeAugmentation
from ..visualization.comparison import Compare, save_comparison
from ..visualization.curves import save_curves
from ..visualization.draw_classes import compare_classes, compare_masked_images
from ..visualization.draw_instances import compare_instances
from ..visualization.draw_panoptic import compare_panoptic
from ..visualization.draw_samples import sample_rows
from ..visualization.draw_semantic import compare_semantic
from ..visualization.sheet import save_page
from .random_state import random_states, restore_random_states

logger = logging.getLogger("focalnet_det")

# Samples of the first batch that are drawn.
MAX_SAMPLES = 16
# evaluator_type of a dataset -> drawing function.
DRAWINGS: dict[str, Compare] = {
    "coco": compare_instances,
    "coco_panoptic_seg": compare_panoptic,
    "sem_seg": compare_semantic,
    "classification": compare_classes,
    "unlabeled": compare_masked_images,
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
    if name is None:
        return None
    # A dataset with an evaluator of the user's own may have any labels.
    compare = DRAWINGS.get(MetadataCatalog.get(name).get("evaluator_type", ""))
    if compare is None:
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
            compare=compare,
        )
    model.train(was_training)
    logger.info("Saved predictions to %s.", path)
    return path


def save_first_batch(
    experiment: Experiment, samples: Sequence[dict[str, Any]], image_format: str
) -> None:
    """Draw the first training batch of a run to ``train_samples.png``.

    The random states are left as they were, and a failure is a warning: neither may change the
    training.

    Args:
        experiment: provides the training sets; nothing is drawn with ``train.pictures=0``.
        samples: first batch of this process.
        image_format: channel order of their images.
    """
    options = experiment.options
    if not options.pictures:
        return
    states = random_states(options.device)
    path = Path(options.output_dir) / "train_samples.png"
    try:
        metadata = MetadataCatalog.get(experiment.settings.train_sets[0])
        save_page(sample_rows(samples[:MAX_SAMPLES], metadata, image_format=image_format), path)
        logger.info("Saved the first training batch to %s.", path)
    except Exception as error:  # a dataset of the user's own may hold anything
        logger.warning("Could not draw the first training batch: %r.", error, exc_info=True)
    finally:
        restore_random_states(states, options.device)


def save_training_samples(args: RunArguments, path: Path, *, count: int, seed: int) -> int:
    """Draw the first training samples of a config as a PNG, without training.

    Args:
        args: config, data and overrides, as for a training.
        path: PNG to write.
        count: samples to draw.
        seed: of their order and augmentation.
    Returns: number of samples drawn.
    Raises: ValueError if ``count`` is not positive, or as :func:`describe` for a wrong config.
    """
    if count < 1:
        raise ValueError(f"--count must be 1 or more, not {count}.")
    experiment = describe(args)
    loader = experiment.train_loader()
    loader.seed = seed
    samples: list[dict[str, Any]] = []
    for batch in loader:
        samples += batch
        if len(samples) >= count:
            break
    metadata = MetadataCatalog.get(experiment.settings.train_sets[0])
    rows = sample_rows(samples[:count], metadata, image_format=loader.image_format)
    save_page(rows, path)
    return min(len(samples), count)
