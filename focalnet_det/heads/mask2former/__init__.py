"""Mask2Former: masked-attention mask transformer, on any backbone, without a compiler."""

from .mask2former import Mask2Former, Mask2FormerHead, mask2former
from .mask_criterion import SetCriterion
from .pixel_decoder import PixelDecoder
from .transformer_decoder import MaskedTransformerDecoder

__all__ = [
    "Mask2Former",
    "Mask2FormerHead",
    "MaskedTransformerDecoder",
    "PixelDecoder",
    "SetCriterion",
    "mask2former",
]
