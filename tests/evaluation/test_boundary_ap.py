"""Boundary AP against a slow computation in the published form."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from focalnet_det.evaluation import BoundaryEvaluator, build_evaluator
from focalnet_det.evaluation import boundary_ap as boundary
from focalnet_det.evaluation.boundary_ap import boundary_iou, mask_boundary, with_boundary


def published_boundary(mask: np.ndarray, ratio: float = 0.02) -> np.ndarray:
    """As the paper's code erodes: 3 x 3 pixels, once for each pixel of the width."""
    width = max(1, round(ratio * math.hypot(*mask.shape)))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


class PublishedEval(COCOeval):
    """pycocotools with the IoU of the paper, from pixels."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-d["score"] for d in found], kind="mergesort")
        found = [found[i] for i in order][: self.params.maxDets[-1]]
        ious = np.zeros((len(found), len(truth)))
        for i, d in enumerate(found):
            for j, g in enumerate(truth):
                a, b = (mask_utils.decode(x["segmentation"]).astype(bool) for x in (d, g))
                values = []
                for x, y in ((a, b), (published_boundary(a), published_boundary(b))):
                    either = x.sum() if g["iscrowd"] else (x | y).sum()
                    values.append((x & y).sum() / either)
                ious[i, j] = min(values)
        return ious if ious.size else []


def blob(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """An ellipse, perhaps over the edge of the image."""
    mask = np.zeros(shape, np.uint8)
    centre = tuple(int(rng.integers(0, side)) for side in shape[::-1])
    axes = (int(rng.integers(3, 30)), int(rng.integers(3, 30)))
    cv2.ellipse(mask, centre, axes, float(rng.integers(180)), 0, 360, 1, -1)
    return mask.astype(bool)


def made_up(folder: Path, images: int = 12) -> tuple[Path, dict[int, Instances]]:
    """Objects of three classes, and predictions that are the objects shifted, with false ones."""
    rng = np.random.default_rng(5)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": f"c{k}"} for k in (2, 3, 7)],
    }
    predictions = {}
    for image_id in range(images):
        shape = (int(rng.integers(60, 120)), int(rng.integers(60, 120)))
        content["images"].append({"id": image_id, "height": shape[0], "width": shape[1]})
        masks, labels = [], []
        for _ in range(rng.integers(0, 6)):
            mask, label = blob(rng, shape), int(rng.integers(3))
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            row = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            row |= {"category_id": (2, 3, 7)[label], "iscrowd": int(rng.random() < 0.15)}
            row |= {"segmentation": {**rle, "counts": rle["counts"].decode()}}
            row |= {"area": int(mask.sum()), "bbox": mask_utils.toBbox(rle).tolist()}
            content["annotations"].append(row)
            shift = tuple(int(v) for v in rng.integers(-2, 3, 2))
            masks.append(np.roll(mask, shift, axis=(0, 1)))
            labels.append(label if rng.random() < 0.9 else int(rng.integers(3)))
        masks += [blob(rng, shape) for _ in range(2)]
        labels += [int(rng.integers(3)) for _ in range(2)]
        instances = Instances(shape)
        instances.pred_masks = torch.as_tensor(np.stack(masks))
        instances.pred_classes = torch.as_tensor(labels)
        # Scores repeat: the order of equal ones is part of the protocol.
        instances.scores = torch.as_tensor(rng.integers(1, 20, len(masks)) / 20)
        instances.pred_boxes = Boxes(torch.zeros(len(masks), 4))
        predictions[image_id] = instances
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path, predictions


def published_metrics(path: Path, predictions: dict[int, Instances]) -> np.ndarray:
    results = []
    for image_id, found in predictions.items():
        for mask, label, score in zip(
            found.pred_masks.numpy(),
            found.pred_classes.tolist(),
            found.scores.tolist(),
            strict=True,
        ):
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            row = {"image_id": image_id, "category_id": (2, 3, 7)[label], "score": score}
            results.append({**row, "segmentation": rle})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        scorer = PublishedEval(truth, truth.loadRes(results), "segm")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


def score(path: Path, predictions: dict[int, Instances], **options: Any) -> dict[str, float]:
    scorer = BoundaryEvaluator(json_file=path, **options)
    for image_id, instances in predictions.items():
        scorer.process([{"image_id": image_id}], [{"instances": instances}])
    return dict(scorer.evaluate()["boundary"])


NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
RECALLS = ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def test_metrics_are_those_of_the_published_form(tmp_path: Path) -> None:
    path, predictions = made_up(tmp_path)
    metrics = score(path, predictions, output_dir=tmp_path / "out")
    expected = 100 * published_metrics(path, predictions)
    expected[expected < 0] = np.nan
    found = [metrics[name] for name in (*NAMES, *RECALLS)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert 10 < metrics["AP"] < 60
    assert np.mean([metrics[f"AP-c{k}"] for k in (2, 3, 7)]) == pytest.approx(metrics["AP"])
    saved = json.loads((tmp_path / "out/boundary_metrics.json").read_text())["boundary"]
    assert saved["AP"] == metrics["AP"]


@pytest.mark.parametrize("shape", [(40, 60), (300, 400)])
def test_boundaries(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for mask in [
        np.ones(shape, bool),
        np.zeros(shape, bool),
        *(blob(rng, shape) for _ in range(9)),
    ]:
        width = max(1, round(0.02 * math.hypot(*shape)))
        np.testing.assert_array_equal(mask_boundary(mask, width), published_boundary(mask))


def test_iou_is_the_smaller_one() -> None:
    big = np.zeros((100, 100), bool)
    big[10:90, 10:90] = True
    hollow = big & published_boundary(big)
    a, b = (with_boundary(mask, 0.02) for mask in (big, hollow))
    # The ring has the boundary of the square, 3 px wide, but 948 of its 6400 pixels.
    assert hollow.sum() == 80 * 80 - 74 * 74
    (value,) = boundary_iou([b], [{**a, "iscrowd": 0}]).flatten()
    assert value == pytest.approx(hollow.sum() / big.sum())


def test_images_without_predictions_count(tmp_path: Path) -> None:
    path, predictions = made_up(tmp_path)
    half = {k: v for k, v in predictions.items() if k % 2}
    expected = 100 * published_metrics(path, half)
    assert score(path, half)["AP"] == pytest.approx(expected[0], abs=1e-12)


def test_two_processes_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, predictions = made_up(tmp_path)
    alone = score(path, predictions)
    gathered: list[Any] = []
    monkeypatch.setattr(boundary.comm, "gather", lambda own, dst: gathered.append(own) or [])
    monkeypatch.setattr(boundary.comm, "is_main_process", lambda: False)
    scorer = BoundaryEvaluator(json_file=path)
    for image_id in range(6):
        scorer.process([{"image_id": image_id}], [{"instances": predictions[image_id]}])
    assert scorer.evaluate() == {}
    monkeypatch.setattr(boundary.comm, "gather", lambda own, dst: [own, *gathered])
    monkeypatch.setattr(boundary.comm, "is_main_process", lambda: True)
    assert score(path, {k: v for k, v in predictions.items() if k >= 6}) == alone


def test_bad_input(tmp_path: Path) -> None:
    path, predictions = made_up(tmp_path)
    with pytest.raises(ValueError, match=r"Image id 99 is not in"):
        score(path, {99: predictions[0]})
    wrong = next(k for k in predictions if k and predictions[k].image_size[0] != 80)
    small = Instances((5, 5))
    small.pred_masks, small.pred_classes = torch.zeros(1, 5, 5), torch.zeros(1).long()
    small.scores = torch.ones(1)
    with pytest.raises(ValueError, match=rf"Masks of image {wrong} are \(5, 5\)"):
        score(path, {wrong: small})
    small.remove("pred_masks")
    with pytest.raises(ValueError, match=f"image {wrong} have no masks.*remove train.boundary"):
        score(path, {wrong: small})
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Annotation 1 in .* has no segmentation"):
        BoundaryEvaluator(json_file=path)


def test_beside_mask_ap(tmp_path: Path) -> None:
    path, predictions = made_up(tmp_path, images=4)
    name = "test_boundary_set"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="coco")
    try:
        scorer = build_evaluator(name, boundary=True)
        scorer.reset()
        for image_id, instances in predictions.items():
            scorer.process([{"image_id": image_id}], [{"instances": instances}])
        results = scorer.evaluate()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert list(results) == ["bbox", "segm", "boundary"]
    assert results["boundary"]["AP"] < results["segm"]["AP"]


def test_real_ground_truth_scores_100(shared_data: Path) -> None:
    path = shared_data / "coco_panoptic/annotations/instances_val2017.json"
    truth = COCO(str(path))
    categories = sorted(truth.cats)
    predictions = {}
    for image_id, image in truth.imgs.items():
        rows = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        instances = Instances((image["height"], image["width"]))
        masks = np.stack([truth.annToMask(row) for row in rows])
        instances.pred_masks = torch.as_tensor(masks).bool()
        instances.pred_classes = torch.as_tensor(
            [categories.index(row["category_id"]) for row in rows]
        )
        instances.scores = torch.ones(len(rows))
        predictions[image_id] = instances
    metrics = score(path, predictions)
    assert {metrics[name] for name in (*NAMES, "AR100")} == {100.0}
