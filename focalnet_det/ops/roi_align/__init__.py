"""Compute RoIAlign from all levels of a feature pyramid, with a kernel in C++."""

from .roi_align import roi_align

__all__ = ["roi_align"]
