"""Compare time and memory of box and mask AP with pycocotools on synthetic predictions."""

import contextlib
import io
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..evaluation.coco_ap import COCODetectionEvaluator, Record

WIDTH, HEIGHT = 640, 480
CLASSES = 80
TASKS = ("bbox", "segm")
# In the order of COCO's summary.
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Scene:
    """Ground truth and predictions of one image, as COCO annotations and results."""

    image: Record
    truth: list[Record]
    predictions: list[Record]


def draw_scene(image_id: int, detections: int) -> Scene:
    """Generate an image with 1 to 13 objects and a number of predictions, deterministically by id.

    A third of the predictions are objects with displaced corners, the others are random.
    """
    rng = np.random.default_rng(image_id)
    count = int(rng.integers(1, 14))
    outlines = np.stack([_outline(rng) for _ in range(count)])
    classes = rng.integers(1, CLASSES + 1, count)
    which = rng.integers(0, count, detections)
    near = rng.random(detections) < 1 / 3
    displaced = outlines[which] + rng.normal(0, 4, (detections, *outlines.shape[1:]))
    elsewhere = np.stack([_outline(rng) for _ in range(detections)])
    predicted = np.where(near[:, None, None], displaced, elsewhere)
    labels = np.where(near, classes[which], rng.integers(1, CLASSES + 1, detections))
    truth = [
        {**row, "category_id": int(c), "iscrowd": 0, "image_id": image_id}
        for row, c in zip(_shapes(outlines), classes, strict=True)
    ]
    for number, row in enumerate(truth):
        row["id"] = 100 * image_id + number + 1
    predictions = [
        {**row, "category_id": int(c), "score": float(score), "image_id": image_id}
        for row, c, score in zip(_shapes(predicted), labels, rng.random(detections), strict=True)
    ]
    return Scene({"id": image_id, "width": WIDTH, "height": HEIGHT}, truth, predictions)


def _outline(rng: np.random.Generator) -> Any:
    """Sample a polygon of 12 corners, (12, 2), with a diameter of 10 to 300 pixels."""
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radius = np.exp(rng.uniform(np.log(5), np.log(150))) * rng.uniform(0.7, 1.3, 12)
    center = rng.uniform(0, 1, 2) * (WIDTH, HEIGHT)
    xy = center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return xy.clip(0, (WIDTH, HEIGHT))


def _shapes(outlines: Any) -> list[Record]:
    """Convert polygons to annotations with masks, boxes and areas."""
    masks = mask_utils.frPyObjects(
        [o.clip(0, (WIDTH, HEIGHT)).ravel() for o in outlines], HEIGHT, WIDTH
    )
    boxes, areas = mask_utils.toBbox(masks), mask_utils.area(masks)
    return [
        {
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            "bbox": box.tolist(),
            "area": float(area),
        }
        for mask, box, area in zip(masks, boxes, areas, strict=True)
    ]


class ResultsEvaluator(COCODetectionEvaluator):
    """Evaluator of COCO results instead of tensors, to measure only the evaluation."""

    def _to_records(self, image_id: int, instances: Any) -> list[Record]:  # noqa: ARG002
        self._held_tasks |= set(TASKS)
        return list(instances)


@dataclass(frozen=True)
class Measurement:
    """Results of both evaluators.

    Attributes:
        ours, theirs: seconds of this package and of pycocotools.
        our_stats, their_stats: statistics by task, percent.
        memory: peak memory of this process after each quarter of the images, MiB (ours only).
    """

    ours: float
    theirs: float
    our_stats: dict[str, list[float]]
    their_stats: dict[str, list[float]]
    memory: list[float]

    @property
    def difference(self) -> float:
        """Largest difference of any statistic, percentage points."""
        pairs = (
            np.subtract(self.our_stats[task], self.their_stats[task]) for task in self.our_stats
        )
        return float(max(np.nanmax(np.abs(pair)) for pair in pairs))


def measure(images: int, detections: int, folder: Path) -> Measurement:
    """Evaluate synthetic box and mask predictions with both evaluators.

    Times are from results in memory to statistics, including loading the ground truth; neither
    writes results to a file.

    Args:
        images: number of images.
        detections: predictions per image.
        folder: for the ground truth file.
    """
    truth = folder / "truth.json"
    _write_truth(truth, images, detections)
    ours, our_stats, memory = measure_ours(truth, images, detections)
    theirs, their_stats = measure_theirs(truth, images, detections)
    return Measurement(ours, theirs, our_stats, their_stats, memory)


def _write_truth(path: Path, images: int, detections: int) -> None:
    scenes = [draw_scene(k, detections) for k in range(1, images + 1)]
    content = {
        "images": [scene.image for scene in scenes],
        "annotations": [row for scene in scenes for row in scene.truth],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
    }
    path.write_text(json.dumps(content))


def measure_ours(
    truth: Path, images: int, detections: int
) -> tuple[float, dict[str, list[float]], list[float]]:
    """Measure seconds, statistics and memory of our evaluator, generating predictions lazily."""
    clock = Clock()
    evaluator = clock.time(lambda: ResultsEvaluator(json_file=truth))
    memory = []
    for image_id in range(1, images + 1):
        output = [{"instances": draw_scene(image_id, detections).predictions}]
        clock.time(lambda: evaluator.process([{"image_id": image_id}], output))  # noqa: B023
        if image_id * 4 // images > (image_id - 1) * 4 // images:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    results = clock.time(evaluator.evaluate)
    stats = {task: [results[task][name] for name in STATS] for task in TASKS}
    return clock.seconds, stats, memory


def measure_theirs(
    truth: Path, images: int, detections: int
) -> tuple[float, dict[str, list[float]]]:
    """Measure seconds and statistics of pycocotools."""
    clock = Clock()
    predictions = list(_all_predictions(images, detections))
    stats = {}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = clock.time(lambda: COCO(str(truth)))
        for task in TASKS:
            rows = [dict(row) for row in predictions]
            for row in rows:
                # pycocotools computes areas from boxes if present; mask AP needs the mask's.
                row.pop("bbox" if task == "segm" else "segmentation")
            evaluation = clock.time(lambda: COCOeval(reference, reference.loadRes(rows), task))  # noqa: B023
            for step in ("evaluate", "accumulate", "summarize"):
                clock.time(getattr(evaluation, step))
            stats[task] = [100 * v if v > -1 else np.nan for v in evaluation.stats.tolist()]
    return clock.seconds, stats


def _all_predictions(images: int, detections: int) -> Iterator[Record]:
    for image_id in range(1, images + 1):
        yield from draw_scene(image_id, detections).predictions


class Clock:
    """Stopwatch that accumulates the time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, call: Callable[[], Any]) -> Any:
        """Return the result of a call, and add its time."""
        start = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - start
        return result
