"""Keypoints that change places in a mirrored image, whatever their names look like."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import MetadataCatalog

from focalnet_det.data.io.keypoints import flip_pairs
from focalnet_det.data.registry import keypoint_metadata


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_eye", "right_eye"),
        ("Left Eye", "Right Eye"),
        ("LEFT_EYE", "RIGHT_EYE"),
        ("LeftEye", "RightEye"),
        ("eyeLeft", "eyeRight"),
        ("l_eye", "r_eye"),
        ("L eye", "R eye"),
        ("eye.l", "eye.r"),
        ("eye-L", "eye-R"),
        ("eyeL", "eyeR"),
        ("eye_l_2", "eye_r_2"),
        ("lefteye", "righteye"),
        ("eye (left)", "eye (right)"),
        ("Lt ankle", "Rt ankle"),
    ],
)
def test_pairs(left: str, right: str) -> None:
    names = ["nose", right, left]
    assert flip_pairs(names) == ([(left, right)], [])


def test_names_without_a_side_stay() -> None:
    names = ["nose", "tail", "leftover", "lower lip", "ring", "relay", "all"]
    pairs, alone = flip_pairs(names)
    assert pairs == []
    # Nobody can tell that "leftover" is no side; it has no partner, and stays.
    assert set(alone) <= {"leftover"}


def test_sides_without_partner_are_named(caplog: pytest.LogCaptureFixture) -> None:
    metadata = keypoint_metadata(["left_eye", "left_ear", "right_ear"])
    assert metadata["keypoint_flip_map"] == [("left_ear", "right_ear")]
    assert "Keypoints left_eye have a left or right name" in caplog.text


def test_pairs_of_coco_are_the_published_ones() -> None:
    published = MetadataCatalog.get("keypoints_coco_2017_val")
    pairs, alone = flip_pairs(published.keypoint_names)
    assert sorted(pairs) == sorted(published.keypoint_flip_map)
    assert alone == []
