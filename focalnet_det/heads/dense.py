"""Build Detectron2's heads of dense detectors, with norms that work in every version of it."""

from collections.abc import Callable
from typing import Any

from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from ..compat import dense_head_norm


def retinanet_head(*, norm: str = "", **arguments: Any) -> RetinaNetHead:
    """Build Detectron2's ``RetinaNetHead`` with a norm, "" for none, and its other arguments."""
    return RetinaNetHead(norm=_norm(norm), **arguments)


def fcos_head(*, norm: str = "", **arguments: Any) -> FCOSHead:
    """Build Detectron2's ``FCOSHead`` with a norm, "" for none, and its other arguments."""
    return FCOSHead(norm=_norm(norm), **arguments)


def _norm(name: str) -> str | Callable[[int], Any]:
    return dense_head_norm(name) if name == "GN" else name
