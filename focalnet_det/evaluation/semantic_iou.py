"""Semantic segmentation: IoU, accuracy and boundary IoU, as a Detectron2 evaluator.

hotcoco counts the pixels, or PyTorch where they are on a GPU. The definitions are those of
mmsegmentation and Detectron2, except where a class that has no ground truth is predicted: like
Detectron2, and unlike mmsegmentation, which counts it as 0, the means leave it out.
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

logger = logging.getLogger(__name__)

Counts = NDArray[np.int64]
MEANS = ("mIoU", "fwIoU", "mACC", "pACC", "mBIoU")
# Images of `worst.png`.
WORST = 6


class SemanticEvaluator(DatasetEvaluator):
    """mIoU, frequency-weighted IoU, accuracies and boundary IoU, in percent.

    Nothing is kept of an image but counts. The main rank scores what all ranks saw; the others
    return an empty dict.

    Args:
        class_names: in order of class.
        output_dir: gets `sem_seg_metrics.json` (null for NaN), with the confusion matrix.
        save_predictions: also write `output_dir`/predictions/*.png, whose values are classes, and
            pictures of the IoU of the classes (`iou.png`) and of the worst images (`worst.png`).
        image_root: folder of the images; saved predictions have the same subfolders. None for no
            subfolders.
        colors: of the classes in pictures, RGB 0..255; None for a palette.
        boundary_ratio: width of a boundary, as a share of the image's diagonal.
        distributed: add the counts of all ranks.
    Raises: ValueError if predictions are to be saved and there is no `output_dir`.
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
            raise ValueError("Predictions can only be saved to an output_dir.")
        self._classes = list(class_names)
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._save_predictions = save_predictions
        self._image_root = None if image_root is None else Path(image_root)
        self._colors = colors
        self._boundary_ratio = boundary_ratio
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        count = len(self._classes)
        self._confusion: Counts = np.zeros((count, count), dtype=np.int64)
        # Boundary pixels of each class: of both maps, of either.
        self._boundary: Counts = np.zeros((2, count), dtype=np.int64)
        self._image_iou: dict[str, float] = {}
        # What is needed to draw an image again: label file and rule.
        self._truth: dict[str, tuple[Any, LabelReader | None]] = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Counts the pixels of some images.

        Args:
            inputs: dicts with "file_name", "sem_seg_file_name" and perhaps "label_rule".
            outputs: dicts with "sem_seg": scores (K, H, W), of the original image's size.
        Raises: ValueError, naming the image, if a prediction cannot belong to the dataset.
        """
        count = len(self._classes)
        for image, output in zip(inputs, outputs, strict=True):
            name = str(image["file_name"])
            scores = output["sem_seg"]
            if len(scores) != count:
                raise ValueError(
                    f"The model predicts {len(scores)} classes, the dataset has "
                    f"{count}: set the model's number of classes to that."
                )
            if name in self._image_iou:
                logger.warning("Image %s was predicted twice; the first result counts.", name)
                continue
            path = image["sem_seg_file_name"]
            truth = read_labels(path, image.get("label_rule"))
            classes = scores.argmax(dim=0)
            # Only the class of each pixel leaves the GPU.
            predicted = classes.cpu().numpy()
            if truth.shape != predicted.shape:
                raise ValueError(size_mismatch_message(path, truth.shape, predicted.shape))
            if classes.is_cuda:
                confusion = confusion_of(torch.from_numpy(truth).to(classes.device), classes, count)
            else:
                found = pixel_confusion(truth, predicted, count, ignore_index=IGNORE)
                confusion = found.astype(np.int64)
            self._image_iou[name] = self._count(truth, predicted, confusion)
            self._truth[name] = (path, image.get("label_rule"))
            if self._save_predictions:
                self._save(name, predicted)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Metrics, {"sem_seg": {"mIoU": ..., "IoU-wall": ..., "ACC-wall": ..., "BIoU-wall": ...}}.

        NaN for classes without ground truth.
        """
        own = (self._confusion, self._boundary, self._image_iou, self._truth)
        parts = comm.gather(own, dst=0) if self._distributed else [own]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        confusion = np.sum([part[0] for part in parts], axis=0)
        boundary = np.sum([part[1] for part in parts], axis=0)
        image_iou = {name: value for part in parts for name, value in part[2].items()}
        if not image_iou:
            logger.warning("No image was processed: nothing to evaluate.")
            return OrderedDict()
        metrics = semantic_metrics(confusion, boundary, self._classes)
        self._report(metrics, confusion, image_iou)
        if self._save_predictions:
            self._draw(metrics, image_iou, {k: v for part in parts for k, v in part[3].items()})
        return OrderedDict(sem_seg=metrics)

    def _count(self, truth: Counts, predicted: Counts, confusion: Counts) -> float:
        """Adds one image; returns the mean IoU of its classes."""
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
        """Draws the IoU of the classes and the worst images, from the saved predictions."""
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
        logger.info("Pictures: %s", self._output_dir)

    def _report(
        self, metrics: Mapping[str, float], confusion: Counts, image_iou: Mapping[str, float]
    ) -> None:
        """Logs the tables and writes `sem_seg_metrics.json`."""
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
                "Classes without ground truth (left out of the means): %s", ", ".join(absent)
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
    """Return the file of an image's saved prediction, in the subfolders that the image is in.

    Args:
        folder: output folder of the evaluation.
        image_root: folder of the images; None for no subfolders.
    """
    path = Path(image)
    inside = image_root is not None and path.is_relative_to(image_root)
    below = path.relative_to(str(image_root)) if inside else Path(path.name)
    return folder / "predictions" / below.with_suffix(".png")


def confusion_of(truth: Tensor, predicted: Tensor, num_classes: int) -> Counts:
    """Counts pixels on the device that holds the maps; equal to hotcoco's.

    Args:
        truth: (H, W), 0..K-1, or 255 where pixels do not count.
        predicted: (H, W), 0..K-1.
    Returns: (K, K), row the true class, column the predicted one.
    """
    valid = truth != IGNORE
    pairs = truth[valid].long() * num_classes + predicted[valid].long()
    counts = torch.bincount(pairs, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).cpu().numpy()


def class_scores(confusion: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """IoU and accuracy of each class, 0..1, NaN for classes without ground truth.

    Args:
        confusion: (K, K), row the true class, column the predicted one.
    """
    correct, truth = np.diag(confusion), confusion.sum(axis=1)
    union = truth + confusion.sum(axis=0) - correct
    iou, accuracy = np.full(len(truth), np.nan), np.full(len(truth), np.nan)
    there = truth > 0
    iou[there], accuracy[there] = correct[there] / union[there], correct[there] / truth[there]
    return iou, accuracy


def semantic_metrics(
    confusion: Counts, boundary: Counts, class_names: Sequence[str]
) -> dict[str, float]:
    """All metrics in percent, the means first; arguments as in the functions around it."""
    iou, accuracy = class_scores(confusion)
    truth = confusion.sum(axis=1)
    there = truth > 0
    if not there.any():
        logger.warning("Every pixel of the ground truth is ignored.")
        return dict.fromkeys((*MEANS, *_per_class_names(class_names)), math.nan)
    boundary_iou = np.full(len(truth), np.nan)
    # A class whose every pixel is close to an ignored one may have no boundary of its own.
    with_boundary = there & (boundary[1] > 0)
    boundary_iou[with_boundary] = boundary[0, with_boundary] / boundary[1, with_boundary]
    means = {
        "mIoU": np.mean(iou[there]),
        "fwIoU": np.sum(truth[there] / truth.sum() * iou[there]),
        "mACC": np.mean(accuracy[there]),
        "pACC": np.trace(confusion) / truth.sum(),
        "mBIoU": np.mean(boundary_iou[with_boundary]) if with_boundary.any() else math.nan,
    }
    values = [*means.values(), *iou, *accuracy, *boundary_iou]
    names = [*means, *_per_class_names(class_names)]
    return {name: 100 * float(value) for name, value in zip(names, values, strict=True)}


def _per_class_names(class_names: Sequence[str]) -> list[str]:
    return [f"{metric}-{name}" for metric in ("IoU", "ACC", "BIoU") for name in class_names]


def boundary_counts(truth: Counts, predicted: Counts, num_classes: int, width: int) -> Counts:
    """Boundary pixels of each class: in both maps, and in either.

    A class's boundary are its pixels that have a pixel of another class, or the image's edge,
    within ``width`` pixels in both directions. Ignored pixels are of no class, in either map.

    Returns: (2, K).
    """
    predicted = np.where(truth == IGNORE, IGNORE, predicted)
    a, b = (np.where(near_edge(m, width), m, IGNORE) for m in (truth, predicted))
    both = np.bincount(a[(a == b) & (a != IGNORE)], minlength=num_classes)
    in_a, in_b = (np.bincount(m[m != IGNORE], minlength=num_classes) for m in (a, b))
    return np.stack([both, in_a + in_b - both])


def near_edge(labels: Counts, width: int) -> NDArray[np.bool_]:
    """Where another label, or the end of the map, is within ``width`` pixels."""
    # No label is -1: beyond its end, a map differs from everything.
    padded = np.pad(labels, width, constant_values=-1).astype(np.float32)
    kernel = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    different = cv2.erode(padded, kernel) != cv2.dilate(padded, kernel)
    return different[width:-width, width:-width]
