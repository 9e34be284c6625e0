"""Bad overrides of .yaml configs: one clear line each, before the first step."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.experiment import RunArguments, check, describe
from tests.helpers.refused import CONFIGS, YAML, data_of, error

YACS = [
    ("SOLVER.BASE_LT=1", "no key 'SOLVER.BASE_LT'. Did you mean BASE_LR?"),
    ("SLOVER.BASE_LR=1", "no key 'SLOVER.BASE_LR'. Did you mean SOLVER?"),
    ("SEED.X=1", "no key 'SEED.X'"),
    ("SOLVER.BASE_LR", "'SOLVER.BASE_LR' has no value"),
    ("SOLVER.BASE_LR=fast", "SOLVER.BASE_LR=fast"),
    ("SOLVER.NO_DECAY_NAMES=[1]", "SOLVER.NO_DECAY_NAMES must be a list of strings"),
    ("SOLVER.IMS_PER_BATCH=2.5", "SOLVER.IMS_PER_BATCH=2.5"),
    ("MODEL.FOCALNET.DEPTHS=[a,b]", "MODEL.FOCALNET.DEPTHS"),
    ("MODEL.FOCALNET.MLP_RATIO=0", "MODEL.FOCALNET.MLP_RATIO must be more than 0"),
    (
        "MODEL.FOCALNET.FOCAL_WINDOWS=[999,3,3,3]",
        "MODEL.FOCALNET.FOCAL_WINDOWS must be between 1 and 63",
    ),
    ("MODEL.FOCALNET.VARIANT=focalnet_tini", "focalnet_tini"),
    (
        "MODEL.PIXEL_MEAN=[1.0,2.0,3.0,4.0]",
        "MODEL.PIXEL_MEAN has 4 values, but MODEL.PIXEL_STD has 3",
    ),
    ("MODEL.CONVENTIONS=mmseg", "Unknown MODEL.CONVENTIONS 'mmseg'"),
    ("SOLVER.IMS_PER_BATCH=0", "SOLVER.IMS_PER_BATCH must be between 1 and 100000"),
    ("SOLVER.IMS_PER_BATCH=-2", "SOLVER.IMS_PER_BATCH must be between 1 and 100000"),
    ("DATALOADER.NUM_WORKERS=-1", "DATALOADER.NUM_WORKERS must be between 0 and 256"),
    ("SOLVER.WEIGHT_DECAY=-0.1", "SOLVER.WEIGHT_DECAY must be 0 or more"),
    ("SOLVER.WARMUP_ITERS=-1", "SOLVER.WARMUP_ITERS must be 0 or more"),
    ("SOLVER.OPTIMIZER=LAMB", "Unknown SOLVER.OPTIMIZER 'LAMB'"),
    ("SOLVER.LR_SCHEDULER_NAME=Poly", "Unknown SOLVER.LR_SCHEDULER_NAME 'Poly'"),
    ("SOLVER.PRECISION=int8", "Unknown precision 'int8'"),
    ("INPUT.POLICY=mosaic", "Unknown INPUT.POLICY 'mosaic'"),
    ("INPUT.RANDOM_FLIP=diagonal", "Unknown INPUT.RANDOM_FLIP 'diagonal'"),
    ("INPUT.MASK_FORMAT=polygon", "INPUT.MASK_FORMAT must be bitmask"),
    ("INPUT.MIN_SIZE_TRAIN=(0,)", "INPUT.MIN_SIZE_TRAIN must be between 1 and 100000"),
    ("MODEL.DEVICE=tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("TEST.DETECTIONS_PER_IMAGE=0", "TEST.DETECTIONS_PER_IMAGE must be 1 or more"),
    ("SOLVER.KEEP_BEST=segm/XP", "keep_best segm/XP is not a metric"),
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


KEY = "MODEL.FOCAL_TRANSFORMER"

FOCAL_YACS = [
    (f"{KEY}.NUM_HEADS=[a]", f"{KEY}.NUM_HEADS must be a list of integers"),
    (f"{KEY}.EXPAND_SIZE=32", f"{KEY}.EXPAND_SIZE must be between 0 and 31"),
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
