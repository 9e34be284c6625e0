"""Records of every kind, against Detectron2's mapper, pycocotools and counts by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from focalnet_det.data import issue_policies
from focalnet_det.data.augmentation import multiscale_or_crop, resize
from focalnet_det.data.instances.mappers import InstanceMapper
from tests.helpers.records import (
    FLIPPED_POINTS,
    HEIGHT,
    MASK,
    TRIANGLE,
    WIDTH,
    annotation,
    assert_same,
    compressed,
    make_record,
    map_one,
    mapper,
    rectangle,
    rotated,
    uncompressed,
)

CLEAN = [
    annotation(),
    annotation(
        bbox=[20.0, 15.0, 50.0, 38.0],
        bbox_mode=BoxMode.XYXY_ABS,
        segmentation=compressed(rectangle(15, 20, 38, 50)),
        category_id=0,
    ),
    annotation(
        bbox=[10.0, 5.0, 45.0, 34.5],
        segmentation=[list(TRIANGLE), [40.5, 30.0, 55.0, 30.0, 55.0, 39.0, 40.5, 39.5]],
    ),
]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("keypoints", [False, True])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("is_train", [False, True])
def test_same_as_detectron2_on_clean_data(
    picture: Path, masks: bool, keypoints: bool, image_format: str, is_train: bool
) -> None:
    augmentations = multiscale_or_crop(
        short_sides=(30, 50), crop_short_sides=(35, 45), crop_range=(15, 30)
    )
    common: dict[str, Any] = {
        "is_train": is_train,
        "augmentations": augmentations,
        "image_format": image_format,
        "keypoint_hflip_indices": FLIPPED_POINTS,
    }
    ours = InstanceMapper(masks=masks, keypoints=keypoints, recompute_boxes=masks, **common)
    theirs = DatasetMapper(
        use_instance_mask=masks,
        use_keypoint=keypoints,
        instance_mask_format="bitmask",
        recompute_boxes=masks,
        **common,
    )
    record = make_record(picture, CLEAN)
    before = copy.deepcopy(record)
    for seed in range(8):
        np.random.seed(seed)
        found = ours(record)
        np.random.seed(seed)
        expected = theirs(record)
        assert_same(found, expected, leave_out=["gt_boxes"] if masks else [])
        if masks and is_train:
            # Detectron2's are whole pixels.
            boxes, pixels = (x["instances"].gt_boxes.tensor for x in (found, expected))
            torch.testing.assert_close(boxes, pixels, atol=1.1, rtol=0)
    assert record == before


def test_boxes_keep_their_fractions(picture: Path) -> None:
    """The box of a mask's pixels would be 10, 21, 50, 40."""
    row = annotation(
        bbox=[10.3, 20.7, 50.2, 39.6],
        bbox_mode=BoxMode.XYXY_ABS,
        segmentation=[[10.3, 20.7, 50.2, 20.7, 50.2, 39.6, 10.3, 39.6]],
    )
    found = map_one(picture, row, recompute_boxes=True)["instances"]
    assert found.gt_masks.get_bounding_boxes().tensor.tolist() == [[10, 21, 50, 40]]
    torch.testing.assert_close(found.gt_boxes.tensor, torch.tensor([[10.3, 20.7, 50.2, 39.6]]))
    # Doubled and mirrored: 120 - 2 * 50.2 = 19.6, 120 - 2 * 10.3 = 99.4.
    augmentations = [T.Resize((HEIGHT * 2, WIDTH * 2)), T.RandomFlip(prob=1.0)]
    found = map_one(picture, row, recompute_boxes=True, augmentations=augmentations)["instances"]
    torch.testing.assert_close(found.gt_boxes.tensor, torch.tensor([[19.6, 41.4, 99.4, 79.2]]))


def test_boxes_of_cut_objects_follow_what_is_left(picture: Path) -> None:
    """A triangle that is cut at x = 12: its hypotenuse leaves less of the height."""
    triangle = [[10.25, 5.25, 40.25, 5.25, 40.25, 35.25]]
    row = annotation(
        bbox=[10.25, 5.25, 40.25, 35.25], bbox_mode=BoxMode.XYXY_ABS, segmentation=triangle
    )
    whole = annotation(
        bbox=[1.3, 1.4, 9.6, 3.7],
        bbox_mode=BoxMode.XYXY_ABS,
        segmentation=[[1.3, 1.4, 9.6, 1.4, 9.6, 3.7, 1.3, 3.7]],
    )
    options: dict[str, Any] = {"augmentations": [T.CropTransform(0, 0, 20, HEIGHT)]}
    record = make_record(picture, [row, whole])
    loose = mapper(**options)(record)["instances"].gt_boxes.tensor
    torch.testing.assert_close(
        loose, torch.tensor([[10.25, 5.25, 20, 35.25], [1.3, 1.4, 9.6, 3.7]])
    )
    tight = mapper(recompute_boxes=True, **options)(record)["instances"].gt_boxes.tensor
    # At x = 20 the hypotenuse y = x - 5 is at 15, and the last pixel's center above it at 14.5 or
    # 13.5; the left and upper sides keep their fractions.
    assert tight[0, 3].item() in (14, 15)
    tight[0, 3] = 15
    torch.testing.assert_close(tight, torch.tensor([[10.25, 5.25, 20, 15], [1.3, 1.4, 9.6, 3.7]]))


def test_boxes_of_rotated_objects_are_tight(picture: Path) -> None:
    """Corners of a box turned by 45 degrees span more than the diamond that was in it."""
    diamond = [[30.0, 10.0, 40.0, 20.0, 30.0, 30.0, 20.0, 20.0]]
    row = annotation(
        bbox=[20.0, 10.0, 40.0, 30.0], bbox_mode=BoxMode.XYXY_ABS, segmentation=diamond
    )
    turn = [T.RotationTransform(HEIGHT, WIDTH, 45, expand=False)]
    (box,) = map_one(picture, row, augmentations=turn, recompute_boxes=True)[
        "instances"
    ].gt_boxes.tensor
    # A square of side sqrt(200) = 14.1, around (30, 20).
    torch.testing.assert_close(box, torch.tensor([22.9, 12.9, 37.1, 27.1]), atol=1.0, rtol=0)


def test_objects_without_keypoints_among_others(picture: Path) -> None:
    rows = [annotation(keypoints=None), annotation()]
    found = mapper(keypoints=True, keypoint_hflip_indices=FLIPPED_POINTS)(
        make_record(picture, rows)
    )["instances"]
    assert found.gt_keypoints.tensor[0].tolist() == [[0, 0, 0]] * 2
    assert found.gt_keypoints.tensor[1, :, 2].tolist() == [2, 1]
    none = mapper(keypoints=True, keypoint_hflip_indices=FLIPPED_POINTS)(make_record(picture, []))
    assert none["instances"].gt_keypoints.tensor.shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["coco_tiny_nc/{}2017", "nuclei/{}_rle", "nuclei/{}"])
def test_same_as_detectron2_on_real_data(shared_data: Path, name: str) -> None:
    folder, _, split = name.partition("/")
    json_file = shared_data / folder / "annotations" / f"instances_{split.format('val')}.json"
    if not json_file.is_file():
        pytest.skip(f"missing: ../shared/data/{folder}")
    images = shared_data / folder / "images" / split.format("val").removesuffix("_rle")
    records = load_coco_json(str(json_file), str(images), f"mapper_test_{folder}")
    MetadataCatalog.remove(f"mapper_test_{folder}")
    common: dict[str, Any] = {
        "is_train": True,
        "augmentations": resize(short_sides=(200, 250)),
        "image_format": "RGB",
    }
    ours = InstanceMapper(masks=True, recompute_boxes=True, **common)
    theirs = DatasetMapper(use_instance_mask=True, instance_mask_format="bitmask", **common)
    crowded = [r for r in records if any(row["iscrowd"] for row in r["annotations"])]
    for record in [*records[:4], *crowded[:1]]:
        np.random.seed(0)
        found = ours(record)
        np.random.seed(0)
        expected = theirs(record)
        issues = found.pop("data_issues", {})
        assert_same(found, expected)
        crowds = sum(row["iscrowd"] for row in record["annotations"])
        assert issues.get(issue_policies.CROWD, 0) == crowds
        assert set(issues) <= {issue_policies.CROWD, issue_policies.NOT_RGB}


def test_integers_are_as_good_as_floats(picture: Path) -> None:
    """Detectron2 cuts off the decimals of integer polygons and boxes when it resizes them."""
    whole = annotation(bbox=[11, 5, 20, 20], segmentation=[[11, 5, 31, 5, 11, 25]])
    exact = annotation(
        bbox=[11.0, 5.0, 20.0, 20.0], segmentation=[[11.0, 5.0, 31.0, 5.0, 11.0, 25.0]]
    )
    augmentations = [T.Resize((HEIGHT * 3 // 2, WIDTH * 3 // 2))]
    found = map_one(picture, whole, augmentations=augmentations)
    assert found["instances"].gt_boxes.tensor.tolist() == [[16.5, 7.5, 46.5, 37.5]]
    theirs = DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    assert_same(found, theirs(make_record(picture, [exact])))


def test_arrays_of_the_user_stay_as_they_are(picture: Path) -> None:
    row = annotation(
        segmentation=[np.array(TRIANGLE)], keypoints=np.array([12.5, 7.5, 2, 20.5, 6.5, 1])
    )
    before = copy.deepcopy(row)
    resized = [T.Resize((HEIGHT * 2, WIDTH * 2))]
    map_one(picture, row, augmentations=resized, keypoints=True)
    assert (row["segmentation"][0] == before["segmentation"][0]).all()
    assert (row["keypoints"] == before["keypoints"]).all()


@pytest.mark.parametrize(
    "segmentation",
    [
        compressed(MASK),
        {**compressed(MASK), "counts": compressed(MASK)["counts"].encode()},
        uncompressed(MASK),
        MASK,
        MASK.astype(bool),
        np.asfortranarray(MASK * 255),
    ],
    ids=["compressed", "bytes", "uncompressed", "array", "bool", "fortran"],
)
def test_masks_of_every_kind(picture: Path, segmentation: Any) -> None:
    found = map_one(picture, annotation(segmentation=segmentation), recompute_boxes=True)
    assert "data_issues" not in found
    assert (found["instances"].gt_masks.tensor[0].numpy() == MASK).all()
    assert found["instances"].gt_boxes.tensor.tolist() == [[10.25, 5, 30.75, 25.25]]


def test_polygons_are_rasterised_as_pycocotools_does(picture: Path) -> None:
    parts = [TRIANGLE, [40.5, 30.0, 55.0, 30.0, 55.0, 39.0]]
    found = map_one(picture, annotation(segmentation=parts))
    expected = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(parts, HEIGHT, WIDTH)))
    assert (found["instances"].gt_masks.tensor[0].numpy() == expected).all()


def test_annotations_of_rotated_images_are_those_of_the_upright_one(
    picture: Path, tmp_path: Path
) -> None:
    path = rotated(picture, tmp_path)
    assert Image.open(path).size == (HEIGHT, WIDTH)
    found = mapper()(make_record(path, [annotation()]))
    assert found.pop("data_issues") == {issue_policies.EXIF_ROTATED: 1}
    expected = mapper()(make_record(picture, [annotation()]))
    assert_same(found, {**expected, "file_name": str(path)})


def test_records_without_size_get_that_of_the_image(picture: Path) -> None:
    record = make_record(picture, [annotation()])
    del record["height"], record["width"]
    found = mapper()(record)
    assert (found["height"], found["width"]) == (HEIGHT, WIDTH)


def test_recomputed_boxes_need_masks() -> None:
    with pytest.raises(ValueError, match="masks=True"):
        mapper(masks=False, recompute_boxes=True)
