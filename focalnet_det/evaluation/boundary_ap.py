"""Evaluate boundary AP, a mask AP that is sensitive to outlines, as a Detectron2 evaluator.

The IoU of two masks is the minimum of their mask IoU and the IoU of their boundaries. pycocotools
matches and averages as for mask AP. Masks are discarded after each image.
"""

import contextlib
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from hotcoco import mask as rle
from numpy.typing import NDArray
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from ..atomic import write_text
from ..data.shapes.export import mask_box
from .coco_ap import _finite, _percent, _summarize
from .ground_truth import Record, load_ground_truth, model_classes
from .repeats import is_repeated
from .score_tables import overall_table, per_class_table
from .semantic_iou import near_edge

logger = logging.getLogger(__name__)

# (category, area range) -> `evalImgs` entry of COCOeval for one image.
Matches = Mapping[tuple[int, int], Record]


class BoundaryEvaluator(DatasetEvaluator):
    """Evaluator of boundary AP and AR in percent, with the metrics of mask AP; NaN if undefined.

    Args:
        json_file, image_root, class_names, thing_dataset_id_to_contiguous_id, output_dir, max_dets,
            distributed: as in :class:`COCODetectionEvaluator`; writes `boundary_metrics.json`.
        boundary_ratio: width of a boundary, as a fraction of the image diagonal.
    Raises: ValueError if the arguments and the JSON disagree, or an annotation has no mask.
    Source: arXiv:2103.16562, sections 4 and 5.
    """

    def __init__(
        self,
        *,
        json_file: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
        thing_dataset_id_to_contiguous_id: Mapping[int, int] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        max_dets: int = 100,
        boundary_ratio: float = 0.02,
        distributed: bool = True,
    ) -> None:
        self._truth = load_ground_truth(
            Path(json_file), None if image_root is None else Path(image_root)
        )
        self._truth.check_has_masks()
        self._classes = model_classes(self._truth, thing_dataset_id_to_contiguous_id, class_names)
        self._category_ids = list(self._classes.values())
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._limits = sorted({limit for limit in (1, 10) if limit < max_dets} | {max_dets})
        self._ratio = boundary_ratio
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard all predictions."""
        self._matches: dict[int, Matches] = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Match the masks of a batch of images.

        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "instances": `scores` (N,), `pred_classes` (N,) and `pred_masks`
                (N, H, W) in the size of the original image.
        Raises: ValueError with the image id if predictions do not fit the dataset.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = self._truth.known_image(image["image_id"])
            if is_repeated(image_id, self._matches):
                continue
            instances = output["instances"]
            if not instances.has("pred_masks"):
                raise ValueError(
                    f"Predictions of image {image_id} have no masks. Boundary AP needs them; "
                    "remove train.boundary_ap."
                )
            labels = instances.pred_classes.tolist()
            scores = _finite("scores", instances.scores, image_id).tolist()
            self._truth.check_labels(image_id, labels)
            masks = getattr(instances.pred_masks, "tensor", instances.pred_masks)
            self._truth.check_masks(image_id, masks)
            arrays = masks.detach().cpu().numpy()
            predictions = [
                {
                    "category_id": self._category_ids[label],
                    "score": score,
                    **with_boundary(mask > 0.5, self._ratio),
                }
                for label, score, mask in zip(labels, scores, arrays, strict=True)
            ]
            self._matches[image_id] = self._match(image_id, predictions)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics, {"boundary": {"AP": ..., "AP-person": ..., "AR100": ...}}."""
        parts = comm.gather(self._matches, dst=0) if self._distributed else [self._matches]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        matches = {image_id: match for part in parts for image_id, match in part.items()}
        if not matches:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return OrderedDict()
        if not self._truth.has_annotations:
            logger.info("The dataset has no annotations. Predictions are not scored.")
            return OrderedDict()
        for image_id in self._truth.images.keys() - matches.keys():
            matches[image_id] = self._match(image_id, [])
        metrics = self._score(matches)
        counts = self._truth.instance_counts
        by_name = {name: counts[category] for name, category in self._classes.items()}
        results = OrderedDict(boundary=metrics)
        logger.info("Boundary AP in percent:\n%s", overall_table(results))
        logger.info("Per class:\n%s", per_class_table(results, by_name))
        if self._output_dir is not None:
            finite = {name: None if math.isnan(v) else v for name, v in metrics.items()}
            text = json.dumps({"boundary": finite}, indent=2, allow_nan=False)
            write_text(self._output_dir / "boundary_metrics.json", [text, "\n"])
        return results

    def _evaluation(self) -> Any:
        evaluation = COCOeval(iouType="segm")
        evaluation.params.catIds = sorted(self._category_ids)
        evaluation.params.maxDets = self._limits
        return evaluation

    def _match(self, image_id: int, predictions: Sequence[Record]) -> Matches:
        """Match predictions and ground truth of one image."""
        evaluation = self._evaluation()
        truth: list[Record] = []
        for annotation in self._truth.annotations[image_id]:
            mask = self._decoded(image_id, annotation)
            crowd = int(annotation.get("iscrowd", 0))
            row = {**annotation, "iscrowd": crowd, "ignore": crowd, "id": len(truth) + 1}
            truth.append({**row, **with_boundary(mask, self._ratio), "area": annotation["area"]})
        matches = {}
        for category in sorted({r["category_id"] for r in (*truth, *predictions)}):
            gts = [r for r in truth if r["category_id"] == category]
            dts = [
                {**r, "id": number}
                for number, r in enumerate(predictions, start=1)
                if r["category_id"] == category
            ]
            # `ious` must be in COCOeval's order: stable, by descending score.
            order = np.argsort([-r["score"] for r in dts], kind="mergesort")
            dts = [dts[i] for i in order][: self._limits[-1]]
            key = (image_id, category)
            evaluation._gts[key], evaluation._dts[key] = gts, dts
            evaluation.ious = {key: boundary_iou(dts, gts)}
            for number, area in enumerate(evaluation.params.areaRng):
                matches[category, number] = evaluation.evaluateImg(*key, area, self._limits[-1])
        return matches

    def _decoded(self, image_id: int, annotation: Record) -> NDArray[np.bool_]:
        segmentation = annotation["segmentation"]
        image = self._truth.images[image_id]
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            size = (image["height"], image["width"])
            parts = mask_utils.frPyObjects(segmentation, *size)
            segmentation = mask_utils.merge(parts) if isinstance(parts, list) else parts
        decoded: NDArray[np.bool_] = mask_utils.decode(segmentation).astype(bool)
        return decoded

    def _score(self, matches: Mapping[int, Matches]) -> dict[str, float]:
        evaluation = self._evaluation()
        params = evaluation.params
        params.imgIds = sorted(matches)
        evaluation._paramsEval = params
        evaluation.evalImgs = [
            matches[image_id].get((category, number))
            for category in params.catIds
            for number in range(len(params.areaRng))
            for image_id in params.imgIds
        ]
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        metrics = _summarize(precision, recall, self._limits, ("all", "s", "m", "l"))
        for name, category in self._classes.items():
            k = params.catIds.index(category)
            metrics[f"AP-{name}"] = _percent(precision[:, :, k, 0, -1])
        return metrics


def with_boundary(mask: NDArray[np.bool_], ratio: float) -> Record:
    """Encode a mask, (H, W), and its boundary as RLE, and count its pixels.

    Args:
        mask: (H, W).
        ratio: width of the boundary, as a fraction of the image diagonal.
    """
    boundary = mask_boundary(mask, max(1, round(ratio * math.hypot(*mask.shape))))
    return {
        "mask": rle.encode(np.asfortranarray(mask)),
        "boundary": rle.encode(np.asfortranarray(boundary)),
        "area": int(np.count_nonzero(mask)),
    }


def mask_boundary(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Return the pixels of a mask, (H, W), within ``width`` pixels (maximum norm) of its outside.

    Everything beyond the image border counts as outside.
    Source: bowenc0221/boundary-iou-api:boundary_iou/utils/boundary_utils.py (mask_to_boundary).
    """
    boundary = np.zeros_like(mask)
    if mask.any():
        left, top, wide, high = mask_box(mask)
        inside = (slice(top, top + high), slice(left, left + wide))
        boundary[inside] = mask[inside] & near_edge(mask[inside].astype(np.int8), width)
    return boundary


def boundary_iou(predictions: Sequence[Record], truth: Sequence[Record]) -> Any:
    """Compute the minimum of mask IoU and boundary IoU, (D, G); [] if D or G is 0."""
    if not predictions or not truth:
        return []
    crowd = [r["iscrowd"] for r in truth]
    mask_iou, outline_iou = (
        rle.iou([r[key] for r in predictions], [r[key] for r in truth], crowd)
        for key in ("mask", "boundary")
    )
    return np.minimum(mask_iou, outline_iou)
