"""Mask2Former's recipes: complete, and with the published settings."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import instantiate
from detectron2.data import transforms as T

from focalnet_det.experiment import load_config
from focalnet_det.heads.mask2former import Mask2Former
from tests.configs.test_leaves import build_without_memory, groups, read
from tests.helpers.paths import CONFIGS

LEAVES = sorted(CONFIGS.glob("*/mask2former_*.py"))
PUBLISHED = [p for p in LEAVES if not p.stem.endswith("small")]
SIZES = ("tiny_lrf", "small_lrf", "base_lrf")
# Data set and task: classes, things.
CLASSES = {
    "ADE20K-SemanticSegmentation": (150, None),
    "ADE20K-InstanceSegmentation": (100, None),
    "ADE20K-PanopticSegmentation": (150, 100),
    "COCO-InstanceSegmentation": (80, None),
    "COCO-PanopticSegmentation": (133, 80),
}


def test_recipes_are_complete() -> None:
    found = {f"{p.parent.name}/{p.stem.removeprefix('mask2former_focalnet_')}" for p in LEAVES}
    semantic = {f"ADE20K-SemanticSegmentation/{size}_160k" for size in SIZES}
    coco = {f"COCO-{t}Segmentation/{s}_50ep" for t in ("Instance", "Panoptic") for s in SIZES}
    large = {f"COCO-{t}Segmentation/large_fl4_100ep" for t in ("Instance", "Panoptic")}
    ade = {
        f"ADE20K-{task}Segmentation/{variant}_160k_640"
        for task in ("Instance", "Panoptic")
        for variant in ("tiny_lrf", "large_fl4")
    }
    small = {f"Shapes-{t}Segmentation/nano_small" for t in ("Semantic", "Instance", "Panoptic")}
    large |= {"ADE20K-SemanticSegmentation/large_fl4_160k_640"}
    assert found == semantic | coco | large | ade | small


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipe_is_as_published(path: Path) -> None:
    experiment = read(path)
    model = build_without_memory(experiment.model)
    assert isinstance(model, Mask2Former)
    classes, things = CLASSES[path.parent.name]
    assert model.sem_seg_head.predictor.class_embed.out_features == classes + 1
    assert (None if model.things is None else len(model.things)) == things
    large = "large" in path.stem
    semantic = "Semantic" in path.parent.name
    queries = 200 if large and not semantic else 100
    assert model.sem_seg_head.predictor.query_feat.num_embeddings == queries
    assert model.resize_masks_first == (not semantic)
    # A tenth of the rate for the backbone; norms and embeddings are not decayed, biases are.
    rates = sorted({row[1] for row in groups(experiment, model)})
    assert rates == pytest.approx([1e-5, 1e-4])
    exempt = {name for row in groups(experiment, model) if row[2] == 0 for name in row[4]}
    decayed = {name for row in groups(experiment, model) if row[2] == 0.05 for name in row[4]}
    assert "sem_seg_head.predictor.class_embed.bias" in decayed
    assert "sem_seg_head.pixel_decoder.input_proj.2.1.bias" in exempt
    assert "sem_seg_head.pixel_decoder.input_proj.2.0.bias" in decayed
    assert "sem_seg_head.pixel_decoder.transformer.level_embed" in decayed
    embeddings = ("query_feat", "query_embed", "level_embed")
    assert {f"sem_seg_head.predictor.{name}.weight" for name in embeddings} <= exempt
    assert experiment.options.clip_norm == 0.01
    length = {"160k": 160_000, "50ep": 368_750, "100ep": 737_500}[
        re.search("160k|50ep|100ep", path.stem)[0]  # type: ignore[index]
    ]
    assert experiment.schedule.max_iter(1) == length
    if length == 160_000:
        assert experiment.schedule.multiplier(1)(0.5) == pytest.approx(0.5**0.9)
    else:
        course, last = experiment.schedule.multiplier(1), 355_092 if length < 4e5 else 710_184
        assert course(0.0) == 1
        assert course((last - 2) / length) == pytest.approx(0.1)
        assert course((last + 2) / length) == pytest.approx(0.01)


def test_images_are_padded_by_the_model_alone() -> None:
    """What pads here gives the label map class 0, and masks no pixel."""
    path = CONFIGS / "COCO-PanopticSegmentation/mask2former_focalnet_tiny_lrf_50ep.py"
    experiment = read(path)
    model = build_without_memory(experiment.model)
    assert model.train_size == (1024, 1024)
    cfg = load_config(path, [])
    augmentations = instantiate(cfg.dataloader.train.augmentations)
    assert not any(getattr(a, "pad", False) for a in augmentations)
    assert isinstance(augmentations[-1], T.FixedSizeCrop)
