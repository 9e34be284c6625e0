"""The other detectors: sizes, and what is published of their recipes."""

import math
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from torch import nn
from torchvision.models import resnet50, swin_t

from focalnet_det.data.augmentation import ResizeShortestEdge
from focalnet_det.experiment import load_config
from focalnet_det.heads.mmdet.cascade import MmdetCascadeROIHeads
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform, MmdetRetinaNet, MmdetRPN
from focalnet_det.heads.reppoints_v2.reppoints_criterion import LossWeights
from focalnet_det.necks.fpn import LastLevelP6P7WithoutReLU
from tests.helpers.configs import LEAVES, build_without_memory, read
from tests.helpers.paths import CONFIGS

CASCADE = CONFIGS / "COCO-InstanceSegmentation/cascade_mask_rcnn_focalnet_tiny_lrf_fpn_3x.py"
RETINANET = CONFIGS / "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py"


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def constant_norms(module: nn.Module) -> int:
    """Scales and shifts of Detectron2's constant batch norms, which are no parameters."""
    return sum(
        b.numel() for n, b in module.named_buffers() if n.endswith(("norm.weight", "norm.bias"))
    )


# Mask R-CNN outside the backbone, with mmdet's layout: its total less its backbone.
MASK_RCNN_PARTS = 48_675_252 - 28_401_348
# Neck and heads of the published Cascade Mask R-CNN: FPN 256, RPN, three box heads of 4
# convolutions with norms and one linear layer, class-specific boxes, three mask heads.
FPN = sum(256 * c + 256 for c in (96, 192, 384, 768)) + 4 * (9 * 256 * 256 + 256)
RPN = 9 * 256 * 256 + 256 + 256 * 15 + 15
BOX_HEAD = 4 * (9 * 256 * 256 + 512) + 12544 * 1024 + 1024 + 1024 * 401 + 401
MASK_HEAD = 4 * (9 * 256 * 256 + 256) + 4 * 256 * 256 + 256 + 256 * 80 + 80


def test_published_sizes() -> None:
    cascade = build_without_memory(read(CASCADE).model)
    assert count(cascade) == 87_104_514
    assert count(cascade) - count(cascade.backbone.bottom_up) == FPN + RPN + 3 * (
        BOX_HEAD + MASK_HEAD
    )
    assert count(build_without_memory(read(RETINANET).model)) == 39_339_448


@pytest.mark.parametrize(
    ("name", "classifier", "outside"),
    [
        # The classification layer, and for Swin the last norm, make way for four output norms.
        ("swin_tiny", swin_t, 768 * 1000 + 1000 + 2 * 768 - 2 * (96 + 192 + 384 + 768)),
        ("resnet50", resnet50, 2048 * 1000 + 1000),
    ],
)
def test_twins_have_the_backbone_of_torchvision(name: str, classifier, outside: int) -> None:  # type: ignore[no-untyped-def]
    model = build_without_memory(
        read(CONFIGS / f"COCO-InstanceSegmentation/mask_rcnn_{name}_fpn_1x.py").model
    )
    backbone = model.backbone.bottom_up
    with torch.device("meta"):
        expected = count(classifier()) - outside
    assert count(backbone) + constant_norms(backbone) == expected
    wider = {"swin_tiny": 0, "resnet50": 256 * (256 + 512 + 1024 + 2048 - 96 - 192 - 384 - 768)}
    assert count(model) - count(backbone) == MASK_RCNN_PARTS + wider[name]


@pytest.mark.parametrize("family", ["mask_rcnn", "cascade_mask_rcnn", "retinanet", "fcos",
                                    "faster_rcnn", "keypoint_rcnn"])  # fmt: skip
def test_twins_share_the_recipe(family: str) -> None:
    """All but the backbone, and what Swin exempts from weight decay."""
    leaves = {p.stem: p for p in LEAVES if p.stem.startswith(f"{family}_")}
    swins = [stem for stem in leaves if "swin_tiny" in stem]
    assert swins
    for stem in swins:
        configs = [load_config(leaves[stem.replace("swin_tiny", n)], []) for n in
                   ("swin_tiny", "resnet50")]  # fmt: skip
        focal = next(
            path for name, path in sorted(leaves.items(), reverse=True)
            if "focalnet_tiny" in name and name.endswith(stem[-7:]) and "detectron2" not in name
            and "deeper" not in name
        )  # fmt: skip
        configs.append(load_config(focal, []))
        for config in configs:
            config.model.backbone.pop("bottom_up")
            config.optimizer.pop("no_decay_names")
        assert configs[0] == configs[1] == configs[2]


def test_published_cascade() -> None:
    model = build_without_memory(read(CASCADE).model)
    levels = [layer.blocks[0].modulation.focal_layers for layer in model.backbone.bottom_up.layers]
    kernels = [[level[0].kernel_size[0] for level in stage] for stage in levels]
    assert kernels == [[11, 13, 15], [9, 11, 13], [9, 11, 13], [7, 9, 11]]
    rpn, heads = model.proposal_generator, model.roi_heads
    assert type(rpn) is MmdetRPN
    assert rpn.smooth_l1_beta == pytest.approx(1 / 9)
    assert rpn.anchor_boundary_thresh == 0
    assert rpn.post_nms_topk == {True: 2000, False: 1000}
    assert type(heads) is MmdetCascadeROIHeads
    assert heads.stage_weights == (1.0, 0.5, 0.25)
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    thresholds = [matcher.thresholds for matcher in heads.proposal_matchers]
    assert thresholds == [[-math.inf, iou, math.inf] for iou in (0.5, 0.6, 0.7)]
    for box, std in zip(
        heads.box_predictor, ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067)), strict=True
    ):
        assert box.bbox_pred.out_features == 80 * 4, "class-specific boxes"
        assert (box.box_reg_loss_type, box.loss_weight) == ("giou", {"loss_box_reg": 10.0})
        assert type(box.box2box_transform) is MmdetBox2BoxTransform
        weights = [1 / std[0], 1 / std[0], 1 / std[1], 1 / std[1]]
        assert list(box.box2box_transform.weights) == pytest.approx(weights)
    for head in heads.box_head:
        convolutions = [module for module in head if isinstance(module, nn.Conv2d)]
        assert len(convolutions) == 4
        assert all(isinstance(c.norm, nn.modules.batchnorm._BatchNorm) for c in convolutions)
        assert all(c.bias is None for c in convolutions)


def test_published_retinanet_form() -> None:
    model = build_without_memory(read(RETINANET).model)
    assert type(model) is MmdetRetinaNet
    assert (model.focal_loss_alpha, model.focal_loss_gamma, model.smooth_l1_beta) == (0.25, 2.0, 0)
    assert model.anchor_matcher.thresholds == [-math.inf, 0.4, 0.5, math.inf]
    assert model.anchor_matcher.min_low_quality_iou == 0
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.bottom_up.norm0.weight", "backbone.bottom_up.norm0.bias"}
    c5 = torch.randn(1, 768, 5, 5)
    torch.manual_seed(0)
    block = type(model.backbone.top_block)(768, 256, in_feature="stage4")
    p6, p7 = block(c5)
    expected = nn.functional.conv2d(p6, block.p7.weight, block.p7.bias, stride=2, padding=1)
    torch.testing.assert_close(p7, expected)
    assert (p6 < 0).any(), "a ReLU would have shown"


def test_published_atss() -> None:
    path = CONFIGS / "COCO-Detection/atss_focalnet_tiny_lrf_fpn_3x.py"
    for suffix in (".py", ".yaml"):
        model = build_without_memory(read(path.with_suffix(suffix)).model)
        assert count(model) == 37_209_066
        # Head: 8 convolutions with norms, 3 without, 5 factors.
        neck = sum(256 * c + 256 for c in (192, 384, 768)) + 5 * (9 * 256 * 256 + 256)
        head = 8 * (9 * 256 * 256 + 512) + 9 * 256 * 85 + 85 + 5
        assert count(model.head) == head
        assert count(model) - count(model.backbone.bottom_up) == neck + head
        assert type(model.backbone.top_block) is LastLevelP6P7WithoutReLU
        assert model.backbone.top_block.in_feature == "p5"
        assert model.anchor_matcher.topk == 9
        assert list(model.box2box_transform.weights) == [10, 10, 5, 5]
        assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.25, 2.0)
        assert (model.box_loss_weight, model.test_score_thresh) == (2.0, 0.05)
        assert (model.test_topk_candidates, model.test_nms_thresh) == (1000, 0.6)
        assert [p.requires_grad for p in model.parameters()].count(False) == 0


def test_published_reppoints_v2() -> None:
    """Settings of the only public recipe, that of Swin; neck and head of the published sizes."""
    totals = {"swin_tiny": "44.9", "focal_tiny": "45.8", "focalnet_tiny_lrf": "46.4"}
    for name, total in totals.items():
        path = CONFIGS / f"COCO-Detection/reppoints_v2_{name}_bifpn_3x.py"
        model = build_without_memory(read(path).model)
        assert f"{count(model) / 1e6:.1f}" == total
        assert count(model) - count(model.backbone.bottom_up) == 10_185_254 + 7_210_442
        assert model.criterion.weights == LossWeights(1, 1, 2, 0.25, 1, 0.1)
        assert model.criterion.matcher.topk == 9
        assert (model.test_score_thresh, model.test_nms_thresh) == (0.05, 0.6)
        flip, sizes = instantiate(load_config(path, []).dataloader.train.augmentations)
        assert type(flip) is T.RandomFlip
        assert sizes.short_edge_length == tuple(range(480, 961, 32))
        assert sizes.max_size == 1333
        norms = {n for n, p in model.named_parameters() if ".gn" in n or "_gn1" in n}
        exempt = {id(p) for g in read(path).optimizer(model).param_groups
                  if g["weight_decay"] == 0 for p in g["params"]}  # fmt: skip
        # Published: what has norm in its name; norms of neck and head have other names.
        assert not any(id(p) in exempt for n, p in model.named_parameters() if n in norms)


def test_keypoint_recipe_does_not_crop() -> None:
    path = CONFIGS / "COCO-Keypoints/keypoint_rcnn_focalnet_tiny_srf_fpn_1x.py"
    augmentations = instantiate(load_config(path, []).dataloader.train.augmentations)
    assert [type(a) for a in augmentations] == [T.RandomFlip, ResizeShortestEdge]


def test_leaves_are_where_detectron2_has_them() -> None:
    folders = {
        "mask": "InstanceSegmentation",
        "cascade": "InstanceSegmentation",
        "retinanet": "Detection",
        "fcos": "Detection",
        "atss": "Detection",
        "reppoints": "Detection",
        "faster": "Detection",
        "keypoint": "Keypoints",
    }
    for path in LEAVES:
        kind = path.stem.partition("_")[0]
        if kind in folders:
            assert Path(path.parent.name).name.split("-")[1] == folders[kind], path
