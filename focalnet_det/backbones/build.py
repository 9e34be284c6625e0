"""From a variant name to a backbone."""

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .focalnet import FocalNet
from .variants import variant

logger = logging.getLogger("focalnet_det")

# Constructor arguments beside the fields of a row; `source` says where a row comes from.
ARGUMENTS = tuple(inspect.signature(FocalNet.__init__).parameters)[1:]


def backbone_arguments(name: str, **overrides: Any) -> dict[str, Any]:
    """Constructor arguments of a variant, with overrides.

    Raises: KeyError for an unknown variant, TypeError for an unknown override.
    """
    arguments = dataclasses.asdict(variant(name))
    del arguments["source"]
    unknown = sorted(set(overrides) - set(ARGUMENTS))
    if unknown:
        raise TypeError(
            f"Unknown backbone option {', '.join(unknown)}. Known: {', '.join(sorted(ARGUMENTS))}."
        )
    return arguments | overrides


def create_backbone(
    name: str,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> FocalNet:
    """A published backbone by name.

    Args:
        name: see :func:`list_backbones`.
        weights: path, URL, registered name or state dict in any public layout, see
            :func:`focalnet_det.checkpoint.load_pretrained`, or None for random weights.
        overrides: any constructor argument of :class:`FocalNet`, such as ``out_features``,
            ``in_channels``, ``focal_windows`` or ``drop_path_rate``.
    Returns: the module, in training mode.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for values
        that do not fit or weights that belong to another network.

    Example::

        net = create_backbone("focalnet_tiny_lrf", out_features=("stage2", "stage3", "stage4"))
        features = net(torch.rand(1, 3, 480, 640))  # {"stage2": (1, 192, 60, 80), ...}
    """
    net = FocalNet(**backbone_arguments(name, **overrides))
    if weights is not None:
        from ..checkpoint import load_pretrained

        logger.info("%s", load_pretrained(net, weights))
    return net
