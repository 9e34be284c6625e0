"""Building blocks shared by the backbones."""

from .drop_path import DropPath
from .layer_norm import layer_norm
from .layer_scale import layer_scale_parameter
from .mlp import Mlp
from .module_hooks import has_hooks
from .norm import channels_first, channels_last
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
