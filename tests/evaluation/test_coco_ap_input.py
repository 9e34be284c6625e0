"""What COCODetectionEvaluator refuses, and what it is built from."""

import math

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: see tools/install_detectron2.py")
from detectron2.data import MetadataCatalog

from focalnet_det.evaluation import (
    build_evaluator,
)
from tests.helpers.coco_scores import build, save

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
    with pytest.raises(KeyError, match="Known: classification, coco"):
        build_evaluator(registered.name)
    registered.set(evaluator_type="coco")
    with pytest.raises(KeyError, match="lacks json_file"):
        build_evaluator(registered.name)
