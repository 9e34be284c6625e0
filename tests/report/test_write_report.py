"""The HTML page of an evaluation: its numbers by hand, and that it needs nothing beside itself."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from focalnet_det.engine.main import RunArguments, run
from focalnet_det.report import write_report
from focalnet_det.report.detection_section import ranked
from focalnet_det.report.page import Bar, Page, side_by_side, table
from focalnet_det.report.semantic_section import top_confusions
from tests.helpers.paths import ROOT

ADE = ROOT / "configs/ADE20K-SemanticSegmentation"


class Contents(HTMLParser):
    """Titles, rows of tables, and what an HTML page loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "meta"):
            self.open.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.titles[-1] += data


def contents(path: Path) -> Contents:
    html = path.read_text(encoding="utf-8")
    found = Contents(html)
    assert found.open == []
    # Everything is inside the file.
    assert all(url.startswith("data:image/") for url in found.loads)
    assert not re.search(r"https?:|url\(|<script|<link", html)
    return found


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[str, Path]:
    """Two images: in one, an object is found and one has the wrong class; the other is missed."""
    boxes = {1: (1, 1, (4, 4)), 2: (1, 2, (40, 40)), 3: (2, 1, (10, 20))}
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "iscrowd": 0, "area": 400.0}
        | {"bbox": [*corner, 20, 20], "segmentation": square(*corner, 20)}
        for i, (image, category, corner) in boxes.items()
    ]
    for image in (1, 2):
        Image.fromarray(np.full((80, 90, 3), 90 * image, np.uint8)).save(tmp_path / f"{image}.png")
    images = [{"id": i, "file_name": f"{i}.png", "height": 80, "width": 90} for i in (1, 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "<b>dog</b>"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    detections = [
        {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [4, 4, 20, 20]},
        {"image_id": 1, "category_id": 1, "score": 0.8, "bbox": [40, 40, 20, 20]},
        {"image_id": 2, "category_id": 2, "score": 0.7, "bbox": [60, 0, 20, 20]},
    ]
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "coco_instances_results.json").write_text(json.dumps(detections))
    name = f"report_{tmp_path.name}"
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    return name, folder


def test_detection(evaluated: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = evaluated
    lines = [{"iteration": i, "total_loss": 2.0 - 0.1 * i, "lr": 0.1} for i in range(5)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.json").write_text(text)
    results = {"bbox": {"AP": 25.0, "AP50": 25.5, "AP-cat": 50.0, "AP-<b>dog</b>": float("nan")}}
    results["keypoints"] = {"AP": 12.5}
    page = contents(write_report(name, results, folder, weights="a.pth", run=tmp_path))
    assert page.titles == [
        *("Metrics", "Classes", "Training", "Precision and recall of boxes", "Errors of boxes"),
        *("Confusions of boxes", "Worst images", "Best images"),
    ]
    assert ["boxes", "25.00", "25.50"] in page.rows
    assert ["keypoints", "12.50"] in page.rows
    assert ["cat", "50.00"] in page.rows
    assert ["<b>dog</b>", "-"] in page.rows
    # The cat on the dog's place; background in the other image. The dog is explained by the
    # former, the second cat by nothing.
    counts = {row[0].partition(":")[0]: row[1] for row in page.rows if len(row) == 3}
    types = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    assert [counts[kind] for kind in types] == ["1", "0", "0", "0", "1", "1"]
    html = (folder / "report.html").read_text()
    assert "1.png: F1 0.50; 1 correct, 1 missed, 1 false" in html
    assert "2.png: F1 0.00; 0 correct, 1 missed, 1 false" in html
    charts = {path.name for path in folder.glob("*.png")}
    assert charts == {"pr_bbox.png", "pr_classes_bbox.png", "errors_bbox.png", "confusion_bbox.png"}
    assert (tmp_path / "curves.png").exists()


def test_without_detections(evaluated: tuple[str, Path]) -> None:
    name, folder = evaluated
    (folder / "coco_instances_results.json").write_text("[]")
    page = contents(write_report(name, {"bbox": {"AP": 0.0}}, folder))
    assert page.titles == ["Metrics", "Detections"]


@pytest.mark.slow
def test_semantic_segmentation_through_the_tool(tmp_path: Path) -> None:
    for kind, value in (("images", 0), ("labels", 1)):
        (tmp_path / kind).mkdir()
        for index, name in enumerate("ab"):
            shape = (40, 60, 3) if kind == "images" else (40, 60)
            values = np.full(shape, value + index * value, dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / kind / f"{name}.png")
    (tmp_path / "classes.txt").write_text("road\nsky\ncar\n")
    folders = {"sem_images": [str(tmp_path / "images")], "sem_labels": [str(tmp_path / "labels")]}
    thin = [
        *("model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]", "model.channels=16"),
        *("model.train_size=[64,64]", "dataloader.train.batch_size=2", "schedule.iterations=1"),
        *("dataloader.train.augmentations.crop=64", "dataloader.train.num_workers=0"),
        *("dataloader.train.augmentations.short_side=96", "dataloader.test.0.num_workers=0"),
        *("dataloader.test.0.augmentations.short_side=96", "train.device=cpu"),
    ]
    run(
        RunArguments(
            config_file=str(ADE / "upernet_focalnet_nano_small.py"),
            opts=thin,
            report=True,
            output=str(tmp_path / "run"),
            classes=str(tmp_path / "classes.txt"),
            first_label=1,
            **folders,
            **{f"val_{key}": value for key, value in folders.items()},
        )
    )
    folder = tmp_path / "run/evaluation/labels_val"
    page = contents(folder / "report.html")
    assert page.titles == [
        *("Metrics", "Classes", "Training", "Largest confusions", "Confusion matrix"),
        *("Worst images", "Best images"),
    ]
    metrics = json.loads((folder / "sem_seg_metrics.json").read_text())["metrics"]
    assert ["sky", *(f"{metrics[f'{m}-sky']:.2f}" for m in ("IoU", "ACC", "BIoU"))] in page.rows


def test_confusions_by_hand() -> None:
    confusion = np.array([[90, 10, 0], [1, 0, 3], [0, 0, 5]])
    rows = top_confusions(confusion, ["a", "b", "c"])
    assert [(r[0], r[1].text, r[2].value, r[3]) for r in rows] == [
        ("a", "b", 10.0, "10"),
        ("b", "c", 75.0, "3"),
        ("b", "a", 25.0, "1"),
    ]


def test_images_are_ranked_by_f1_then_by_errors() -> None:
    rows = {7: (1, 0, 0, 1.0), 3: (0, 1, 0, 0.0), 5: (0, 4, 2, 0.0), 9: (0, 0, 0, 0.0)}
    summary = {i: dict(zip(("tp", "fp", "fn", "f1"), row, strict=True)) for i, row in rows.items()}
    assert ranked(summary) == [5, 3, 7]


def test_page_escapes_what_it_is_given() -> None:
    page = Page(title="a < b", subtitle="&", tiles=[("<i>", "1")])
    page.add("<script>", "'\"", table(["<td>"], [[Bar(120.0)], [Bar(float("nan"))]]))
    html = page.html()
    assert "<script>" not in html
    assert "<h1>a &lt; b</h1><p>&amp;</p>" in html
    # Bars end at the width of the cell, and NaN has none.
    assert re.findall(r'style="background-size: ([\d.]+)%', html) == ["100.0", "0.0"]


def test_side_by_side_takes_the_first_height() -> None:
    images = [np.zeros((20, 10, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)]
    assert side_by_side(images, gap=4).shape == (20, 10 + 4 + 20, 3)


def teardown_module() -> None:
    for name in [n for n in DatasetCatalog.list() if n.startswith("report_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
