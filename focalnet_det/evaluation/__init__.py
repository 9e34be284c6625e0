"""Detectron2 evaluators for detection and segmentation, and their tables. Needs Detectron2."""

from focalnet_det.evaluation.boundary import BoundaryEvaluator
from focalnet_det.evaluation.build import EVALUATORS, build_evaluator
from focalnet_det.evaluation.coco import COCODetectionEvaluator
from focalnet_det.evaluation.panoptic import PanopticEvaluator
from focalnet_det.evaluation.semantic import SemanticEvaluator
from focalnet_det.evaluation.tables import overall_table, per_class_table

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
