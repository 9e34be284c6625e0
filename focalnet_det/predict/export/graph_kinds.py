"""Choose the wrapper of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.modeling import FPN, RetinaNet
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.roi_heads import StandardROIHeads
from torch import nn

from ...backbones import StagedBackbone
from ...heads.batch_padding import has_valid_context
from ...heads.mask2former.mask2former import Mask2Former
from ...heads.mmdet.segmentor import MmsegSegmentor
from .graph_detectors import GraphDenseDetector, GraphRCNN
from .graph_models import GraphBackbone, GraphMask2Former, GraphModel, GraphSegmentor


@dataclass(frozen=True)
class GraphKind:
    """Models that one wrapper is for.

    Attributes:
        model: class of the models.
        wrap: makes the wrapper of a model.
    """

    model: type[nn.Module]
    wrap: Callable[[Any], GraphModel]


# The first match wins.
KINDS = (
    GraphKind(GeneralizedRCNN, GraphRCNN),
    GraphKind(RetinaNet, GraphDenseDetector),
    GraphKind(FCOS, GraphDenseDetector),
    GraphKind(MmsegSegmentor, GraphSegmentor),
    GraphKind(Mask2Former, GraphMask2Former),
    GraphKind(StagedBackbone, GraphBackbone),
    GraphKind(FPN, GraphBackbone),
)


def graph_model(model: nn.Module) -> GraphModel:
    """Wrap a model so that a graph of it can be recorded.

    Args:
        model: a meta-architecture, or a backbone.
    Returns: the wrapper, in eval mode.
    Raises: ValueError for a model that cannot be exported, with the reason.
    """
    if has_valid_context(model):
        raise ValueError(
            "A model with valid_context cannot be exported: its result depends on the sizes of "
            "the images in a batch. Set valid_context to false; images of one size, as a graph "
            "takes them, then differ in nothing but the padding to a multiple of 32 pixels."
        )
    heads = getattr(model, "roi_heads", None)
    if heads is not None and not isinstance(heads, StandardROIHeads):
        raise ValueError(f"RoI heads of type {type(heads).__name__} cannot be exported.")
    for kind in KINDS:
        if isinstance(model, kind.model):
            return kind.wrap(model).eval()
    known = ", ".join(sorted(kind.model.__name__ for kind in KINDS))
    raise ValueError(f"A {type(model).__name__} cannot be exported. These can: {known}.")
