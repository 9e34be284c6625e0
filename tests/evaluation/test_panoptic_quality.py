"""Panoptic quality against its definition, on made-up and on real images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from detectron2.data import DatasetCatalog, MetadataCatalog

from focalnet_det.evaluation import PanopticEvaluator, build_evaluator
from focalnet_det.evaluation import panoptic_quality as panoptic
from tests.helpers.panoptic_scores import (
    CATEGORIES,
    as_predictions,
    blocks,
    evaluator,
    feed,
    panoptic_quality,
    perturbed,
    write_set,
)


def test_perturbed_predictions_score_as_the_definition_says(tmp_path: Path) -> None:
    truth = {seed: blocks(seed) for seed in range(30)}
    scorer = evaluator(write_set(tmp_path, truth))
    pairs = []
    for image_id, (ids, segments) in truth.items():
        predicted, found = perturbed(ids, segments, image_id)
        feed(scorer, image_id, predicted, as_predictions(found))
        pairs.append((ids, predicted, segments, found))
    metrics = scorer.evaluate()["panoptic_seg"]
    expected = panoptic_quality(pairs, CATEGORIES)
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert 20 < metrics["PQ"] < 80


def test_ground_truth_scores_100(tmp_path: Path) -> None:
    truth = {seed: blocks(seed) for seed in range(6)}
    scorer = evaluator(write_set(tmp_path, truth))
    for image_id, (ids, segments) in truth.items():
        feed(scorer, image_id, ids, [{k: s[k] for k in ("id", "category_id")} for s in segments])
    metrics = scorer.evaluate()["panoptic_seg"]
    names = [f"{q}{suffix}" for q in ("PQ", "SQ", "RQ") for suffix in ("", "_th", "_st")]
    assert {metrics[name] for name in names} == {100.0}


def real_set(root: Path, split: str) -> tuple[Path, Path, dict]:
    path = root / f"coco_panoptic/annotations/panoptic_{split}2017.json"
    folder = root / f"coco_panoptic/panoptic_{split}2017"
    return path, folder, json.loads(path.read_text())


def real_ids(path: Path) -> np.ndarray:
    colors = np.asarray(Image.open(path)).astype(np.int64)
    return colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_ground_truth_scores_100(split: str, shared_data: Path) -> None:
    path, folder, content = real_set(shared_data, split)
    scorer = PanopticEvaluator(panoptic_json=path, panoptic_root=folder)
    for annotation in content["annotations"]:
        segments = [{k: s[k] for k in ("id", "category_id")} for s in annotation["segments_info"]]
        ids = real_ids(folder / annotation["file_name"])
        feed(scorer, annotation["image_id"], ids, segments)
    metrics = scorer.evaluate()["panoptic_seg"]
    defined = [value for value in metrics.values() if not math.isnan(value)]
    assert set(defined) == {100.0}
    # 39 and 41 of the classes occur in the two splits; each has three metrics, and so have groups.
    assert len(defined) == 3 * ((39 if split == "train" else 41) + 3)


def test_real_perturbed_predictions(shared_data: Path) -> None:
    path, folder, content = real_set(shared_data, "val")
    scorer = PanopticEvaluator(panoptic_json=path, panoptic_root=folder)
    pairs = []
    for index, annotation in enumerate(content["annotations"]):
        ids = real_ids(folder / annotation["file_name"])
        predicted, found = perturbed(ids, annotation["segments_info"], index)
        feed(scorer, annotation["image_id"], predicted, found)
        pairs.append((ids, predicted, annotation["segments_info"], found))
    metrics = scorer.evaluate()["panoptic_seg"]
    expected = panoptic_quality(pairs, content["categories"])
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=1e-9)
    assert 10 < metrics["PQ"] < 90


def two_segments() -> tuple[np.ndarray, list[dict]]:
    ids = np.ones((4, 6), dtype=np.int64)
    ids[:, 3:] = 300
    return ids, [{"id": 1, "category_id": 3}, {"id": 300, "category_id": 11}]


def test_hand_worked_numbers(tmp_path: Path) -> None:
    scorer = evaluator(write_set(tmp_path, {7: two_segments()}), output_dir=tmp_path / "out")
    predicted = np.full((4, 6), 2)
    predicted[:, 4:] = 0
    predicted[0, 5] = 9
    # The cat: 12 of 16 pixels are right. Sky: missed. A cat of one pixel too many.
    segments = [
        {"id": 2, "category_id": 0, "isthing": True},
        {"id": 9, "category_id": 0, "isthing": True},
    ]
    feed(scorer, 7, predicted, segments)
    metrics = scorer.evaluate()["panoptic_seg"]
    assert metrics["SQ-cat"] == pytest.approx(75)
    assert metrics["RQ-cat"] == pytest.approx(100 / 1.5)
    assert metrics["PQ-cat"] == metrics["PQ_th"] == pytest.approx(50)
    assert metrics["PQ-sky"] == metrics["PQ_st"] == 0
    assert metrics["PQ"] == pytest.approx(25)
    assert math.isnan(metrics["PQ-dog"])
    saved = json.loads((tmp_path / "out/panoptic_metrics.json").read_text())
    assert saved["metrics"]["PQ-dog"] is None
    assert saved["image_PQ"] == {"7": pytest.approx(25)}


def test_images_that_were_not_predicted_are_missed(tmp_path: Path) -> None:
    ids, segments = two_segments()
    crowd = [{**segments[0], "iscrowd": 1}, segments[1]]
    scorer = evaluator(write_set(tmp_path, {1: (ids, segments), 2: (ids, crowd)}))
    feed(scorer, 1, ids, segments)
    metrics = scorer.evaluate()["panoptic_seg"]
    assert metrics["PQ-cat"] == 100
    assert metrics["PQ-sky"] == pytest.approx(100 / 1.5)


def test_predictions_are_saved_in_coco_format(tmp_path: Path) -> None:
    ids, segments = two_segments()
    root = write_set(tmp_path, {1: (ids, segments)})
    scorer = evaluator(root, output_dir=tmp_path / "out", save_predictions=True)
    feed(scorer, 1, ids * 300, as_predictions([{**s, "id": s["id"] * 300} for s in segments]))
    scorer.evaluate()
    content = json.loads((tmp_path / "out/panoptic_results.json").read_text())
    (row,) = content["annotations"]
    expected = [{"id": 300, "category_id": 3}, {"id": 90_000, "category_id": 11}]
    assert row == {"image_id": 1, "file_name": "1.png", "segments_info": expected}
    assert (real_ids(tmp_path / "out/panoptic/1.png") == ids * 300).all()
    with pytest.raises(ValueError, match="requires an output_dir"):
        evaluator(root, save_predictions=True)


BAD_PREDICTIONS = {
    "repeat": ([{"id": 1, "category_id": 3}] * 2, "image 7 has duplicate segment ids: id 1"),
    "unlisted": (
        [{"id": 1, "category_id": 3}],
        "image 7 has pixels of an unlisted segment: id 300",
    ),
    "empty": (
        [{"id": i, "category_id": 3} for i in (1, 300, 4)],
        "image 7 has segments without pixels: id 4",
    ),
    "void": (
        [{"id": i, "category_id": 3} for i in (1, 300, 0)],
        "image 7 has segments with id 0",
    ),
    "category": (
        [{"id": 1, "category_id": 4}, {"id": 300, "category_id": 3}],
        "image 7 has segments with an unknown category: category 4",
    ),
    "class": (
        [{"id": 1, "category_id": 2, "isthing": True}, {"id": 300, "category_id": 3}],
        "image 7 has a segment of thing class 2",
    ),
    "things as stuff": (
        [{"id": 1, "category_id": 0, "isthing": False}, {"id": 300, "category_id": 3}],
        "image 7 has a segment of stuff class 0",
    ),
    "no list": (None, "image 7 lacks a list of segments"),
}


@pytest.mark.parametrize("name", BAD_PREDICTIONS)
def test_impossible_predictions_name_the_image(name: str, tmp_path: Path) -> None:
    ids, segments = two_segments()
    scorer = evaluator(write_set(tmp_path, {7: (ids, segments)}))
    bad, message = BAD_PREDICTIONS[name]
    with pytest.raises(ValueError, match=message):
        feed(scorer, 7, ids, bad)


def test_wrong_sizes_and_images_are_errors(tmp_path: Path) -> None:
    ids, segments = two_segments()
    scorer = evaluator(write_set(tmp_path, {7: (ids, segments)}))
    with pytest.raises(ValueError, match=r"image 7 is \(3, 6\).*7.png is \(4, 6\)"):
        feed(scorer, 7, ids[:3], segments)
    with pytest.raises(ValueError, match="Image id 8 is not annotated"):
        feed(scorer, 8, ids, segments)


def test_contradictions_of_the_ground_truth_name_the_file(tmp_path: Path) -> None:
    ids, segments = two_segments()
    root = write_set(tmp_path, {7: (ids, [*segments, segments[0]])})
    with pytest.raises(ValueError, match=r"duplicate segment ids: .*segments_info\[2\] \(id 1"):
        evaluator(root)
    scorer = evaluator(write_set(tmp_path, {7: (ids, segments[1:])}))
    with pytest.raises(ValueError, match=r"Ground truth .*7.png has pixels of an unlisted segment"):
        feed(scorer, 7, ids, segments)
    content = json.loads((tmp_path / "panoptic.json").read_text())
    twice = {**content, "annotations": content["annotations"] * 2}
    both = {**content, "categories": [*CATEGORIES, {"id": 3, "name": "cat", "isthing": 0}]}
    none = {**content, "images": []}
    for broken, message in (
        (twice, r"images annotated twice: .*image 7"),
        (both, r"thing and stuff: categories\[\d\] \(id 3\)"),
        (none, r"annotations of an unlisted image: .*image 7"),
        ({}, "it lacks annotations, categories, images"),
    ):
        (tmp_path / "panoptic.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            evaluator(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such COCO panoptic file"):
        PanopticEvaluator(panoptic_json=tmp_path / "absent.json", panoptic_root=tmp_path)


def test_classes_of_the_model_and_of_the_data_must_agree(tmp_path: Path) -> None:
    root = write_set(tmp_path, {7: two_segments()})
    with pytest.raises(ValueError, match=r"thing_ids and .* differ in category ids \[5\]"):
        evaluator(root, thing_ids={3: 0})
    with pytest.raises(ValueError, match=r"stuff_ids and .* differ in category ids \[20, 21\]"):
        evaluator(root, stuff_ids={0: 0, 11: 1})


@pytest.fixture
def registered(tmp_path: Path) -> Path:
    root = write_set(tmp_path, {7: two_segments()})
    DatasetCatalog.register("test_panoptic_set", list)
    MetadataCatalog.get("test_panoptic_set").set(
        evaluator_type="coco_panoptic_seg",
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "png"),
        thing_classes=["cat", "dog"],
        stuff_classes=["things", "sky", "grass", "sand"],
        thing_dataset_id_to_contiguous_id={3: 0, 5: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 11: 1, 20: 2, 21: 3},
    )
    yield root
    DatasetCatalog.remove("test_panoptic_set")
    MetadataCatalog.remove("test_panoptic_set")


def test_registered_sets_are_scored_in_every_task(registered: Path) -> None:
    scorer = build_evaluator("test_panoptic_set")
    scorer.reset()
    ids, segments = two_segments()
    labels = registered / "labels.png"
    Image.fromarray(np.where(ids == 1, 0, 1).astype(np.uint8)).save(labels)
    record = {"image_id": 7, "file_name": "7.jpg", "sem_seg_file_name": str(labels)}
    scores = torch.nn.functional.one_hot(torch.as_tensor(ids > 1).long(), 4).permute(2, 0, 1)
    prediction = (torch.as_tensor(ids), as_predictions(segments))
    scorer.process([record], [{"sem_seg": scores, "panoptic_seg": prediction}])
    results = scorer.evaluate()
    assert list(results) == ["sem_seg", "panoptic_seg"]
    assert results["sem_seg"]["mIoU"] == results["panoptic_seg"]["PQ"] == 100


def test_two_processes_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_set(tmp_path, {k: blocks(k) for k in range(8)})
    alone = evaluator(root)
    ranks = [evaluator(root, output_dir=root / str(rank)) for rank in (0, 1)]
    for image_id in range(8):
        # As samplers pad: both ranks see image 0.
        for scorer in (alone, ranks[image_id % 2], *(ranks[1:] if image_id == 0 else ())):
            feed(scorer, image_id, *perturbed(*blocks(image_id), image_id))
    gathered: list[Any] = []
    monkeypatch.setattr(panoptic.comm, "gather", lambda own, dst: gathered.append(own) or [])
    monkeypatch.setattr(panoptic.comm, "is_main_process", lambda: False)
    assert ranks[1].evaluate() == {}
    monkeypatch.setattr(panoptic.comm, "gather", lambda own, dst: [own, *gathered])
    monkeypatch.setattr(panoptic.comm, "is_main_process", lambda: True)
    together = ranks[0].evaluate()
    monkeypatch.undo()
    np.testing.assert_equal(together, alone.evaluate())
    assert not (root / "1").exists()
