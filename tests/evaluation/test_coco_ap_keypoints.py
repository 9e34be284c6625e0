"""Keypoint AP against pycocotools, for COCO's 17 points and for another number of them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focalnet_det.evaluation import COCODetectionEvaluator

METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR20", "ARm", "ARl")


def truth_of(points: int, rng: np.random.Generator) -> dict[str, Any]:
    """12 images of up to 4 persons, some without a visible point; one is a crowd."""
    images = [{"id": 5 + i, "height": 300, "width": 300} for i in range(12)]
    annotations = []
    for image in images:
        for _ in range(rng.integers(0, 5)):
            x, y = rng.uniform(0, 150, 2)
            w, h = rng.uniform(20, 140, 2)
            where = rng.uniform((x, y), (x + w, y + h), (points, 2))
            visible = rng.integers(0, 3, points) * (rng.random() > 0.15)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "area": float(w * h * 0.6),
                    "iscrowd": int(len(annotations) == 3),
                    "keypoints": np.column_stack([where, visible]).round(2).flatten().tolist(),
                    "num_keypoints": int((visible > 0).sum()),
                }
            )
    names = [f"point{i}" for i in range(points)]
    categories = [{"id": 1, "name": "person", "keypoints": names}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize(("points", "sigmas"), [(17, None), (5, [0.05] * 5)])
def test_keypoints_score_as_pycocotools(
    tmp_path: Path, points: int, sigmas: list[float] | None
) -> None:
    rng = np.random.default_rng(points)
    truth = truth_of(points, rng)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    evaluator = COCODetectionEvaluator(json_file=path, tasks=("keypoints",), distributed=False)
    results = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        guesses = [np.array(a["keypoints"]).reshape(points, 3)[:, :2] for a in own]
        guesses = [g + rng.normal(0, 4, g.shape) for g in guesses]
        guesses += [rng.uniform(0, 300, (points, 2)) for _ in range(rng.integers(0, 3))]
        scores = rng.random(len(guesses)).round(2).astype(np.float32)
        stacked = np.array(guesses, dtype=np.float32).reshape(-1, points, 2)
        results += [
            {
                "image_id": image["id"],
                "category_id": 1,
                "score": float(score),
                "keypoints": np.column_stack([g, np.ones(points)]).flatten().tolist(),
            }
            for g, score in zip(stacked, scores, strict=True)
        ]
        # Detectron2's points lie half a pixel further right and down.
        found = np.concatenate([stacked + 0.5, np.ones((len(stacked), points, 1))], axis=2)
        instances = Instances((300, 300))
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]]).repeat(len(stacked), 1))
        instances.scores = torch.from_numpy(scores)
        instances.pred_classes = torch.zeros(len(stacked), dtype=torch.long)
        instances.pred_keypoints = torch.from_numpy(found.astype(np.float32))
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    metrics = evaluator.evaluate()["keypoints"]
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(str(path))
        reference = COCOeval(api, api.loadRes(results), "keypoints")
        if sigmas:
            reference.params.kpt_oks_sigmas = np.array(sigmas)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    expected = dict(
        zip(("AP", "AP50", "AP75", "APm", "APl", "AR20"), reference.stats, strict=False)
    )
    expected |= {"ARm": reference.stats[8], "ARl": reference.stats[9]}
    assert 5 < metrics["AP"] < 95
    for name in METRICS:
        assert metrics[name] == pytest.approx(100 * expected[name], abs=1e-3), name
    assert metrics["AP-person"] == pytest.approx(metrics["AP"])
