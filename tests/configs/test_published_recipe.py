"""The published recipe of Mask R-CNN, FocalNet-T SRF, 1x, in both kinds of config."""

import math
import re
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from torch import nn

from focalnet_det.data import loader as data_build
from focalnet_det.experiment import (
    Experiment,
    load_config,
)
from focalnet_det.experiment import yacs_parts as yacs_module
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform, MmdetMatcher, MmdetRPN
from tests.helpers.configs import RECIPE, read, train_loader_arguments

# The published recipe of Mask R-CNN, FocalNet-T SRF, 1x, for both kinds of config.
# Source: microsoft/FocalNet:detection/configs/focalnet/
# mask_rcnn_focalnet_tiny_patch4_mstrain_480-800_adamw_1x_coco_srf.py and its base files.


@pytest.fixture(scope="module", params=[".py", ".yaml"])
def path(request: pytest.FixtureRequest) -> Path:
    return RECIPE.with_suffix(request.param)


@pytest.fixture(scope="module")
def recipe(path: Path) -> Experiment:
    return read(path)


@pytest.fixture(scope="module")
def model(recipe: Experiment) -> nn.Module:
    torch.manual_seed(0)
    return recipe.model()


def test_published_size(model: nn.Module) -> None:
    assert sum(p.numel() for p in model.parameters()) == 48_675_252
    assert sum(p.numel() for p in model.backbone.bottom_up.parameters()) == 28_401_348


def test_published_kernels_and_drop_path(model: nn.Module) -> None:
    backbone = model.backbone.bottom_up
    kernels = {
        tuple(p.shape[-2:])
        for name, p in backbone.named_parameters()
        if re.search(r"focal_layers\.0\.0\.weight$", name)
    }
    wider = {
        tuple(p.shape[-2:])
        for name, p in backbone.named_parameters()
        if re.search(r"focal_layers\.1\.0\.weight$", name)
    }
    assert (kernels, wider) == ({(9, 9)}, {(11, 11)})
    rates = [block.drop_path.rate for layer in backbone.layers for block in layer.blocks]
    # Linear over the 2 + 2 + 6 + 2 blocks.
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_published_optimizer(recipe: Experiment, model: nn.Module) -> None:
    optimizer = recipe.optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    decayed, exempt = optimizer.param_groups
    for group, decay in ((decayed, 0.05), (exempt, 0.0)):
        assert group["lr"] == 1e-4
        assert group["betas"] == (0.9, 0.999)
        assert group["weight_decay"] == decay
    by_id = {id(p): name for name, p in model.named_parameters()}
    exempt_names = {by_id[id(p)] for p in exempt["params"]}
    assert all("norm" in name for name in exempt_names)
    # Weight and bias of: two norms in 12 blocks, stem, 3 downsamplings, 4 outputs.
    assert len(exempt_names) == 2 * (2 * 12 + 1 + 3 + 4)
    blocks = 2 * 2 * (2 * 96 + 2 * 192 + 6 * 384 + 2 * 768)
    others = 2 * 96 + 2 * (192 + 384 + 768) + 2 * (96 + 192 + 384 + 768)
    assert sum(p.numel() for p in exempt["params"]) == blocks + others == 23_424
    assert sum(p.numel() for p in decayed["params"]) == 48_675_252 - 23_424
    assert recipe.options.clip_norm == 0
    assert recipe.options.precision == "fp16"


def test_published_schedule(path: Path, recipe: Experiment) -> None:
    batch_size = train_loader_arguments(path)["batch_size"]
    assert batch_size == 16
    # COCO train2017 has 117,266 images with annotations: 7329.1 batches.
    loader = data_build.TrainLoader(None, num_images=117_266, batch_size=batch_size)
    per_epoch = loader.iterations_per_epoch
    assert per_epoch == 7330
    total = recipe.schedule.max_iter(per_epoch)
    assert total == 87_960
    course = recipe.schedule.multiplier(per_epoch)
    expected = {
        0: 0.001,
        250: 0.5005,
        500: 1.0,
        65_969: 1.0,
        65_970: 0.1,  # after 9 epochs
        80_629: 0.1,
        80_630: 0.01,  # after 11 epochs
        87_959: 0.01,
    }
    actual = {iteration: course(iteration / total) for iteration in expected}
    assert actual == pytest.approx(expected)


def test_published_pixels(model: nn.Module, path: Path, recipe: Experiment) -> None:
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert model.input_format == "RGB"
    assert train_loader_arguments(path)["image_format"] == "RGB"
    assert model.backbone.size_divisibility == 32


def test_published_rpn(model: nn.Module) -> None:
    rpn = model.proposal_generator
    assert list(rpn.in_features) == ["p2", "p3", "p4", "p5", "p6"]
    generator = rpn.anchor_generator
    assert list(generator.strides) == [4, 8, 16, 32, 64]
    for side, cells in zip((32, 64, 128, 256, 512), generator.cell_anchors, strict=True):
        sizes = cells[:, 2:] - cells[:, :2]
        torch.testing.assert_close(sizes.prod(dim=1), torch.full((3,), float(side**2)))
        ratios = sizes[:, 1] / sizes[:, 0]
        torch.testing.assert_close(ratios, torch.tensor([0.5, 1.0, 2.0]))
        torch.testing.assert_close(cells[:, :2], -cells[:, 2:])
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert rpn.post_nms_topk == {True: 1000, False: 1000}
    assert rpn.nms_thresh == 0.7
    assert rpn.min_box_size == 0
    assert (rpn.batch_size_per_image, rpn.positive_fraction) == (256, 0.5)
    assert rpn.anchor_matcher.thresholds == [-math.inf, 0.3, 0.7, math.inf]
    assert type(rpn) is MmdetRPN
    assert type(rpn.anchor_matcher) is MmdetMatcher
    assert rpn.anchor_matcher.min_low_quality_iou == 0.3
    assert type(rpn.box2box_transform) is MmdetBox2BoxTransform
    # Smooth L1 with beta 0 is L1.
    assert (rpn.box_reg_loss_type, rpn.smooth_l1_beta) == ("smooth_l1", 0)
    assert set(rpn.loss_weight.values()) == {1.0}


def test_published_roi_heads(model: nn.Module) -> None:
    heads = model.roi_heads
    assert list(heads.box_in_features) == list(heads.mask_in_features) == ["p2", "p3", "p4", "p5"]
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert heads.proposal_matcher.thresholds == [-math.inf, 0.5, math.inf]
    assert not heads.proposal_matcher.allow_low_quality_matches
    box = heads.box_predictor
    assert box.cls_score.out_features == 80 + 1
    assert box.bbox_pred.out_features == 80 * 4, "class-specific boxes"
    assert (box.test_score_thresh, box.test_nms_thresh, box.test_topk_per_image) == (0.05, 0.5, 100)
    assert (box.box_reg_loss_type, box.smooth_l1_beta) == ("smooth_l1", 0)
    assert set(box.loss_weight.values()) <= {1.0}
    assert type(box.box2box_transform) is MmdetBox2BoxTransform
    assert tuple(box.box2box_transform.weights) == (10, 10, 5, 5)
    assert [fc.out_features for fc in heads.box_head if isinstance(fc, nn.Linear)] == [1024, 1024]
    assert [c.kernel_size for c in heads.mask_head if isinstance(c, nn.Conv2d)] == [(3, 3)] * 4 + [
        (1, 1)
    ]
    assert heads.mask_head.predictor.out_channels == 80, "class-specific masks"
    for pooler, size in ((heads.box_pooler, 7), (heads.mask_pooler, 14)):
        assert tuple(pooler.output_size) == (size, size)
        for level, stride in zip(pooler.level_poolers, (4, 8, 16, 32), strict=True):
            assert (level.spatial_scale, level.sampling_ratio) == (1 / stride, 0)
            assert level.aligned


def test_published_augmentation(path: Path, recipe: Experiment) -> None:
    if path.suffix == ".py":
        augmentations = instantiate(load_config(path, []).dataloader.train.augmentations)
    else:
        with mock.patch.object(yacs_module, "build_loader") as build:
            read(path).train_loader()
        augmentations = build.call_args.kwargs["augmentations"]
    flip, choice = augmentations
    assert isinstance(flip, T.RandomFlip)
    assert (flip.prob, flip.horizontal, flip.vertical) == (0.5, True, False)
    plain, crop = (list(policy.augs) for policy in choice.choices)
    sizes = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    for resize in (plain[0], crop[2]):
        assert isinstance(resize, T.ResizeShortestEdge)
        assert (list(resize.short_edge_length), resize.max_size) == (sizes, 1333)
        assert resize.sample_style == "choice"
    assert (len(plain), len(crop)) == (1, 3)
    assert (list(crop[0].short_edge_length), crop[0].max_size) == ([400, 500, 600], 1333)
    assert crop[0].sample_style == "choice"
    assert isinstance(crop[1], T.RandomCrop)
    assert (crop[1].crop_type, tuple(crop[1].crop_size)) == ("absolute_range", (384, 600))


def test_published_evaluation(path: Path, recipe: Experiment) -> None:
    assert train_loader_arguments(path)["datasets"] == ["coco_2017_train"]
    (name,) = recipe.test_loaders
    assert name == "coco_2017_val"
    if path.suffix == ".py":
        resizes = instantiate(load_config(path, []).dataloader.test[0].augmentations)
    else:
        with mock.patch.object(yacs_module, "build_loader_of_tests") as build:
            recipe.test_loaders[name]()
        resizes = build.call_args.kwargs["augmentations"]
        assert build.call_args.kwargs["image_format"] == "RGB"
    (resize,) = resizes
    image = T.AugInput(torch.zeros(480, 640, 3, dtype=torch.uint8).numpy())
    resize(image)
    assert image.image.shape == (800, 1067, 3)  # 640 * 800 / 480 = 1066.7
    wide = T.AugInput(torch.zeros(300, 900, 3, dtype=torch.uint8).numpy())
    resize(wide)
    assert wide.image.shape == (444, 1333, 3)  # 300 * 1333 / 900 = 444.3
    assert recipe.options.max_dets == 100
