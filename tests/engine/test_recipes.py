"""Every recipe trains and evaluates; and two processes train what one does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.main import RunArguments, run
from focalnet_det.engine.trainer import Trainer
from tests.helpers.paths import ROOT

# Panoptic recipes, and those on panoptic data, have a file of tests of their own.
ELSEWHERE = ("common", "COCO-PanopticSegmentation", "COCO-SemanticSegmentation")
ELSEWHERE += ("Shapes-PanopticSegmentation",)
LEAVES = sorted(
    p
    for p in (ROOT / "configs").glob("*/*.*")
    # Mask2Former's have a file of tests of their own too.
    if p.parent.name not in ELSEWHERE and "mask2former" not in p.stem
)
SEMANTIC = [p for p in LEAVES if p.parent.name.endswith("SemanticSegmentation")]
NANO = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"


def family(path: Path) -> str:
    """Method of a leaf: what its name begins with."""
    return re.split("_(focalnet|focal|swin|resnet)", path.stem)[0]


def data(shapes: Path) -> dict[str, list[str]]:
    return {
        "coco_json": [str(shapes / "annotations/instances_train.json")],
        "images": [str(shapes / "images/train")],
        "val_json": [str(shapes / "annotations/instances_val.json")],
        "val_images": [str(shapes / "images/val")],
    }


def names(paths: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in paths]


# A thin backbone of each kind with the recipe's kernels, thin heads, tiny images; the rest is the
# recipe.
NARROW = ["model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"]
HEADS = ["model.backbone.bottom_up.num_heads=[1,1,2,4]"]
BACKBONES = {
    "focalnet": NARROW,
    "swin": [*NARROW, *HEADS],
    "resnet50": [],
    "_focal_": [*NARROW, *HEADS],
}
RUN = [
    *("dataloader.train.batch_size=2", "dataloader.train.num_workers=0", "schedule.epochs=null"),
    *("dataloader.test.0.num_workers=0", "schedule.iterations=1", "train.device=cpu"),
    *("dataloader.test.0.augmentations.short_side=64", "train.precision=fp32", "train.pictures=0"),
]
SIZES = ["dataloader.train.augmentations.short_sides=[64]"]
R_CNN = [
    *("model.backbone.out_channels=32", "model.proposal_generator.head.in_channels=32"),
    *("model.proposal_generator.post_nms_topk=[50,50]", "model.roi_heads.batch_size_per_image=16"),
]
MASK_HEAD = ["input_shape.channels=32", "conv_dims=[16,16]"]
PREDICTOR = ["input_shape.channels=16", "test_topk_per_image=3"]


def under(node: str, fields: list[str]) -> list[str]:
    return [f"model.{node}.{field}" for field in fields]


ONE_BOX_HEAD = [
    *under("roi_heads.box_head", ["input_shape.channels=32", "fc_dims=[16,16]"]),
    *under("roi_heads.box_predictor", PREDICTOR),
]
FAMILIES = {
    "cascade_mask_rcnn": [
        *R_CNN,
        *(o for k in range(3) for o in under(f"roi_heads.box_predictors.{k}", PREDICTOR)),
        *(f"model.roi_heads.box_heads.{k}.{o}" for k in range(3)
          for o in ("input_shape.channels=32", "conv_dims=[16]", "fc_dims=[16]")),
    ],
    "mask_rcnn": [*R_CNN, *ONE_BOX_HEAD, *under("roi_heads.mask_head", MASK_HEAD)],
    "faster_rcnn": [*R_CNN, *ONE_BOX_HEAD],
    "keypoint_rcnn": [
        *(*R_CNN, *ONE_BOX_HEAD),
        *under("roi_heads.keypoint_head", ["input_shape.channels=32", "conv_dims=[16]"]),
    ],
    "retinanet": ["model.backbone.out_channels=32", "model.head.conv_dims=[32]"],
    # Its GroupNorm has 32 groups, and wants more than one value in each.
    "fcos": ["model.backbone.out_channels=64", "model.head.conv_dims=[64]"],
}  # fmt: skip
for method, width in (("retinanet", 32), ("fcos", 64)):
    FAMILIES[method] += [f"model.head.input_shape.{k}.channels={width}" for k in range(5)]
FAMILIES["fcos"] += ["model.test_score_thresh=0.0001"]


def mask_heads(path: Path) -> list[str]:
    """Of a cascade: one, or one for each stage."""
    one = "detectron2" in path.stem
    nodes = ["mask_head"] if one else [f"mask_heads.{k}" for k in range(3)]
    return [o for node in nodes for o in under(f"roi_heads.{node}", MASK_HEAD)]


DETECTORS = [p for p in LEAVES if p not in SEMANTIC]
THIN_YAML = [
    *("MODEL.FOCALNET.EMBED_DIM=8", "MODEL.FOCALNET.DEPTHS=(1,1,1,1)", "MODEL.DEVICE=cpu"),
    *("SOLVER.IMS_PER_BATCH=2", "SOLVER.EPOCHS=0", "SOLVER.MAX_ITER=1"),
    *("INPUT.MIN_SIZE_TRAIN=(64,)", "INPUT.MIN_SIZE_TEST=64", "DATALOADER.NUM_WORKERS=0"),
    *("SOLVER.PRECISION=fp32", "TEST.DETECTIONS_PER_IMAGE=3", "TEST.PICTURES=0"),
    "MODEL.FPN.OUT_CHANNELS=32",
]
R_CNN_YAML = [
    *("MODEL.ROI_BOX_HEAD.FC_DIM=16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE=16"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN=50", "MODEL.RPN.POST_NMS_TOPK_TEST=50"),
]
MASK_YAML = ["MODEL.ROI_MASK_HEAD.CONV_DIM=16", "MODEL.ROI_MASK_HEAD.NUM_CONV=1"]
# A key that a recipe does not read is an error.
FAMILIES_YAML = {
    "mask_rcnn": [*R_CNN_YAML, *MASK_YAML],
    "cascade_mask_rcnn": [*R_CNN_YAML, *MASK_YAML],
    "panoptic_fpn": [*R_CNN_YAML, *MASK_YAML],
    "faster_rcnn": R_CNN_YAML,
    "keypoint_rcnn": [*R_CNN_YAML, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS=(16,)"],
    "retinanet": ["MODEL.RETINANET.NUM_CONVS=1"],
}


def with_keypoints(source: Path, folder: Path) -> str:
    """A copy of a COCO file in which every object has 17 keypoints inside its box."""
    content = json.loads(source.read_text())
    names = ["nose", *(f"{side}_{i}" for i in range(8) for side in ("left", "right"))]
    content["categories"] = [{"id": 1, "name": "shape", "keypoints": names}]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = [(x + w * i / 17, y + h * i / 17, 2) for i in range(17)]
        annotation["keypoints"] = [number for point in points for number in point]
        annotation |= {"num_keypoints": 17, "category_id": 1}
    target = folder / source.name
    target.write_text(json.dumps(content))
    return str(target)


@pytest.mark.slow
@pytest.mark.parametrize("path", DETECTORS, ids=names(DETECTORS))
def test_detector_trains_a_step_and_evaluates(path: Path, shapes: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = data(shapes)
    kind = family(path)
    if kind == "keypoint_rcnn":
        for option in ("coco_json", "val_json"):
            arguments[option] = [with_keypoints(Path(arguments[option][0]), tmp_path)]
    if path.suffix == ".py":
        backbone = next(b for b in BACKBONES if b in path.stem)
        sizes = ["dataloader.train.augmentations.size=64"] if "lsj" in path.stem else SIZES
        opts = [*RUN, *sizes, *BACKBONES[backbone], *FAMILIES[kind]]
        if kind == "cascade_mask_rcnn":
            opts += mask_heads(path)
    else:
        opts = [*THIN_YAML, *FAMILIES_YAML[kind]]
    if "nano" in path.stem:
        opts = [*(o for o in RUN if "epochs" not in o), *SIZES, *NARROW]
        opts.append("dataloader.train.augmentations.crop=64")
        opts += HEADS if "_focal_" in path.stem else []
    results = run(
        RunArguments(config_file=str(path), opts=opts, output=str(tmp_path / "run"), **arguments)
    )
    tasks = {"mask_rcnn": "segm", "cascade_mask_rcnn": "segm", "keypoint_rcnn": "keypoints"}
    metrics = results["instances_val"]
    assert set(metrics) == {"bbox", tasks.get(kind, "bbox")}
    assert all(0 <= values["AP"] <= 100 for values in metrics.values())
    (line,) = (json.loads(line) for line in (tmp_path / "run/metrics.json").open())
    assert 0 < line["total_loss"] < 100
    assert line["instances_val/bbox/AP"] == metrics["bbox"]["AP"]
    weights = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    shutil.rmtree(tmp_path)  # checkpoints of every recipe would fill a small disk


def semantic_data(shapes: Path) -> dict[str, Any]:
    ade = shapes / "ade"
    classes = shapes / "classes.txt"
    classes.write_text(
        "\n".join(c["name"] for c in json.loads((shapes / "categories.json").read_text()))
    )
    return {
        "sem_images": [str(ade / "images/training")],
        "sem_labels": [str(ade / "annotations/training")],
        "val_sem_images": [str(ade / "images/validation")],
        "val_sem_labels": [str(ade / "annotations/validation")],
        "classes": str(classes),
        "first_label": 1,
    }


THIN_SEMANTIC = {
    ".py": [
        *("model.train_size=[64,64]", "dataloader.train.batch_size=2", "schedule.iterations=1"),
        *("dataloader.train.augmentations.crop=64", "dataloader.train.num_workers=0"),
        *("dataloader.train.augmentations.short_side=96", "dataloader.test.0.num_workers=0"),
        *("dataloader.test.0.augmentations.short_side=96", "train.device=cpu"),
        "model.channels=32",
    ],
    ".yaml": [
        *("MODEL.FOCALNET.EMBED_DIM=8", "MODEL.FOCALNET.DEPTHS=(1,1,1,1)", "MODEL.DEVICE=cpu"),
        *("MODEL.SEGMENTOR.TRAIN_SIZE=(64,64)", "SOLVER.IMS_PER_BATCH=2", "SOLVER.MAX_ITER=1"),
        *("INPUT.SEMANTIC_CROPS.CROP=64", "INPUT.SEMANTIC_CROPS.SHORT_SIDE=96"),
        *("INPUT.MIN_SIZE_TEST=96", "DATALOADER.NUM_WORKERS=0", "MODEL.SEM_SEG_HEAD.CONVS_DIM=32"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", SEMANTIC, ids=names(SEMANTIC))
def test_semantic_recipe_trains_a_step_and_evaluates(
    path: Path, shapes: Path, tmp_path: Path
) -> None:
    if path.suffix == ".py":
        backbone = "model.backbone.bottom_up" if "semantic_fpn" in path.name else "model.backbone"
        opts = [f"{backbone}.embed_dim=8", f"{backbone}.depths=[1,1,1,1]", *THIN_SEMANTIC[".py"]]
        if "_focal_" in path.stem:
            opts.append(f"{backbone}.num_heads=[1,1,2,4]")
    else:
        opts = THIN_SEMANTIC[".yaml"]
    results = run(
        RunArguments(
            config_file=str(path), opts=opts, output=str(tmp_path), **semantic_data(shapes)
        )
    )
    metrics = results["validation"]["sem_seg"]
    assert 0 <= metrics["mIoU"] <= 100
    assert {"IoU-circle", "ACC-water", "BIoU-star", "pACC"} < set(metrics)
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.json").open())
    trained = scored = line
    # Ten equally probable classes have 2.3; Detectron2's head starts further from that, and how far
    # depends on the draw of its weights.
    assert 1 < trained["total_loss"] < 100
    assert scored["validation/sem_seg/mIoU"] == metrics["mIoU"]
    shutil.rmtree(tmp_path)


# All anchors and proposals enter the losses, so that none is drawn by lot.
WITHOUT_LOTS = [
    *("model.proposal_generator.batch_size_per_image=5000", "schedule.iterations=5"),
    *("model.roi_heads.batch_size_per_image=1000", "model.roi_heads.positive_fraction=0.5"),
    *("dataloader.train.batch_size=4", "dataloader.train.num_workers=0", "train.seed=2"),
    *("dataloader.train.augmentations.short_sides=[64,96]", "train.device=cpu"),
    *("dataloader.train.augmentations.crop=64", "dataloader.test.0.augmentations.short_side=96"),
    *("dataloader.test.0.num_workers=0", "train.log_iterations=1", "schedule.warmup_iterations=0"),
    *("optimizer.lr=0.0003",),
]


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process averages its losses over its images: one process does it in two parts."""
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--num-cpus", "2"]
    command += ["--config-file", str(NANO), "--output", str(tmp_path / "two")]
    for option, (value,) in data(shapes).items():
        command += [f"--{option.replace('_', '-')}", value]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *WITHOUT_LOTS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]

    in_parts = Trainer.accumulate_gradients

    def as_two_processes_share_it(self: Trainer, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return in_parts(self, batch[0::2] + batch[1::2])

    monkeypatch.setattr(Trainer, "accumulate_gradients", as_two_processes_share_it)
    opts = [*WITHOUT_LOTS, "train.accumulation=2"]
    run(
        RunArguments(config_file=str(NANO), opts=opts, output=str(tmp_path / "one"), **data(shapes))
    )

    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.json").open()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 5
    for single, double in zip(one, two, strict=True):
        for name in (key for key in single if "loss" in key or key == "lr"):
            assert double[name] == pytest.approx(single[name], rel=1e-4), name
    # AP in percent, of hardly trained weights: rounding decides between equal scores.
    scores = [{k: v for k, v in rows[4].items() if "/AP" in k} for rows in (one, two)]
    assert scores[0]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2, abs=1e-2)
