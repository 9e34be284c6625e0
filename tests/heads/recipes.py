"""Every method of the zoo with a nano backbone and narrow heads, from the recipes' own functions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parents[2] / "configs/common/models"
CLASSES, KEYPOINTS, STUFF, IGNORE = 3, 5, 4, 255
HEIGHT, WIDTH = 64, 96

BACKBONE = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
RCNN = {"channels": 32, "fc_dim": 32, "mask_convs": 1, "rois": 16, "proposals": 20} | BACKBONE
DENSE = {"num_classes": CLASSES, "channels": 64, "convs": 1, "norm": "GN"} | BACKBONE
# Method: file, function, arguments. The size of heads without masks is that of Mask R-CNN.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{method}_{conventions}": (file, method, arguments | {"conventions": conventions})
        for conventions in ("mmdet", "detectron2")
        for method, file, arguments in (
            ("mask_rcnn", "mask_rcnn", RCNN | {"num_classes": CLASSES}),
            ("faster_rcnn", "mask_rcnn", RCNN | {"num_classes": CLASSES}),
            ("cascade_mask_rcnn", "cascade_mask_rcnn", RCNN | {"num_classes": CLASSES}),
            ("keypoint_rcnn", "keypoint_rcnn",
             RCNN | {"num_keypoints": KEYPOINTS, "keypoint_dim": 32}),
            ("panoptic_fpn", "panoptic_fpn",
             RCNN | {"num_classes": CLASSES, "num_stuff": STUFF}),
            ("retinanet", "retinanet", DENSE),
        )
    },
    "fcos": ("retinanet", "fcos", DENSE),
    "semantic_fpn": ("semantic", "semantic_fpn",
                     {"num_classes": STUFF, "channels": 32, "head_channels": 32, "crop": HEIGHT}
                     | BACKBONE),
    "upernet": ("semantic", "upernet",
                {"num_classes": STUFF, "channels": 16, "crop": HEIGHT} | BACKBONE),
}  # fmt: skip
NANO = {
    "nano_mask_rcnn": ("mask_rcnn", RCNN | {"num_classes": CLASSES}),
    "nano_cascade_mask_rcnn": ("cascade_mask_rcnn", RCNN | {"num_classes": CLASSES}),
    "nano_retinanet": ("retinanet", {"num_classes": CLASSES, "channels": 32, "convs": 1}),
}


def build(method: str, **changes: Any) -> nn.Module:
    """Return a model of ``METHODS`` with random weights; changes go to the recipe's function."""
    file, function, arguments = METHODS[method]
    recipe: Callable[..., Any] = LazyConfig.load(str(MODELS / f"{file}.py"), function)
    model = recipe("focalnet_nano", **arguments | changes)
    return instantiate(model)  # type: ignore[no-any-return]
