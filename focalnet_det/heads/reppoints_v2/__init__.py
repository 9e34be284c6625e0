"""Define RepPoints v2, a dense detector of point sets that are verified by corners."""

from .reppoints_head import RepPointsV2Head
from .reppoints_v2 import RepPointsV2

__all__ = ["RepPointsV2", "RepPointsV2Head"]
