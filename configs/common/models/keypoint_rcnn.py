"""Keypoint R-CNN, as Detectron2 has it."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead

from .mask_rcnn import LEVELS, faster_rcnn, roi_pooler


def keypoint_rcnn(name, *, num_keypoints=17, channels=256, keypoint_dim=512, **options):
    """Keypoint R-CNN of one class; other arguments as in mask_rcnn."""
    model = faster_rcnn(name, num_classes=1, channels=channels, **options)
    model.roi_heads.update(
        keypoint_in_features=list(LEVELS),
        keypoint_pooler=roi_pooler(14),
        keypoint_head=L(KRCNNConvDeconvUpsampleHead)(
            input_shape=L(ShapeSpec)(channels=channels, height=14, width=14),
            num_keypoints=num_keypoints,
            conv_dims=[keypoint_dim] * 8,
            loss_normalizer="visible",
        ),
    )
    # As in Detectron2: fewer proposals and plain L1 cost keypoint AP.
    rpn = model.proposal_generator
    rpn.post_nms_topk = (rpn.post_nms_topk[0] * 3 // 2, rpn.post_nms_topk[1])
    model.roi_heads.box_predictor.smooth_l1_beta = 0.5
    return model
