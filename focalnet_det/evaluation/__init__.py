"""Evaluate detection and segmentation with Detectron2 evaluators, and format the scores."""

from focalnet_det.evaluation.boundary_ap import BoundaryEvaluator
from focalnet_det.evaluation.coco_ap import COCODetectionEvaluator
from focalnet_det.evaluation.evaluators import EVALUATORS, build_evaluator
from focalnet_det.evaluation.panoptic_quality import PanopticEvaluator
from focalnet_det.evaluation.score_tables import overall_table, per_class_table
from focalnet_det.evaluation.semantic_iou import SemanticEvaluator

__all__ = [
    "EVALUATORS",
    "BoundaryEvaluator",
    "COCODetectionEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "build_evaluator",
    "overall_table",
    "per_class_table",
]
