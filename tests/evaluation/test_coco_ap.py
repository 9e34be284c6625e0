"""COCODetectionEvaluator against pycocotools, which scores independently converted predictions."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: see tools/install_detectron2.py")
from pathlib import Path
from typing import Any

import torch.distributed as dist
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm

from focalnet_det.evaluation import (
    COCODetectionEvaluator,
)
from tests.helpers.coco_scores import (
    CATEGORIES,
    assert_same,
    check_against_pycocotools,
    feed,
    random_predictions,
    random_truth,
    reference_eval,
    reference_metrics,
    save,
    scores,
    to_instances,
    to_rle,
    truth_as_predictions,
)
from tests.helpers.processes import in_two_processes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limits", [(1,), (1, 5), (1, 10, 100), (1, 10, 300)])
def test_random_predictions_score_as_pycocotools(tmp_path, seed, limits):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    predictions = random_predictions(truth, rng)
    metrics = check_against_pycocotools(save(truth, tmp_path), predictions, limits)
    assert 0 < metrics["bbox"]["AP"] < 100
    assert 0 < metrics["segm"]["AP"] < 100
    assert math.isnan(metrics["bbox"]["AP-ghost"])


def test_more_than_100_detections_per_class_change_ap_as_in_pycocotools(tmp_path):
    rng = np.random.default_rng(5)
    truth = random_truth(rng)
    truth["categories"] = [{"id": 3, "name": "car"}]
    for annotation in truth["annotations"]:
        annotation["category_id"] = 3
    predictions = random_predictions(truth, rng, extra=250)
    path = save(truth, tmp_path)
    by_limit = [
        check_against_pycocotools(path, predictions, limits)["bbox"]["AP"]
        for limits in ((1, 10, 100), (1, 10, 300))
    ]
    assert by_limit[0] != by_limit[1]


REAL_SETS = {
    "coco_tiny": "coco_tiny/annotations/instances_val2017.json",
    "nuclei": "nuclei/annotations/instances_val.json",
}


@pytest.mark.parametrize("name", sorted(REAL_SETS))
def test_real_sets_score_as_pycocotools(shared_data, name):
    json_file = shared_data / REAL_SETS[name]
    if not json_file.is_file():
        pytest.skip(f"missing: ../shared/data/{REAL_SETS[name]}")
    truth = json.loads(json_file.read_text())
    predictions = random_predictions(truth, np.random.default_rng(0), extra=2)
    metrics = check_against_pycocotools(json_file, predictions, (1, 10, 100))
    assert metrics["bbox"]["AP"] > 0
    assert metrics["segm"]["AP"] > 0


def test_ground_truth_scores_100(tmp_path):
    truth = random_truth(np.random.default_rng(0))
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path))
    feed(evaluator, truth_as_predictions(truth))
    for metrics in evaluator.evaluate().values():
        # COCO divides by TP + FP + 2**-52, so a perfect score may miss 100 by a few bits.
        assert metrics["AP"] == pytest.approx(100, abs=1e-9)
        assert metrics["AP-person"] == pytest.approx(100, abs=1e-9)


def test_no_prediction_at_all_scores_zero_as_in_pycocotools(tmp_path):
    truth = random_truth(np.random.default_rng(0))
    predictions = random_predictions(truth, np.random.default_rng(0))
    for fields in predictions.values():
        for key in fields:
            fields[key] = fields[key][:0]
    metrics = check_against_pycocotools(save(truth, tmp_path), predictions, (1, 10, 100))
    assert metrics["segm"]["AP"] == 0
    assert math.isnan(metrics["segm"]["AP-ghost"])


def test_no_processed_image_gives_no_metrics(tmp_path):
    truth = random_truth(np.random.default_rng(0))
    assert COCODetectionEvaluator(json_file=save(truth, tmp_path)).evaluate() == {}


def test_hand_worked_average_precision(tmp_path):
    """Two boxes, three predictions: hit (0.9), miss (0.8), hit (0.7)."""
    box = {"area": 400.0, "iscrowd": 0, "category_id": 1, "image_id": 1}
    truth = {
        "images": [{"id": 1, "height": 100, "width": 100}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "bbox": [0, 0, 20, 20], **box},
            {"id": 2, "bbox": [50, 50, 20, 20], **box},
        ],
    }
    instances = Instances((100, 100))
    corners = [[0, 0, 20, 20], [0, 60, 20, 80], [50, 50, 70, 70]]
    instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
    instances.scores = torch.tensor([0.9, 0.8, 0.7])
    instances.pred_classes = torch.zeros(3, dtype=torch.int64)
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path))
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    metrics = evaluator.evaluate()
    assert list(metrics) == ["bbox"]  # no masks predicted
    # Recall 0.00 .. 0.50 (51 points) at precision 1, the other 50 points at 2/3.
    assert metrics["bbox"]["AP"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert metrics["bbox"]["AR1"] == 50
    assert math.isnan(metrics["bbox"]["APl"])


def test_files_can_be_read_back(tmp_path):
    rng = np.random.default_rng(1)
    truth = random_truth(rng)
    output_dir = tmp_path / "new" / "folder"
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path), output_dir=output_dir)
    feed(evaluator, random_predictions(truth, rng))
    metrics = evaluator.evaluate()
    results = json.loads((output_dir / "coco_instances_results.json").read_text())
    for task in metrics:
        # As Detectron2 does: with a box, COCO would take the box's area as that of the mask.
        own = [{k: v for k, v in r.items() if task == "bbox" or k != "bbox"} for r in results]
        scorer = reference_eval(truth, own, task, (1, 10, 100))
        assert_same(metrics[task], reference_metrics(scorer, (1, 10, 100)))
    saved = json.loads((output_dir / "coco_metrics.json").read_text())
    assert saved["segm"]["AP"] == metrics["segm"]["AP"]
    assert saved["segm"]["AP-ghost"] is None
    assert len(list(output_dir.iterdir())) == 2  # no temporary file left


def test_test_set_without_annotations_is_written_not_scored(tmp_path):
    truth = random_truth(np.random.default_rng(1))
    predictions = random_predictions(truth, np.random.default_rng(1))
    del truth["annotations"]
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path), output_dir=tmp_path)
    feed(evaluator, predictions)
    assert evaluator.evaluate() == {}
    count = sum(len(fields["scores"]) for fields in predictions.values())
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == count


def test_contiguous_ids_follow_the_given_mapping(tmp_path):
    """A mapping in another order than the category ids, with the predictions relabelled."""
    rng = np.random.default_rng(2)
    truth = random_truth(rng)
    predictions = random_predictions(truth, rng)
    mapping = {90: 0, 44: 1, 3: 2, 17: 3}
    plain = COCODetectionEvaluator(json_file=save(truth, tmp_path))
    feed(plain, predictions)
    by_rank = sorted(CATEGORIES)
    for fields in predictions.values():
        fields["labels"] = np.array([mapping[by_rank[label]] for label in fields["labels"]], int)
    names = ["Mensch", "Hund", "Auto", "Geist"]
    mapped = COCODetectionEvaluator(
        json_file=save(truth, tmp_path),
        thing_dataset_id_to_contiguous_id=mapping,
        class_names=names,
    )
    feed(mapped, predictions)
    expected, actual = plain.evaluate()["segm"], mapped.evaluate()["segm"]
    assert actual["AP"] == expected["AP"]
    for name, original in zip(names[:3], ["person", "dog", "car"], strict=True):
        assert actual[f"AP-{name}"] == expected[f"AP-{original}"]
    assert list(mapped.instance_counts) == names
    assert mapped.instance_counts["Geist"] == 0
    assert mapped.instance_counts["Auto"] == sum(
        a["category_id"] == 3 and not a["iscrowd"] for a in truth["annotations"]
    )


@pytest.mark.parametrize("form", ["bool", "probability", "uint8", "BitMasks", "transposed"])
def test_every_form_of_mask_gives_the_same_result(tmp_path, form):
    truth = random_truth(np.random.default_rng(3))
    predictions = random_predictions(truth, np.random.default_rng(3))
    image_id = max(predictions, key=lambda key: len(predictions[key]["scores"]))
    instances = to_instances(predictions[image_id])
    masks = instances.pred_masks
    forms = {
        "bool": masks,
        "probability": masks.float() * 0.4 + 0.3,
        "uint8": masks.to(torch.uint8),
        "BitMasks": BitMasks(masks),
        "transposed": masks.transpose(1, 2).contiguous().transpose(1, 2),
    }
    instances.pred_masks = forms[form]
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path), output_dir=tmp_path)
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    evaluator.evaluate()
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    expected = [to_rle(mask) for mask in predictions[image_id]["masks"]]
    assert [result["segmentation"] for result in results] == expected


def test_reset_forgets_and_repeated_images_count_once(tmp_path):
    truth = random_truth(np.random.default_rng(4))
    predictions = random_predictions(truth, np.random.default_rng(4))
    evaluator = COCODetectionEvaluator(json_file=save(truth, tmp_path), tasks=("bbox",))
    feed(evaluator, predictions)
    first = evaluator.evaluate()
    feed(evaluator, predictions)
    assert_same(evaluator.evaluate()["bbox"], first["bbox"])
    evaluator.reset()
    assert evaluator.evaluate() == {}


def work(rank: int, store: str, json_file: str, folder: str) -> None:
    dist.init_process_group("gloo", store, world_size=2, rank=rank)
    truth = json.loads(Path(json_file).read_text())
    predictions = random_predictions(truth, np.random.default_rng(6))
    evaluator = COCODetectionEvaluator(json_file=json_file, output_dir=folder)
    # Image 8 is repeated, as samplers do to give every rank as many.
    shard = {k: v for i, (k, v) in enumerate(predictions.items()) if i % 2 == rank or i == 8}
    feed(evaluator, shard)
    gather = comm.gather

    def one_rank_at_a_time(data: Any, dst: int) -> Any:
        parts = gather(data, dst=dst)
        assert sum(part is not None for part in parts) == (rank == 0)
        return parts

    comm.gather = one_rank_at_a_time
    assert bool(evaluator.evaluate()) == (rank == 0)
    dist.barrier()
    dist.destroy_process_group()


def test_two_gloo_processes_agree_with_one(tmp_path):
    truth = random_truth(np.random.default_rng(6))
    path = save(truth, tmp_path)
    evaluator = COCODetectionEvaluator(json_file=path, output_dir=tmp_path / "one")
    feed(evaluator, random_predictions(truth, np.random.default_rng(6)))
    expected = evaluator.evaluate()
    store = f"file://{tmp_path}/rendezvous"
    in_two_processes("tests.evaluation.test_coco_ap", "work", store, path, tmp_path / "two")
    saved = json.loads((tmp_path / "two/coco_metrics.json").read_text())
    for task, metrics in expected.items():
        actual = {k: math.nan if v is None else v for k, v in saved[task].items()}
        assert_same(actual, metrics)
    one, two = (
        sorted(json.loads((tmp_path / name / "coco_instances_results.json").read_text()), key=str)
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 50


def test_ground_truth_scores_100_whatever_its_ids_and_areas(tmp_path, small):
    """Ids that repeat would hide three objects of four; an area of 0 would make all small."""
    truth = small[0]
    predictions = truth_as_predictions(truth)
    expected = scores(tmp_path, truth, predictions)
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = 1 + number % 2
        annotation["area"] = 0 if number % 2 else None
    found = scores(tmp_path, truth, predictions)
    assert found["segm"]["AP"] == found["bbox"]["AP"] == pytest.approx(100, abs=1e-9)
    for task in ("bbox", "segm"):
        assert found[task] == pytest.approx(expected[task], nan_ok=True)
