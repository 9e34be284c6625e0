"""One's own panoptic files from the command line: what is set in a config, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import MetadataCatalog

from focalnet_det.engine.own_panoptic import PanopticSets, panoptic_sets, use_panoptic_sets
from focalnet_det.experiment import load_config, read_experiment

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NANO = CONFIGS / "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py"
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


def sets(folder: Path, split: str) -> PanopticSets:
    return panoptic_sets("", [str(folder / f"panoptic_{split}.json")], [], [str(folder / split)])


def test_a_config_is_pointed_at_the_files(folder: Path) -> None:
    cfg = load_config(NANO, [])
    use_panoptic_sets(cfg, train=sets(folder, "train"), val=sets(folder, "val"), overrides=[])
    assert list(cfg.dataloader.train.datasets) == ["panoptic_train_train"]
    assert [loader.dataset for loader in cfg.dataloader.test] == ["panoptic_val_val"]
    assert (cfg.model.roi_heads.num_classes, cfg.model.sem_seg_head.num_classes) == (2, 4)
    assert cfg.dataloader.train.batch_size == 2
    metadata = MetadataCatalog.get("panoptic_val_val")
    assert metadata.thing_classes == ["car", "dog"]
    assert metadata.stuff_classes == ["things", "road", "sky", "sea"]
    assert metadata.stuff_dataset_id_to_contiguous_id == {2: 1, 7: 2, 11: 3}
    assert metadata.panoptic_root == str(folder / "panoptic_val")
    experiment = read_experiment(cfg)
    (record, *_) = experiment.test_loaders["panoptic_val_val"]().dataset
    assert (record["label_rule"].read(record["sem_seg_file_name"])[:20] == 2).all()


def test_yaml_configs_are_too(folder: Path) -> None:
    path = CONFIGS / "COCO-PanopticSegmentation/panoptic_fpn_focalnet_tiny_srf_1x.yaml"
    cfg = load_config(path, [])
    use_panoptic_sets(cfg, train=sets(folder, "train"), val=PanopticSets(), overrides=[])
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (2, 4)
    assert cfg.DATASETS.TRAIN == ("panoptic_train_train",)
    assert cfg.DATASETS.TEST == ()


def test_evaluation_alone(folder: Path) -> None:
    cfg = load_config(NANO, [])
    use_panoptic_sets(cfg, train=PanopticSets(), val=sets(folder, "val"), overrides=[])
    assert [loader.dataset for loader in cfg.dataloader.test] == ["panoptic_val_val"]


def test_what_is_refused(folder: Path) -> None:
    train, val = sets(folder, "train"), sets(folder, "val")
    with pytest.raises(ValueError, match="1 files, 1 PNG folders, 0 image folders"):
        panoptic_sets("", train.jsons, [], [])
    with pytest.raises(ValueError, match="No folder absent beside"):
        panoptic_sets("", [str(folder / "absent.json")], [], ["x"])
    detector = load_config(
        CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py", []
    )
    yaml = load_config(
        CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml", []
    )
    for cfg in (detector, yaml):
        with pytest.raises(ValueError, match="need a panoptic model"):
            use_panoptic_sets(cfg, train=train, val=val, overrides=[])
    content = json.loads((folder / "panoptic_val.json").read_text())
    content["categories"].append({"id": 20, "name": "cat", "isthing": 1})
    (folder / "panoptic_val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has other categories than .*\['cat'\]"):
        use_panoptic_sets(load_config(NANO, []), train=train, val=val, overrides=[])
