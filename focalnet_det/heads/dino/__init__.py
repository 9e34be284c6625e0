"""DINO on any backbone, without a compiler."""

from .box_criterion import DINOCriterion
from .dino_model import DINO, dino
from .dino_transformer import DINOTransformer
from .level_neck import LevelNeck

__all__ = ["DINO", "DINOCriterion", "DINOTransformer", "LevelNeck", "dino"]
