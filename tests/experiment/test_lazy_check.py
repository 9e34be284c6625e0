"""Bad overrides of .py configs: one clear line each, before the first step."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.errors import one_line_errors
from focalnet_det.experiment import RunArguments, check, describe, load_config
from tests.helpers.refused import BACKBONE, CONFIGS, FOCAL_NANO, NANO, data_of, error

# Overrides of a .py config: a value, and what the line says.
LAZY = [
    ("train.seed", "key=value, got 'train.seed'"),
    ("=3", "no key"),
    ("train.sed=1", "no key 'train.sed'. Did you mean 'seed'?"),
    ("trian.seed=1", "no key 'trian.seed'"),
    ("+train.sed=1", "no key 'train.sed'"),
    ("+foo=1", "no key 'foo'"),
    ("+dataloader.foo=1", "no key 'dataloader.foo'"),
    ("+optimizer.foo=1", "optimizer.foo is not an argument of adamw"),
    ("+schedule.foo=1", "schedule.foo is not an argument of Schedule"),
    ("+model.roi_heads.foo=1", "unexpected keyword argument 'foo'"),
    ("optimizer.lr_factor=1", "Did you mean 'lr_factors'?"),
    ("dataloader.train.batchsize=2", "Did you mean 'batch_size'?"),
    (f"{BACKBONE}.focal_window=[3,3,3,3]", "Unknown backbone option focal_window"),
    ("train.output_dir=[a", "Invalid override"),
    ("dataloader.test.7.num_workers=0", "no key 'dataloader.test.7"),
    ("model.roi_heads.box_in_features.9=p2", "no key 'model.roi_heads.box_in_features.9'"),
    # Kinds of values.
    ("model=3", "model is a section of the config: set its keys"),
    ("schedule=null", "schedule is a section of the config"),
    ("dataloader.train=null", "dataloader.train is a section of the config"),
    ("model.roi_heads=true", "model.roi_heads must not replace a mapping"),
    ("model.roi_heads.box_predictor=[1]", "Invalid override"),
    ("model.roi_heads.box_in_features=7", "box_in_features must be a list, got 7"),
    ("model.roi_heads.box_in_features=[1,2]", "must be like ['p2', 'p3', 'p4', 'p5']"),
    ("model.roi_heads.box_in_features.0=null", "box_in_features.0 is an entry of a list"),
    ("model.roi_heads.box_in_features.0=p7", "StandardROIHeads reads features p7"),
    ("model.proposal_generator.in_features=[p2,stage3]", "reads features stage3, but the backbone"),
    ("model.proposal_generator.anchor_generator.sizes.0.0=-1", "sizes must be more than 0"),
    ("model.pixel_mean.0=inf", "model.pixel_mean.0 must be a finite number"),
    ("model.input_format=3", "model.input_format must be a string, got 3"),
    ("+train.ddp.buckets=3", "DistributedDataParallel has no argument buckets"),
    # Types.
    ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
    ("optimizer.lr=null", "optimizer.lr must be a number, got None"),
    ("optimizer.lr=true", "optimizer.lr must be a number, got True"),
    ("optimizer.weight_decay=[1]", "optimizer.weight_decay must be a number"),
    ("dataloader.train.batch_size=2.5", "batch_size must be an integer, got 2.5"),
    ("dataloader.train.batch_size=many", "batch_size must be an integer, got 'many'"),
    ("dataloader.train.num_workers=null", "num_workers must be an integer"),
    ("dataloader.train.masks=3", "masks must be true or false, got 3"),
    ("dataloader.train.augmentations.crop=[96]", "crop must be an integer"),
    ("schedule.iterations=ten", "iterations must be an integer"),
    ("schedule.warmup_iterations=x", "warmup_iterations must be an integer"),
    (f"{BACKBONE}.depths=[a,b,c,d]", "depths must be a list of integers"),
    (f"{BACKBONE}.embed_dim=32.5", "embed_dim must be an integer"),
    ("train.seed=soon", "seed must be an integer, got 'soon'"),
    ("train.report=3", "report must be true or false"),
    ("train.clip_norm=big", "clip_norm must be a number"),
    ("train.profile=[1]", "profile"),
    ("train.profile=[a,b]", "profile must be a list of integers"),
    ("train.ddp=3", "ddp must be a mapping"),
    # Ranges.
    ("optimizer.lr=0", "optimizer.lr must be more than 0"),
    ("optimizer.lr=-1", "optimizer.lr must be more than 0"),
    ("optimizer.lr=nan", "optimizer.lr must be a finite number, got nan"),
    ("optimizer.lr=inf", "optimizer.lr must be a finite number, got inf"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be 0 or more"),
    ("optimizer.layer_decay=0", "optimizer.layer_decay must be more than 0"),
    ("optimizer.layer_decay=1.5", "optimizer.layer_decay must be more than 0 and at most 1"),
    ("dataloader.train.batch_size=0", "batch_size must be between 1 and 100000, got 0"),
    ("dataloader.train.batch_size=-2", "batch_size must be between 1 and 100000, got -2"),
    ("dataloader.train.num_workers=-1", "num_workers must be between 0 and 256, got -1"),
    ("dataloader.train.num_workers=9999", "num_workers must be between 0 and 256"),
    ("dataloader.train.copy_paste=2", "copy_paste must be between 0 and 1"),
    ("dataloader.train.augmentations.crop=0", "crop must be between 1 and 100000, got 0"),
    ("dataloader.train.augmentations.short_sides=[0]", "short_sides must be between 1 and 100000"),
    ("dataloader.test.0.augmentations.short_side=-5", "short_side must be between 1 and 100000"),
    ("schedule.iterations=0", "schedule.iterations must be 1 or more, got 0"),
    ("schedule.iterations=-5", "schedule.iterations must be 1 or more, got -5"),
    ("schedule.iterations=null", "either epochs or iterations"),
    ("schedule.warmup_iterations=-1", "warmup_iterations must be 0 or more"),
    ("schedule.warmup_factor=2", "warmup_factor must be between 0 and 1"),
    ("schedule.decay=linear", "Unknown decay 'linear'"),
    (f"{BACKBONE}.mlp_ratio=0", "mlp_ratio must be more than 0"),
    (f"{BACKBONE}.mlp_ratio=-1", "mlp_ratio must be more than 0"),
    (f"{BACKBONE}.focal_windows=[999,3,3,3]", "focal_windows must be between 1 and 63"),
    (f"{BACKBONE}.focal_windows=[4,3,3,3]", "focal_windows must be odd"),
    (f"{BACKBONE}.focal_windows=[3,3,3]", "one entry per stage"),
    (f"{BACKBONE}.depths=[0,1,1,1]", "depths must be between 1 and 1000"),
    (f"{BACKBONE}.depths=[1000000,1,1,1]", "depths must be between 1 and 1000"),
    (f"{BACKBONE}.in_channels=4", "expects 4 image channels"),
    (f"{BACKBONE}.embed_dim=0", "embed_dim must be between 1 and 8192"),
    (f"{BACKBONE}.drop_path_rate=1.5", "drop_path_rate must be between 0 and 0.999"),
    (f"{BACKBONE}.frozen_stages=9", "frozen_stages"),
    (f"{BACKBONE}.variant=focalnet_tini", "focalnet_tini"),
    ("model.roi_heads.positive_fraction=2", "positive_fraction must be between 0 and 1"),
    ("model.roi_heads.batch_size_per_image=0", "batch_size_per_image must be 1 or more"),
    ("model.roi_heads.box_predictor.test_nms_thresh=-1", "test_nms_thresh must be between 0 and 1"),
    ("model.pixel_std=[0,1,1]", "pixel_std must be more than 0"),
    # Options of the run.
    ("train.precision=fp8", "Unknown precision 'fp8'. Known: bf16, fp16, fp32"),
    ("train.period_unit=hours", "Unknown period_unit 'hours'"),
    ("train.init_levels=more", "Unknown init_levels 'more'"),
    ("train.device=tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("train.device=meta", "device must be auto, cpu, cuda or cuda:N"),
    ("train.clip_norm=-1", "clip_norm must be 0 or more"),
    ("train.clip_value=-1", "clip_value must be 0 or more"),
    ("train.eval_period=-1", "eval_period must be 0 or more"),
    ("train.checkpoint_period=-3", "checkpoint_period must be 0 or more"),
    ("train.ema_decay=1", "ema_decay must be between 0 and 0.999999"),
    ("train.ema_decay=-0.5", "ema_decay must be between 0 and 0.999999"),
    ("train.accumulation=0", "accumulation must be 1 or more"),
    ("train.accumulation=3", "cannot be accumulated in 3 parts"),
    ("train.keep_checkpoints=0", "keep_checkpoints must be 1 or more"),
    ("train.log_iterations=0", "log_iterations must be 1 or more"),
    ("train.max_dets=0", "max_dets must be 1 or more"),
    ("train.pictures=-1", "pictures must be 0 or more"),
    ("train.recipe_batch=-16", "recipe_batch must be 0 or more"),
    ("train.growth_iterations=0", "growth_iterations must be 1 or more"),
    ("train.profile=[9,3]", "profile must be (first, last)"),
    ("train.profile=[5000,5001]", "begins at iteration 5000, after the last of 1000"),
    ("train.keep_best=segm/XP", "keep_best segm/XP is not a metric of val"),
    ("train.keep_best=AP", "keep_best must be TASK/METRIC, like \"segm/AP\", got 'AP'"),
    ("train.keep_best=segm/AP-horse", "keep_best segm/AP-horse is not a metric"),
    ("train.keep_best=sem_seg/mIoU", "Known: bbox/AP, segm/AP, ..."),
    ("train.keep_best=keypoints/AP", "keep_best keypoints/AP is not a metric"),
    ("train.keep_best=boundary/AP", "keep_best boundary/AP is not a metric"),
    ("train.wandb_project=x", "needs Weights & Biases: pip install wandb"),
    # Names that match nothing.
    ("+optimizer.lr_factors.bottom_down=0.1", "no parameter has 'bottom_down' in its name"),
    ("optimizer.no_decay_names=[norms]", "no parameter has 'norms' in its name"),
    # Length.
    ("train.eval_period=5000", "train.eval_period of 5000 iterations is longer than the training"),
    ("schedule.milestones=[10,20]", "no effect on a cosine schedule"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), LAZY, ids=[o for o, _ in LAZY])
def test_override_of_a_py_config(
    override: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "wandb" in override and "wandb" in sys.modules:
        pytest.skip("Weights & Biases is installed here")
    assert message in error(NANO, [override], files, capsys)


FOCAL = [
    (f"+{BACKBONE}.num_heads=3", "num_heads must be a list of integers, got 3"),
    (f"+{BACKBONE}.window_size=8", "window_size must be odd"),
    (f"+{BACKBONE}.expand_size=-1", "expand_size must be between 0 and 31"),
    (f"+{BACKBONE}.top_k=64", "Unknown backbone option top_k"),
    (f"+{BACKBONE}.in_channels=4", "set in_channels to 3"),
]


@pytest.mark.parametrize(("override", "message"), FOCAL, ids=[o for o, _ in FOCAL])
def test_override_of_a_focal_transformer(
    override: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(FOCAL_NANO, [override], files, capsys)


JUNK = ("-1", "0", "nan", "abc", "null", "[]", "[1]", "1000000000", "true", "{a:1}", "''", "[[1]]")


def keys_of(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a LazyConfig, but the calls themselves and what refers to another key."""
    names = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        if name != "_target_" and not OmegaConf.is_interpolation(node, name):
            yield f"{prefix}{name}"
            if OmegaConf.is_config(node[name]):
                yield from keys_of(node[name], f"{prefix}{name}.")


@pytest.mark.parametrize("seed", range(3))
def test_random_overrides_are_taken_or_refused_in_one_line(
    seed: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    keys = list(keys_of(load_config(CONFIGS / NANO, [])))
    for _ in range(10):
        override = f"{chance.choice(keys)}={chance.choice(JUNK)}"
        args = RunArguments(config_file=str(CONFIGS / NANO), opts=[override])
        args.output, data = str(files / "run"), data_of(NANO, files)
        for name, value in data.items():
            setattr(args, name, value)
        status = None
        try:
            with one_line_errors():
                check(describe(args))
        except SystemExit as refused:
            status = refused.code
        lines = capsys.readouterr().err.count("\n")
        assert (status, lines) in ((None, 0), (1, 1)), override
