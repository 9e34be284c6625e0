"""Records of every kind, against Detectron2's mapper, pycocotools and counts by hand."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode

from focalnet_det.data import issue_policies
from focalnet_det.data.augmentation import multiscale_or_crop, resize
from focalnet_det.data.instances.mappers import InstanceMapper, SkippedImage
from focalnet_det.data.io.coco_files import read_coco
from focalnet_det.data.io.masks import run_lengths
from focalnet_det.data.io.read_image import UnreadableImageError
from focalnet_det.data.issue_policies import ISSUE_POLICIES, IssueCounter, policy_table
from focalnet_det.data.registry import register_coco_json

HEIGHT, WIDTH = 40, 60
ROOT = Path(__file__).parents[2]
TRIANGLE = [10.0, 5.0, 30.5, 5.0, 10.0, 25.25]
FLIPPED_POINTS = [1, 0]


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths by a slow loop over the columns."""
    runs, current = [0], 0
    for value in mask.T.reshape(-1).tolist():
        if value != current:
            runs.append(0)
            current = value
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def annotation(**changes: Any) -> dict[str, Any]:
    row = {
        "bbox": [10.25, 5.0, 20.5, 20.25],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 3,
        "iscrowd": 0,
        "segmentation": [list(TRIANGLE)],
        "keypoints": [12.5, 7.5, 2, 20.5, 6.5, 1],
    }
    row.update(changes)
    return {name: value for name, value in row.items() if value is not None}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def make_record(path: Path, annotations: Sequence[dict[str, Any]], **changes: Any) -> dict:
    return {
        "file_name": str(path),
        "image_id": 7,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": list(annotations),
        **changes,
    }


def mapper(**changes: Any) -> InstanceMapper:
    options: dict[str, Any] = {
        "is_train": True,
        "augmentations": [],
        "image_format": "RGB",
        "masks": True,
        "recompute_boxes": False,
    }
    return InstanceMapper(**{**options, **changes})


def map_one(path: Path, row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return mapper(**changes)(make_record(path, [row]))


def assert_same(
    found: dict[str, Any], expected: dict[str, Any], *, leave_out: Sequence[str] = ()
) -> None:
    """Every key, and every tensor bit by bit."""
    assert set(found) == set(expected)
    assert found["image"].dtype == torch.uint8
    assert torch.equal(found["image"], expected["image"])
    for name in set(found) - {"image", "instances"}:
        assert found[name] == expected[name]
    if "instances" not in expected:
        return
    mine, theirs = found["instances"], expected["instances"]
    assert mine.image_size == theirs.image_size
    assert set(mine.get_fields()) == set(theirs.get_fields())
    for name, value in theirs.get_fields().items():
        if name in leave_out:
            continue
        one, other = mine.get(name), value
        assert type(one) is type(other), name
        one, other = getattr(one, "tensor", one), getattr(other, "tensor", other)
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


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


MASK = rectangle(3, 10, 30, 45) - rectangle(10, 20, 12, 22)


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


def test_run_lengths_are_those_of_a_slow_loop() -> None:
    random = np.random.default_rng(0)
    masks = [(random.random((HEIGHT, WIDTH)) < share).astype(np.uint8) for share in (0.02, 0.5, 1)]
    for mask in [*masks, MASK, np.zeros((HEIGHT, WIDTH), dtype=np.uint8)]:
        runs = uncompressed(mask)["counts"]
        assert run_lengths(compressed(mask)["counts"]).tolist() == runs
        assert run_lengths(runs).tolist() == runs
    big = np.zeros((700, 900), dtype=np.uint8)  # runs that take four characters
    big[600:, 880] = 1
    assert run_lengths(compressed(big)["counts"]).tolist() == [880 * 700 + 600, 100, 19 * 700]


def encoded(runs: list[int]) -> bytes:
    """Runs, right or wrong, as pycocotools compresses them."""
    rle = {"size": [HEIGHT, WIDTH], "counts": runs}
    return mask_utils.frPyObjects(rle, HEIGHT, WIDTH)["counts"]


def rle(counts: Any, size: Sequence[int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


PIXELS = HEIGHT * WIDTH
DROPPED_MASKS = {
    "odd number of coordinates": ([[*TRIANGLE, 3.0]], issue_policies.MALFORMED_MASK),
    "two points": ([[1.0, 1.0, 5.0, 5.0]], issue_policies.MALFORMED_MASK),
    "no coordinate": ([[]], issue_policies.MALFORMED_MASK),
    "not nested": ([1.0, 1.0, 5.0, 1.0, 5.0, 5.0], issue_policies.MALFORMED_MASK),
    "no number": ([["a", 1, 2, 3, 4, 5]], issue_policies.MALFORMED_MASK),
    "NaN": ([[*TRIANGLE[:5], float("nan")]], issue_policies.MALFORMED_MASK),
    "far away": ([[*TRIANGLE[:4], 1e9, 1e9]], issue_policies.MALFORMED_MASK),
    "text": ("polygon", issue_policies.MALFORMED_MASK),
    "size of the RLE": (compressed(MASK[:, :-1]), issue_policies.MALFORMED_MASK),
    "RLE turned": (compressed(np.ascontiguousarray(MASK.T)), issue_policies.MALFORMED_MASK),
    "RLE without counts": ({"size": [HEIGHT, WIDTH]}, issue_policies.MALFORMED_MASK),
    "RLE without size": ({"counts": [PIXELS]}, issue_policies.MALFORMED_MASK),
    "runs too short": (rle([3, 4]), issue_policies.MALFORMED_MASK),
    "runs too long": (rle([3, PIXELS]), issue_policies.MALFORMED_MASK),
    "negative run": (rle([-1, PIXELS + 1]), issue_policies.MALFORMED_MASK),
    "half a pixel": (rle([0.5, PIXELS - 0.5]), issue_policies.MALFORMED_MASK),
    "no runs": (rle([]), issue_policies.MALFORMED_MASK),
    "text too short": (rle(encoded([3, 4])), issue_policies.MALFORMED_MASK),
    "text too long": (rle(encoded([3, PIXELS])), issue_policies.MALFORMED_MASK),
    "text broken off": (rle(encoded([3, 4, PIXELS - 7])[:-1]), issue_policies.MALFORMED_MASK),
    "other characters": (rle("\x01é~~"), issue_policies.MALFORMED_MASK),
    "size of the array": (MASK[:-1], issue_policies.MALFORMED_MASK),
    "array of three dimensions": (MASK[None], issue_policies.MALFORMED_MASK),
    "none": (None, issue_policies.NO_MASK),
    "empty list": ([], issue_policies.NO_MASK),
    "polygon without area": ([[5.0, 5.0, 5.0, 5.0, 5.0, 5.0]], issue_policies.EMPTY_MASK),
    "polygon outside": ([[61.0, 1.0, 70.0, 1.0, 70.0, 9.0]], issue_policies.EMPTY_MASK),
    "empty RLE": (compressed(MASK * 0), issue_policies.EMPTY_MASK),
    "empty runs": (rle([PIXELS]), issue_policies.EMPTY_MASK),
    "empty array": (MASK * 0, issue_policies.EMPTY_MASK),
}


@pytest.mark.parametrize("name", DROPPED_MASKS)
def test_unusable_masks_are_dropped_and_counted(picture: Path, name: str) -> None:
    segmentation, problem = DROPPED_MASKS[name]
    rows = [annotation(segmentation=segmentation), annotation(category_id=5)]
    for recompute_boxes in (False, True):
        found = mapper(recompute_boxes=recompute_boxes)(make_record(picture, rows))
        assert found["data_issues"] == {problem: 1}
        assert found["instances"].gt_classes.tolist() == [5]
    assert ISSUE_POLICIES[problem].training == "dropped"
    # Where no masks are trained, masks do not matter.
    found = mapper(masks=False)(make_record(picture, rows))
    assert "data_issues" not in found
    assert len(found["instances"]) == 2


def test_bad_parts_of_a_mask_are_left_out(picture: Path) -> None:
    rows = [annotation(segmentation=[TRIANGLE, [1.0, 1.0, 5.0]]), annotation()]
    found = mapper()(make_record(picture, rows))
    assert found["data_issues"] == {issue_policies.MALFORMED_PART: 1}
    masks = found["instances"].gt_masks.tensor
    assert masks.any()
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([-5.0, -6.0, 20.0, 20.0], [0, 0, 15, 14]),
        ([50.0, 30.0, 100.0, 100.0], [50, 30, WIDTH, HEIGHT]),
        ([-1e6, -1e6, 3e6, 3e6], [0, 0, WIDTH, HEIGHT]),
    ],
)
def test_boxes_are_clipped_to_the_image(
    picture: Path, bbox: list[float], expected: list[int]
) -> None:
    found = map_one(picture, annotation(bbox=bbox))
    assert found["data_issues"] == {issue_policies.BOX_OUTSIDE: 1}
    assert found["instances"].gt_boxes.tensor.tolist() == [expected]


def test_rounding_is_no_box_outside(picture: Path) -> None:
    found = map_one(picture, annotation(bbox=[50.0, 30.0, 10.005, 10.005]))
    assert "data_issues" not in found
    assert found["instances"].gt_boxes.tensor.tolist() == [[50, 30, WIDTH, HEIGHT]]


@pytest.mark.parametrize(
    ("bbox", "problem"),
    [
        ([10.0, 10.0, 0.0, 5.0], issue_policies.EMPTY_BOX),
        ([10.0, 10.0, 5.0, -2.0], issue_policies.MALFORMED_BOX),
        (["1", "2", "3", "4"], issue_policies.MALFORMED_BOX),
        ([70.0, 10.0, 5.0, 5.0], issue_policies.EMPTY_BOX),
        ([-8.0, 10.0, 8.0, 5.0], issue_policies.EMPTY_BOX),
        ([1.0, 2.0, 3.0], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, 3.0, 4.0, 5.0], issue_policies.MALFORMED_BOX),
        ([], issue_policies.MALFORMED_BOX),
        (None, issue_policies.MALFORMED_BOX),
        (3.0, issue_policies.MALFORMED_BOX),
        (["a", "b", "c", "d"], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, float("nan"), 4.0], issue_policies.MALFORMED_BOX),
        ([1.0, 2.0, float("inf"), 4.0], issue_policies.MALFORMED_BOX),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_unusable_boxes_are_dropped_and_counted(
    picture: Path, bbox: Any, problem: str, masks: bool
) -> None:
    rows = [annotation(bbox=bbox), annotation(category_id=5)]
    found = mapper(masks=masks, recompute_boxes=masks)(make_record(picture, rows))
    assert found["data_issues"] == {problem: 1}
    assert found["instances"].gt_classes.tolist() == [5]
    assert ISSUE_POLICIES[problem].training == "dropped"


def test_crowds_are_counted_and_not_trained_on(picture: Path) -> None:
    crowd = annotation(iscrowd=1, segmentation=uncompressed(MASK))
    found = mapper()(make_record(picture, [crowd, annotation(), crowd]))
    assert found["data_issues"] == {issue_policies.CROWD: 2}
    assert len(found["instances"]) == 1


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("rows", "issues"),
    [
        ([], {issue_policies.NO_ANNOTATION: 1}),
        ([annotation(iscrowd=1)], {issue_policies.CROWD: 1, issue_policies.NO_ANNOTATION: 1}),
        (
            [annotation(bbox=[1.0])],
            {issue_policies.MALFORMED_BOX: 1, issue_policies.NO_ANNOTATION: 1},
        ),
    ],
)
def test_images_without_annotation(
    picture: Path, masks: bool, rows: list[dict[str, Any]], issues: dict[str, int]
) -> None:
    found = mapper(masks=masks, recompute_boxes=masks)(make_record(picture, rows))
    assert found["data_issues"] == issues
    assert set(found) == {
        *("file_name", "image_id", "height", "width", "image", "instances", "data_issues")
    }
    instances = found["instances"]
    assert instances.image_size == (HEIGHT, WIDTH)
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    assert instances.has("gt_masks") == masks
    if masks:
        assert instances.gt_masks.tensor.shape == (0, HEIGHT, WIDTH)


def test_a_crop_without_objects_is_no_problem_of_the_data(picture: Path) -> None:
    row = annotation(bbox=[0.0, 0.0, 2.0, 2.0], segmentation=[[0.0, 0.0, 2.0, 0.0, 2.0, 2.0]])
    crop = T.CropTransform(30, 20, 20, 15)
    found = map_one(picture, row, augmentations=[crop], recompute_boxes=True)
    assert "data_issues" not in found
    assert found["instances"].gt_masks.tensor.shape == (0, 15, 20)


def unreadable(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    cut = {"truncated": len(content) // 2, "empty": 0}
    path.write_bytes(content[: cut[kind]] if kind in cut else b"no picture")
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_unreadable_images_are_skipped_in_training_and_stop_evaluation(
    tmp_path: Path, kind: str
) -> None:
    record = make_record(unreadable(tmp_path, kind), [annotation()])
    with pytest.raises(SkippedImage, match=rf"unreadable image: .*{kind}\.jpg") as skipped:
        mapper()(record)
    assert skipped.value.issues == {issue_policies.UNREADABLE_IMAGE: 1}
    with pytest.raises(UnreadableImageError, match=rf"{kind}\.jpg"):
        mapper(is_train=False)(record)
    again = pickle.loads(pickle.dumps(skipped.value))
    assert (again.problem, again.issues, str(again)) == (
        skipped.value.problem,
        skipped.value.issues,
        str(skipped.value),
    )


def test_missing_images_stop_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mapper()(make_record(tmp_path / "none.jpg", [annotation()]))


def rotated(path: Path, folder: Path) -> Path:
    """The same picture stored on its side, with the EXIF orientation that turns it back."""
    exif = Image.Exif()
    exif[274] = 6
    target = folder / "rotated.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(target, exif=exif)
    return target


def test_annotations_of_rotated_images_are_those_of_the_upright_one(
    picture: Path, tmp_path: Path
) -> None:
    path = rotated(picture, tmp_path)
    assert Image.open(path).size == (HEIGHT, WIDTH)
    found = mapper()(make_record(path, [annotation()]))
    assert found.pop("data_issues") == {issue_policies.EXIF_ROTATED: 1}
    expected = mapper()(make_record(picture, [annotation()]))
    assert_same(found, {**expected, "file_name": str(path)})


def test_other_sizes_are_skipped_in_training_and_stop_evaluation(
    picture: Path, tmp_path: Path
) -> None:
    stored = {"height": WIDTH, "width": HEIGHT}  # of the file, before EXIF turns it
    rows = [annotation()]
    for record in (
        make_record(rotated(picture, tmp_path), rows, **stored),
        make_record(picture, rows, height=HEIGHT + 1),
    ):
        with pytest.raises(SkippedImage, match="size differs") as skipped:
            mapper()(record)
        assert skipped.value.issues == {issue_policies.SIZE_DIFFERS: 1}
        with pytest.raises(SizeMismatchError, match=r"\.png"):
            mapper(is_train=False)(record)


def test_records_without_size_get_that_of_the_image(picture: Path) -> None:
    record = make_record(picture, [annotation()])
    del record["height"], record["width"]
    found = mapper()(record)
    assert (found["height"], found["width"]) == (HEIGHT, WIDTH)


def test_repairs_of_images_are_counted_in_evaluation_too(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 3, dtype=np.uint8)).save(path)
    for is_train in (False, True):
        found = mapper(is_train=is_train)(make_record(path, [annotation()]))
        assert found["data_issues"] == {issue_policies.NOT_RGB: 1}
        assert (found["image"] == 3).all()


def test_recomputed_boxes_need_masks() -> None:
    with pytest.raises(ValueError, match="masks=True"):
        mapper(masks=False, recompute_boxes=True)


def coco_file(folder: Path, picture: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "instances.json"
    image = {"file_name": picture.name, "height": HEIGHT, "width": WIDTH}
    content = {
        "images": [{**image, "id": 4}, {**image, "id": 9}],
        "categories": [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}],
        "annotations": [
            {"id": index, "image_id": 9, "iscrowd": 0, "area": 1, **row}
            for index, row in enumerate(rows, start=1)
        ],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_coco_file_with_gaps_and_oddities(picture: Path, tmp_path: Path) -> None:
    box = {"bbox": [10, 5, 21, 21]}
    path = coco_file(
        tmp_path,
        picture,
        [
            {**box, "category_id": 90, "segmentation": [TRIANGLE]},
            {**box, "category_id": 3, "segmentation": uncompressed(MASK)},
            {**box, "category_id": 3, "segmentation": compressed(MASK), "iscrowd": 1},
            {**box, "category_id": 3, "segmentation": [TRIANGLE[:5]]},
            {**box, "category_id": 90, "segmentation": [TRIANGLE, TRIANGLE[:4]]},
            {**box, "category_id": 3, "segmentation": rle([3, 4])},
            {**box, "category_id": 3, "segmentation": []},
            {**box, "category_id": 3, "segmentation": [TRIANGLE], "image_id": 5},
            {"category_id": 3, "segmentation": [TRIANGLE]},
        ],
    )
    assert register_coco_json("mapper_test", path, picture.parent) == ["first", "last"]
    empty, full = DatasetCatalog.get("mapper_test")
    DatasetCatalog.remove("mapper_test")
    MetadataCatalog.remove("mapper_test")

    counts = IssueCounter()
    file = read_coco(path, picture.parent)
    counts.add(file.settled)
    for record, classes in ((empty, []), (full, [1, 0, 1, 0])):
        found = mapper(recompute_boxes=True)(record)
        assert found["instances"].gt_classes.tolist() == classes
        counts.add(found["data_issues"])
    # The last one has the box of its triangle.
    assert full["annotations"][-1]["bbox"] == [10.0, 5.0, 20.5, 20.25]
    assert counts.counts == {
        issue_policies.IMAGE_TWICE: 1,
        issue_policies.NO_ANNOTATION: 1,
        issue_policies.CROWD: 1,
        issue_policies.MALFORMED_MASK: 2,
        issue_policies.MALFORMED_PART: 1,
        issue_policies.NO_MASK: 1,
        issue_policies.UNLISTED_IMAGE: 1,
        issue_policies.BOX_FROM_MASK: 1,
        issue_policies.OBJECT_TWICE: 1,  # the box taken from the mask is the same triangle's
    }


def test_unknown_categories_stop(picture: Path, tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 2, 2], "category_id": 4, "segmentation": [TRIANGLE]}
    path = coco_file(tmp_path, picture, [row])
    with pytest.raises(ValueError, match=r"without a known category_id: annotations\[0\].*: 4"):
        register_coco_json("mapper_test_unknown", path, picture.parent)


def test_tally_adds_merges_and_resumes() -> None:
    first, second = IssueCounter(), IssueCounter()
    first.add({issue_policies.CROWD: 2, issue_policies.EMPTY_BOX: 1})
    second.add({issue_policies.CROWD: 3})
    second.merge(first)
    assert second.counts == {issue_policies.CROWD: 5, issue_policies.EMPTY_BOX: 1}
    resumed = IssueCounter()
    resumed.add({issue_policies.NO_MASK: 7})
    resumed.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert resumed.counts == second.counts
    resumed.add({issue_policies.CROWD: 1})
    assert (resumed.counts[issue_policies.CROWD], second.counts[issue_policies.CROWD]) == (6, 5)


def test_tally_refuses_unknown_problems() -> None:
    counts = IssueCounter()
    counts.add({issue_policies.CROWD: 1})
    with pytest.raises(KeyError, match="'croud'.*Known: unreadable image"):
        counts.add({issue_policies.CROWD: 1, "croud": 1})
    with pytest.raises(KeyError, match="croud"):
        counts.load_state_dict({"counts": {"croud": 1}})
    assert counts.counts == {issue_policies.CROWD: 1}


def test_tally_prints_what_was_met() -> None:
    counts = IssueCounter()
    assert counts.table() == "Images and labels: no issues."
    counts.add(
        {
            issue_policies.BOX_OUTSIDE: 1200,
            issue_policies.UNREADABLE_IMAGE: 3,
            issue_policies.EMPTY_MASK: 0,
        }
    )
    assert counts.table().splitlines() == [
        "images and labels      policy    count",
        "unreadable image       skipped       3",
        "box outside the image  repaired   1200",
    ]


def test_every_problem_has_a_policy_and_the_page_shows_it() -> None:
    names = {
        value
        for name, value in vars(issue_policies).items()
        if name.isupper() and name not in ("ISSUE_POLICIES", "RENAMED_ISSUES")
    }
    assert names == set(ISSUE_POLICIES)
    actions = {"repaired", "dropped", "skipped", "kept", "stopped"}
    assert {p.training for p in ISSUE_POLICIES.values()} == actions
    assert {p.evaluation for p in ISSUE_POLICIES.values()} <= actions - {"skipped"}
    page = (ROOT / "datasets" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## What happens to odd images and labels\n")[2].split("\n## ")[0]
    assert policy_table() in section
