"""Prepare a Detectron2 model for a run, whichever kind of config built it."""

from torch import nn

from .batch_padding import has_valid_context, ignore_batch_padding
from .empty import accept_empty_images
from .fast_heads import use_fast_linears
from .poolers import use_fast_roi_align


def prepare_model(model: nn.Module) -> nn.Module:
    """Replace modules of a Detectron2 model by ours; parameters and their names do not change.

    RoIAlign and the linear layers of RoI heads are the fast ones, images without objects do not
    stop the training, and if the config sets ``valid_context``, necks and heads ignore batch
    padding too.

    Returns: the model, or its replacement.
    Raises: ValueError as :func:`ignore_batch_padding`, if the config sets ``valid_context``.
    """
    model = use_fast_linears(use_fast_roi_align(accept_empty_images(model)))
    return ignore_batch_padding(model) if has_valid_context(model) else model
