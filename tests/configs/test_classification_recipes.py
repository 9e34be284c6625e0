"""The classification recipes are the published ones; SimMIM's are those of its own repository."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("timm", reason="timm is a test dependency")

import torch
from detectron2.config import instantiate
from torch import nn

from focalnet_det.experiment import Experiment, load_config, read_experiment
from tests.helpers.configs import build_without_memory
from tests.helpers.paths import CONFIGS

IMAGENET = CONFIGS / "ImageNet-Classification"
# Parameters, stochastic depth, and top-1 on ImageNet-1k.
# Source: microsoft/FocalNet:README.md and configs/*.yaml; counts of the official classes.
PUBLISHED = {
    "tiny_srf": (28_427_116, 0.2, 82.1),
    "tiny_lrf": (28_647_928, 0.2, 82.3),
    "small_srf": (49_891_216, 0.3, 83.4),
    "small_lrf": (50_342_440, 0.3, 83.5),
    "base_srf": (88_148_144, 0.5, 83.7),
    "base_lrf": (88_749_768, 0.5, 83.9),
    "tiny_iso": (5_880_280, 0.2, 74.1),
    "small_iso": (22_376_344, 0.2, 80.9),
    "base_iso": (87_237_400, 0.2, 82.4),
}
# Images of ImageNet-1k; the official loader drops what is left of an epoch.
IMAGES = 1_281_167


def built(path: Path) -> tuple[Any, Experiment, nn.Module]:
    cfg = load_config(path, [])
    experiment = read_experiment(cfg)
    return cfg, experiment, build_without_memory(experiment.model)


def rates(model: nn.Module) -> list[float]:
    return [block.drop_path.rate for layer in model.backbone.layers for block in layer.blocks]


def decays(experiment: Experiment, model: nn.Module) -> dict[str, float]:
    groups = experiment.optimizer(model).param_groups
    by_id = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_leaves_are_complete() -> None:
    found = {path.stem for path in IMAGENET.glob("*_300ep.py")}
    assert found == {f"classifier_focalnet_{name}_300ep" for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_as_published(name: str) -> None:
    """microsoft/FocalNet:config.py, whose rates are for a batch of 512, and data/build.py."""
    count, drop_path, top1 = PUBLISHED[name]
    path = IMAGENET / f"classifier_focalnet_{name}_300ep.py"
    cfg, experiment, model = built(path)
    assert sum(p.numel() for p in model.parameters()) == count
    found = rates(model)
    assert found == pytest.approx([drop_path * i / (len(found) - 1) for i in range(len(found))])
    assert f"top-1 {top1}." in path.read_text().split('"""')[1]
    mix = model.mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.8, 1.0, 1, 0.5)
    assert (mix.label_smoothing, mix.num_classes, mix.mode) == (0.1, 1000, "batch")
    assert (model.erase.probability, model.erase.max_count, model.erase.per_pixel) == (
        *(0.25, 1),
        True,
    )
    schedule, options = experiment.schedule, experiment.options
    assert (schedule.epochs, schedule.decay) == (300, "cosine")
    assert schedule.warmup_iterations == 20 * (IMAGES // 1024)
    optimizer = experiment.optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    rate = 5e-4 * 1024 / 512
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (rate, (0.9, 0.999), 1e-8)
    assert schedule.warmup_factor == pytest.approx(5e-7 * 2 / rate)
    assert schedule.final_factor == pytest.approx(5e-6 * 2 / rate)
    for key, decay in decays(experiment, model).items():
        parameter = model.get_parameter(key)
        assert decay == (0.0 if parameter.ndim == 1 else 0.05), key
    assert (options.clip_norm, options.recipe_batch, options.ema_decay) == (5.0, 1024, 0.0)
    loader = cfg.dataloader.train
    assert (loader.batch_size, loader.datasets) == (1024, "imagenet_train")
    crop, flip, policy = instantiate(loader.augmentations)[0].change.transforms
    assert (tuple(crop.scale), tuple(crop.ratio)) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (crop.size, flip.p) == ((224, 224), 0.5)
    assert (policy.num_layers, len(policy.ops)) == (2, 15)
    resize, center = instantiate(cfg.dataloader.test[0].augmentations)
    assert (resize.short_side, center.size) == (256, 224)


def test_pretraining_is_that_of_simmim() -> None:
    """microsoft/SimMIM:configs/swin_base__100ep/simmim_pretrain__..., with a batch of 16 x 128."""
    cfg, experiment, model = built(
        CONFIGS / "ImageNet-Pretraining/simmim_focalnet_base_lrf_100ep.py"
    )
    schedule = experiment.schedule
    assert (schedule.epochs, schedule.warmup_iterations) == (100, 10 * (IMAGES // 2048))
    rate = experiment.settings.learning_rate
    assert rate == pytest.approx(2e-4 * 2048 / 512)
    assert schedule.warmup_factor * rate == pytest.approx(1e-6 * 4)
    assert schedule.final_factor * rate == pytest.approx(1e-5 * 4)
    assert (experiment.options.clip_norm, set(rates(model))) == (5.0, {0.0})
    assert (model.generate.unit, model.generate.ratio) == (32, 0.6)
    for key, decay in decays(experiment, model).items():
        exempt = key == "mask_token" or model.get_parameter(key).ndim == 1
        assert decay == (0.0 if exempt else 0.05), key
    crop, flip = instantiate(cfg.dataloader.train.augmentations)[0].change.transforms
    assert (crop.size, tuple(crop.scale), tuple(crop.ratio)) == (
        *((192, 192), (0.67, 1.0)),
        (3 / 4, 4 / 3),
    )
    assert flip.p == 0.5


def test_fine_tuning_decays_layer_by_layer() -> None:
    """microsoft/SimMIM:configs/swin_base__100ep/simmim_finetune__...: 1.25e-3 for 512, 0.9."""
    path = IMAGENET / "classifier_focalnet_base_lrf_finetune_100ep.py"
    _, experiment, model = built(path)
    assert rates(model)[-1] == pytest.approx(0.1)
    assert experiment.schedule.warmup_iterations == 20 * (IMAGES // 2048)
    groups = experiment.optimizer(model).param_groups
    by_id = {id(p): g["lr"] for g in groups for p in g["params"]}
    found = {name: by_id[id(p)] / 5e-3 for name, p in model.named_parameters()}
    # 24 blocks: the head counts no layer, the last block one, the stem 25.
    assert found["head.weight"] == found["norm.weight"] == 1
    assert found["backbone.layers.3.blocks.1.mlp.fc1.weight"] == pytest.approx(0.9)
    assert found["backbone.layers.0.blocks.0.mlp.fc1.weight"] == pytest.approx(0.9**24)
    assert found["backbone.patch_embed.proj.weight"] == pytest.approx(0.9**25)
