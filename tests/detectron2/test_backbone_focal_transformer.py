"""Focal Transformer in Detectron2: registry entries, yacs keys, and detectors that train."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from focalnet_det import add_focalnet_config, create_backbone
from focalnet_det.backbones import FocalTransformer, FocalTransformerV2
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.experiment.solver import layers_above, parameter_groups

LINES = """
MODEL:
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {NAME: %s}
  FOCAL_TRANSFORMER: {VARIANT: %s, EMBED_DIM: 8, NUM_HEADS: [1, 2, 4, 8], DEPTHS: [1, 1, 1, 1]}
  FPN: {IN_FEATURES: %s}
"""
ZOO = {
    "mask_rcnn": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "build_focal_transformer_fpn_backbone",
        ["stage1", "stage2", "stage3", "stage4"],
    ),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "build_retinanet_focal_transformer_fpn_backbone",
        ["stage2", "stage3", "stage4"],
    ),
}


def zoo_config(name: str, variant: str) -> CfgNode:
    file, builder, features = ZOO[name]
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(file))
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(LINES % (builder, variant, features))))
    return cfg


def config(*settings: object) -> CfgNode:
    cfg = get_cfg()
    add_focalnet_config(cfg)
    name = ["MODEL.BACKBONE.NAME", "build_focal_transformer_backbone"]
    cfg.merge_from_list([*name, *settings])
    return cfg


def test_registry_names() -> None:
    for name in (
        "build_focal_transformer_backbone",
        "build_focal_transformer_fpn_backbone",
        "build_retinanet_focal_transformer_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY


@pytest.mark.parametrize("variant", ["focal_nano", "focal_fast_tiny"])
@pytest.mark.parametrize("name", ZOO)
def test_zoo_configs_train(name: str, variant: str) -> None:
    cfg = zoo_config(name, variant)
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    model = build_model(cfg)
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([3])
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[0, 8:50, 10:60] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with EventStorage():
        losses = model([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert "backbone.bottom_up.layers.0.blocks.0.attn.qkv.weight" in model.state_dict()
    model.eval()
    with torch.no_grad():
        (result,) = model([{"image": image, "height": 64, "width": 96}])
    assert result["instances"].image_size == (64, 96)


def test_keys_override_the_variant() -> None:
    cfg = config(
        *("MODEL.FOCAL_TRANSFORMER.VARIANT", "focal_nano"),
        *("MODEL.FOCAL_TRANSFORMER.FOCAL_WINDOWS", [9, 5, 3, 1]),
        *("MODEL.FOCAL_TRANSFORMER.EXPAND_SIZE", 2),
        *("MODEL.FOCAL_TRANSFORMER.DROP_PATH_RATE", 0.5),
        *("MODEL.FOCAL_TRANSFORMER.OUT_FEATURES", ["stage2", "stage4"]),
        *("MODEL.PIXEL_MEAN", [1.0] * 5),
        *("MODEL.PIXEL_STD", [1.0] * 5),
    )
    net = build_backbone(cfg)
    assert isinstance(net, FocalTransformer)
    assert net.layers[0].blocks[0].attn.focal_window == 9
    assert net.layers[0].blocks[0].attn.expand_size == 2
    assert net.layers[3].blocks[0].drop_path.rate == pytest.approx(0.5)
    assert net.patch_embed.proj.weight.shape == (32, 5, 4, 4)
    shapes = {n: (s.channels, s.stride) for n, s in net.output_shape().items()}
    assert shapes == {"stage2": (64, 8), "stage4": (256, 32)}


def test_version_2_has_keys_of_its_own() -> None:
    key = "MODEL.FOCAL_TRANSFORMER"
    with torch.device("meta"):
        net = build_backbone(config(f"{key}.VARIANT", "focal_fast_tiny", f"{key}.TOP_K", 64))
        assert isinstance(net, FocalTransformerV2)
        assert net.layers[2].blocks[5].attn.top_k == 64
        with pytest.raises(TypeError, match=r"top_k\. Known: .*focal_windows"):
            build_backbone(config(f"{key}.VARIANT", "focal_tiny", f"{key}.TOP_K", 64))


def test_features_equal_those_of_the_plain_backbone() -> None:
    plain, adapted = create_backbone("focal_nano").eval(), focalnet_backbone("focal_nano").eval()
    adapted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        expected, actual = plain(x), adapted(x)
    assert list(actual) == list(expected) == ["stage1", "stage2", "stage3", "stage4"]
    for name, feature in expected.items():
        torch.testing.assert_close(actual[name], feature, rtol=0, atol=0)


def test_layer_decay_and_groups_see_its_blocks() -> None:
    net = create_backbone("focal_nano")
    above = layers_above(net)
    assert above["layers.3.blocks.0.attn.qkv.weight"] == 1
    assert above["layers.0.blocks.0.pool_layers.0.weight"] == 6
    assert above["patch_embed.proj.weight"] == 7
    groups = parameter_groups(
        nn.ModuleDict({"backbone": net}), lr=1.0, weight_decay=0.1, layer_decay=0.5
    )
    assert {group["lr"] for group in groups} == {0.5**k for k in range(1, 8)}
