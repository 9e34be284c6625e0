"""The benchmark of evaluation measures equal numbers, and nothing is kept of predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.benchmark.evaluation_speed import ResultsEvaluator, draw_scene, measure
from focalnet_det.evaluation import coco_ap as coco


def test_both_give_the_same_statistics(tmp_path: Path) -> None:
    found = measure(12, 30, tmp_path)
    assert found.difference < 1e-9
    assert 5 < found.our_stats["segm"][0] < 80
    assert found.our_stats["segm"] != found.our_stats["bbox"]
    assert found.ours > 0 < found.theirs
    assert len(found.memory) == 4


def test_scenes_are_the_same_each_time_and_sound() -> None:
    scene = draw_scene(3, 20)
    assert scene == draw_scene(3, 20)
    assert len(scene.predictions) == 20
    for row in scene.truth + scene.predictions:
        assert mask_utils.area(row["segmentation"]) == row["area"]
        np.testing.assert_array_equal(mask_utils.toBbox(row["segmentation"]), row["bbox"])


def test_predictions_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "BATCH", 4)
    images = range(1, 15)
    scenes = {k: draw_scene(k, 10) for k in images}
    content: dict[str, Any] = {
        "images": [scene.image for scene in scenes.values()],
        "annotations": [row for scene in scenes.values() for row in scene.truth],
        "categories": [{"id": k, "name": f"{k}"} for k in range(1, 81)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    evaluator = ResultsEvaluator(json_file=tmp_path / "truth.json", output_dir=tmp_path / "out")
    held = []
    order = [9, 2, *(k for k in images if k not in (2, 9))]
    for k in order:
        evaluator.process([{"image_id": k}], [{"instances": scenes[k].predictions}])
        held.append(len(evaluator._pending))
    assert max(held) < 4
    evaluator.evaluate()
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert written == [row for k in images for row in scenes[k].predictions]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] == "."] == []
