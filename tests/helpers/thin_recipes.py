"""Overrides that make recipes thin enough to train a step in seconds, and data for them."""

import json
import re
from pathlib import Path
from typing import Any


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
    "sparse_rcnn": [
        *("model.backbone.out_channels=32", "model.stages=2", "model.dynamic_channels=8"),
        *("model.proposals=10", "model.feedforward=16", "model.max_detections_per_image=5"),
    ],
    # Their group norm has 32 groups, and needs more than one value in each.
    "fcos": ["model.backbone.out_channels=64", "model.head.conv_dims=[64]"],
    "atss": ["model.backbone.out_channels=64", "model.head.conv_dims=[64]"],
    "reppoints_v2": [
        *("model.backbone.out_channels=64", "model.backbone.repeats=1"),
        *("model.head.channels=64", "model.head.convs=1"),
    ],
}  # fmt: skip
for method, width in (("retinanet", 32), ("fcos", 64), ("atss", 64)):
    FAMILIES[method] += [f"model.head.input_shape.{k}.channels={width}" for k in range(5)]

FAMILIES["fcos"] += ["model.test_score_thresh=0.0001"]


def mask_heads(path: Path) -> list[str]:
    """Of a cascade: one, or one for each stage."""
    one = "detectron2" in path.stem
    nodes = ["mask_head"] if one else [f"mask_heads.{k}" for k in range(3)]
    return [o for node in nodes for o in under(f"roi_heads.{node}", MASK_HEAD)]


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
    "sparse_rcnn": [
        f"MODEL.SPARSE_RCNN.{key}"
        for key in ("PROPOSALS=10", "STAGES=2", "DYNAMIC_CHANNELS=8", "FEEDFORWARD=16")
    ],
    "atss": ["MODEL.RETINANET.NUM_CONVS=1", "MODEL.FPN.OUT_CHANNELS=64"],
    "reppoints_v2": ["MODEL.REPPOINTS_V2.CONVS=1", "MODEL.FPN.OUT_CHANNELS=64"],
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
