"""Evaluate panoptic quality as a Detectron2 evaluator; hotcoco matches the segments.

Predictions are scored in memory, without writing PNGs first.
"""

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from hotcoco import mask as rle
from hotcoco.metrics import panoptic_quality
from hotcoco.panoptic import PanopticEval
from numpy.typing import NDArray

from ..atomic import write_text
from ..data.io.write_image import write_png
from ..data.panoptic.segments import (
    PanopticFile,
    Record,
    read_panoptic_json,
    read_segment_ids,
    segment_colors,
    segment_pixels,
    segment_problems,
)
from .repeats import is_repeated
from .score_tables import render_table, two_decimals

logger = logging.getLogger(__name__)

QUALITIES = ("PQ", "SQ", "RQ")
# Suffix of a metric, as in Detectron2 -> row of the table.
GROUPS = {"": "all", "_th": "things", "_st": "stuff"}

# (4,): sum of IoU, true positives, false positives and false negatives of a category.
Matches = NDArray[np.float64]


class PanopticEvaluator(DatasetEvaluator):
    """Evaluator of PQ, SQ and RQ of all classes, of things and of stuff, in percent.

    Only matches are stored per image. The main rank scores the images of all ranks; the others
    return an empty dict. Segments of images without prediction count as false negatives.

    Args:
        panoptic_json: COCO panoptic annotations; their areas are not used.
        panoptic_root: folder of the PNGs.
        thing_ids, stuff_ids: category id -> class of the model; default: the index among the
            things, and 1 + the index among the stuff.
        output_dir: folder for `panoptic_metrics.json` (null for NaN); None writes nothing.
        save_predictions: also write `output_dir`/panoptic/*.png and `panoptic_results.json`, in
            COCO's result format.
        distributed: gather the results of all ranks.
    Raises: ValueError if the JSON is invalid or does not match the ids, or ``save_predictions`` is
        set without ``output_dir``.
    Source: arXiv:1801.00868, section 4.
    """

    def __init__(
        self,
        *,
        panoptic_json: str | os.PathLike[str],
        panoptic_root: str | os.PathLike[str],
        thing_ids: Mapping[int, int] | None = None,
        stuff_ids: Mapping[int, int] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        save_predictions: bool = False,
        distributed: bool = True,
    ) -> None:
        if save_predictions and output_dir is None:
            raise ValueError("save_predictions=True requires an output_dir.")
        self._truth = read_panoptic_json(Path(panoptic_json))
        self._root = Path(panoptic_root)
        self._categories = {
            True: _by_class(thing_ids, self._truth, things=True),
            False: _by_class(stuff_ids, self._truth, things=False),
        }
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._save_predictions = save_predictions
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard all predictions."""
        self._matches: dict[int, dict[int, Matches]] = {}
        self._results: dict[int, Record] = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Match the segments of a batch of images.

        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "panoptic_seg": (ids, segments). ids is (H, W), in the size of the
                original image, 0 for void; segments are dicts with "id", "category_id" (class of
                the model) and "isthing"; without "isthing", "category_id" is that of the dataset.
        Raises: ValueError with the image id if prediction or ground truth is inconsistent.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = image["image_id"]
            if image_id not in self._truth.annotations:
                raise ValueError(
                    f"Image id {image_id!r} is not annotated in {self._truth.path}. Evaluate on "
                    "the same dataset that was loaded."
                )
            if is_repeated(image_id, self._matches):
                continue
            ids, segments = output["panoptic_seg"]
            if segments is None:
                raise ValueError(f"The prediction of image {image_id} lacks a list of segments.")
            predicted = ids.cpu().numpy()
            segments = [self._to_category(image_id, segment) for segment in segments]
            self._matches[image_id] = self._match(image_id, predicted, segments)
            if self._save_predictions:
                self._save(image_id, predicted, segments)

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics, {"panoptic_seg": {"PQ": ..., "SQ_th": ..., "PQ-person": ...}}.

        Undefined metrics are NaN.
        """
        own = (self._matches, self._results)
        parts = comm.gather(own, dst=0) if self._distributed else [own]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        matches = {image_id: match for part in parts for image_id, match in part[0].items()}
        if not matches:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return OrderedDict()
        unseen = sorted(self._truth.annotations.keys() - matches.keys())
        if unseen:
            logger.warning("%d images have no prediction, such as %s.", len(unseen), unseen[0])
        matches |= {image_id: self._missed(image_id) for image_id in unseen}
        # Sorted, because float sums depend on the order and ranks process different images.
        total = sum_matches(matches[image_id] for image_id in sorted(matches))
        metrics = panoptic_metrics(total, self._truth)
        self._report(metrics, total, matches)
        if self._save_predictions:
            results = {k: result for part in parts for k, result in part[1].items()}
            assert self._output_dir is not None
            content = {
                "annotations": [results[k] for k in sorted(results)],
                "categories": list(self._truth.categories.values()),
            }
            write_text(self._output_dir / "panoptic_results.json", [json.dumps(content)])
        return OrderedDict(panoptic_seg=metrics)

    def _to_category(self, image_id: int, segment: Mapping[str, Any]) -> Record:
        """Return the id and the dataset's category id of a predicted segment."""
        category, isthing = int(segment["category_id"]), segment.get("isthing")
        if isthing is not None:
            known = self._categories[bool(isthing)]
            if category not in known:
                raise ValueError(
                    f"The prediction of image {image_id} has a segment of "
                    f"{'thing' if isthing else 'stuff'} class {category}, which does not exist in "
                    f"{self._truth.path}. Set the model's number of classes to that of the dataset."
                )
            category = known[category]
        return {"id": int(segment["id"]), "category_id": category}

    def _match(
        self, image_id: int, predicted: NDArray[np.integer], segments: Sequence[Record]
    ) -> dict[int, Matches]:
        annotation = self._truth.annotations[image_id]
        path = self._root / annotation["file_name"]
        truth = read_segment_ids(path)
        if truth.shape != predicted.shape:
            raise ValueError(
                f"The prediction of image {image_id} is {predicted.shape} (height, width), but "
                f"{path} is {truth.shape}. Resize predictions to the original image."
            )
        categories = self._truth.categories
        size = {"height": truth.shape[0], "width": truth.shape[1]}
        common = {"images": [{"id": image_id, **size}], "categories": list(categories.values())}
        datasets = []
        for subject, ids, id_segments in (
            (f"Ground truth {path}", truth, annotation["segments_info"]),
            (f"The prediction of image {image_id}", predicted, segments),
        ):
            pixels = segment_pixels(ids)
            for problem, detail in segment_problems(pixels, id_segments, categories):
                raise ValueError(f"{subject} has {problem}: {detail}.")
            annotations = _annotations(image_id, ids, id_segments, pixels)
            datasets.append({**common, "annotations": annotations})
        evaluation = PanopticEval(*datasets)
        evaluation.evaluate()
        per_class = evaluation.results()["per_class"]
        rows = {k: [v["iou"], v["tp"], v["fp"], v["fn"]] for k, v in per_class.items()}
        return {int(k): np.array(row, dtype=np.float64) for k, row in rows.items() if any(row)}

    def _missed(self, image_id: int) -> dict[int, Matches]:
        """Count the segments of an image without prediction as false negatives."""
        segments = self._truth.annotations[image_id]["segments_info"]
        miss = np.array([0.0, 0, 0, 1])
        return sum_matches({s["category_id"]: miss} for s in segments if not s.get("iscrowd"))

    def _save(self, image_id: int, ids: NDArray[np.integer], segments: Sequence[Record]) -> None:
        assert self._output_dir is not None
        name = Path(self._truth.annotations[image_id]["file_name"]).with_suffix(".png")
        path = self._output_dir / "panoptic" / name
        write_png(path, segment_colors(ids))
        self._results[image_id] = {
            "image_id": image_id,
            "file_name": str(name),
            "segments_info": list(segments),
        }

    def _report(
        self,
        metrics: Mapping[str, float],
        total: Mapping[int, Matches],
        by_image: Mapping[int, Mapping[int, Matches]],
    ) -> None:
        """Log the tables and write `panoptic_metrics.json`."""
        counts = [len(_scored(self._truth, total, suffix)) for suffix in GROUPS]
        rows = [
            [name, *(two_decimals(metrics[f"{q}{suffix}"]) for q in QUALITIES), f"{count}"]
            for (suffix, name), count in zip(GROUPS.items(), counts, strict=True)
        ]
        logger.info(
            "Panoptic quality, %d images, in percent:\n%s",
            len(by_image),
            render_table(["group", *QUALITIES, "classes"], rows),
        )
        rows = []
        for k, category in self._truth.categories.items():
            name = str(category["name"])
            scores = [two_decimals(metrics[f"{q}-{name}"]) for q in QUALITIES]
            kind = "thing" if category["isthing"] else "stuff"
            _, tp, fp, fn = total.get(k, np.zeros(4))
            rows.append([name, kind, *scores, f"{tp:.0f}", f"{fp:.0f}", f"{fn:.0f}"])
        logger.info(
            "Per class:\n%s",
            render_table(["class", "", *QUALITIES, "TP", "FP", "FN"], rows),
        )
        if self._output_dir is None:
            return
        content = {
            "metrics": {name: _or_null(value) for name, value in metrics.items()},
            "image_PQ": {
                str(k): _or_null(100 * _mean_quality(by_image[k])[0]) for k in sorted(by_image)
            },
        }
        text = json.dumps(content, indent=2, allow_nan=False)
        write_text(self._output_dir / "panoptic_metrics.json", [text, "\n"])


def _by_class(
    ids: Mapping[int, int] | None, truth: PanopticFile, *, things: bool
) -> dict[int, int]:
    """Map classes of the model to category ids."""
    known = truth.names(things=things)
    if ids is None:
        return {k + (0 if things else 1): category for k, category in enumerate(known)}
    # Detectron2's metadata of Panoptic FPN maps an extra id to the stuff class "things".
    categories = {k: category for category, k in ids.items() if things or category in known}
    if set(categories.values()) != set(known):
        raise ValueError(
            f"{'thing' if things else 'stuff'}_ids and {truth.path} differ in category ids "
            f"{sorted(set(categories.values()) ^ set(known))}."
        )
    return categories


def _annotations(
    image_id: int,
    ids: NDArray[np.integer],
    segments: Sequence[Record],
    pixels: Mapping[int, int],
) -> list[Record]:
    """Convert the segments of an id map to annotations of hotcoco."""
    # RLE is column-major: a copy of the transpose lets the encoder read contiguous memory.
    columns = np.ascontiguousarray(ids.T)
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": segment["category_id"],
            "iscrowd": int(segment.get("iscrowd", 0)),
            "area": pixels[segment["id"]],
            "segmentation": rle.encode((columns == segment["id"]).T),
        }
        for number, segment in enumerate(segments, start=1)
    ]


def sum_matches(parts: Iterable[Mapping[int, Matches]]) -> dict[int, Matches]:
    """Sum matches by category, in the given order."""
    total: dict[int, Matches] = {}
    for part in parts:
        for category, row in part.items():
            total[category] = total.get(category, 0) + row
    return total


def panoptic_metrics(total: Mapping[int, Matches], truth: PanopticFile) -> dict[str, float]:
    """Compute all metrics in percent, groups first; NaN for categories without segments."""
    metrics: dict[str, float] = {}
    for suffix in GROUPS:
        means = _mean_quality(_scored(truth, total, suffix))
        metrics |= {f"{q}{suffix}": 100 * v for q, v in zip(QUALITIES, means, strict=True)}
    for k, category in truth.categories.items():
        scores = _mean_quality({k: total[k]} if k in total else {})
        name = category["name"]
        metrics |= {f"{q}-{name}": 100 * v for q, v in zip(QUALITIES, scores, strict=True)}
    return metrics


def _scored(truth: PanopticFile, total: Mapping[int, Matches], suffix: str) -> dict[int, Matches]:
    """Select the matches of the categories in a group of ``GROUPS``."""
    kinds = {"": (True, False), "_th": (True,), "_st": (False,)}[suffix]
    return {k: m for k, m in total.items() if bool(truth.categories[k]["isthing"]) in kinds}


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean_quality(matches: Mapping[int, Matches]) -> tuple[float, float, float]:
    """Return PQ, SQ and RQ, averaged over the categories, 0..1; NaN if there is none."""
    if not matches:
        return math.nan, math.nan, math.nan
    rows = [panoptic_quality(m[0], int(m[1]), int(m[2]), int(m[3])) for m in matches.values()]
    pq, sq, rq = np.mean(rows, axis=0).tolist()
    return pq, sq, rq
