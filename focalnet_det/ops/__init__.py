"""Compute focal modulation and focal attention on tensors: plain PyTorch, no modules or configs."""

from . import dispatch, fused
from .focal_modulation import aggregate_contexts

__all__ = ["aggregate_contexts", "dispatch", "fused"]
