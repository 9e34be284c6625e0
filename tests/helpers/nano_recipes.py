"""Every method of the zoo in a nano size, built by the recipes' own functions, and its records."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import nn

from focalnet_det.heads.prepare import prepare_model
from tests.helpers.paths import ROOT

MODELS = ROOT / "configs/common/models"
CLASSES, KEYPOINTS, STUFF, IGNORE = 3, 5, 4, 255
HEIGHT, WIDTH = 64, 96

THIN = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
BOXES = THIN | {"channels": 32, "fc_dim": 32, "mask_convs": 1, "rois": 16, "proposals": 20}
RCNN = BOXES | {"num_classes": CLASSES}
DENSE = THIN | {"channels": 64, "convs": 1, "norm": "GN", "num_classes": CLASSES}
# Method: file and function of its recipe, and the function's arguments.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{function}_{conventions}": (file, function, arguments | {"conventions": conventions})
        for file, function, arguments in (
            ("mask_rcnn", "mask_rcnn", RCNN),
            ("mask_rcnn", "faster_rcnn", RCNN),
            ("cascade_mask_rcnn", "cascade_mask_rcnn", RCNN),
            ("keypoint_rcnn", "keypoint_rcnn",
             BOXES | {"num_keypoints": KEYPOINTS, "keypoint_dim": 32}),
            ("panoptic_fpn", "panoptic_fpn", RCNN | {"num_stuff": STUFF}),
            ("retinanet", "retinanet", DENSE),
        )
        for conventions in ("mmdet", "detectron2")
    },
    "fcos": ("retinanet", "fcos", DENSE),
    "atss": ("atss", "atss", DENSE),
    "reppoints_v2": ("reppoints_v2", "reppoints_v2",
                     THIN | {"channels": 64, "convs": 1, "repeats": 1, "num_classes": CLASSES}),
    "semantic_fpn": ("semantic", "semantic_fpn",
                     THIN | {"num_classes": STUFF, "channels": 32, "head_channels": 32,
                             "crop": HEIGHT}),
    "upernet": ("semantic", "upernet",
                THIN | {"num_classes": STUFF, "channels": 16, "crop": HEIGHT}),
}  # fmt: skip


def build(method: str) -> nn.Module:
    """Return a model of ``METHODS`` with random weights, prepared as for a run."""
    file, function, arguments = METHODS[method]
    recipe: Callable[..., Any] = LazyConfig.load(str(MODELS / f"{file}.py"), function)
    return prepare_model(instantiate(recipe("focalnet_nano", **arguments)))


def record(
    objects: int, *, seed: int = 0, fields: bool = True, visible: bool = True, label: int = 1
) -> dict[str, Any]:
    """Return what a mapper hands to a model in training: a random image and rectangles in it.

    Args:
        objects: 0 to 2 of them.
        fields: with masks and keypoints, even without objects; mappers leave them out then.
        visible: whether the keypoints are.
        label: of all pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]])[:objects]
    instances = Instances((HEIGHT, WIDTH), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.zeros(objects, dtype=torch.long)
    if fields:
        masks = torch.zeros(objects, HEIGHT, WIDTH, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.gt_masks = BitMasks(masks)
        points = torch.rand(objects, KEYPOINTS, 2, generator=generator) * 30 + 10
        shown = torch.full((objects, KEYPOINTS, 1), 2.0 if visible else 0.0)
        instances.gt_keypoints = Keypoints(torch.cat([points, shown], dim=2))
    return {
        "image": torch.rand(3, HEIGHT, WIDTH, generator=generator) * 255,
        "instances": instances,
        "sem_seg": torch.full((HEIGHT, WIDTH), label),
        "height": 2 * HEIGHT,
        "width": 2 * WIDTH,
    }
