"""Length, batch and rate for one's own data, worked out by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.experiment import load_config, read_experiment
from focalnet_det.engine.own_data import CocoFiles, plan, use_coco_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs/COCO-InstanceSegmentation"
SMALL = CONFIGS / "mask_rcnn_focalnet_nano_fpn_small.py"
PUBLISHED = CONFIGS / "mask_rcnn_focalnet_tiny_srf_fpn_1x"


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [
        (165, 4, (4, 2520)),  # 42 iterations an epoch, 60 epochs
        (8, 4, (4, 1000)),  # 60 epochs would be 120
        (3, 16, (3, 1000)),
        (20_000, 4, (4, 90_000)),  # 60 epochs would be 300,000
        (117_266, 4, (4, 351_804)),  # 12 epochs of 29,317
    ],
)
def test_plan(images: int, batch: int, expected: tuple[int, int]) -> None:
    found = plan(images, batch)
    assert (found.batch_size, found.iterations) == expected
    assert f"{images} training images" in found.reason
    assert ("larger than the data set" in found.reason) == (images < batch)


def data(folder: Path, images: int) -> Path:
    """A COCO file with a box in every image but one."""
    path = folder / "train.json"
    for i in range(images):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.png")
    box = {"category_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(images)
        ],
        "annotations": [{**box, "id": i, "image_id": i} for i in range(1, images)],
        "categories": [{"id": 1, "name": "cell"}],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_published_recipe_on_few_images(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(PUBLISHED.with_suffix(suffix), [])
    train = CocoFiles(annotations=[str(data(tmp_path, images=9))], images=[str(tmp_path)])
    with caplog.at_level("INFO"):
        use_coco_json(cfg, train=train, val=CocoFiles(), overrides=[])
    experiment = read_experiment(cfg)
    schedule = experiment.schedule
    # 8 annotated images: a batch of 8 for 16, half the rate, the drops at 9/12 and 11/12.
    assert schedule.max_iter(1) == 1000
    assert tuple(schedule.milestones) == (750, 917)
    assert schedule.warmup_iterations == 100
    rate = cfg.optimizer.lr if suffix == ".py" else cfg.SOLVER.BASE_LR
    batch = cfg.dataloader.train.batch_size if suffix == ".py" else cfg.SOLVER.IMS_PER_BATCH
    assert (rate, batch) == (5e-5, 8)
    assert "8 training images in batches of 8: 1000 iterations" in caplog.text
    assert "learning rate 5e-05" in caplog.text


def test_a_length_that_was_given_stays(tmp_path: Path) -> None:
    overrides = ["schedule.iterations=77"]
    cfg = load_config(SMALL, overrides)
    train = CocoFiles(annotations=[str(data(tmp_path, images=3))], images=[str(tmp_path)])
    use_coco_json(cfg, train=train, val=CocoFiles(), overrides=overrides)
    assert (cfg.schedule.iterations, cfg.dataloader.train.batch_size) == (77, 4)
