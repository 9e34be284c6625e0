"""Keep the former name of `focalnet_det.heads.batch_padding.ignore_batch_padding` importable."""

from torch import nn

from ..compat import renamed
from .batch_padding import has_valid_context, ignore_batch_padding


def _ignore_padding_if_asked(model: nn.Module) -> nn.Module:
    return ignore_batch_padding(model) if has_valid_context(model) else model


see_images_alone = renamed(
    _ignore_padding_if_asked,
    "focalnet_det.heads.alone.see_images_alone",
    "focalnet_det.heads.batch_padding.ignore_batch_padding",
)
