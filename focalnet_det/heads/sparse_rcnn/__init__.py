"""Sparse R-CNN: a fixed set of learned proposals, refined in stages, on any backbone with FPN."""

from .dynamic_stage import DynamicConv, DynamicStage
from .sparse_criterion import SparseCriterion
from .sparse_rcnn import DynamicHead, SparseRCNN, sparse_rcnn

__all__ = [
    "DynamicConv",
    "DynamicHead",
    "DynamicStage",
    "SparseCriterion",
    "SparseRCNN",
    "sparse_rcnn",
]
