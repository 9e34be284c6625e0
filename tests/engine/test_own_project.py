"""A Detectron2 project of one's own: the example trains, and ignored keys are errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.model_zoo import get_config_file

from examples import detectron2_project
from focalnet_det import add_focalnet_config, create_backbone
from focalnet_det.data.shapes.generate import make_shapes
from focalnet_det.engine.own_project import OwnProjectHook, ignored_keys, use_focalnet
from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.experiment.description import checked_settings
from tests.helpers.paths import CONFIGS

SMALL = [
    *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.WARMUP_ITERS", "0"),
    *("MODEL.FOCALNET.VARIANT", "focalnet_nano", "MODEL.FOCALNET.EMBED_DIM", "8"),
    *("MODEL.FOCALNET.DEPTHS", "(1,1,1,1)", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "INPUT.MASK_FORMAT", "bitmask"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "6", "SOLVER.STEPS", "()"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("forget_data_sets")
def test_the_example_trains_with_detectron2(tmp_path: Path) -> None:
    shapes = make_shapes(tmp_path / "shapes", train=4, val=1, size=(96, 80), seed=3, workers=1)
    annotations = shapes / "annotations/instances_train.json"
    register_coco_instances("project_train", {}, str(annotations), str(shapes / "images/train"))
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1)}
    weights = create_backbone("focalnet_nano", output_norm=False, **small).state_dict()
    torch.save(weights, tmp_path / "official.pth")
    output = tmp_path / "output"
    output.mkdir()
    cfg = detectron2_project.configure(
        "project_train",
        str(output),
        [*SMALL, "SOLVER.EMA_DECAY", "0.5", "SOLVER.BASE_LR", "0.0"],
        weights=tmp_path / "official.pth",
    )
    trainer = detectron2_project.train(cfg)
    assert type(trainer.optimizer).__name__ == "AdamW"
    losses = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert losses[-1]["total_loss"] > 0
    # With a learning rate of zero, the weights are still those of the file.
    model = trainer._trainer.model
    trained = {n.removeprefix("backbone.bottom_up."): p for n, p in model.named_parameters()}
    assert all(torch.equal(trained[name], value) for name, value in weights.items())
    averaged = torch.load(output / "model_ema.pth", weights_only=True)["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(averaged[name], dict(model.named_parameters())[name])


def project(**changes: Any) -> CfgNode:
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.merge_from_file(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    return cfg


def test_keys_that_the_trainer_ignores_are_named() -> None:
    assert ignored_keys(use_focalnet(project(), "focalnet_nano")) == []
    cfg = project(
        **{
            "SOLVER.ACCUMULATION": 2,
            "SOLVER.OPTIMIZER": "ADAMW",
            "MODEL.CONVENTIONS": "mmdet",
            "MODEL.BACKBONE.FREEZE_AT": 3,
            "SOLVER.EMA_DECAY": 0.9,
        }
    )
    others = ["MODEL.CONVENTIONS", "MODEL.BACKBONE.FREEZE_AT"]
    assert ignored_keys(cfg) == ["SOLVER.ACCUMULATION", "SOLVER.OPTIMIZER", *others]
    assert ignored_keys(cfg, own_optimizer=True) == ["SOLVER.ACCUMULATION", *others]
    hook = OwnProjectHook(cfg)
    hook.trainer = detectron2_project.Trainer
    with pytest.raises(ValueError, match="trainer does not read SOLVER.ACCUMULATION, MODEL.CONV"):
        hook.before_train()


def test_use_focalnet_sets_what_belongs_together() -> None:
    cfg = use_focalnet(project(), "focal_tiny")
    assert cfg.MODEL.BACKBONE.NAME == "build_focal_transformer_fpn_backbone"
    assert cfg.MODEL.FOCAL_TRANSFORMER.VARIANT == "focal_tiny"
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN[0], cfg.MODEL.WEIGHTS) == ("RGB", 123.675, "")
    dense = get_cfg()
    dense.merge_from_file(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    use_focalnet(dense, "focalnet_nano")
    assert dense.MODEL.BACKBONE.NAME == "build_retinanet_focalnet_fpn_backbone"
    assert dense.MODEL.FPN.IN_FEATURES == ["stage2", "stage3", "stage4"]
    with pytest.raises(ValueError, match="Res5ROIHeads. Configs named C4"):
        use_focalnet(get_cfg(), "focalnet_nano")


def test_wrong_builders_are_one_sentence_in_our_tools() -> None:
    yaml = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"
    for override, message in {
        "MODEL.BACKBONE.NAME=build_focalnet_fpn": "Unknown MODEL.BACKBONE.NAME 'build_focalnet_fpn'"
        ". Of this package: build_focal_transformer_backbone, ",
        "MODEL.ROI_HEADS.NAME=Res5ROIHeads": "MODEL.ROI_HEADS.NAME is Res5ROIHeads. Configs named",
    }.items():
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            checked_settings(load_config(yaml, [override]))
    assert read_experiment(load_config(yaml, [])).settings
