"""Label files of every kind, class lists, folder pairs, and the mapper that reads them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

from focalnet_det.data import issue_policies
from focalnet_det.data.instances.mappers import InstanceMapper, SkippedImage
from focalnet_det.data.io.labels import (
    LabelRule,
    UnreadableLabelsError,
    balanced_weights,
    pixel_counts,
    read_labels,
)
from focalnet_det.data.semantic.ade20k_colors import ADE20K_COLORS
from focalnet_det.data.semantic.label_folders import (
    paired_files,
    read_class_list,
    register_ade20k_sem_seg,
    register_sem_seg,
    register_shapes_sem_seg,
)

VALUES = np.array([[0, 1, 2], [3, 255, 1]], dtype=np.uint8)
ADE = LabelRule(num_classes=3, first_label=1)


def saved(path: Path, values: Any = VALUES, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        # A palette whose greys are not its indices.
        image.putpalette([x for i in range(256) for x in (255 - i, i // 2, 7)])
    image.save(path)
    return path


@pytest.mark.parametrize("kind", ["L", "P", "16 bits"])
def test_values_of_every_kind(kind: str, tmp_path: Path) -> None:
    values = VALUES.astype(np.uint16) if kind == "16 bits" else VALUES
    path = saved(tmp_path / "a.png", values, kind)
    np.testing.assert_array_equal(read_labels(path), VALUES)
    np.testing.assert_array_equal(read_labels(path, ADE), [[255, 0, 1], [2, 255, 0]])


def test_more_classes_than_labels_can_tell_apart() -> None:
    """Value 255 is ignored, so that class 255, or 254 from 1 on, could not be learned."""
    assert LabelRule(num_classes=255).num_classes == 255
    with pytest.raises(ValueError, match="256 classes exceed the limit of 255"):
        LabelRule(num_classes=256)
    with pytest.raises(ValueError, match="255 classes exceed the limit of 254"):
        LabelRule(num_classes=255, first_label=1)


@pytest.mark.parametrize("rule", [None, LabelRule(num_classes=3), ADE])
def test_values_that_no_rule_allows(rule: LabelRule | None, tmp_path: Path) -> None:
    for value in (-5, 256):
        path = saved(tmp_path / "a.tif", np.array([[1, value]], dtype=np.int32))
        with pytest.raises(ValueError, match=rf"a\.tif contains {value}, but"):
            read_labels(path, rule)


def test_files_of_several_pages(tmp_path: Path) -> None:
    page = Image.fromarray(VALUES)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(UnreadableLabelsError, match="3 pages"):
        read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LabelRule(num_classes=2), r"a\.png contains 2, 3, but the 2 classes .* 0 to 1"),
        (LabelRule(num_classes=2, first_label=1), "contains 3, but the 2 classes .* 1 to 2"),
    ],
)
def test_values_of_no_class(rule: LabelRule, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(saved(tmp_path / "a.png"), rule)


def test_unreadable_label_files(tmp_path: Path) -> None:
    colour = saved(tmp_path / "c.png", np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(UnreadableLabelsError, match=r"c\.png is a color image \(RGB\)"):
        read_labels(colour)
    (tmp_path / "d.png").write_bytes(b"not a picture")
    with pytest.raises(UnreadableLabelsError, match=r"Cannot read label file .*d\.png"):
        read_labels(tmp_path / "d.png")
    with pytest.raises(FileNotFoundError, match=r"e\.png does not exist"):
        read_labels(tmp_path / "e.png")


@pytest.mark.parametrize(
    ("name", "text", "first", "expected"),
    [
        ("c.txt", "road\n\n sky \n", None, (("road", "sky"), 0)),
        ("c.txt", "road\nsky\n", 1, (("road", "sky"), 1)),
        (
            "c.txt",
            "Idx\tRatio\tName\n1\t.5\twall\n2\t.1\tsky, air\n",
            None,
            (("wall", "sky, air"), 1),
        ),
        ("c.json", '["road", "sky"]', 1, (("road", "sky"), 1)),
        ("c.json", '[{"name": "road"}, {"name": "sky"}]', None, (("road", "sky"), 0)),
        (
            "c.json",
            '[{"id": 2, "name": "sky"}, {"id": 1, "name": "road"}]',
            None,
            (("road", "sky"), 1),
        ),
    ],
)
def test_class_lists(
    name: str, text: str, first: int | None, expected: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = read_class_list(path, first)
    assert (found.names, found.first_label) == expected
    assert found.rule == LabelRule(num_classes=2, first_label=expected[1])


@pytest.mark.parametrize(
    ("name", "text", "first", "message"),
    [
        ("c.txt", "", None, "the file is empty"),
        ("c.txt", "a\na\n", None, "must be unique"),
        ("c.json", "{}", None, "expected a JSON list"),
        ("c.json", "[1", None, "not a class list"),
        ("c.json", '[{"id": 1}]', None, "not a class list"),
        ("c.json", '[{"id": 1, "name": "a"}, {"id": 3, "name": "b"}]', None, "without gaps"),
        ("c.json", '[{"id": 7, "name": "a"}, {"id": 8, "name": "b"}]', None, "0, 1, 2"),
        ("c.json", '[{"id": 1, "name": "a"}]', 0, "start at 1, but the first label is 0"),
    ],
)
def test_bad_class_lists(
    name: str, text: str, first: int | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_list(tmp_path / name, first)
    with pytest.raises(ValueError, match="Class list .* does not exist"):
        read_class_list(tmp_path / "absent.txt")


def test_files_are_paired_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.jpg", "sub/a.JPG", "alone.png"):
        saved(tmp_path / "images" / name)
    for name in ("b.png", "sub/a.png", "notes.png"):
        saved(tmp_path / "labels" / name)
    (tmp_path / "images/readme.txt").write_text("no picture")
    pairs = paired_files(tmp_path / "images", tmp_path / "labels")
    assert [(i.name, x.name) for i, x in pairs] == [("b.jpg", "b.png"), ("a.JPG", "a.png")]
    assert "2 files without a counterpart are ignored, such as alone" in caplog.text
    with pytest.raises(ValueError, match=r"No image in .*sub \(1 files\)"):
        paired_files(tmp_path / "images/sub", tmp_path / "labels")
    with pytest.raises(FileNotFoundError, match="No such folder.*absent"):
        paired_files(tmp_path / "absent", tmp_path / "labels")
    saved(tmp_path / "images/b.png")
    with pytest.raises(ValueError, match=r"b\.jpg and .*b\.png differ only in their extension"):
        paired_files(tmp_path / "images", tmp_path / "labels")


def mapper(**changes: Any) -> InstanceMapper:
    fields: dict[str, Any] = {"is_train": True, "augmentations": [], "image_format": "RGB"}
    return InstanceMapper(**(fields | changes))


def record(tmp_path: Path, size: tuple[int, int] = (2, 3)) -> dict[str, Any]:
    picture = saved(tmp_path / "i.png", np.zeros((*size, 3), dtype=np.uint8))
    label = saved(tmp_path / "l.png")
    return {"file_name": str(picture), "sem_seg_file_name": str(label), "label_rule": ADE}


def test_mapper_gives_classes_that_move_with_the_image(tmp_path: Path) -> None:
    example = mapper(augmentations=[T.RandomFlip(prob=1.0)])(record(tmp_path))
    np.testing.assert_array_equal(example["sem_seg"], [[1, 0, 255], [0, 255, 2]])
    assert example["sem_seg"].dtype.is_signed
    assert not {"sem_seg_file_name", "label_rule"} & set(example)


def test_evaluation_leaves_the_labels_to_the_evaluator(tmp_path: Path) -> None:
    example = mapper(is_train=False)(record(tmp_path))
    assert "sem_seg" not in example
    np.testing.assert_array_equal(
        read_labels(example["sem_seg_file_name"], example["label_rule"]),
        [[255, 0, 1], [2, 255, 0]],
    )


def test_training_skips_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(SkippedImage, match=r"l\.png is 2 x 3 .* image 4 x 3") as skipped:
        mapper()(record(tmp_path, size=(4, 3)))
    assert skipped.value.issues == {issue_policies.LABEL_SIZE_DIFFERS: 1}
    damaged = record(tmp_path)
    (tmp_path / "l.png").write_bytes(b"")
    with pytest.raises(SkippedImage) as skipped:
        mapper()(damaged)
    assert skipped.value.issues == {issue_policies.UNREADABLE_LABELS: 1}


def test_registered_folders(tmp_path: Path) -> None:
    saved(tmp_path / "images/a.png")
    saved(tmp_path / "labels/a.png")
    (tmp_path / "c.txt").write_text("x\ny\nz\n")
    name = "test_registered_folders"
    for _ in range(2):  # the second time, in place of the first
        register_sem_seg(
            name, tmp_path / "images", tmp_path / "labels", read_class_list(tmp_path / "c.txt", 1)
        )
    (found,) = DatasetCatalog.get(name)
    assert found["file_name"] == str(tmp_path / "images/a.png")
    assert found["label_rule"] == ADE
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["x", "y", "z"]
    assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 255)


def test_ade20k_has_detectron2s_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_ade20k_sem_seg()
    root = tmp_path / "ADEChallengeData2016"
    with pytest.raises(FileNotFoundError, match=r"images/validation"):
        DatasetCatalog.get("ade20k_sem_seg_val")
    saved(root / "images/validation/ADE_val_00000001.png")
    saved(root / "annotations_detectron2/validation/ADE_val_00000001.png")
    (found,) = DatasetCatalog.get("ade20k_sem_seg_val")
    assert found["label_rule"] == LabelRule(num_classes=150)
    classes = MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes
    assert (len(classes), classes[0], classes[149]) == (150, "wall", "flag")


def test_shapes_labels_agree_with_their_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focalnet_det.data.shapes.generate import make_shapes

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    root = make_shapes(tmp_path / "shapes", train=2, val=1, size=(64, 64), seed=0, workers=1)
    register_shapes_sem_seg()
    metadata = MetadataCatalog.get("shapes_sem_seg_val")
    categories = json.loads((root / "categories.json").read_text())
    assert metadata.stuff_classes == [c["name"] for c in categories]
    assert [c["ade_label"] for c in categories] == list(range(1, 11))
    assert len(DatasetCatalog.get("shapes_sem_seg_train")) == 2
    (found,) = DatasetCatalog.get("shapes_sem_seg_val")
    labels = read_labels(found["sem_seg_file_name"], found["label_rule"])
    assert set(np.unique(labels)) <= {*range(10), 255}


def test_weights_of_rare_classes(tmp_path: Path) -> None:
    """4 pixels of class 0, 16 of class 1, 1 of class 3; class 2 is absent: the median is 4."""
    first, second = np.full((2, 4), 2), np.array([[1, 1, 1, 1, 4], [0, 2, 2, 2, 2]])
    rule = LabelRule(num_classes=4, first_label=1)
    second = np.vstack([second, [[2, 2, 2, 2, 255]]])
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    for path, values in zip(files, (first, second), strict=False):
        Image.fromarray(values.astype(np.uint8)).save(path)
    files[2].write_bytes(b"no picture")
    counts = pixel_counts(files, rule)
    assert counts.tolist() == [4, 16, 0, 1]
    assert balanced_weights(counts) == [1.0, 0.5, 1.0, 2.0]
    assert balanced_weights(np.array([1, 10_000, 10_000])) == [10.0, 1.0, 1.0]


def test_ade20k_colours() -> None:
    """Sky, tree, person and flag of the published table; two classes share a grey."""
    assert len(ADE20K_COLORS) == 150
    assert len(set(ADE20K_COLORS)) == 149
    picked = [ADE20K_COLORS[i] for i in (2, 4, 12, 149)]
    assert picked == [(6, 230, 230), (4, 200, 3), (150, 5, 61), (92, 0, 255)]
    register_ade20k_sem_seg()
    assert MetadataCatalog.get("ade20k_sem_seg_val").stuff_colors == ADE20K_COLORS
