"""Missed objects and false detections are those of COCO's own evaluation."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focalnet_det.visualization.objects import (
    Objects,
    annotated_objects,
    encoded,
    without_partner,
)

SIZE = (60, 80)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(rows - y, columns - x) <= radius


def scene(random: np.random.Generator) -> tuple[list[dict[str, Any]], Objects]:
    """Discs of two classes, one a crowd now and then, and detections near and far."""
    annotations, found = [], []
    for _ in range(int(random.integers(1, 7))):
        x, y, radius = random.uniform((8, 8, 5), (72, 52, 12))
        crowd = bool(random.random() < 0.2)
        mask, cls = disc(x, y, radius * (1 + crowd)), int(random.integers(2))
        annotations.append((mask, cls, int(crowd)))
        for _ in range(int(random.integers(0, 3))):
            shift = random.normal(0, 0.25 * radius, 2)
            other = random.random() < 0.15
            found.append((disc(x + shift[0], y + shift[1], radius), cls ^ int(other)))
    scores = random.permutation(len(found)) / 10 + 0.1
    rows = [
        {
            "bbox": box_of(mask),
            "bbox_mode": BoxMode.XYWH_ABS,
            "segmentation": {**encoded(mask), "counts": encoded(mask)["counts"].decode()},
            "category_id": cls,
            "iscrowd": crowd,
        }
        for mask, cls, crowd in annotations
    ]
    boxes = np.array([box_of(mask) for mask, _ in found], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    predicted = Objects(
        size=SIZE,
        boxes=boxes,
        classes=np.array([cls for _, cls in found], dtype=np.int64),
        scores=scores,
        masks=np.array([mask for mask, _ in found]).reshape(-1, *SIZE),
    )
    return rows, predicted


def box_of(mask: np.ndarray) -> list[float]:
    ys, xs = mask.nonzero()
    return [float(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]


def coco_counts(rows: list[dict[str, Any]], predicted: Objects) -> tuple[list[bool], list[bool]]:
    """Missed objects and false detections of COCOeval at an IoU of 0.5."""
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": k} for k in (0, 1)],
        "annotations": [
            {**row, "id": i, "image_id": 1, "area": 500.0} for i, row in enumerate(rows, 1)
        ],
    }
    truth.createIndex()
    assert predicted.scores is not None
    assert predicted.masks is not None
    detections = truth.loadRes(
        [
            {"image_id": 1, "category_id": int(c), "score": float(s), "segmentation": encoded(m)}
            for c, s, m in zip(predicted.classes, predicted.scores, predicted.masks, strict=True)
        ]
    )
    evaluation = COCOeval(truth, detections, "segm")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    missed, false = {}, {}
    for part in filter(None, evaluation.evalImgs):
        for i, match, ignored in zip(
            part["gtIds"], part["gtMatches"][0], part["gtIgnore"], strict=True
        ):
            if not ignored:
                missed[i] = match == 0
        for i, match, ignored in zip(
            part["dtIds"], part["dtMatches"][0], part["dtIgnore"][0], strict=True
        ):
            false[i] = bool(match == 0 and not ignored)
    return [missed[i] for i in sorted(missed)], [false[i] for i in sorted(false)]


def test_partners_are_those_of_coco(capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(1)
    counts = np.zeros(4, dtype=int)
    for _ in range(25):
        rows, predicted = scene(random)
        if not len(predicted):
            continue
        truth = annotated_objects(rows, SIZE)
        missed, false = without_partner(truth, predicted)
        expected = coco_counts(rows, predicted)
        assert (missed.tolist(), false.tolist()) == expected
        counts += [missed.sum(), (~missed).sum(), false.sum(), (~false).sum()]
    assert counts.min() > 5


def test_boxes_are_compared_without_masks_and_empty_sides_are_fine() -> None:
    def boxes(*rows: list[float], scores: bool = False) -> Objects:
        return Objects(
            size=SIZE,
            boxes=np.array(rows, dtype=float).reshape(-1, 4),
            classes=np.zeros(len(rows), dtype=np.int64),
            scores=np.arange(len(rows), 0, -1.0) if scores else None,
        )

    # IoU 0.5 exactly, and below.
    truth = boxes([0, 0, 20, 10], [40, 0, 60, 10])
    found = boxes([0, 0, 10, 10], [40, 0, 49, 10], scores=True)
    missed, false = without_partner(truth, found)
    assert (missed.tolist(), false.tolist()) == ([False, True], [False, True])
    assert [x.tolist() for x in without_partner(truth, boxes())] == [[True, True], []]
    assert [x.tolist() for x in without_partner(boxes(), found)] == [[], [True, True]]
    regions = boxes([10, 20, 30, 40]).regions((30, 40))
    # Half as high and half as wide.
    assert regions[0].sum() == 100
    assert regions[0][10:20, 5:15].all()
