"""Compute focal modulation and focal attention on tensors: plain PyTorch, no modules or configs."""

from .focal_block import autograd, policy
from .focal_modulation import aggregate_contexts

__all__ = ["aggregate_contexts", "autograd", "policy"]
