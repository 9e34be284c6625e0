"""What every model of a run gets, whichever config built it."""

from torch import nn

from .batch_padding import has_valid_context, ignore_batch_padding
from .empty import accept_empty_images
from .poolers import use_fast_roi_align


def prepare(model: nn.Module) -> nn.Module:
    """Replace parts of a Detectron2 model by ours; parameters and their names stay.

    RoIAlign is the fast one, training goes on where images have no objects, and if the config asks
    for ``valid_context``, what follows the backbone ignores batch padding too.

    Returns: the model, or what replaces it.
    """
    model = use_fast_roi_align(accept_empty_images(model))
    return ignore_batch_padding(model) if has_valid_context(model) else model
