"""Provide the building blocks that the backbones share."""

from .drop_path import DropPath
from .layer_norm import layer_norm
from .layer_scale import layer_scale_parameter
from .memory_format import channels_first, channels_last
from .mlp import Mlp
from .module_hooks import has_hooks
from .patch_embed import PatchEmbed, pad_to_multiple, valid_mask

__all__ = [
    "DropPath",
    "Mlp",
    "PatchEmbed",
    "channels_first",
    "channels_last",
    "has_hooks",
    "layer_norm",
    "layer_scale_parameter",
    "pad_to_multiple",
    "valid_mask",
]
