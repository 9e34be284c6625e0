"""Cascade Mask R-CNN, as published for FocalNet, and as Detectron2 has it."""

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads

from focalnet_det.heads.mmdet.cascade import MmdetCascadeROIHeads, sync_bn_box_head
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform

from .mask_rcnn import mask_rcnn, nano_mask_rcnn

IOUS = (0.5, 0.6, 0.7)
# One over the standard deviations of the deltas.
DETECTRON2_WEIGHTS = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
MMDET_WEIGHTS = (*DETECTRON2_WEIGHTS[:2], (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))


def cascade_mask_rcnn(name, *, conventions="mmdet", **options):
    """Cascade Mask R-CNN; arguments as in mask_rcnn.

    conventions: "mmdet" for the published form: boxes of each class, four convolutions and a linear
        layer per box head, batch norm over all GPUs, GIoU, three mask heads; "detectron2" for
        boxes without class, two linear layers, L1, one mask head.
    """
    model = mask_rcnn(name, conventions=conventions, **options)
    return _published(model) if conventions == "mmdet" else _cascade(model)


def _published(model):
    heads, predictor = model.roi_heads, model.roi_heads.box_predictor
    channels, fc_dim = heads.box_head.input_shape.channels, predictor.input_shape.channels
    rpn = model.proposal_generator
    rpn.smooth_l1_beta, rpn.anchor_boundary_thresh = 1 / 9, 0
    rpn.post_nms_topk = (rpn.pre_nms_topk[0], rpn.post_nms_topk[1])
    box_head = L(sync_bn_box_head)(
        input_shape=heads.box_head.input_shape, conv_dims=[channels] * 4, fc_dims=[fc_dim]
    )
    mask_head = heads.mask_head.copy()
    mask_head.num_classes = "${...num_classes}"
    del heads["mask_head"]
    _stages(heads, box_head, MmdetBox2BoxTransform, MMDET_WEIGHTS)
    for stage in heads.box_predictors:
        stage.box_reg_loss_type, stage.loss_weight = "giou", {"loss_box_reg": 10.0}
    heads.update(_target_=MmdetCascadeROIHeads, mask_heads=[mask_head] * len(IOUS))
    return model


def _cascade(model):
    heads = model.roi_heads
    _stages(heads, heads.box_head, Box2BoxTransform, DETECTRON2_WEIGHTS)
    for stage in heads.box_predictors:
        stage.cls_agnostic_bbox_reg = True
    heads._target_ = CascadeROIHeads
    return model


def _stages(heads, box_head, transform, weights):
    """Three box heads, predictors and matchers in place of one of each."""
    predictors = [heads.box_predictor.copy() for _ in IOUS]
    for predictor, numbers in zip(predictors, weights, strict=True):
        predictor.box2box_transform = L(transform)(weights=numbers)
        predictor.num_classes = "${...num_classes}"
    for part in ("box_head", "box_predictor", "proposal_matcher"):
        del heads[part]
    heads.box_heads = [box_head] * len(IOUS)
    heads.box_predictors = predictors
    heads.proposal_matchers = [
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False) for iou in IOUS
    ]


def nano_cascade_mask_rcnn(**changes):
    """A small one of Detectron2's form; changes as in nano_mask_rcnn."""
    return _cascade(nano_mask_rcnn(**changes))
