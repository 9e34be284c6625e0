"""Readers of data files against files that hypothesis damages: a clear error, or usable data."""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis", reason="hypothesis is missing: see setup.py, extra test")
pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focalnet_det.data.instances.mappers import InstanceMapper, SkippedImage
from focalnet_det.data.io.labels import LabelRule, UnreadableLabelsError, read_labels
from focalnet_det.data.io.read_image import UnreadableImageError, read_rgb
from focalnet_det.data.panoptic.panoptic_sets import PanopticFiles, register_panoptic_json
from focalnet_det.data.registry import register_coco_json
from focalnet_det.evaluation import build_evaluator
from tests.helpers import bad_files

NAME = "test_fuzz_readers"
MANY = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.one_of(
    st.integers(-3, 60),
    st.floats(-60, 60),
    st.sampled_from([float("nan"), float("inf"), 1e308, 2**31, 2**63, 10**400, -0.0, 0.5]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=8), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)
BOXES = st.lists(NUMBERS, min_size=4, max_size=4)
POLYGONS = st.lists(st.lists(NUMBERS, max_size=12), max_size=3)
RLES = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([bad_files.HEIGHT, bad_files.WIDTH]), VALUES),
        "counts": st.one_of(
            st.lists(st.integers(-5, 2000), max_size=6),
            st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12),
            VALUES,
        ),
    }
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        bad_files.write_images(root / "images")
        bad_files.write_pngs(root / "pngs")
        yield root
    forget()


def forget() -> None:
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def walk(draw: Any, content: Any) -> tuple[Any, Any]:
    """A container in a JSON file, and a key of it; each level has the same chance."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = draw(st.sampled_from(keys))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            return content, key
        content = inner


@st.composite
def damaged(draw: Any, sound: dict[str, Any]) -> dict[str, Any]:
    """A sound file of which up to three places hold something else, or nothing."""
    content = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        target, last = walk(draw, content)
        action = draw(st.sampled_from(("remove", "scalar", "value", "alike")))
        if action == "remove":
            del target[last]
        elif action == "scalar":
            target[last] = draw(SCALARS)
        else:
            alike = {"bbox": BOXES, "segmentation": st.one_of(POLYGONS, RLES)}
            target[last] = draw(alike.get(last, VALUES) if action == "alike" else VALUES)
    return content


def assert_sentence(error: Exception, name: str) -> None:
    text = str(error)
    assert name in text, text
    assert "Traceback" not in text
    assert len(text) < 20_000


@MANY
@given(content=damaged(bad_files.coco()))
def test_coco(content: dict[str, Any], folder: Path) -> None:
    path = bad_files.write_json(folder / "fuzz.json", content)
    for evaluation in (False, True):
        try:
            register_coco_json(NAME, path, folder / "images", evaluation=evaluation)
        except ValueError as error:
            assert_sentence(error, "fuzz.json")
            continue
        if evaluation:
            build_evaluator(NAME).reset()
            continue
        for masks in (False, True):
            mapper = InstanceMapper(
                is_train=True,
                augmentations=[],
                image_format="RGB",
                masks=masks,
                recompute_boxes=masks,
            )
            for record in DatasetCatalog.get(NAME):
                try:
                    found = mapper(record)["instances"]
                except SkippedImage:
                    continue
                assert torch.isfinite(found.gt_boxes.tensor).all()
                assert (found.gt_classes >= 0).all()
    forget()


@MANY
@given(content=damaged(bad_files.panoptic()))
def test_panoptic(content: dict[str, Any], folder: Path) -> None:
    files = PanopticFiles(
        panoptic_json=bad_files.write_json(folder / "fuzz.json", content),
        panoptic_root=folder / "pngs",
        images=folder / "images",
    )
    for evaluation in (False, True):
        try:
            register_panoptic_json(NAME, files, evaluation=evaluation)
        except ValueError as error:
            assert_sentence(error, "fuzz.json")
            continue
        mapper = InstanceMapper(is_train=True, augmentations=[], image_format="RGB", masks=True)
        for record in DatasetCatalog.get(NAME):
            try:
                found = mapper(record)
            except SkippedImage:
                continue
            assert found["sem_seg"].shape == found["image"].shape[1:]
        if evaluation:
            build_evaluator(NAME).reset()
    forget()


@MANY
@given(
    values=st.lists(st.integers(-300, 70_000), min_size=1, max_size=6),
    kind=st.sampled_from(["uint8", "uint16", "int32", "float32"]),
    count=st.integers(1, 255),
)
def test_labels(values: list[int], kind: str, count: int, folder: Path) -> None:
    """Every value is a class, is ignored, or is an error that names it."""
    array = np.array([values]).astype(kind)
    path = folder / "fuzz.tif"
    Image.fromarray(array).save(path)
    try:
        found = read_labels(path, LabelRule(num_classes=count))
    except (ValueError, UnreadableLabelsError) as error:
        assert_sentence(error, "fuzz.tif")
        found = None
    if found is None:
        sound = (array >= 0) & ((array < count) | (array == 255))
        assert kind == "float32" or not sound.all()
        return
    expected = np.where(array == 255, 255, array)
    np.testing.assert_array_equal(found, expected)
    assert ((found < count) | (found == 255)).all()


@MANY
@given(
    position=st.integers(0, 2000),
    garbage=st.binary(min_size=1, max_size=8),
    length=st.integers(0, 2000),
    suffix=st.sampled_from(["png", "jpg", "tif", "gif", "webp", "bmp"]),
)
def test_pictures(position: int, garbage: bytes, length: int, suffix: str, folder: Path) -> None:
    """A picture of which some bytes are others, or which ends early."""
    path = folder / f"fuzz.{suffix}"
    with Image.open(folder / "images/0.png") as image:
        image.save(path)
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(garbage)] = garbage
    path.write_bytes(bytes(content[: length or None]))
    try:
        picture, _ = read_rgb(path)
    except UnreadableImageError as error:
        assert_sentence(error, f"fuzz.{suffix}")
    else:
        assert picture.mode == "RGB"
