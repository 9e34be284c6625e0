"""The functions behind the web page, without the page."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image
from shapely import Polygon

from focalnet_det.predict.prediction import Prediction
from focalnet_det.predict.regions import outlines, regions_of, render
from focalnet_det.predict.serve import App, main

Train = Callable[[str], Path]
SVG = "{http://www.w3.org/2000/svg}"


def areas(path: str) -> list[float]:
    """Areas of the outlines of an SVG path."""
    rings = [part.strip("MZ").split("L") for part in re.findall(r"M[^M]*Z", path)]
    points = [[tuple(map(float, corner.split())) for corner in ring] for ring in rings]
    return sorted(Polygon(ring).area for ring in points)


def test_outlines_enclose_the_mask_and_its_holes() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 20:70] = True
    mask[20:30, 30:50] = False
    # Outlines run through the middles of border pixels: of the mask, and around the hole.
    assert areas(outlines(mask)) == pytest.approx([11 * 21, 39 * 49], abs=3)
    rows, columns = np.mgrid[:60, :80]
    disc = np.hypot(rows - 30, columns - 40) < 20
    (area,) = areas(outlines(disc))
    assert area == pytest.approx(np.pi * 19.5**2, rel=0.04)


def prediction(**outputs: object) -> Prediction:
    metadata = Metadata(name="page")
    metadata.set(thing_classes=["cat <b>", "dog"], stuff_classes=["sky", "grass"])
    return Prediction(outputs, Image.new("RGB", (80, 60), (9, 90, 9)), metadata)


def instances() -> Instances:
    found = Instances((60, 80))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 20, 30], [5, 5, 60, 55], [0, 0, 9, 9]]))
    found.scores = torch.tensor([0.9, 0.8, 0.3])
    found.pred_classes = torch.tensor([0, 1, 1])
    return found


def test_regions_show_their_names_and_numbers() -> None:
    given = prediction(instances=instances())
    regions = regions_of(given, 0.5)
    # Large ones first, so that small ones lie on top.
    assert [region.label for region in regions] == ["dog 80%", "cat <b> 90%"]
    root = ElementTree.fromstring(render(given.image, regions))
    groups = root.findall(f"{SVG}g")
    assert [g.get("data-index") for g in groups] == ["0", "1"]
    assert [g.findtext(f"{SVG}title") for g in groups] == ["dog 80%", "cat <b> 90%"]
    assert root.get("viewBox") == "0 0 80 60"
    path = groups[1].find(f"{SVG}path")
    assert path is not None
    assert path.get("d") == "M10.0 10.0H20.0V30.0H10.0Z"
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x", -1)) <= 80
        assert 0 <= float(text.get("y", -1)) <= 60


def test_regions_of_segments_and_of_classes() -> None:
    ids = torch.zeros(60, 80, dtype=torch.int32)
    ids[:, :40], ids[20:40, 50:70] = 4, 9
    segments = [
        {"id": 4, "category_id": 0, "isthing": False},
        {"id": 9, "category_id": 1, "isthing": True, "score": 0.75},
    ]
    found = regions_of(prediction(panoptic_seg=(ids, segments), instances=instances()), 0.5)
    assert [(r.label, r.box) for r in found] == [
        ("sky", (0, 0, 40, 60)),
        ("dog 75%", (50, 20, 70, 40)),
    ]
    scores = torch.zeros(2, 60, 80)
    scores[1, :, 60:] = 1
    found = regions_of(prediction(sem_seg=scores), 0.5)
    assert [(r.label, r.box) for r in found] == [
        ("sky 75% of the image", (0, 0, 60, 60)),
        ("grass 25% of the image", (60, 0, 80, 60)),
    ]


@pytest.mark.slow
def test_image_in_masks_out_and_a_click(trained: Train, shapes: Path, tmp_path: Path) -> None:
    app = App([trained("mask_rcnn"), trained("upernet")], device="cpu")
    detector, segmentor = app.paths
    image = sorted((shapes / "images/val").iterdir())[0]
    found, problem = app.predict(detector, str(image))
    assert problem == ""
    assert found is not None
    threshold = float(found.instances.scores[:3].min())
    html, sentence = app.show(found, threshold)
    assert html.count('class="region"') == 3
    assert sentence.startswith("3 objects. Click an object")
    assert app.show(found, 1.0)[1] == "No objects at this threshold."
    picture, numbers = app.explain(detector, found, threshold, 0)
    assert picture is not None
    assert picture.shape[2] == 3
    assert "evidence" in numbers
    assert app.explain(detector, found, threshold, 3) == (None, "Click an object of the picture.")

    regions, _ = app.predict(segmentor, str(image))
    html, sentence = app.show(regions, 0.5)
    assert "of the image</title>" in html
    assert "regions. Click" in sentence
    picture, numbers = app.explain(segmentor, regions, 0.5, 0)
    assert picture is not None
    assert "evidence" not in numbers

    # Wrong files give a sentence, without the name under which the page keeps them.
    wrong = tmp_path / "kept" / "notes.png"
    wrong.parent.mkdir()
    wrong.write_text("no picture")
    nothing, problem = app.predict(detector, str(wrong))
    assert nothing is None
    assert "notes.png" in problem
    assert str(tmp_path) not in problem
    assert "\n" not in problem
    assert app.predict(detector, None) == (None, "")
    assert app.predict("other", str(image))[1].startswith("No model 'other': choose one of")


def test_models_are_named_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a/mine", tmp_path / "b/mine", tmp_path / "other"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(App(folders).paths) == [str(folders[0]), str(folders[1]), "other"]
    with pytest.raises(ValueError, match="does not exist: give the folder of a run"):
        main([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="No model"):
        App([])
