"""The Detectron2 adapter: Detectron2's own configs run on a focal backbone by a few yaml lines."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from focalnet_det import add_focalnet_config, create_backbone
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.necks.fpn import build_fpn, build_retinanet_fpn

RCNN_LINES = """
MODEL:
  WEIGHTS: ""
  BACKBONE: {NAME: build_focalnet_fpn_backbone}
  FOCALNET: {VARIANT: focalnet_nano}
  FPN: {IN_FEATURES: [stage1, stage2, stage3, stage4]}
"""
RETINANET_LINES = """
MODEL:
  WEIGHTS: ""
  BACKBONE: {NAME: build_retinanet_focalnet_fpn_backbone}
  FOCALNET: {VARIANT: focalnet_nano}
  FPN: {IN_FEATURES: [stage2, stage3, stage4]}
"""
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
# Name: zoo file, lines, meta architecture that replaces the file's, names of the losses.
MODELS = {
    "mask_rcnn": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        RCNN_LINES,
        None,
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
    ),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        RETINANET_LINES,
        None,
        {"loss_cls", "loss_box_reg"},
    ),
    "panoptic": (
        PANOPTIC,
        RCNN_LINES,
        None,
        {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_sem_seg"},
    ),
    "semantic": (PANOPTIC, RCNN_LINES, "SemanticSegmentor", {"loss_sem_seg"}),
}


def zoo_config(name: str) -> CfgNode:
    # After our package, without which main's model zoo does not import where setuptools is new.
    from detectron2 import model_zoo

    file, lines, meta_architecture, _ = MODELS[name]
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(file))
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(lines)))
    if meta_architecture is not None:
        cfg.MODEL.META_ARCHITECTURE = meta_architecture
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def nano_config(*overrides: object) -> CfgNode:
    """Detectron2's defaults with the nano backbone, without neck."""
    cfg = get_cfg()
    add_focalnet_config(cfg)
    settings = ["MODEL.BACKBONE.NAME", "build_focalnet_backbone"]
    cfg.merge_from_list([*settings, "MODEL.FOCALNET.VARIANT", "focalnet_nano", *overrides])
    return cfg


def synthetic_image() -> dict[str, object]:
    """96 x 128 pixels with two rectangles, as a mapper hands them to a model."""
    height, width = 96, 128
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 8:72, 10:60] = True
    masks[1, 30:62, 70:118] = True
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 60.0, 72.0], [70.0, 30.0, 118.0, 62.0]]))
    instances.gt_classes = torch.tensor([3, 41])
    instances.gt_masks = BitMasks(masks)
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[:, 64:] = 7
    labels[:4] = 255
    return {
        "image": image,
        "height": height,
        "width": width,
        "instances": instances,
        "sem_seg": labels,
    }


def test_registry_names() -> None:
    for name in (
        "build_focalnet_backbone",
        "build_focalnet_fpn_backbone",
        "build_retinanet_focalnet_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY


@pytest.mark.parametrize("name", MODELS)
def test_zoo_configs_train_on_a_focal_backbone(name: str) -> None:
    model = build_model(zoo_config(name))
    image = synthetic_image()

    model.train()
    with EventStorage():
        losses = model([image])
    assert set(losses) == MODELS[name][3]
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    # DistributedDataParallel refuses models with parameters that get no gradient.
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    backbone = dict(model.backbone.bottom_up.named_parameters())
    assert "layers.0.blocks.0.modulation.f.weight" in backbone
    for parameter_name, parameter in backbone.items():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name

    model.eval()
    with torch.no_grad():
        (result,) = model([{"image": image["image"], "height": 96, "width": 128}])
    if name != "semantic":
        assert result["instances"].image_size == (96, 128)
    if name in ("semantic", "panoptic"):
        assert result["sem_seg"].shape == (54, 96, 128)
        assert torch.isfinite(result["sem_seg"]).all()
    if name == "panoptic":
        assert result["panoptic_seg"][0].shape == (96, 128)


def test_parameter_names_inside_a_detector() -> None:
    names = set(build_model(zoo_config("mask_rcnn")).state_dict())
    expected = {
        "backbone.bottom_up.patch_embed.proj.weight",
        "backbone.bottom_up.layers.0.blocks.0.modulation.f.weight",
        "backbone.bottom_up.layers.2.blocks.2.modulation.focal_layers.1.0.weight",
        "backbone.bottom_up.layers.0.downsample.proj.weight",
        "backbone.bottom_up.norm3.bias",
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_output5.weight",
    }
    assert expected - names == set()


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("mask_rcnn", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("retinanet", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
def test_pyramid_strides(name: str, strides: dict[str, int]) -> None:
    backbone = build_backbone(zoo_config(name))
    shapes = backbone.output_shape()
    assert {n: s.stride for n, s in shapes.items()} == strides
    assert {s.channels for s in shapes.values()} == {256}
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 128, 256))
    sizes = {n: tuple(f.shape[-2:]) for n, f in features.items()}
    assert sizes == {n: (128 // s, 256 // s) for n, s in strides.items()}
    if name == "mask_rcnn":
        assert torch.equal(features["p6"], features["p5"][..., ::2, ::2])
    else:
        p7 = backbone.top_block.p7
        coarser = torch.relu(features["p6"])
        torch.testing.assert_close(
            features["p7"],
            torch.nn.functional.conv2d(coarser, p7.weight, p7.bias, stride=2, padding=1),
        )


def test_images_are_padded_to_what_the_pyramid_needs() -> None:
    model = build_model(zoo_config("mask_rcnn"))
    assert model.backbone.size_divisibility == 32
    image = torch.rand(3, 75, 101)
    assert model.preprocess_image([{"image": image}]).tensor.shape[-2:] == (96, 128)


def test_overrides_arrive() -> None:
    cfg = nano_config(
        *("MODEL.FOCALNET.FOCAL_WINDOWS", [9, 7, 5, 3]),
        *("MODEL.FOCALNET.FOCAL_LEVELS", (3, 2, 2, 1)),
        *("MODEL.FOCALNET.DROP_PATH_RATE", 0.5),
        *("MODEL.FOCALNET.OUT_FEATURES", ["stage2", "stage4"]),
        *("MODEL.FOCALNET.LAYER_SCALE", 0.25),
        *("MODEL.FOCALNET.FROZEN_STAGES", 0),
    )
    net = build_backbone(cfg)
    state = net.state_dict()
    # Kernel sizes are window + 2 * level.
    assert state["layers.0.blocks.0.modulation.focal_layers.0.0.weight"].shape[-1] == 9
    assert state["layers.0.blocks.0.modulation.focal_layers.2.0.weight"].shape[-1] == 13
    assert state["layers.3.blocks.0.modulation.focal_layers.0.0.weight"].shape[-1] == 3
    assert "layers.3.blocks.0.modulation.focal_layers.1.0.weight" not in state
    assert float(state["layers.1.blocks.0.gamma_1"][0]) == 0.25
    assert {n: (s.channels, s.stride) for n, s in net.output_shape().items()} == {
        "stage2": (64, 8),
        "stage4": (256, 32),
    }
    assert net.layers[3].blocks[0].drop_path.rate == pytest.approx(0.5)
    assert not net.patch_embed.proj.weight.requires_grad
    assert net.layers[0].blocks[0].modulation.f.weight.requires_grad


def test_what_is_not_overridden_comes_from_the_variant() -> None:
    net = build_backbone(nano_config())
    shapes = {n: (s.channels, s.stride) for n, s in net.output_shape().items()}
    assert shapes == {
        "stage1": (32, 4),
        "stage2": (64, 8),
        "stage3": (128, 16),
        "stage4": (256, 32),
    }
    assert [len(layer.blocks) for layer in net.layers] == [1, 1, 3, 1]


def test_image_channels_are_those_of_pixel_mean() -> None:
    cfg = nano_config("MODEL.PIXEL_MEAN", [1.0] * 5, "MODEL.PIXEL_STD", [1.0] * 5)
    assert build_backbone(cfg).patch_embed.proj.weight.shape == (32, 5, 4, 4)


def test_unknown_variant_lists_the_known_ones() -> None:
    cfg = nano_config("MODEL.FOCALNET.VARIANT", "focalnet_tiny")
    with pytest.raises(KeyError, match=r"'focalnet_tiny'.*focalnet_tiny_srf"):
        build_backbone(cfg)


def test_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"focal_window\b.*focal_windows"):
        focalnet_backbone("focalnet_nano", focal_window=(9, 9, 9, 9))


@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_unknown_pyramid_feature_lists_the_known_ones(name: str) -> None:
    cfg = zoo_config(name)
    cfg.MODEL.FPN.IN_FEATURES = ["stage2", "res4"]
    with pytest.raises(ValueError, match=r"stage1.*stage4") as error:
        build_backbone(cfg)
    assert "res4" in str(error.value)


@pytest.mark.parametrize("build", [build_fpn, build_retinanet_fpn])
def test_unknown_feature_in_a_lazy_neck_lists_the_known_ones(build) -> None:
    with pytest.raises(ValueError, match=r"stage5.*stage1, stage2, stage3, stage4"):
        build(focalnet_backbone("focalnet_nano"), in_features=["stage4", "stage5"])


def test_features_equal_those_of_the_plain_backbone() -> None:
    plain = create_backbone("focalnet_nano").eval()
    adapted = build_backbone(nano_config()).eval()
    adapted.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        expected, actual = plain(x), adapted(x)
    assert list(actual) == list(expected) == ["stage1", "stage2", "stage3", "stage4"]
    for name, feature in expected.items():
        torch.testing.assert_close(actual[name], feature, rtol=0, atol=0)
