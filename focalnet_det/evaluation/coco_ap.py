"""Evaluate box, mask and keypoint AP in the COCO protocol, as a Detectron2 evaluator.

hotcoco computes the scores. They are bitwise equal to those of pycocotools, except that pycocotools
never counts a match with annotation id 0, which COCO does not use.
"""

import itertools
import json
import logging
import math
import os
import tempfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from torch import Tensor

from focalnet_det.atomic import write_text
from focalnet_det.evaluation.ground_truth import load_ground_truth, model_classes
from focalnet_det.evaluation.score_tables import overall_table, per_class_table

from .repeats import is_repeated

logger = logging.getLogger(__name__)

# Task -> (field of the predictions, key of COCO results).
TASK_FIELDS = {
    "bbox": ("pred_boxes", "bbox"),
    "segm": ("pred_masks", "segmentation"),
    "keypoints": ("pred_keypoints", "keypoints"),
}
# Detections per image in COCO's protocol of keypoint AP.
KEYPOINT_LIMIT = 20
# COCO measured the annotators' deviation of its 17 keypoints; other datasets get this value.
DEFAULT_SIGMA = 0.05

# Images to buffer before matching.
BATCH = 64

Record = dict[str, Any]


class COCODetectionEvaluator(DatasetEvaluator):
    """Evaluator of AP and AR of boxes, masks and keypoints, in percent; NaN if undefined.

    Predictions are matched batch by batch and stored on disk, so that memory stays bounded. The
    main rank scores the images of all ranks; the others return an empty dict.

    Args:
        json_file: COCO annotations; files without "annotations" (test sets) are not scored.
        image_root: image folder, to read sizes that the file lacks; None for none.
        tasks: subset of "bbox", "segm" and "keypoints"; None for all fields of the predictions.
        class_names: by contiguous id; default: the names in `json_file`.
        thing_dataset_id_to_contiguous_id: category id -> class of the model; default: the index in
            sorted order, as in Detectron2's COCO loader.
        output_dir: folder for `coco_instances_results.json` and `coco_metrics.json` (null for NaN);
            None writes nothing.
        max_dets: detections per image and class that count for AP; 100 in COCO's protocol.
        distributed: gather the results of all ranks.
    Raises: ValueError if the arguments and the JSON disagree.
    """

    def __init__(
        self,
        *,
        json_file: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        tasks: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        thing_dataset_id_to_contiguous_id: Mapping[int, int] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        max_dets: int = 100,
        distributed: bool = True,
    ) -> None:
        if max_dets < 1:
            raise ValueError(f"max_dets must be at least 1, got {max_dets}.")
        self._tasks = None if tasks is None else _checked_tasks(tasks)
        self._truth = load_ground_truth(
            Path(json_file), None if image_root is None else Path(image_root)
        )
        if self._tasks and "segm" in self._tasks:
            self._truth.check_has_masks()
        self._classes = model_classes(self._truth, thing_dataset_id_to_contiguous_id, class_names)
        self._category_ids = list(self._classes.values())
        self._output_dir = None if output_dir is None else Path(output_dir)
        # pycocotools reports AP at the largest limit, so larger ones than max_dets must be absent.
        self._limits = sorted({limit for limit in (1, 10) if limit < max_dets} | {max_dets})
        self._distributed = distributed
        if self._truth.most_objects > max_dets:
            logger.warning(
                "%s has up to %d objects of one class per image, but only %d detections count. "
                "Increase train.max_dets and the detection limit of the model.",
                json_file,
                self._truth.most_objects,
                max_dets,
            )
        self.reset()

    @property
    def instance_counts(self) -> dict[str, int]:
        """Number of ground-truth instances, excluding crowds, by class name."""
        counts = self._truth.instance_counts
        return {name: counts[category] for name, category in self._classes.items()}

    def reset(self) -> None:
        """Discard all predictions."""
        self._seen: set[int] = set()
        self._pending: dict[int, list[Record]] = {}
        self._matches: dict[str, list[Any]] = {}
        self._spool = None if self._output_dir is None else Spool(self._output_dir)
        self._held_tasks: set[str] = set()

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Convert the predictions of a batch of images to COCO results.

        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "instances": `scores` (N,), `pred_classes` (N,), and at least one of
                `pred_boxes` (N, 4), xyxy, `pred_masks` (N, H, W) and `pred_keypoints` (N, K, 3), in
                absolute pixels of the original image.
        Raises: ValueError with the image id if predictions do not fit the dataset.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = self._truth.known_image(image["image_id"])
            if is_repeated(image_id, self._seen):
                continue
            self._pending[image_id] = self._to_records(image_id, output["instances"])
            self._seen.add(image_id)
            if len(self._pending) == BATCH:
                self._flush()

    def _flush(self) -> None:
        """Match the buffered predictions, and move them to disk."""
        if not self._pending:
            return
        if self._truth.has_annotations:
            for task in self._tasks or self._held_tasks:
                self._matches.setdefault(task, []).append(self._match(task, self._pending))
        if self._spool is not None:
            for image_id, records in self._pending.items():
                self._spool.add(image_id, [json.dumps(r, allow_nan=False) for r in records])
        self._pending = {}

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics by task, {"bbox": {"AP": ..., "AP-person": ..., "AR100": ...}, ...}."""
        # Predictions are gathered one rank at a time, to bound the memory of the main rank.
        self._flush()
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        seen, tasks = self._of_all_ranks()
        if not seen:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return results
        if self._output_dir is not None and self._spool is not None:
            path = self._output_dir / "coco_instances_results.json"
            self._write_predictions(path, self._spool)
        if not self._truth.has_annotations:
            logger.info("The dataset has no annotations. Predictions are not scored.")
            return results
        for task in tasks:
            own = [self._match(task, {}), *self._matches.get(task, ())]
            parts = self._in_turn([hotcoco.StreamingEval.merge(own).to_bytes()])
            if self._is_main:
                unseen = self._match(task, {i: [] for i in self._truth.images if i not in seen})
                matches = (hotcoco.StreamingEval.from_bytes(part) for part in parts)
                results[task] = self._score(hotcoco.StreamingEval.merge([unseen, *matches]))
            else:
                deque(parts, maxlen=0)
        if self._is_main:
            self._report(results)
        return results

    @property
    def _is_main(self) -> bool:
        return not self._distributed or comm.is_main_process()

    def _of_all_ranks(self) -> tuple[set[int], list[str]]:
        """Gather the ids of processed images and the tasks to score, equal on all ranks."""
        own = (self._seen, self._held_tasks)
        parts = comm.all_gather(own) if self._distributed else [own]
        held = set().union(*(part for _, part in parts))
        tasks = self._tasks or [task for task in TASK_FIELDS if task in held]
        return set().union(*(part for part, _ in parts)), list(tasks)

    def _in_turn(self, own: Sequence[Any]) -> Iterator[Any]:
        """Yield the items of all ranks in rank order, one at a time; None on non-main ranks.

        Every rank must exhaust the iterator, since each step is a collective call.
        """
        if not self._distributed:
            yield from own
            return
        for rank, count in enumerate(comm.all_gather(len(own))):
            for index in range(count):
                parts = comm.gather(own[index] if comm.get_rank() == rank else None, dst=0)
                yield parts[rank] if comm.is_main_process() else None

    def _write_predictions(self, path: Path, spool: "Spool") -> None:
        """Write all predictions as COCO results on the main rank, by rank and then by image."""
        written: set[int] = set()

        def lines() -> Iterator[str]:
            for part in self._in_turn(spool):
                # Samplers may pad with repeated images.
                for image_id in sorted(set(part or ()) - written):
                    written.add(image_id)
                    yield from part[image_id]

        if self._is_main:
            write_text(path, itertools.chain(["["], _separated(lines()), ["\n]\n"]))
        else:
            deque(lines(), maxlen=0)

    def _match(self, task: str, records: Mapping[int, list[Record]]) -> Any:
        """Match predictions, by image id, to their ground truth."""
        params = hotcoco.Params(task)
        if task == "keypoints":
            params.max_dets = [KEYPOINT_LIMIT]
            count = self._truth.num_keypoints
            if count != len(params.kpt_oks_sigmas):
                params.kpt_oks_sigmas = [DEFAULT_SIGMA] * count
        else:
            params.max_dets = self._limits
        matches = hotcoco.StreamingEval(self._truth.category_records, task, params=params)
        # COCO computes areas from boxes if present, but mask AP needs the area of the mask.
        keys = ("image_id", "category_id", "score", TASK_FIELDS[task][1])
        for image_id, predictions in records.items():
            matches.update(
                [self._truth.images[image_id]],
                self._truth.annotations[image_id],
                [{key: record[key] for key in keys} for record in predictions],
            )
        return matches

    def _to_records(self, image_id: int, instances: Instances) -> list[Record]:
        """Convert the predictions of one image to COCO results."""
        held = {task for task, (field, _) in TASK_FIELDS.items() if instances.has(field)}
        if not held or (len(instances) and not held.issuperset(self._tasks or ())):
            raise ValueError(
                f"Predictions of image {image_id} have the fields "
                f"{', '.join(sorted(instances.get_fields()))}, which are insufficient to evaluate "
                f"{' and '.join(self._tasks or TASK_FIELDS)}. Set `tasks`."
            )
        self._held_tasks |= held
        labels = instances.pred_classes.tolist()
        scores = _finite("scores", instances.scores, image_id)
        self._truth.check_labels(image_id, labels)
        records: list[Record] = [
            {"image_id": image_id, "category_id": self._category_ids[label], "score": score}
            for label, score in zip(labels, scores.tolist(), strict=True)
        ]
        if "bbox" in held:
            boxes = _finite("pred_boxes", instances.pred_boxes.tensor, image_id)
            xywh = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            for record, box in zip(records, xywh.tolist(), strict=True):
                record["bbox"] = box
        if "segm" in held and "segm" in (self._tasks or held):
            masks = getattr(instances.pred_masks, "tensor", instances.pred_masks)
            self._truth.check_masks(image_id, masks)
            for record, mask in zip(records, masks, strict=True):
                record["segmentation"] = _encode(mask)
        if "keypoints" in held:
            points = _finite("pred_keypoints", instances.pred_keypoints, image_id)
            # COCO uses pixel indices, Detectron2 coordinates measured from the image corner.
            points = points - points.new_tensor([0.5, 0.5, 0.0])
            for record, values in zip(records, points.flatten(1).tolist(), strict=True):
                record["keypoints"] = values
        return records

    def _score(self, matches: Any) -> dict[str, float]:
        scorer = matches.finalize()
        scorer.accumulate()
        assert scorer.eval is not None
        precision, recall = scorer.eval["precision"], scorer.eval["recall"]
        # COCO has no keypoint metrics of small objects.
        keypoints = scorer.params.iouType == "keypoints"
        limits = [KEYPOINT_LIMIT] if keypoints else self._limits
        areas = ["all", "m", "l"] if keypoints else ["all", "s", "m", "l"]
        metrics = _summarize(precision, recall, limits, areas)
        for name, category in self._classes.items():
            k = scorer.params.catIds.index(category)
            metrics[f"AP-{name}"] = _percent(precision[:, :, k, 0, -1])
        return metrics

    def _report(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """Log the tables and write `coco_metrics.json`."""
        logger.info("COCO metrics in percent:\n%s", overall_table(results))
        logger.info("Per class:\n%s", per_class_table(results, self.instance_counts))
        if absent := [name for name, count in self.instance_counts.items() if count == 0]:
            logger.info("Classes without ground truth (AP is NaN): %s.", ", ".join(absent))
        if self._output_dir is not None:
            finite = {
                task: {name: None if math.isnan(v) else v for name, v in metrics.items()}
                for task, metrics in results.items()
            }
            text = json.dumps(finite, indent=2, allow_nan=False)
            write_text(self._output_dir / "coco_metrics.json", [text, "\n"])


class Spool(Sequence[dict[int, list[str]]]):
    """On-disk sequence of batches {image id: lines of text}, in order of id.

    Args:
        folder: location of the anonymous temporary file, which is deleted with the object.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The file lives as long as the object.
        self._file = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115
        self._starts: dict[int, tuple[int, int]] = {}

    def add(self, image_id: int, lines: Sequence[str]) -> None:
        """Append the lines of an image, given without line ends."""
        self._file.seek(0, os.SEEK_END)
        self._starts[image_id] = (self._file.tell(), len(lines))
        self._file.writelines(f"{line}\n" for line in lines)

    def __len__(self) -> int:
        return -(-len(self._starts) // BATCH)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {
            k: self._lines(k) for k in sorted(self._starts)[index * BATCH : (index + 1) * BATCH]
        }

    def _lines(self, image_id: int) -> list[str]:
        start, count = self._starts[image_id]
        self._file.seek(start)
        return [self._file.readline().rstrip("\n") for _ in range(count)]


def _checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    unknown = [task for task in tasks if task not in TASK_FIELDS]
    if isinstance(tasks, str) or unknown or not tasks:
        raise ValueError(f"Unknown tasks {tasks!r}. Known: {', '.join(sorted(TASK_FIELDS))}.")
    return tuple(task for task in TASK_FIELDS if task in tasks)


def _finite(field: str, values: Tensor, image_id: int) -> Tensor:
    values = values.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{field} of image {image_id} are not finite. Training may have diverged.")
    return values


def _encode(mask: Tensor) -> Record:
    """Encode a mask, (H, W), bool or a probability with threshold 0.5, as RLE."""
    binary = mask.detach() > 0.5 if mask.is_floating_point() else mask.detach().bool()
    # RLE is column-major: a copy of the transpose lets the encoder read contiguous memory.
    columns = binary.t().contiguous().cpu().numpy()
    rle = hotcoco.mask.encode(columns.T)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _percent(values: np.ndarray) -> float:
    """Return the mean of the defined (nonnegative) values in percent; NaN if there is none."""
    defined = values[values > -1]
    return float(np.mean(defined) * 100) if defined.size else math.nan


def _summarize(
    precision: np.ndarray, recall: np.ndarray, limits: Sequence[int], areas: Sequence[str]
) -> dict[str, float]:
    """Compute COCO's summary metrics, AP at the largest detection limit.

    Args:
        precision: (T, R, K, A, M): IoU threshold, recall, class, area range, detection limit; -1
            if undefined.
        recall: (T, K, A, M).
        limits: M detection limits.
        areas: names of the A area ranges; the first is all.
    """
    metrics = {
        "AP": _percent(precision[:, :, :, 0, -1]),
        "AP50": _percent(precision[0, :, :, 0, -1]),
        "AP75": _percent(precision[5, :, :, 0, -1]),
    }
    sizes = list(enumerate(areas))[1:]
    metrics |= {f"AP{name}": _percent(precision[:, :, :, a, -1]) for a, name in sizes}
    metrics |= {f"AR{limit}": _percent(recall[:, :, 0, m]) for m, limit in enumerate(limits)}
    metrics |= {f"AR{name}": _percent(recall[:, :, a, -1]) for a, name in sizes}
    return metrics


def _separated(lines: Iterable[str]) -> Iterator[str]:
    """Format the elements of a JSON list, one per line."""
    for index, line in enumerate(lines):
        yield (",\n" if index else "\n") + line
