"""Tensor functions of focal networks. Plain PyTorch, no modules and no configs."""

from . import dispatch, fused
from .focal_modulation import aggregate_contexts

__all__ = ["aggregate_contexts", "dispatch", "fused"]
