"""One's own panoptic files from the command line: what is set in a config, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import MetadataCatalog

from focalnet_det.experiment import Experiment, RunArguments, describe
from tests.helpers.paths import CONFIGS

NANO = CONFIGS / "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py"
YAML = CONFIGS / "COCO-PanopticSegmentation/panoptic_fpn_focalnet_tiny_srf_1x.yaml"
CATEGORIES = [
    {"id": 2, "name": "road", "isthing": 0},
    {"id": 5, "name": "car", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
    {"id": 9, "name": "dog", "isthing": 1},
    {"id": 11, "name": "sea", "isthing": 0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        (tmp_path / f"panoptic_{split}").mkdir()
        (tmp_path / split).mkdir()
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
        for k in range(count):
            colors = np.zeros((40, 50, 3), dtype=np.uint8)
            colors[:20, :, 0], colors[20:, :, 1] = 3, 1
            Image.fromarray(colors).save(tmp_path / f"panoptic_{split}/{k}.png")
            Image.fromarray(colors).save(tmp_path / f"{split}/{k}.jpg")
            content["images"].append({"id": k, "file_name": f"{k}.jpg", "height": 40, "width": 50})
            segments = [{"id": 3, "category_id": 7}, {"id": 256, "category_id": 9}]
            row = {"image_id": k, "file_name": f"{k}.png", "segments_info": segments}
            content["annotations"].append(row)
        (tmp_path / f"panoptic_{split}.json").write_text(json.dumps(content))
    return tmp_path


def described(config: Path, folder: Path, **changes: Any) -> Experiment:
    fields: dict[str, Any] = {"output": str(folder / "run")}
    for split, prefix in (("train", ""), ("val", "val_")):
        fields[f"{prefix}panoptic_json"] = [str(folder / f"panoptic_{split}.json")]
        fields[f"{prefix}images"] = [str(folder / split)]
    return describe(RunArguments(config_file=str(config), **(fields | changes)))


@pytest.mark.parametrize("config", [NANO, YAML])
def test_a_config_is_pointed_at_the_files(config: Path, folder: Path) -> None:
    experiment = described(config, folder)
    assert experiment.settings.train_sets == ("panoptic_train",)
    assert list(experiment.test_loaders) == ["panoptic_val"]
    model = experiment.model()
    assert (model.roi_heads.num_classes, model.sem_seg_head.predictor.out_channels) == (2, 4)
    metadata = MetadataCatalog.get("panoptic_val")
    assert metadata.thing_classes == ["car", "dog"]
    assert metadata.stuff_classes == ["things", "road", "sky", "sea"]
    assert metadata.stuff_dataset_id_to_contiguous_id == {2: 1, 7: 2, 11: 3}
    assert metadata.panoptic_root == str(folder / "panoptic_val")
    (record, *_) = experiment.test_loaders["panoptic_val"]().dataset
    assert (record["label_rule"].read(record["sem_seg_file_name"])[:20] == 2).all()


def test_evaluation_alone(folder: Path) -> None:
    experiment = described(NANO, folder, panoptic_json=[], images=[], eval_only=True)
    assert list(experiment.test_loaders) == ["panoptic_val"]


def test_bad_input_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="1 files, 1 PNG folders, 0 image folders"):
        described(NANO, folder, images=[])
    with pytest.raises(ValueError, match="no PNG folder absent next to"):
        described(NANO, folder, panoptic_json=[str(folder / "absent.json")])
    for stem in ("mask_rcnn_focalnet_nano_fpn_small.py", "mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"):
        with pytest.raises(ValueError, match="need a panoptic model"):
            described(CONFIGS / "COCO-InstanceSegmentation" / stem, folder)
    content = json.loads((folder / "panoptic_val.json").read_text())
    content["categories"].append({"id": 20, "name": "cat", "isthing": 1})
    (folder / "panoptic_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has other categories than .*\['cat'\]"):
        described(NANO, folder)
