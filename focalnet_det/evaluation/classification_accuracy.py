"""Evaluate top-1 and top-5 accuracy of image classification as a Detectron2 evaluator."""

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from numpy.typing import NDArray

from focalnet_det.atomic import write_text
from focalnet_det.evaluation.score_tables import render_table, two_decimals

logger = logging.getLogger(__name__)

METRICS_FILE = "classification_metrics.json"
PREDICTIONS_FILE = "classification_predictions.json"
MEANS = ("top1", "top5", "mean_top1")
TOP = 5
# Number of images with the lowest probability of their class in `classification_metrics.json`.
WORST = 12


@dataclass(frozen=True)
class ImageResult:
    """Result of one image.

    Attributes:
        file_name: of the image.
        label: true class.
        predicted: the classes of the highest scores, at most five, best first.
        scores: their probabilities, 0..1.
        probability: of the true class, 0..1.
    """

    file_name: str
    label: int
    predicted: tuple[int, ...]
    scores: tuple[float, ...]
    probability: float


class ClassificationEvaluator(DatasetEvaluator):
    """Evaluator of top-1, top-5 and per-class accuracy, in percent.

    The main rank scores the images of all ranks; the others return an empty dict. Outputs beyond
    the classes of the dataset are ignored, which is how published 22k heads are evaluated on
    ImageNet-1k.

    Args:
        class_names: in order of class.
        output_dir: folder for `classification_metrics.json` (null for NaN), which includes the
            confusion matrix and the worst images; None writes nothing.
        save_predictions: also write `classification_predictions.json`, the five best classes of
            every image.
        distributed: gather the results of all ranks.
    Raises: ValueError if ``save_predictions`` is set without ``output_dir``.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        output_dir: str | os.PathLike[str] | None = None,
        save_predictions: bool = False,
        distributed: bool = True,
    ) -> None:
        if save_predictions and output_dir is None:
            raise ValueError("save_predictions=True requires an output_dir.")
        self._classes = list(class_names)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._save_predictions = save_predictions
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard all predictions."""
        self._images: list[ImageResult] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Note the best classes of a batch of images.

        Args:
            inputs: dicts with "file_name" and "label".
            outputs: dicts with "class_scores": logits, (K,).
        Raises: ValueError if the model has fewer outputs than the dataset classes.
        """
        count = len(self._classes)
        for image, output in zip(inputs, outputs, strict=True):
            logits = output["class_scores"].float()
            if len(logits) < count:
                raise ValueError(
                    f"The model predicts {len(logits)} classes, but the dataset has {count}. Set "
                    "the model's number of classes to that."
                )
            probabilities = logits[:count].softmax(dim=0).cpu()
            best = probabilities.topk(min(TOP, count))
            label = int(image["label"])
            self._images.append(
                ImageResult(
                    file_name=str(image["file_name"]),
                    label=label,
                    predicted=tuple(best.indices.tolist()),
                    scores=tuple(best.values.tolist()),
                    probability=float(probabilities[label]),
                )
            )

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics, {"classification": {"top1": ..., "top1-dog": ...}}.

        Classes without images are NaN, and are left out of their mean.
        """
        parts = comm.gather(self._images, dst=0) if self._distributed else [self._images]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        images = [image for part in parts for image in part]
        if not images:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return OrderedDict()
        confusion = confusion_of(images, len(self._classes))
        metrics = classification_metrics(images, confusion, self._classes)
        self._report(metrics, confusion, images)
        return OrderedDict(classification=metrics)

    def _report(
        self,
        metrics: Mapping[str, float],
        confusion: NDArray[np.int64],
        images: Sequence[ImageResult],
    ) -> None:
        """Log the tables and write the files."""
        row = ["classification", *(two_decimals(metrics[name]) for name in MEANS)]
        logger.info(
            "Classification, %d images, in percent:\n%s",
            len(images),
            render_table(["task", *MEANS], [row]),
        )
        counts = confusion.sum(axis=1)
        rows = [
            [name, two_decimals(metrics[f"top1-{name}"]), str(count)]
            for name, count in zip(self._classes, counts, strict=True)
        ]
        logger.info("Per class:\n%s", render_table(["class", "top1", "images"], rows))
        if self._output_dir is None:
            return
        worst = sorted(images, key=lambda image: image.probability)[:WORST]
        true, predicted = np.nonzero(confusion)
        content = {
            "metrics": {k: None if math.isnan(v) else v for k, v in metrics.items()},
            "classes": self._classes,
            # (true class, predicted class, images) where there are any.
            "confusion": np.stack([true, predicted, confusion[true, predicted]], 1).tolist(),
            "worst": [asdict(image) for image in worst],
        }
        write_text(self._output_dir / METRICS_FILE, json.dumps(content, allow_nan=False))
        if self._save_predictions:
            listed = json.dumps([asdict(image) for image in images])
            write_text(self._output_dir / PREDICTIONS_FILE, listed)


def confusion_of(images: Sequence[ImageResult], num_classes: int) -> NDArray[np.int64]:
    """Count the images of each true class (rows) by predicted class (columns), (K, K)."""
    pairs = [image.label * num_classes + image.predicted[0] for image in images]
    counts = np.bincount(np.array(pairs, dtype=np.int64), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def classification_metrics(
    images: Sequence[ImageResult], confusion: NDArray[np.int64], class_names: Sequence[str]
) -> dict[str, float]:
    """Compute all metrics in percent, means first.

    Args:
        images: results.
        confusion: (K, K), see :func:`confusion_of`.
        class_names: K names.
    """
    with np.errstate(invalid="ignore"):
        accuracy = 100 * np.diag(confusion) / confusion.sum(axis=1)
    return {
        "top1": 100 * float(np.mean([image.label == image.predicted[0] for image in images])),
        "top5": 100 * float(np.mean([image.label in image.predicted for image in images])),
        "mean_top1": float(np.nanmean(accuracy)),
        **{f"top1-{name}": float(a) for name, a in zip(class_names, accuracy, strict=True)},
    }
