"""Bad configs and command lines: one clear line each, before the first step."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.errors import one_line_errors
from focalnet_det.experiment import RunArguments, check, describe, load_config
from focalnet_det.experiment.check import disk_problems, skeleton, weight_problems

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
NANO = "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
FOCAL_NANO = "Shapes-InstanceSegmentation/mask_rcnn_focal_nano_fpn_small.py"
BOXES = "COCO-Detection/retinanet_focalnet_nano_fpn_small.py"
ONE_X = "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"
YAML = "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"
RETINANET_YAML = "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.yaml"
UPERNET = "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py"
UPERNET_YAML = "ADE20K-SemanticSegmentation/upernet_focalnet_tiny_srf_160k.yaml"
PANOPTIC = "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py"
BACKBONE = "model.backbone.bottom_up"


def data_of(config: str, files: Path) -> dict[str, Any]:
    """Options that name the data of a kind that a config takes."""
    train, val = [str(files / "train")], [str(files / "val")]
    if "upernet" in config:
        labels = {"sem_images": train, "sem_labels": [str(files / "train_labels")]}
        val_labels = {"val_sem_images": val, "val_sem_labels": [str(files / "val_labels")]}
        return {**labels, **val_labels, "classes": str(files / "classes.txt")}
    kind = "panoptic" if "panoptic" in config else "coco"
    stem = "panoptic_" if kind == "panoptic" else ""
    name = "panoptic_json" if kind == "panoptic" else "json"
    train_option = "panoptic_json" if kind == "panoptic" else "coco_json"
    return {
        train_option: [str(files / f"{stem}train.json")],
        "images": train,
        f"val_{name}": [str(files / f"{stem}val.json")],
        "val_images": val,
    }


def error_of(args: RunArguments, capsys: pytest.CaptureFixture[str]) -> str:
    """What a tool prints for a command line that must be refused; one line, exit status 1."""
    with pytest.raises(SystemExit) as refused, one_line_errors():
        check(describe(args), eval_only=args.eval_only)
    assert refused.value.code == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text


def error(
    config: str,
    opts: Sequence[str],
    files: Path,
    capsys: pytest.CaptureFixture[str],
    **changes: Any,
) -> str:
    fields = {**data_of(config, files), "output": str(files / "run"), **changes}
    fields = {k: v for k, v in fields.items() if v is not None}
    return error_of(
        RunArguments(config_file=str(CONFIGS / config), opts=list(opts), **fields), capsys
    )


# Overrides of a .py config: a value, and what the line says.
LAZY = [
    ("train.seed", "key=value, got 'train.seed'"),
    ("=3", "no key"),
    ("train.sed=1", "no key 'train.sed'. Did you mean 'seed'?"),
    ("trian.seed=1", "no key 'trian.seed'"),
    ("+train.sed=1", "no key 'train.sed'"),
    ("+foo=1", "no key 'foo'"),
    ("+dataloader.foo=1", "no key 'dataloader.foo'"),
    ("+optimizer.foo=1", "optimizer.foo is unknown to adamw"),
    ("+schedule.foo=1", "schedule.foo is unknown to Schedule"),
    ("+model.roi_heads.foo=1", "unexpected keyword argument 'foo'"),
    ("optimizer.lr_factor=1", "Did you mean 'lr_factors'?"),
    ("dataloader.train.batchsize=2", "Did you mean 'batch_size'?"),
    (f"{BACKBONE}.focal_window=[3,3,3,3]", "Unknown backbone option focal_window"),
    ("train.output_dir=[a", "Override not understood"),
    ("dataloader.test.7.num_workers=0", "no key 'dataloader.test.7"),
    ("model.roi_heads.box_in_features.9=p2", "no key 'model.roi_heads.box_in_features.9'"),
    # Kinds of values.
    ("model=3", "model is a section of the config: set its keys"),
    ("schedule=null", "schedule is a section of the config"),
    ("dataloader.train=null", "dataloader.train is a section of the config"),
    ("model.roi_heads=true", "model.roi_heads was a part of its own"),
    ("model.roi_heads.box_predictor=[1]", "Override not understood"),
    ("model.roi_heads.box_in_features=7", "box_in_features must be a list, as it was"),
    ("model.roi_heads.box_in_features=[1,2]", "must be like ['p2', 'p3', 'p4', 'p5']"),
    ("model.roi_heads.box_in_features.0=null", "box_in_features.0 is an entry of a list"),
    ("model.roi_heads.box_in_features.0=p7", "StandardROIHeads reads features p7"),
    ("model.proposal_generator.in_features=[p2,stage3]", "reads features stage3, the backbone"),
    ("model.proposal_generator.anchor_generator.sizes.0.0=-1", "sizes must be more than 0"),
    ("model.pixel_mean.0=inf", "model.pixel_mean.0 must be a finite number"),
    ("model.input_format=3", "model.input_format must be a text, got 3"),
    ("+train.ddp.buckets=3", "DistributedDataParallel has no argument buckets"),
    # Types.
    ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
    ("optimizer.lr=null", "optimizer.lr must be a number, got None"),
    ("optimizer.lr=true", "optimizer.lr must be a number, got True"),
    ("optimizer.weight_decay=[1]", "optimizer.weight_decay must be a number"),
    ("dataloader.train.batch_size=2.5", "batch_size must be a whole number, got 2.5"),
    ("dataloader.train.batch_size=many", "batch_size must be a whole number, got 'many'"),
    ("dataloader.train.num_workers=null", "num_workers must be a whole number"),
    ("dataloader.train.masks=3", "masks must be true or false, got 3"),
    ("dataloader.train.augmentations.crop=[96]", "crop must be a whole number"),
    ("schedule.iterations=ten", "iterations must be a whole number"),
    ("schedule.warmup_iterations=x", "warmup_iterations must be a whole number"),
    (f"{BACKBONE}.depths=[a,b,c,d]", "depths must be a list of whole numbers"),
    (f"{BACKBONE}.embed_dim=32.5", "embed_dim must be a whole number"),
    ("train.seed=soon", "seed must be a whole number, got 'soon'"),
    ("train.report=3", "report must be true or false"),
    ("train.clip_norm=big", "clip_norm must be a number"),
    ("train.profile=[1]", "profile"),
    ("train.profile=[a,b]", "profile must be a list of whole numbers"),
    ("train.ddp=3", "ddp must be a mapping"),
    # Ranges.
    ("optimizer.lr=0", "optimizer.lr must be more than 0"),
    ("optimizer.lr=-1", "optimizer.lr must be more than 0"),
    ("optimizer.lr=nan", "optimizer.lr must be a finite number, got nan"),
    ("optimizer.lr=inf", "optimizer.lr must be a finite number, got inf"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be 0 or more"),
    ("optimizer.layer_decay=0", "optimizer.layer_decay must be more than 0"),
    ("optimizer.layer_decay=1.5", "optimizer.layer_decay must be more than 0 and at most 1"),
    ("dataloader.train.batch_size=0", "batch_size must be 1..100000, got 0"),
    ("dataloader.train.batch_size=-2", "batch_size must be 1..100000, got -2"),
    ("dataloader.train.num_workers=-1", "num_workers must be 0..256, got -1"),
    ("dataloader.train.num_workers=9999", "num_workers must be 0..256"),
    ("dataloader.train.copy_paste=2", "copy_paste must be 0..1"),
    ("dataloader.train.augmentations.crop=0", "crop must be 1..100000, got 0"),
    ("dataloader.train.augmentations.short_sides=[0]", "short_sides must be 1..100000"),
    ("dataloader.test.0.augmentations.short_side=-5", "short_side must be 1..100000"),
    ("schedule.iterations=0", "schedule.iterations must be 1 or more, got 0"),
    ("schedule.iterations=-5", "schedule.iterations must be 1 or more, got -5"),
    ("schedule.iterations=null", "either epochs or iterations"),
    ("schedule.warmup_iterations=-1", "warmup_iterations must be 0 or more"),
    ("schedule.warmup_factor=2", "warmup_factor must be 0..1"),
    ("schedule.decay=linear", "Unknown decay 'linear'"),
    (f"{BACKBONE}.mlp_ratio=0", "mlp_ratio must be more than 0"),
    (f"{BACKBONE}.mlp_ratio=-1", "mlp_ratio must be more than 0"),
    (f"{BACKBONE}.focal_windows=[999,3,3,3]", "focal_windows must be 1..63"),
    (f"{BACKBONE}.focal_windows=[4,3,3,3]", "focal_windows must be odd"),
    (f"{BACKBONE}.focal_windows=[3,3,3]", "one entry per stage"),
    (f"{BACKBONE}.depths=[0,1,1,1]", "depths must be 1..1000"),
    (f"{BACKBONE}.depths=[1000000,1,1,1]", "depths must be 1..1000"),
    (f"{BACKBONE}.in_channels=4", "takes 4 image channels"),
    (f"{BACKBONE}.embed_dim=0", "embed_dim must be 1..8192"),
    (f"{BACKBONE}.drop_path_rate=1.5", "drop_path_rate must be 0..0.999"),
    (f"{BACKBONE}.frozen_stages=9", "frozen_stages"),
    (f"{BACKBONE}.variant=focalnet_tini", "focalnet_tini"),
    ("model.roi_heads.positive_fraction=2", "positive_fraction must be 0..1"),
    ("model.roi_heads.batch_size_per_image=0", "batch_size_per_image must be 1 or more"),
    ("model.roi_heads.box_predictor.test_nms_thresh=-1", "test_nms_thresh must be 0..1"),
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
    ("train.ema_decay=1", "ema_decay must be 0..0.999999"),
    ("train.ema_decay=-0.5", "ema_decay must be 0..0.999999"),
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
    ("train.keep_best=segm/XP", "keep_best segm/XP is no metric of val"),
    ("train.keep_best=AP", "keep_best must be TASK/METRIC, like \"segm/AP\", got 'AP'"),
    ("train.keep_best=segm/AP-horse", "keep_best segm/AP-horse is no metric"),
    ("train.keep_best=sem_seg/mIoU", "Known: bbox/AP, segm/AP, ..."),
    ("train.keep_best=keypoints/AP", "keep_best keypoints/AP is no metric"),
    ("train.keep_best=boundary/AP", "keep_best boundary/AP is no metric"),
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


YACS = [
    ("SOLVER.BASE_LT=1", "no key 'SOLVER.BASE_LT'. Did you mean BASE_LR?"),
    ("SLOVER.BASE_LR=1", "no key 'SLOVER.BASE_LR'. Did you mean SOLVER?"),
    ("SEED.X=1", "no key 'SEED.X'"),
    ("SOLVER.BASE_LR", "'SOLVER.BASE_LR' has no value"),
    ("SOLVER.BASE_LR=fast", "SOLVER.BASE_LR=fast"),
    ("SOLVER.NO_DECAY_NAMES=[1]", "SOLVER.NO_DECAY_NAMES must be a list of texts"),
    ("SOLVER.IMS_PER_BATCH=2.5", "SOLVER.IMS_PER_BATCH=2.5"),
    ("MODEL.FOCALNET.DEPTHS=[a,b]", "MODEL.FOCALNET.DEPTHS"),
    ("MODEL.FOCALNET.MLP_RATIO=0", "MODEL.FOCALNET.MLP_RATIO must be more than 0"),
    ("MODEL.FOCALNET.FOCAL_WINDOWS=[999,3,3,3]", "MODEL.FOCALNET.FOCAL_WINDOWS must be 1..63"),
    ("MODEL.FOCALNET.VARIANT=focalnet_tini", "focalnet_tini"),
    ("MODEL.PIXEL_MEAN=[1.0,2.0,3.0,4.0]", "MODEL.PIXEL_MEAN has 4 values, MODEL.PIXEL_STD 3"),
    ("MODEL.CONVENTIONS=mmseg", "Unknown MODEL.CONVENTIONS 'mmseg'"),
    ("SOLVER.IMS_PER_BATCH=0", "SOLVER.IMS_PER_BATCH must be 1..100000"),
    ("SOLVER.IMS_PER_BATCH=-2", "SOLVER.IMS_PER_BATCH must be 1..100000"),
    ("DATALOADER.NUM_WORKERS=-1", "DATALOADER.NUM_WORKERS must be 0..256"),
    ("SOLVER.WEIGHT_DECAY=-0.1", "SOLVER.WEIGHT_DECAY must be 0 or more"),
    ("SOLVER.WARMUP_ITERS=-1", "SOLVER.WARMUP_ITERS must be 0 or more"),
    ("SOLVER.OPTIMIZER=LAMB", "Unknown SOLVER.OPTIMIZER 'LAMB'"),
    ("SOLVER.LR_SCHEDULER_NAME=Poly", "Unknown SOLVER.LR_SCHEDULER_NAME 'Poly'"),
    ("SOLVER.PRECISION=int8", "Unknown precision 'int8'"),
    ("INPUT.POLICY=mosaic", "Unknown INPUT.POLICY 'mosaic'"),
    ("INPUT.RANDOM_FLIP=diagonal", "Unknown INPUT.RANDOM_FLIP 'diagonal'"),
    ("INPUT.MASK_FORMAT=polygon", "INPUT.MASK_FORMAT must be bitmask"),
    ("INPUT.MIN_SIZE_TRAIN=(0,)", "INPUT.MIN_SIZE_TRAIN must be 1..100000"),
    ("MODEL.DEVICE=tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("TEST.DETECTIONS_PER_IMAGE=0", "TEST.DETECTIONS_PER_IMAGE must be 1 or more"),
    ("SOLVER.KEEP_BEST=segm/XP", "keep_best segm/XP is no metric"),
    ("MODEL.META_ARCHITECTURE=Yolo", "Yolo"),
    ("MODEL.BACKBONE.NAME=build_yolo", "build_yolo"),
    # Keys of Detectron2 that nothing reads.
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING=range", "INPUT.MIN_SIZE_TRAIN_SAMPLING has no effect"),
    ("INPUT.CROP.ENABLED=True", "INPUT.CROP.ENABLED has no effect"),
    ("DATALOADER.SAMPLER_TRAIN=RepeatFactorTrainingSampler", "DATALOADER.SAMPLER_TRAIN has no"),
    ("DATALOADER.REPEAT_THRESHOLD=0.1", "DATALOADER.REPEAT_THRESHOLD has no effect"),
    ("MODEL.BACKBONE.FREEZE_AT=4", "MODEL.BACKBONE.FREEZE_AT has no effect"),
    ("MODEL.RESNETS.DEPTH=101", "MODEL.RESNETS.DEPTH has no effect"),
    ("MODEL.RETINANET.NUM_CONVS=2", "MODEL.RETINANET.NUM_CONVS has no effect"),
    ("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION=7", "POOLER_RESOLUTION has no effect"),
    ("MODEL.UPERNET.DROPOUT=0.5", "MODEL.UPERNET.DROPOUT has no effect"),
    ("INPUT.SEMANTIC_CROPS.CROP=96", "INPUT.SEMANTIC_CROPS.CROP has no effect"),
    ("SOLVER.MOMENTUM=0.5", "SOLVER.MOMENTUM has no effect"),
    ("SOLVER.WARMUP_METHOD=constant", "SOLVER.WARMUP_METHOD has no effect"),
    ("SOLVER.BIAS_LR_FACTOR=2.0", "SOLVER.BIAS_LR_FACTOR has no effect"),
    ("SOLVER.REFERENCE_WORLD_SIZE=8", "SOLVER.REFERENCE_WORLD_SIZE has no effect"),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE=1.0", "SOLVER.CLIP_GRADIENTS.NORM_TYPE has no effect"),
    ("TEST.PRECISE_BN.ENABLED=True", "TEST.PRECISE_BN.ENABLED has no effect"),
    ("TEST.AUG.MIN_SIZES=(99,)", "TEST.AUG.MIN_SIZES has no effect"),
    ("TEST.KEYPOINT_OKS_SIGMAS=[0.1]", "TEST.KEYPOINT_OKS_SIGMAS has no effect"),
    ("DATASETS.PROPOSAL_FILES_TRAIN=('a',)", "DATASETS.PROPOSAL_FILES_TRAIN has no effect"),
    ("CUDNN_BENCHMARK=True", "CUDNN_BENCHMARK has no effect"),
    ("GLOBAL.HACK=2.0", "GLOBAL.HACK has no effect"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), YACS, ids=[o for o, _ in YACS])
def test_override_of_a_yaml_config(
    override: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(YAML, [override], files, capsys)


FOCAL = [
    (f"+{BACKBONE}.num_heads=3", "num_heads must be a list of whole numbers, got 3"),
    (f"+{BACKBONE}.window_size=8", "window_size must be odd"),
    (f"+{BACKBONE}.expand_size=-1", "expand_size must be 0..31"),
    (f"+{BACKBONE}.top_k=64", "Unknown backbone option top_k"),
    (f"+{BACKBONE}.in_channels=4", "in_channels must be 3 in a recipe"),
]


@pytest.mark.parametrize(("override", "message"), FOCAL, ids=[o for o, _ in FOCAL])
def test_override_of_a_focal_transformer(
    override: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(FOCAL_NANO, [override], files, capsys)


KEY = "MODEL.FOCAL_TRANSFORMER"
FOCAL_YACS = [
    (f"{KEY}.NUM_HEADS=[a]", f"{KEY}.NUM_HEADS must be a list of whole numbers"),
    (f"{KEY}.EXPAND_SIZE=32", f"{KEY}.EXPAND_SIZE must be 0..31"),
    (f"{KEY}.TOP_K=64", "Unknown backbone option top_k"),
    ("MODEL.FOCALNET.MLP_RATIO=2.0", "MODEL.FOCALNET.MLP_RATIO has no effect"),
    ("", ""),
]


@pytest.mark.parametrize(("override", "message"), FOCAL_YACS, ids=[o for o, _ in FOCAL_YACS])
def test_a_focal_transformer_as_yaml(
    override: str, message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "focal.yaml"
    path.write_text(
        f"_BASE_: {CONFIGS}/Base-RCNN-FocalNet-FPN.yaml\n"
        "MODEL:\n"
        "  BACKBONE: {NAME: build_focal_transformer_fpn_backbone}\n"
        "  FOCAL_TRANSFORMER: {VARIANT: focal_nano, EXPAND_SIZE: 2, DROP_PATH_RATE: 0.1}\n"
        "SOLVER: {LAYER_DECAY: 0.9, MAX_ITER: 10, STEPS: [8], WARMUP_ITERS: 2}\n"
    )
    if override:
        assert message in error(str(path), [override], files, capsys)
        return
    args = RunArguments(
        config_file=str(path), output=str(tmp_path / "run"), **data_of(str(path), files)
    )
    check(describe(args))


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


PAIRS = [
    (YAML, ["SOLVER.AMP.ENABLED=True", "SOLVER.PRECISION=bf16"], "AMP.ENABLED means fp16"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.EPOCH_STEPS=(1,)"], "SOLVER.EPOCH_STEPS has no effect"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.STEPS=(60,200)"], "200 iterations is not within"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.STEPS=(60,30)"], "must rise"),
    (YAML, ["SOLVER.MAX_ITER=60", "SOLVER.WARMUP_ITERS=100"], "WARMUP_ITERS of 100 is not shorter"),
    (ONE_X, ["schedule.iterations=60", "schedule.warmup_iterations=60"], "of 60 is not shorter"),
    (ONE_X, ["schedule.iterations=60", "schedule.epochs=2"], "either epochs or iterations"),
    (ONE_X, ["schedule.epochs=3", "schedule.milestones=[9,11]"], "9 epochs is not within"),
    (ONE_X, ["schedule.iterations=60", "train.eval_period=99"], "longer than the training of 60"),
    (BOXES, ["train.keep_best=segm/AP"], "Known: bbox/AP, ..."),
    (BOXES, ["dataloader.train.copy_paste=0.5"], "copy_paste needs masks"),
    (UPERNET, ["train.keep_best=segm/AP"], "Known: sem_seg/mIoU, ..."),
    (UPERNET, ["model.loss.class_weights=[1,2]"], "2 class weights for 3 classes"),
    (UPERNET, ["model.loss.class_weights=[0,0,0]"], "All class weights are 0"),
    (UPERNET, ["model.loss.class_weights=[1,-1,1]"], "class_weights must be a number between 0 and"),
    (UPERNET, ["model.loss.average=some"], "Unknown average 'some'"),
    (UPERNET, ["model.window=[64,64]", "model.window_stride=[99,9]"], "window_stride"),
    (UPERNET, ["+optimizer.lr_factors.bottom_up=0.1"], "no parameter has 'bottom_up'"),
    (UPERNET_YAML, ["MODEL.UPERNET.CLASS_WEIGHTS=[1,2]"], "2 class weights"),
    (UPERNET_YAML, ["MODEL.RPN.NMS_THRESH=0.5"], "MODEL.RPN.NMS_THRESH has no effect"),
    (RETINANET_YAML, ["MODEL.ROI_HEADS.NMS_THRESH_TEST=0.3"], "NMS_THRESH_TEST has no effect"),
    (PANOPTIC, ["train.keep_best=panoptic_seg/AP"], "panoptic_seg/PQ, ..."),
    (NANO, ["optimizer.lr=-1", "train.clip_norm=-1"], "clip_norm must be 0 or more"),
    (NANO, ["optimizer.lr=-1", "optimizer.weight_decay=-1"], "2 problems: (1) optimizer.lr"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "opts", "message"), PAIRS, ids=[" ".join(o) for _, o, _ in PAIRS]
)
def test_overrides_that_contradict_each_other(
    config: str, opts: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(config, opts, files, capsys)


OPTIONS = [
    (NANO, {"coco_json": None}, "--images has no effect without --coco-json"),
    (NANO, {"coco_json": None, "images": None}, "--val-json without --coco-json"),
    (NANO, {"val_json": None}, "--val-images has no effect without --val-json"),
    (NANO, {"images": None}, "Each --coco-json FILE needs --images DIR"),
    (NANO, {"images": ["{files}/train", "{files}/val"]}, "1 files, 2 folders"),
    (NANO, {"images": ["{files}/absent"]}, "No such image folder"),
    (NANO, {"coco_json": ["{files}/absent.json"]}, "No such annotation file"),
    (NANO, {"val_json": ["{files}/absent.json"]}, "No such annotation file"),
    (NANO, {"eval_only": True, "resume": True}, "--eval-only and --resume contradict"),
    (NANO, {"classes": "{files}/classes.txt"}, "--classes has no effect without --sem-images"),
    (NANO, {"first_label": 1}, "--first-label has no effect without --classes"),
    (NANO, {"panoptic_root": ["{files}"]}, "--panoptic-root has no effect"),
    (NANO, {"panoptic_json": ["{files}/panoptic_train.json"]}, "One kind of data at a time"),
    (UPERNET, {"classes": None}, "need --classes FILE"),
    (UPERNET, {"sem_labels": None}, "1 image folders, 0 label folders"),
    (UPERNET, {"sem_images": None, "sem_labels": None}, "there is nothing to train on"),
    (UPERNET, {"sem_images": ["{files}/absent"]}, "No such folder"),
    (UPERNET, {"classes": "{files}/absent.txt"}, "No such class list"),
    (PANOPTIC, {"images": None}, "0 image folders"),
    (PANOPTIC, {"panoptic_root": ["{files}/absent"]}, "No such panoptic folder"),
    (NANO, {"output": "{files}/train.json"}, "is not a folder"),
]  # fmt: skip


def filled(value: Any, files: Path) -> Any:
    if isinstance(value, list):
        return [filled(item, files) for item in value]
    return value.replace("{files}", str(files)) if isinstance(value, str) else value


@pytest.mark.parametrize(("config", "changes", "message"), OPTIONS, ids=[m for *_, m in OPTIONS])
def test_options_that_lack_or_contradict_each_other(
    config: str,
    changes: dict[str, Any],
    message: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {key: filled(value, files) for key, value in changes.items()}
    assert message in error(config, [], files, capsys, **changes)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (UPERNET, NANO, "COCO files (--coco-json) need a detector"),
        (UPERNET_YAML, NANO, "COCO files (--coco-json) need a detector"),
        (PANOPTIC, NANO, "COCO files (--coco-json) need a detector"),
        (NANO, UPERNET, "Label folders (--sem-images) need a semantic segmentor"),
        (YAML, UPERNET, "Label folders (--sem-images) need a semantic segmentor"),
        (NANO, PANOPTIC, "Panoptic files (--panoptic-json) need a panoptic model"),
        (UPERNET, PANOPTIC, "Panoptic files (--panoptic-json) need a panoptic model"),
    ],
)
def test_data_of_another_kind(
    config: str, data: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RunArguments(config_file=str(CONFIGS / config), **data_of(data, files))
    assert message in error_of(args, capsys)


FILES = {
    "absent.py": (None, "No such config file"),
    "config.json": ("{}", "neither a .py (LazyConfig) nor a .yaml (yacs)"),
    "empty.py": ("", "does not define model, optimizer, schedule, dataloader, train"),
    "syntax.py": ("model = (", "cannot be read: SyntaxError"),
    "name.py": ("model = mask_rcnn()", "cannot be read: NameError: name 'mask_rcnn'"),
    "list.yaml": ("[1, 2]", "a mapping of keys is expected"),
    "text.yaml": ("a: b: c", "is not valid yaml"),
    "binary.yaml": ("\x00\x01", "is not valid yaml"),
    "typo.yaml": ("SOLVER: {BASE_LT: 1.0}", "SOLVER.BASE_LT"),
    "type.yaml": ("SOLVER: {BASE_LR: [1, 2]}", "BASE_LR"),
    "section.yaml": ("SOLVER: 3", "SOLVER"),
    "version.yaml": ("VERSION: 9", "VERSION"),
    "code.yaml": ("MODEL: !!python/object/apply:os.system ['exit 3']", "yaml tag that runs code"),
    "module.yaml": ("A: !!python/name:os.system", "yaml tag that runs code"),
    "cycle.yaml": ("_BASE_: cycle.yaml", "is its own _BASE_: cycle.yaml -> cycle.yaml"),
    "base.yaml": ("_BASE_: nowhere.yaml", "no such _BASE_ file"),
    "hook.yaml": ("_BASE_: code.yaml", "yaml tag that runs code"),
    "calls.yaml": (
        "model: {_target_: os.system, command: exit}\noptimizer: {}\nschedule: {}\n"
        "dataloader: {}\ntrain: {}",
        "calls os.system. A saved config may call focalnet_det",
    ),
    "part.yaml": ("model: {_target_: torch.nn.Linear}", "it lacks optimizer, schedule"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other, (text, _) in FILES.items():
        if text is not None:
            (tmp_path / other).write_text(text)
    message = FILES[name][1]
    assert message in error_of(RunArguments(config_file=str(tmp_path / name)), capsys)


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"_BASE_: {other}.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        describe(RunArguments(config_file=str(tmp_path / "a.yaml")))


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            NANO,
            ["model.roi_heads.num_classes=2", "dataloader.train.datasets=shapes_train"],
            "coco_2017_val has 80 classes, the model 2: set num_classes to 80",
        ),
        (UPERNET, ["model.num_classes=20"], "ade20k_sem_seg_train has 150 classes, the model 20"),
        (PANOPTIC, ["model.roi_heads.num_classes=5"], "has 6 classes, the model 5"),
        (YAML, ["MODEL.ROI_HEADS.NUM_CLASSES=79"], "coco_2017_train has 80 classes, the model 79"),
    ],
)
def test_more_classes_than_the_model_has(
    config: str, opts: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RunArguments(config_file=str(CONFIGS / config), opts=opts)
    assert message in error_of(args, capsys)


def test_disk_space_is_estimated(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = RunArguments(config_file=str(CONFIGS / ONE_X), output=str(files / "run"))
    experiment = describe(args)
    model, _ = skeleton(experiment)

    def free(_: object) -> Any:
        return type("usage", (), {"free": free.bytes})()

    monkeypatch.setattr("shutil.disk_usage", free)
    # 48.7 M parameters, three numbers of 4 bytes each, in 5 files: 2.92 GB.
    free.bytes = 2_930_000_000
    assert disk_problems(experiment, model) == []
    free.bytes = 2_900_000_000
    (problem,) = disk_problems(experiment, model)
    assert "need about 2.7 GiB" in problem
    assert "keep_checkpoints" in problem


@pytest.mark.parametrize(
    ("names", "eval_only", "message"),
    [
        (["bus", "car", "zebra"], True, "class 'bus' is 'car' here"),
        (["bus", "car", "zebra"], False, "class 'bus' is 'car' here"),
        (["car", "bus"], True, "for 2 other classes than the 3"),
        (["car", "bus"], False, None),  # the layers that count classes begin anew
        (["car", "bus", "zebra"], True, None),
        (None, True, None),
    ],
)
def test_weights_for_other_classes(
    names: list[str] | None, eval_only: bool, message: str | None, files: Path, tmp_path: Path
) -> None:
    content = {"model": {}} | ({} if names is None else {"class_names": names})
    torch.save(content, tmp_path / "weights.pth")
    opts = [f"train.init_checkpoint={tmp_path / 'weights.pth'}"]
    args = RunArguments(config_file=str(CONFIGS / BOXES), opts=opts, **data_of(BOXES, files))
    problems = weight_problems(describe(args), eval_only=eval_only)
    assert bool(problems) == (message is not None)
    assert message is None or message in problems[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config-file"),
        (["--config-file", "absent.py"], "No such config file: absent.py"),
        (["--config-file", "absent.py", "train.seed=1", "--output", "x"], "No such config file"),
        (["--config-file", "a.py", "--nothing"], "unrecognized arguments: --nothing"),
        (["--config-file", "a.py", "--num-gpus", "many"], "invalid int value: 'many'"),
        (["--config-file", str(CONFIGS / NANO), "train.device=tpu"], "got 'tpu'"),
    ],
)
def test_command_line(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train_net.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_nothing_is_drawn_by_the_checks(files: Path) -> None:
    """A checked run begins with the numbers of one that was not checked."""
    args = RunArguments(
        config_file=str(CONFIGS / BOXES), output=str(files / "run"), **data_of(BOXES, files)
    )
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check(describe(args))
    assert torch.equal(torch.rand(3), expected)
