"""Random ground truth and predictions in COCO's format, and their scores by pycocotools."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focalnet_det.evaluation import (
    COCODetectionEvaluator,
)

AREA_SUFFIXES = ("", "s", "m", "l")

# Unsorted, with gaps; "ghost" never occurs.
CATEGORIES = {90: "person", 3: "car", 17: "ghost", 44: "dog"}

Predictions = dict[int, dict[str, np.ndarray]]


def ellipse(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    center_y, center_x = rng.uniform(0, height), rng.uniform(0, width)
    radius_y, radius_x = rng.uniform(3, height / 2), rng.uniform(3, width / 2)
    return ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2 <= 1


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_truth(rng: np.random.Generator) -> dict[str, Any]:
    """20 images, of which every fifth has no annotation; one instance in six is a crowd."""
    images, annotations = [], []
    for index in range(20):
        size = {"height": int(rng.integers(40, 150)), "width": int(rng.integers(40, 150))}
        images.append({"id": 1000 - 7 * index, "file_name": f"{index}.jpg", **size})
        for _ in range(0 if index % 5 == 0 else rng.integers(1, 9)):
            rle = to_rle(ellipse(rng, **size))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": images[-1]["id"],
                "category_id": int(rng.choice([90, 3, 44])),
                "segmentation": rle,
                "area": float(mask_util.area(rle)),
                "bbox": mask_util.toBbox(rle).tolist(),
                "iscrowd": int(rng.random() < 1 / 6),
            }
            annotations.append(annotation)
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def random_predictions(
    truth: dict[str, Any], rng: np.random.Generator, extra: int = 6
) -> Predictions:
    """Shifted ground truth (also of crowds) and false alarms; scores in steps of 0.1, so they tie.

    Every seventh image has no prediction at all.
    """
    api = quiet(COCO)
    api.dataset = copy.deepcopy(truth)
    quiet(api.createIndex)
    category_ids = sorted(category["id"] for category in truth["categories"])
    predictions = {}
    for index, image in enumerate(truth["images"]):
        masks, labels = [], []
        for annotation in api.imgToAnns[image["id"]] if index % 7 else []:
            shift = rng.integers(-4, 5, size=2)
            masks.append(np.roll(api.annToMask(annotation), shift, axis=(0, 1)) > 0)
            labels.append(category_ids.index(annotation["category_id"]))
        for _ in range(int(rng.integers(0, extra + 1)) if index % 7 else 0):
            masks.append(ellipse(rng, image["height"], image["width"]))
            labels.append(int(rng.integers(len(category_ids))))
        stacked = np.array(masks, dtype=bool).reshape(-1, image["height"], image["width"])
        rles = mask_util.encode(np.asfortranarray(stacked.transpose(1, 2, 0).astype(np.uint8)))
        boxes = np.array(mask_util.toBbox(rles), dtype=np.float32).reshape(-1, 4)
        boxes += rng.normal(0, 0.7, boxes.shape).astype(np.float32)
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
        predictions[image["id"]] = {
            "boxes": boxes,
            "masks": stacked,
            "scores": np.round(rng.random(len(masks)), 1).astype(np.float32),
            "labels": np.array(labels, dtype=np.int64),
        }
    return predictions


def truth_as_predictions(truth: dict[str, Any]) -> Predictions:
    category_ids = sorted(category["id"] for category in truth["categories"])
    api = quiet(COCO)
    api.dataset = copy.deepcopy(truth)
    quiet(api.createIndex)
    predictions = {}
    for image in truth["images"]:
        own = [a for a in api.imgToAnns[image["id"]] if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in own], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.array([api.annToMask(a) for a in own], dtype=bool)
        predictions[image["id"]] = {
            "boxes": boxes,
            "masks": masks.reshape(-1, image["height"], image["width"]),
            "scores": np.full(len(own), 0.9, dtype=np.float32),
            "labels": np.array([category_ids.index(a["category_id"]) for a in own], dtype=int),
        }
    return predictions


def to_instances(fields: dict[str, np.ndarray]) -> Instances:
    instances = Instances(fields["masks"].shape[1:])
    instances.pred_boxes = Boxes(torch.from_numpy(fields["boxes"]))
    instances.pred_masks = torch.from_numpy(fields["masks"])
    instances.scores = torch.from_numpy(fields["scores"])
    instances.pred_classes = torch.from_numpy(fields["labels"])
    return instances


def feed(evaluator: Any, predictions: Predictions) -> None:
    for image_id, fields in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": to_instances(fields)}])


def quiet(function: Any, *args: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def reference_results(truth: dict[str, Any], predictions: Predictions, task: str) -> list[Any]:
    category_ids = sorted(category["id"] for category in truth["categories"])
    results = []
    for image_id, fields in predictions.items():
        for box, mask, score, label in zip(
            fields["boxes"], fields["masks"], fields["scores"], fields["labels"], strict=True
        ):
            result = {"image_id": image_id, "score": float(score)}
            result["category_id"] = category_ids[label]
            if task == "bbox":
                width, height = box[2] - box[0], box[3] - box[1]
                result["bbox"] = [float(v) for v in (box[0], box[1], width, height)]
            else:
                result["segmentation"] = to_rle(mask)
            results.append(result)
    return results


def reference_eval(truth: dict[str, Any], results: list[Any], task: str, limits: Any) -> COCOeval:
    api = quiet(COCO)
    api.dataset = copy.deepcopy(truth)
    quiet(api.createIndex)
    if results:
        predictions = quiet(api.loadRes, copy.deepcopy(results))
    else:  # loadRes fails on an empty list
        predictions = quiet(COCO)
        predictions.dataset = {**copy.deepcopy(truth), "annotations": []}
        quiet(predictions.createIndex)
    scorer = quiet(COCOeval, api, predictions, task)
    scorer.params.maxDets = list(limits)
    quiet(scorer.evaluate)
    quiet(scorer.accumulate)
    return scorer


def mean_percent(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(np.mean(values) * 100) if values.size else math.nan


def reference_metrics(scorer: COCOeval, limits: Any) -> dict[str, float]:
    """Every metric from the arrays: `summarize` finds AP only if 100 is among the limits."""
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    metrics = {"AP50": mean_percent(precision[0, ..., 0, -1])}
    metrics["AP75"] = mean_percent(precision[5, ..., 0, -1])
    for area, suffix in enumerate(AREA_SUFFIXES):
        metrics[f"AP{suffix}"] = mean_percent(precision[..., area, -1])
        if suffix:
            metrics[f"AR{suffix}"] = mean_percent(recall[..., area, -1])
    for index, limit in enumerate(limits):
        metrics[f"AR{limit}"] = mean_percent(recall[..., 0, index])
    names = {category["id"]: category["name"] for category in scorer.cocoGt.dataset["categories"]}
    for index, category_id in enumerate(sorted(names)):
        metrics[f"AP-{names[category_id]}"] = mean_percent(precision[:, :, index, 0, -1])
    return metrics


def assert_same(actual: dict[str, float], expected: dict[str, float]) -> None:
    """Equal keys and bits; NaN equals NaN."""
    assert set(actual) == set(expected)
    different = {
        name: (actual[name], expected[name])
        for name in expected
        if actual[name] != expected[name]
        and not (math.isnan(actual[name]) and math.isnan(expected[name]))
    }
    assert not different


def save(truth: dict[str, Any], folder: Path) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(truth))
    return path


def check_against_pycocotools(
    json_file: Path, predictions: Predictions, limits: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    truth = json.loads(json_file.read_text())
    evaluator = COCODetectionEvaluator(json_file=json_file, max_dets=limits[-1])
    feed(evaluator, predictions)
    metrics = evaluator.evaluate()
    assert list(metrics) == ["bbox", "segm"]
    for task in metrics:
        results = reference_results(truth, predictions, task)
        scorer = reference_eval(truth, results, task, limits)
        assert_same(metrics[task], reference_metrics(scorer, limits))
        if limits == (1, 10, 100):
            quiet(scorer.summarize)
            names = [*("AP", "AP50", "AP75", "APs", "APm", "APl"), *("AR1", "AR10", "AR100")]
            for name, stat in zip([*names, "ARs", "ARm", "ARl"], scorer.stats, strict=True):
                value = metrics[task][name]
                assert value == stat * 100 or (math.isnan(value) and stat == -1)
    return metrics


def build(folder: Path, truth: dict[str, Any], **options: Any) -> Any:
    return COCODetectionEvaluator(json_file=save(truth, folder), **options)


def scores(folder: Path, truth: dict[str, Any], predictions: Predictions) -> Any:
    evaluator = build(folder, truth)
    feed(evaluator, predictions)
    return evaluator.evaluate()
