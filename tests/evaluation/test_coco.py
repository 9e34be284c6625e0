"""COCODetectionEvaluator against pycocotools, which scores independently converted predictions."""

import contextlib
import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: see tools/install_detectron2.py")

from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focalnet_det.evaluation import (
    COCODetectionEvaluator,
    build_evaluator,
    overall_table,
    per_class_table,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

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


# Forks after one import: quicker than two, and safe while hotcoco has no threads yet.
TWO_PROCESSES = """
import json, sys
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

given = json.loads(sys.argv[1])
sys.path.insert(0, given["tests"])
import test_coco as t

def worker(rank):
    dist.init_process_group("gloo", init_method=given["url"], world_size=2, rank=rank)
    truth = json.load(open(given["json"]))
    predictions = t.random_predictions(truth, t.np.random.default_rng(6))
    evaluator = t.COCODetectionEvaluator(json_file=given["json"], output_dir=given["out"])
    # Image 8 is repeated, as samplers do to give every rank as many.
    shard = {k: v for i, (k, v) in enumerate(predictions.items()) if i % 2 == rank or i == 8}
    t.feed(evaluator, shard)
    gather = comm.gather

    def one_rank_at_a_time(data, dst):
        parts = gather(data, dst=dst)
        assert sum(part is not None for part in parts) == (rank == 0)
        return parts

    comm.gather = one_rank_at_a_time
    assert bool(evaluator.evaluate()) == (rank == 0)
    dist.barrier()
    dist.destroy_process_group()

mp.start_processes(worker, nprocs=2, start_method="fork")
"""


def test_two_gloo_processes_agree_with_one(tmp_path):
    truth = random_truth(np.random.default_rng(6))
    path = save(truth, tmp_path)
    evaluator = COCODetectionEvaluator(json_file=path, output_dir=tmp_path / "one")
    feed(evaluator, random_predictions(truth, np.random.default_rng(6)))
    expected = evaluator.evaluate()
    given = {"tests": str(Path(__file__).parent), "json": str(path), "out": str(tmp_path / "two")}
    given["url"] = f"file://{tmp_path}/rendezvous"
    command = [sys.executable, "-c", TWO_PROCESSES, json.dumps(given)]
    subprocess.run(command, check=True, timeout=120)
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


def build(folder: Path, truth: dict[str, Any], **options: Any) -> Any:
    return COCODetectionEvaluator(json_file=save(truth, folder), **options)


@pytest.fixture
def small() -> tuple[dict[str, Any], Instances, int]:
    """Ground truth, the predictions of one of its images and that image's id."""
    truth = random_truth(np.random.default_rng(7))
    image_id = truth["images"][1]["id"]
    fields = random_predictions(truth, np.random.default_rng(7))[image_id]
    return truth, to_instances(fields), image_id


def test_unknown_image_is_named(tmp_path, small):
    truth, instances, _ = small
    with pytest.raises(ValueError, match="Image id 12345 is not in"):
        build(tmp_path, truth).process([{"image_id": 12345}], [{"instances": instances}])


def test_class_outside_the_data_set(tmp_path, small):
    truth, instances, image_id = small
    instances.pred_classes[0] = 4
    with pytest.raises(ValueError, match=r"class 4, but .* has 4 classes"):
        build(tmp_path, truth).process([{"image_id": image_id}], [{"instances": instances}])


@pytest.mark.parametrize("field", ["scores", "pred_boxes"])
def test_values_that_are_not_finite(tmp_path, small, field):
    truth, instances, image_id = small
    values = instances.get(field)
    getattr(values, "tensor", values)[0] = math.nan
    with pytest.raises(ValueError, match=f"{field} of image {image_id} are not finite"):
        build(tmp_path, truth).process([{"image_id": image_id}], [{"instances": instances}])


def test_masks_of_another_size(tmp_path, small):
    truth, instances, image_id = small
    masks = instances.pred_masks
    instances.remove("pred_masks")
    instances.pred_masks = masks[:, 1:]
    with pytest.raises(ValueError, match="Resize predictions to the original image"):
        build(tmp_path, truth).process([{"image_id": image_id}], [{"instances": instances}])


def test_masks_wanted_but_not_predicted(tmp_path, small):
    truth, instances, image_id = small
    instances.remove("pred_masks")
    evaluator = build(tmp_path, truth, tasks=("bbox", "segm"))
    with pytest.raises(ValueError, match="insufficient to evaluate bbox and segm"):
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def test_ground_truth_without_masks(tmp_path, small):
    truth, instances, image_id = small
    del truth["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match=r"Annotation 1 in .* has no segmentation"):
        build(tmp_path, truth, tasks=("segm",))
    with pytest.raises(ValueError, match="has no segmentation"):
        build(tmp_path, truth).process([{"image_id": image_id}], [{"instances": instances}])
    build(tmp_path, truth, tasks=("bbox",)).process(
        [{"image_id": image_id}], [{"instances": instances}]
    )


def test_ground_truth_that_contradicts_itself(tmp_path, small):
    small[0]["annotations"][2]["category_id"] = 777
    with pytest.raises(ValueError, match=r"known category_id: annotations\[2\] \(id 3\): 777"):
        build(tmp_path, small[0])


def test_ground_truth_of_an_unlisted_image_is_left_out(tmp_path, small):
    truth = small[0]
    truth["annotations"][2]["image_id"] = 777
    assert sum(build(tmp_path, truth).instance_counts.values()) == len(
        [a for a in truth["annotations"] if not a["iscrowd"]]
    ) - (not truth["annotations"][2]["iscrowd"])


def scores(folder: Path, truth: dict[str, Any], predictions: Predictions) -> Any:
    evaluator = build(folder, truth)
    feed(evaluator, predictions)
    return evaluator.evaluate()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("densepose",)}, "Known: bbox, keypoints, segm"),
        ({"tasks": "bbox"}, "Known: bbox, keypoints, segm"),
        ({"tasks": ()}, "Known: bbox, keypoints, segm"),
        ({"max_dets": 0}, "max_dets must be at least 1"),
        ({"class_names": ["one"]}, "has 4 categories"),
        ({"class_names": ["one"] * 4}, "as many unique names"),
        ({"thing_dataset_id_to_contiguous_id": {90: 0, 3: 1, 5: 2, 44: 3}}, r"\[5, 17\]"),
        ({"thing_dataset_id_to_contiguous_id": {90: 0, 3: 1, 17: 1, 44: 3}}, "without gaps"),
    ],
)
def test_wrong_options(tmp_path, small, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, small[0], **options)


@pytest.fixture
def registered():
    """Metadata of a data set that is forgotten after the test."""
    name = "test_coco_evaluator"
    yield MetadataCatalog.get(name)
    MetadataCatalog.remove(name)


def test_build_evaluator_reads_metadata(tmp_path, small, registered):
    truth, instances, image_id = small
    registered.set(evaluator_type="coco", json_file=str(save(truth, tmp_path)))
    registered.set(thing_classes=["c", "g", "d", "p"])
    evaluator = build_evaluator(registered.name, output_dir=tmp_path, tasks=("bbox",), max_dets=20)
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    metrics = evaluator.evaluate()["bbox"]
    assert {"AR20", "AP-c", "AP-p"} < set(metrics)
    assert (tmp_path / "coco_metrics.json").is_file()


def test_build_evaluator_names_known_types(registered):
    with pytest.raises(KeyError, match="Known: coco"):
        build_evaluator(registered.name)
    registered.set(evaluator_type="coco")
    with pytest.raises(KeyError, match="lacks json_file"):
        build_evaluator(registered.name)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_tables_fit_80_columns():
    results = {
        "bbox": {"AP": 41.237, "AP50": 60.0, "APs": math.nan, "AP-[red]cat": 3.2},
        "segm": {"AP": 100.0},
    }
    rows = overall_table(results).splitlines()
    assert cells(rows[0]) == ["task", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert cells(rows[2]) == ["bbox", "41.24", "60.00", "-", "-", "-", "-"]
    assert cells(rows[3]) == ["segm", "100.00", "-", "-", "-", "-", "-"]
    rows = per_class_table(results, {"[red]cat": 3, "long name " * 12: 0}).splitlines()
    assert cells(rows[0]) == ["class", "box AP", "mask AP", "instances"]
    assert cells(rows[2]) == ["[red]cat", "3.20", "-", "3"]
    assert max(map(len, rows)) <= 80
    assert all(row.isascii() for row in rows)
