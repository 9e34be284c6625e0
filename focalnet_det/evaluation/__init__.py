"""Evaluation of detectors: Detectron2 evaluators and their tables. Needs Detectron2."""

from focalnet_det.evaluation.build import EVALUATORS, build_evaluator
from focalnet_det.evaluation.coco import COCODetectionEvaluator
from focalnet_det.evaluation.tables import overall_table, per_class_table

__all__ = [
    "EVALUATORS",
    "COCODetectionEvaluator",
    "build_evaluator",
    "overall_table",
    "per_class_table",
]
