"""The ADE20K recipes are the published ones."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.config import instantiate
from torch import nn

from focalnet_det.analysis.segmentor_flops import segmentor_macs
from focalnet_det.experiment import Experiment, load_config, read_experiment
from focalnet_det.heads.mmdet.segmentor import MmsegSegmentor
from tests.helpers.paths import ROOT

ADE = ROOT / "configs/ADE20K-SemanticSegmentation"
LEAVES = sorted(p for p in ADE.glob("*focalnet*160k*.py") if "mask2former" not in p.stem)

# Parameters in millions, and kernels per level.
# Source: microsoft/FocalNet:semantic_segmentation/configs/focalnet.
UPERNET = {
    "tiny_srf": ("60.823", (9, 11)),
    "tiny_lrf": ("61.573", (9, 11, 13)),
    "small_srf": ("83.061", (9, 11)),
    "small_lrf": ("84.595", (9, 11, 13)),
    "base_srf": ("123.681", (9, 11)),
    "base_lrf": ("125.726", (9, 11, 13)),
}


def built(path: Path) -> tuple[Experiment, nn.Module]:
    experiment = read_experiment(load_config(path, []))
    with torch.device("meta"):
        return experiment, experiment.model()


def bottom_up(model: nn.Module) -> nn.Module:
    return getattr(model.backbone, "bottom_up", model.backbone)


def test_leaves_are_complete() -> None:
    names = {f"{m}_focalnet_{v}_160k" for m in ("upernet", "semantic_fpn") for v in UPERNET}
    names |= {f"upernet_focalnet_large_{level}_160k_640" for level in ("fl3", "fl4")}
    assert {path.stem for path in LEAVES} == names


@pytest.mark.parametrize("name", UPERNET)
def test_upernet_model_is_as_published(name: str) -> None:
    millions, kernels = UPERNET[name]
    _, model = built(ADE / f"upernet_focalnet_{name}_160k.py")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == millions
    for layer in model.backbone.layers:
        for block in layer.blocks:
            levels = block.modulation.focal_layers
            assert tuple(level[0].kernel_size[0] for level in levels) == kernels


# GFLOPs at 512 x 2048, of README.md in microsoft/FocalNet.
FLOPS = {
    "tiny_srf": 944,
    "tiny_lrf": 949,
    "small_srf": 1035,
    "small_lrf": 1044,
    "base_srf": 1180,
    "base_lrf": 1192,
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_the_published_ones(name: str) -> None:
    _, model = built(ADE / f"upernet_focalnet_{name}_160k.py")
    total = sum(segmentor_macs(model.eval()))
    # Biases, norms and activations, which the published counter adds, are less than 0.1 %.
    assert total / 1e9 == pytest.approx(FLOPS[name], rel=0.003)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_recipe_is_as_published(path: Path) -> None:
    experiment, model = built(path)
    side = 640 if path.stem.endswith("640") else 512
    assert isinstance(model, MmsegSegmentor)
    assert model.train_size == (side, side)
    assert model.window is None
    assert model.pixel_mean.shape == (3, 1, 1)
    rates = [block.drop_path.rate for layer in bottom_up(model).layers for block in layer.blocks]
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])

    schedule = experiment.schedule
    assert (schedule.max_iter(1263), schedule.decay) == (160_000, "poly")
    assert (schedule.warmup_iterations, schedule.warmup_factor) == (1500, 1e-6)

    optimizer = experiment.optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == 6e-5
        assert tuple(group["betas"]) == (0.9, 0.999)
        for parameter in group["params"]:
            exempt = "norm" in names[id(parameter)]
            assert group["weight_decay"] == (0.0 if exempt else 0.01), names[id(parameter)]

    cfg = load_config(path, [])
    train, (test,) = cfg.dataloader.train, cfg.dataloader.test
    assert (train.datasets, test.dataset) == ("ade20k_sem_seg_train", "ade20k_sem_seg_val")
    assert (train.batch_size, train.masks) == (16, False)
    resize, crop, flip, _ = instantiate(train.augmentations)
    assert (resize.long_side, resize.short_side) == (4 * side, side)
    assert tuple(resize.ratios) == (0.5, 2.0)
    assert (crop.crop_aug.crop_size, crop.single_category_max_area) == ((side, side), 0.75)
    assert flip.prob == 0.5
    (evaluated,) = instantiate(test.augmentations)
    assert (evaluated.short_edge_length, evaluated.max_size) == ((side, side), 4 * side)
    assert (experiment.options.recipe_batch, experiment.options.precision) == (16, "fp32")


def test_upernet_head_is_as_published() -> None:
    _, model = built(ADE / "upernet_focalnet_tiny_srf_160k.py")
    head = model.sem_seg_head
    assert head.num_classes == 150
    assert head.in_features == ["stage1", "stage2", "stage3", "stage4"]
    assert [module[0].output_size for module in head.psp_modules] == [1, 2, 3, 6]
    assert (head.bottleneck.conv.out_channels, head.dropout.p) == (512, 0.1)
    assert (head.loss_weight, head.auxiliary_weight) == (1.0, 0.4)
    auxiliary = head.auxiliary_head
    assert (auxiliary.convs[0].conv.in_channels, auxiliary.convs[0].conv.out_channels) == (384, 256)
    assert auxiliary.dropout.p == 0.1
    assert (head.loss.average, head.loss.ignore_value) == ("all", 255)
    assert (head.loss.class_weights, head.loss.ohem_threshold) == (None, None)


@pytest.mark.parametrize("path", [p for p in LEAVES if p.stem.startswith("upernet")])
def test_scores_of_the_header(path: Path) -> None:
    """A published score stands in the header of its leaf, and nowhere else."""
    published = {
        "tiny_srf": "46.5 on ADE20K val, 47.2",
        "tiny_lrf": "46.8 on ADE20K val, 47.8",
        "small_srf": "49.3 on ADE20K val, 50.1",
        "small_lrf": "49.1 on ADE20K val, 50.1",
        "base_srf": "50.2 on ADE20K val, 51.1",
        "base_lrf": "50.5 on ADE20K val, 51.4",
    }
    found = re.search(r"focalnet_(\w+_[sl]rf)_160k", path.stem)
    expected = published[found[1]] if found else "no score is published"
    assert expected in path.read_text().split('"""')[1]
