"""Share parts of dense detectors: heads with norms for every Detectron2, and inference steps."""

from collections.abc import Callable
from typing import Any

from detectron2.layers import batched_nms
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..compat import dense_head_norm


def retinanet_head(*, norm: str = "", **arguments: Any) -> RetinaNetHead:
    """Build Detectron2's ``RetinaNetHead`` with a norm, "" for none, and its other arguments."""
    return RetinaNetHead(norm=head_norm(norm), **arguments)


def fcos_head(*, norm: str = "", **arguments: Any) -> FCOSHead:
    """Build Detectron2's ``FCOSHead`` with a norm, "" for none, and its other arguments."""
    return FCOSHead(norm=head_norm(norm), **arguments)


def head_norm(name: str) -> str | Callable[[int], Any]:
    """Return a norm in the form that Detectron2's dense heads take; "" for none."""
    return dense_head_norm(name) if name == "GN" else name


def suppress_overlaps(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    image_size: tuple[int, int],
    nms_threshold: float,
    limit: int,
) -> Instances:
    """Clip boxes to the image, apply NMS to each class, and keep the highest scores.

    Args:
        boxes: (R, 4), xyxy, absolute pixels.
        scores, classes: (R,).
        image_size: (height, width) without padding, pixels.
        nms_threshold: IoU above which the box of lower score is dropped.
        limit: largest number of detections.
    Returns: instances with ``pred_boxes``, ``scores`` and ``pred_classes``, by falling score.
    """
    result = Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    result.pred_boxes.clip(image_size)
    kept = batched_nms(result.pred_boxes.tensor, scores, classes, nms_threshold)
    return result[kept[:limit]]
