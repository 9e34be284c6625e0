"""Every fault of a panoptic set is one clear error before the first step, or a counted policy."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog

from focalnet_det.data import issue_policies
from focalnet_det.data.instances.mappers import InstanceMapper
from focalnet_det.data.panoptic.panoptic_sets import PanopticFiles, register_panoptic_json
from focalnet_det.evaluation import build_evaluator
from tests.helpers import bad_files
from tests.helpers.bad_files import NAN, Change, add, both, drop, put

NAME = "test_bad_panoptic"

pytestmark = pytest.mark.usefixtures("forget_data_sets")
SEGMENTS = ("annotations", 1, "segments_info")


@pytest.fixture
def files(tmp_path: Path) -> PanopticFiles:
    return PanopticFiles(
        panoptic_json=bad_files.write_json(tmp_path / "bad.json", bad_files.panoptic()),
        panoptic_root=bad_files.write_pngs(tmp_path / "pngs"),
        images=bad_files.write_images(tmp_path / "images", 2),
    )


ERRORS: dict[str, tuple[Change, str]] = {
    "no images": (drop("images"), "lacks images"),
    "no annotations": (drop("annotations"), "lacks annotations"),
    "no categories": (drop("categories"), "lacks categories"),
    "annotations null": (put("annotations", None), "annotations is None, not a list"),
    "annotation text": (put("annotations", 1, "x"), r"annotations\[1\] is 'x'"),
    "images empty": (both(put("images", []), put("annotations", [])), "missing images"),
    "annotations empty": (put("annotations", []), "images without annotation: 2 images"),
    "categories empty": (put("categories", []), "missing categories"),
    "category id text": (put("categories", 0, "id", "1"), "categories without id, name or isthing"),
    "category no name": (drop("categories", 0, "name"), "categories without id, name or isthing"),
    "category no isthing": (drop("categories", 0, "isthing"), "without id, name or isthing"),
    "isthing text": (put("categories", 0, "isthing", "yes"), "without id, name or isthing"),
    "isthing two": (put("categories", 0, "isthing", 2), "without id, name or isthing"),
    "category twice": (
        add("categories", {"id": 1, "name": "other", "isthing": 1}),
        r"duplicate categories: categories\[2\] \(id 1\)",
    ),
    "name twice": (
        add("categories", {"id": 3, "name": "thing", "isthing": 1}),
        r"duplicate categories: categories\[2\] \(id 3\), 'thing'",
    ),
    "thing and stuff": (
        add("categories", {"id": 3, "name": "thing", "isthing": 0}),
        "categories that are both thing and stuff",
    ),
    "no stuff": (
        both(drop("categories", 1), put("annotations", "*", "segments_info", [])),
        "no stuff categories",
    ),
    "image id text": (put("images", 1, "id", "11"), r"without id or file_name: images\[1\]"),
    "image id twice": (put("images", 1, "id", 10), r"duplicate image ids: images\[1\]"),
    "no file_name": (drop("images", 1, "file_name"), "images without id or file_name"),
    "missing image": (put("images", 1, "file_name", "absent.png"), r"images/absent\.png"),
    "width text": (put("images", 1, "width", "48"), "malformed width or height"),
    "width of another": (put("images", "*", "width", 50), "the file lists 50 x 32"),
    "image_id text": (put("annotations", 1, "image_id", "11"), "without image_id, file_name"),
    "unlisted": (put("annotations", 1, "image_id", 12), r"unlisted image: annotations\[1\] .*12"),
    "twice": (put("annotations", 1, "image_id", 10), r"annotated twice: annotations\[1\]"),
    "no png name": (drop("annotations", 1, "file_name"), "without image_id, file_name or seg"),
    "missing png": (put("annotations", 1, "file_name", "absent.png"), r"pngs/absent\.png"),
    "no segments_info": (drop("annotations", 1, "segments_info"), "file_name or segments_info"),
    "segments_info text": (put("annotations", 1, "segments_info", "x"), "or segments_info"),
    "segment text": (put(*SEGMENTS, 0, "x"), "file_name or segments_info"),
    "segment no id": (drop(*SEGMENTS, 0, "id"), "segments without id or category_id"),
    "segment id text": (put(*SEGMENTS, 0, "id", "1"), "segments without id or category_id"),
    "segment id nan": (put(*SEGMENTS, 0, "id", NAN), "segments without id or category_id"),
    "segment id void": (
        put(*SEGMENTS, 0, "id", 0),
        r"segments with id 0: .*segments_info\[0\] \(id 0\)",
    ),
    "segment id large": (put(*SEGMENTS, 0, "id", 2**24), "an id out of range"),
    "segment id negative": (put(*SEGMENTS, 0, "id", -1), "segments without id or category_id"),
    "segment id twice": (put(*SEGMENTS, 0, "id", 300), r"duplicate \w+ ids: .*\[1\] \(id 300\)"),
    "segment no category": (drop(*SEGMENTS, 0, "category_id"), "without id or category_id"),
    "segment category": (
        put(*SEGMENTS, 0, "category_id", 9),
        "segments with an unknown category.*9",
    ),
    "segment crowd": (put(*SEGMENTS, 0, "iscrowd", "no"), "segments with a malformed iscrowd"),
}


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", sorted(ERRORS))
def test_errors(case: str, evaluation: bool, files: PanopticFiles) -> None:
    change, message = ERRORS[case]
    content = bad_files.panoptic()
    change(content)
    bad_files.write_json(Path(files.panoptic_json), content)
    with pytest.raises(ValueError, match=r"bad\.json") as raised:
        register_panoptic_json(NAME, files, evaluation=evaluation)
    assert re.search(message, str(raised.value)), str(raised.value)


def recolored(number: int, corner: tuple[int, int, int]) -> Callable[[Path], None]:
    """Another color at one pixel of some PNGs."""

    def change(folder: Path) -> None:
        for k in range(number):
            pixels = np.array(Image.open(folder / f"{k}.png"))
            pixels[20, 20] = corner
            Image.fromarray(pixels).save(folder / f"{k}.png")

    return change


def as_gray(folder: Path) -> None:
    Image.open(folder / "0.png").convert("L").save(folder / "0.png")


def cropped(folder: Path) -> None:
    Image.open(folder / "0.png").crop((0, 0, 40, 32)).save(folder / "0.png")


def emptied(folder: Path) -> None:
    pixels = np.array(Image.open(folder / "0.png"))
    pixels[:10, :10] = 0
    Image.fromarray(pixels).save(folder / "0.png")


PNGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unlisted color": (recolored(1, (9, 9, 9)), issue_policies.VOID_SEGMENT),
    "gray": (as_gray, issue_policies.UNREADABLE_LABELS),
    "another size": (cropped, issue_policies.LABEL_SIZE_DIFFERS),
    "not drawn": (emptied, "segments without pixels"),
    "text": (lambda f: (f / "0.png").write_text("x") and None, issue_policies.UNREADABLE_LABELS),
}


@pytest.mark.parametrize("case", sorted(PNGS))
def test_pngs_that_disagree(
    case: str, files: PanopticFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two PNGs: a training goes on and counts, an evaluation stops."""
    change, problem = PNGS[case]
    change(Path(files.panoptic_root))
    register_panoptic_json(NAME, files)
    assert problem not in issue_policies.ISSUE_POLICIES or f"1 x {problem}" in caplog.text
    with pytest.raises(ValueError, match=rf"bad\.json cannot be used:\n- 1 x {problem}: .*0\.png"):
        register_panoptic_json(NAME, files, evaluation=True)


def test_unlisted_pixels_are_counted_in_training(files: PanopticFiles) -> None:
    recolored(1, (9, 9, 9))(Path(files.panoptic_root))
    register_panoptic_json(NAME, files)
    mapper = InstanceMapper(is_train=True, augmentations=[], image_format="RGB", masks=True)
    first, second = (mapper(record) for record in DatasetCatalog.get(NAME))
    assert first["data_issues"] == {issue_policies.VOID_SEGMENT: 1}
    assert "data_issues" not in second
    assert first["sem_seg"][20, 20] == 255
    assert (first["sem_seg"] == 1).sum() == 48 * 32 - 101


def test_most_pngs_of_another_kind_stop_a_training(files: PanopticFiles) -> None:
    recolored(2, (9, 9, 9))(Path(files.panoptic_root))
    with pytest.raises(ValueError, match=f"2 x {issue_policies.VOID_SEGMENT}"):
        register_panoptic_json(NAME, files)


def test_crowds_alone_can_be_evaluated(files: PanopticFiles) -> None:
    content = bad_files.panoptic()
    put("annotations", "*", "segments_info", "*", "iscrowd", 1)(content)
    bad_files.write_json(Path(files.panoptic_json), content)
    register_panoptic_json(NAME, files, evaluation=True)
    evaluator = build_evaluator(NAME)
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        ids = torch.zeros(32, 48, dtype=torch.int32)
        scores = torch.zeros(2, 32, 48)
        evaluator.process([record], [{"panoptic_seg": (ids, []), "sem_seg": scores}])
    assert np.isnan(evaluator.evaluate()["panoptic_seg"]["PQ"])
