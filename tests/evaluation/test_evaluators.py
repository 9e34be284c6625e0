"""Ground truth given as predictions scores 100 in every metric, through the evaluators of a run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_utils

from focalnet_det.data.io.labels import IGNORE, read_labels
from focalnet_det.data.panoptic.panoptic_sets import PanopticFiles, register_panoptic_json
from focalnet_det.data.panoptic.segments import read_segment_ids
from focalnet_det.data.registry import register_coco_json
from focalnet_det.data.semantic.label_folders import read_class_list, register_label_folders
from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.evaluation import build_evaluator

NAME = "truth_scores_100"

pytestmark = pytest.mark.usefixtures("forget_data_sets")
# COCO divides by TP + FP + 2**-52.
EXACTLY_100 = pytest.approx(100, abs=1e-9)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth") / "shapes"
    return make_shapes(folder, train=1, val=24, size=(96, 96), seed=3, workers=1)


def decoded(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask of any kind, by pycocotools."""
    parts = segmentation
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        parts = mask_utils.frPyObjects(segmentation, *size)
    return mask_utils.decode(mask_utils.merge(parts) if isinstance(parts, list) else parts)


def as_prediction(record: dict[str, Any]) -> Instances:
    """The objects of a record, without crowds, as a model would give them."""
    size = (record["height"], record["width"])
    rows = [row for row in record["annotations"] if not row.get("iscrowd")]
    found = Instances(size)
    boxes = [BoxMode.convert(row["bbox"], row["bbox_mode"], BoxMode.XYXY_ABS) for row in rows]
    # Doubles: a float32 box has another width than its corners say.
    found.pred_boxes = Boxes(torch.zeros(len(rows), 4))
    found.pred_boxes.tensor = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    found.scores = torch.linspace(0.9, 0.5, len(rows))
    found.pred_classes = torch.tensor([row["category_id"] for row in rows], dtype=torch.int64)
    if any("segmentation" in row for row in rows) or not rows:
        masks = [decoded(row["segmentation"], size) for row in rows]
        found.pred_masks = torch.tensor(np.array(masks).reshape(-1, *size)).bool()
    if any("keypoints" in row for row in rows):
        points = [np.reshape(row["keypoints"], (-1, 3)) for row in rows]
        found.pred_keypoints = torch.tensor(np.array(points), dtype=torch.float32)
    return found


def score(make: Any, **options: Any) -> dict[str, dict[str, float]]:
    """Metrics of predictions that are made from the records of the registered set."""
    evaluator = build_evaluator(NAME, **options)
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [make(record)])
    return evaluator.evaluate()


def real_instances(shared_data: Path, name: str) -> tuple[Path, Path]:
    folder, split = name.split("/")
    path = shared_data / folder / f"annotations/instances_{split}.json"
    if not path.is_file():
        pytest.skip(f"missing: ../shared/data/{folder}")
    return path, shared_data / folder / "images" / split.removesuffix("_rle")


def assert_instances_score_100(json_file: Path, images: Path) -> None:
    register_coco_json(NAME, json_file, images, evaluation=True)
    content = json.loads(json_file.read_text())
    objects = [row for row in content["annotations"] if not row.get("iscrowd")]
    # Of more objects of a class in an image than detections count, some cannot be found.
    most = max(Counter((row["image_id"], row["category_id"]) for row in objects).values())
    results = score(lambda r: {"instances": as_prediction(r)}, max_dets=max(100, most))
    occurring = {row["category_id"] for row in objects}
    names = {c["name"] for c in content["categories"] if c["id"] in occurring}
    assert set(results) == {"bbox", "segm"}
    for metrics in results.values():
        for metric in (
            "AP",
            "AP50",
            "AP75",
            f"AR{max(100, most)}",
            *(f"AP-{name}" for name in names),
        ):
            assert metrics[metric] == EXACTLY_100, metric
        sizes = [metrics[name] for name in ("APs", "APm", "APl")]
        assert [value for value in sizes if not np.isnan(value)] == [EXACTLY_100] * sum(
            not np.isnan(value) for value in sizes
        )


def test_shapes_instances(shapes: Path) -> None:
    json_file = shapes / "annotations/instances_val.json"
    rows = json.loads(json_file.read_text())["annotations"]
    # Polygons, RLE and crowds: the set is worth the test.
    assert any(row["iscrowd"] for row in rows)
    assert {type(row["segmentation"]) for row in rows} == {list, dict}
    assert_instances_score_100(json_file, shapes / "images/val")


@pytest.mark.parametrize("name", ["coco_tiny/val2017", "nuclei/val", "coco_panoptic/val2017"])
def test_real_instances(shared_data: Path, name: str) -> None:
    assert_instances_score_100(*real_instances(shared_data, name))


def test_keypoints(shapes: Path, tmp_path: Path) -> None:
    """Three points in the box of each object, one of them not visible."""
    content = json.loads((shapes / "annotations/instances_val.json").read_text())
    content["categories"] = [
        {**category, "keypoints": ["top", "left_side", "right_side"]}
        for category in content["categories"]
    ]
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        points = [x + width // 2, y, 2, x, y + height // 2, 1, x + width - 1, y + height // 2, 0]
        row |= {"keypoints": points, "num_keypoints": 2}
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(content))
    register_coco_json(NAME, path, shapes / "images/val", evaluation=True)
    results = score(lambda record: {"instances": as_prediction(record)})
    assert results["keypoints"]["AP"] == EXACTLY_100
    assert results["keypoints"]["AR20"] == EXACTLY_100


def as_panoptic_prediction(record: dict[str, Any]) -> dict[str, Any]:
    """The PNG and the labels made from it, crowds left out."""
    ids = read_segment_ids(record["pan_seg_file_name"]).copy()
    segments = []
    for segment in record["segments_info"]:
        if segment.get("iscrowd"):
            ids[ids == segment["id"]] = 0
        else:
            segments.append({k: segment[k] for k in ("id", "category_id", "isthing")})
    scores = as_scores(record, len(MetadataCatalog.get(NAME).stuff_classes))
    return {"panoptic_seg": (torch.from_numpy(ids), segments), "sem_seg": scores}


def as_scores(record: dict[str, Any], count: int) -> torch.Tensor:
    """Labels as scores of each class, (K, H, W); any class where they are ignored."""
    labels = read_labels(record["sem_seg_file_name"], record["label_rule"])
    labels[labels == IGNORE] = 0
    one_hot = np.arange(count)[:, None, None] == labels
    return torch.from_numpy(one_hot).float()


def assert_panoptic_scores_100(files: PanopticFiles) -> None:
    register_panoptic_json(NAME, files, evaluation=True)
    results = score(as_panoptic_prediction)
    for metric in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert results["panoptic_seg"][metric] == 100, metric
    assert results["sem_seg"]["mIoU"] == results["sem_seg"]["mBIoU"] == 100


def test_shapes_panoptic(shapes: Path) -> None:
    assert_panoptic_scores_100(
        PanopticFiles(
            panoptic_json=shapes / "annotations/panoptic_val.json",
            panoptic_root=shapes / "panoptic_val",
            images=shapes / "images/val",
        )
    )


def test_real_panoptic(shared_data: Path) -> None:
    root = shared_data / "coco_panoptic"
    if not root.is_dir():
        pytest.skip("missing: ../shared/data/coco_panoptic")
    assert_panoptic_scores_100(
        PanopticFiles(
            panoptic_json=root / "annotations/panoptic_val2017.json",
            panoptic_root=root / "panoptic_val2017",
            images=root / "images/val2017",
        )
    )


def assert_labels_score_100(images: Path, labels: Path, class_list: Path) -> None:
    classes = read_class_list(class_list)
    register_label_folders(NAME, images, labels, classes, evaluation=True)
    results = score(lambda record: {"sem_seg": as_scores(record, len(classes.names))})["sem_seg"]
    assert all(results[metric] == 100 for metric in ("mIoU", "fwIoU", "mACC", "pACC", "mBIoU"))


def test_shapes_labels(shapes: Path, tmp_path: Path) -> None:
    names = [{"id": number, "name": str(number)} for number in range(1, 11)]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    ade = shapes / "ade"
    folders = ade / "images/validation", ade / "annotations/validation"
    assert_labels_score_100(*folders, tmp_path / "classes.json")


@pytest.mark.parametrize(
    ("folder", "classes"), [("camvid", "categories.json"), ("ade20k_mini", "objectInfo150.txt")]
)
def test_real_labels(shared_data: Path, folder: str, classes: str) -> None:
    root = shared_data / folder
    if not root.is_dir():
        pytest.skip(f"missing: ../shared/data/{folder}")
    folders = root / "images/validation", root / "annotations/validation"
    assert_labels_score_100(*folders, root / classes)
