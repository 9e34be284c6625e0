"""Evaluate IoU, accuracy and boundary IoU of semantic segmentation as a Detectron2 evaluator.

hotcoco counts pixels on the CPU, PyTorch on the GPU. Metrics are defined as in mmsegmentation and
Detectron2. Means exclude classes without ground truth, even if predicted, as in Detectron2;
mmsegmentation counts them as 0.
"""

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from hotcoco.metrics import pixel_confusion
from numpy.typing import NDArray
from torch import Tensor

from focalnet_det.atomic import write_text
from focalnet_det.data.instances.mappers import size_mismatch_message
from focalnet_det.data.io.labels import IGNORE, LabelReader, read_labels, read_values
from focalnet_det.data.io.write_image import write_png
from focalnet_det.evaluation.score_tables import render_table, two_decimals
from focalnet_det.visualization.draw_semantic import save_comparison, save_iou_chart

from .repeats import is_repeated

logger = logging.getLogger(__name__)

Counts = NDArray[np.int64]
MEANS = ("mIoU", "fwIoU", "mACC", "pACC", "mBIoU")
# Number of images in `worst.png`.
WORST = 6


class SemanticEvaluator(DatasetEvaluator):
    """Evaluator of mIoU, frequency-weighted IoU, accuracies and boundary IoU, in percent.

    Only counts are stored per image. The main rank scores the images of all ranks; the others
    return an empty dict.

    Args:
        class_names: in order of class.
        output_dir: folder for `sem_seg_metrics.json` (null for NaN), which includes the confusion
            matrix; None writes nothing.
        save_predictions: also write `output_dir`/predictions/*.png (pixel values are classes), a
            chart of the IoU of each class (`iou.png`) and the worst images (`worst.png`).
        image_root: image folder, whose subfolders saved predictions reproduce; None for none.
        colors: RGB of each class, 0..255, for visualization; None for a default palette.
        boundary_ratio: width of a boundary, as a fraction of the image diagonal.
        distributed: gather the results of all ranks.
    Raises: ValueError if ``save_predictions`` is set without ``output_dir``.
    Source: arXiv:1411.4038, section 5 (IoU and accuracies); arXiv:2103.16562, section 4 (boundary
        IoU, here per class over the dataset, as IoU is).
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        output_dir: str | os.PathLike[str] | None = None,
        save_predictions: bool = False,
        image_root: str | os.PathLike[str] | None = None,
        colors: Sequence[tuple[int, int, int]] | None = None,
        boundary_ratio: float = 0.02,
        distributed: bool = True,
    ) -> None:
        if save_predictions and output_dir is None:
            raise ValueError("save_predictions=True requires an output_dir.")
        self._classes = list(class_names)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._save_predictions = save_predictions
        self._image_root = None if image_root is None else Path(image_root)
        self._colors = colors
        self._boundary_ratio = boundary_ratio
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard all predictions."""
        count = len(self._classes)
        self._confusion: Counts = np.zeros((count, count), dtype=np.int64)
        # Boundary pixels of each class: intersection and union.
        self._boundary: Counts = np.zeros((2, count), dtype=np.int64)
        self._image_iou: dict[str, float] = {}
        # Label file and its rule, to draw the worst images.
        self._truth: dict[str, tuple[Any, LabelReader | None]] = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Count the pixels of a batch of images.

        Args:
            inputs: dicts with "file_name", "sem_seg_file_name" and optionally "label_rule".
            outputs: dicts with "sem_seg": scores, (K, H, W), in the size of the original image.
        Raises: ValueError if a prediction does not fit the dataset.
        """
        count = len(self._classes)
        for image, output in zip(inputs, outputs, strict=True):
            name = str(image["file_name"])
            scores = output["sem_seg"]
            if len(scores) != count:
                raise ValueError(
                    f"The model predicts {len(scores)} classes, but the dataset has {count}. Set "
                    "the model's number of classes to that."
                )
            if is_repeated(name, self._image_iou):
                continue
            path = image["sem_seg_file_name"]
            truth = read_labels(path, image.get("label_rule"))
            classes = scores.argmax(dim=0)
            # Only the class map is copied from the GPU, not the scores.
            predicted = classes.cpu().numpy()
            if truth.shape != predicted.shape:
                raise ValueError(size_mismatch_message(path, truth.shape, predicted.shape))
            if classes.is_cuda:
                confusion = confusion_of(torch.from_numpy(truth).to(classes.device), classes, count)
            else:
                counts = pixel_confusion(truth, predicted, count, ignore_index=IGNORE)
                confusion = counts.astype(np.int64)
            self._image_iou[name] = self._count(truth, predicted, confusion)
            self._truth[name] = (path, image.get("label_rule"))
            if self._save_predictions:
                self._save(name, predicted)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics, {"sem_seg": {"mIoU": ..., "IoU-wall": ..., "BIoU-wall": ...}}.

        Classes without ground truth are NaN.
        """
        own = (self._confusion, self._boundary, self._image_iou, self._truth)
        parts = comm.gather(own, dst=0) if self._distributed else [own]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        confusion = np.sum([part[0] for part in parts], axis=0)
        boundary = np.sum([part[1] for part in parts], axis=0)
        image_iou = {name: value for part in parts for name, value in part[2].items()}
        if not image_iou:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return OrderedDict()
        metrics = semantic_metrics(confusion, boundary, self._classes)
        self._report(metrics, confusion, image_iou)
        if self._save_predictions:
            self._draw(metrics, image_iou, {k: v for part in parts for k, v in part[3].items()})
        return OrderedDict(sem_seg=metrics)

    def _count(self, truth: Counts, predicted: Counts, confusion: Counts) -> float:
        """Add the counts of one image, and return the mean IoU of its classes."""
        self._confusion += confusion
        width = max(1, round(self._boundary_ratio * math.hypot(*truth.shape)))
        self._boundary += boundary_counts(truth, predicted, len(self._classes), width)
        iou, _ = class_scores(confusion)
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else math.nan

    def _save(self, name: str, predicted: Counts) -> None:
        write_png(self._prediction_path(name), predicted)

    def _prediction_path(self, name: str) -> Path:
        assert self._output_dir is not None
        return prediction_path(self._output_dir, name, self._image_root)

    def _draw(
        self,
        metrics: Mapping[str, float],
        image_iou: Mapping[str, float],
        truth: Mapping[str, tuple[Any, LabelReader | None]],
    ) -> None:
        """Draw the IoU of each class, and the worst images from their saved predictions."""
        assert self._output_dir is not None
        iou = {name: metrics[f"IoU-{name}"] for name in self._classes}
        save_iou_chart(iou, self._output_dir / "iou.png", self._colors)
        scored = [name for name, value in image_iou.items() if not math.isnan(value)]
        rows = [
            (
                name,
                read_labels(*truth[name]),
                read_values(self._prediction_path(name)),
                f"{Path(name).name}: mIoU {100 * image_iou[name]:.1f}",
            )
            for name in sorted(scored, key=lambda name: image_iou[name])[:WORST]
        ]
        if rows:
            save_comparison(rows, self._classes, self._output_dir / "worst.png", self._colors)
        logger.info("Saved visualizations to %s.", self._output_dir)

    def _report(
        self, metrics: Mapping[str, float], confusion: Counts, image_iou: Mapping[str, float]
    ) -> None:
        """Log the tables and write `sem_seg_metrics.json`."""
        means = [two_decimals(metrics[name]) for name in MEANS]
        logger.info(
            "Semantic segmentation, %d images, in percent:\n%s",
            len(image_iou),
            render_table(["task", *MEANS], [["sem_seg", *means]]),
        )
        pixels = confusion.sum(axis=1)
        rows = [
            [name, *(two_decimals(metrics[f"{m}-{name}"]) for m in ("IoU", "ACC", "BIoU")), f"{n}"]
            for name, n in zip(self._classes, pixels, strict=True)
        ]
        logger.info(
            "Per class:\n%s", render_table(["class", "IoU", "accuracy", "BIoU", "pixels"], rows)
        )
        absent = [name for name, n in zip(self._classes, pixels, strict=True) if n == 0]
        if absent:
            logger.info(
                "Classes without ground truth (excluded from the means): %s.", ", ".join(absent)
            )
        if self._output_dir is None:
            return
        content = {
            "metrics": {k: None if math.isnan(v) else v for k, v in metrics.items()},
            "classes": self._classes,
            "confusion": confusion.tolist(),
            "image_mIoU": {k: None if math.isnan(v) else v for k, v in image_iou.items()},
        }
        write_text(self._output_dir / "sem_seg_metrics.json", json.dumps(content, allow_nan=False))


def prediction_path(
    folder: Path, image: str | os.PathLike[str], image_root: str | os.PathLike[str] | None
) -> Path:
    """Return the file of an image's saved prediction, in the same subfolders as the image.

    Args:
        folder: output folder of the evaluation.
        image: image file.
        image_root: image folder; None for no subfolders.
    """
    path = Path(image)
    inside = image_root is not None and path.is_relative_to(image_root)
    below = path.relative_to(str(image_root)) if inside else Path(path.name)
    return folder / "predictions" / below.with_suffix(".png")


def confusion_of(truth: Tensor, predicted: Tensor, num_classes: int) -> Counts:
    """Compute the confusion matrix on the device of the label maps; equal to hotcoco's.

    Args:
        truth: integer (H, W), 0..K-1, or 255 for ignored pixels.
        predicted: integer (H, W), 0..K-1.
        num_classes: K.
    Returns: (K, K), rows are true classes, columns predicted ones.
    """
    valid = truth != IGNORE
    pairs = truth[valid].long() * num_classes + predicted[valid].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).cpu().numpy()


def class_scores(confusion: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute IoU and accuracy of each class, (K,), 0..1, NaN for classes without ground truth.

    Args:
        confusion: (K, K), rows are true classes, columns predicted ones.
    """
    correct, truth = np.diag(confusion), confusion.sum(axis=1)
    union = truth + confusion.sum(axis=0) - correct
    iou, accuracy = np.full(len(truth), np.nan), np.full(len(truth), np.nan)
    present = truth > 0
    iou[present] = correct[present] / union[present]
    accuracy[present] = correct[present] / truth[present]
    return iou, accuracy


def semantic_metrics(
    confusion: Counts, boundary: Counts, class_names: Sequence[str]
) -> dict[str, float]:
    """Compute all metrics in percent, means first.

    Args:
        confusion: (K, K), rows are true classes, columns predicted ones.
        boundary: (2, K), see :func:`boundary_counts`.
        class_names: K names.
    """
    iou, accuracy = class_scores(confusion)
    truth = confusion.sum(axis=1)
    present = truth > 0
    if not present.any():
        logger.warning("All ground-truth pixels are ignored.")
        return dict.fromkeys((*MEANS, *_per_class_names(class_names)), math.nan)
    boundary_iou = np.full(len(truth), np.nan)
    # A class can lack boundary pixels, for example if all of it is next to ignored pixels.
    with_boundary = present & (boundary[1] > 0)
    boundary_iou[with_boundary] = boundary[0, with_boundary] / boundary[1, with_boundary]
    means = {
        "mIoU": np.mean(iou[present]),
        "fwIoU": np.sum(truth[present] / truth.sum() * iou[present]),
        "mACC": np.mean(accuracy[present]),
        "pACC": np.trace(confusion) / truth.sum(),
        "mBIoU": np.mean(boundary_iou[with_boundary]) if with_boundary.any() else math.nan,
    }
    values = [*means.values(), *iou, *accuracy, *boundary_iou]
    names = [*means, *_per_class_names(class_names)]
    return {name: 100 * float(value) for name, value in zip(names, values, strict=True)}


def _per_class_names(class_names: Sequence[str]) -> list[str]:
    return [f"{metric}-{name}" for metric in ("IoU", "ACC", "BIoU") for name in class_names]


def boundary_counts(truth: Counts, predicted: Counts, num_classes: int, width: int) -> Counts:
    """Count the boundary pixels of each class: intersection and union of both label maps.

    The boundary of a class consists of its pixels within ``width`` pixels (maximum norm) of another
    class or the image border. Ignored pixels are excluded from both maps.

    Args:
        truth: (H, W), 0..K-1, or 255 for ignored pixels.
        predicted: (H, W), 0..K-1.
        num_classes: K.
        width: pixels.
    Returns: (2, K).
    """
    predicted = np.where(truth == IGNORE, IGNORE, predicted)
    a, b = (np.where(near_edge(m, width), m, IGNORE) for m in (truth, predicted))
    both = np.bincount(a[(a == b) & (a != IGNORE)], minlength=num_classes)
    in_a, in_b = (np.bincount(m[m != IGNORE], minlength=num_classes) for m in (a, b))
    return np.stack([both, in_a + in_b - both])


def near_edge(labels: Counts, width: int) -> NDArray[np.bool_]:
    """Return the pixels, (H, W), within ``width`` pixels of another label or the map border."""
    # Padding with -1, which is not a label, makes the map border an edge.
    padded = np.pad(labels, width, constant_values=-1).astype(np.float32)
    kernel = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    different = cv2.erode(padded, kernel) != cv2.dilate(padded, kernel)
    return different[width:-width, width:-width]
