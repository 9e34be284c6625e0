"""From a variant name to a backbone."""

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .focal_transformer import FocalTransformer, FocalTransformerV2
from .focalnet import FocalNet
from .stages import StagedBackbone
from .variants import FocalNetSpec, FocalTransformerSpec, FocalTransformerV2Spec, variant

logger = logging.getLogger("focalnet_det")

# Which class a row of the table is for.
CLASSES: dict[type, type[StagedBackbone]] = {
    FocalNetSpec: FocalNet,
    FocalTransformerSpec: FocalTransformer,
    FocalTransformerV2Spec: FocalTransformerV2,
}


def arguments_of(network: type[StagedBackbone]) -> tuple[str, ...]:
    """Names of a class's constructor arguments."""
    return tuple(inspect.signature(network.__init__).parameters)[1:]


def backbone_class(name: str) -> type[StagedBackbone]:
    """The class of a variant.

    Raises: KeyError for an unknown variant.
    """
    return CLASSES[type(variant(name))]


def backbone_arguments(name: str, **overrides: Any) -> dict[str, Any]:
    """Constructor arguments of a variant, with overrides.

    Raises: KeyError for an unknown variant, TypeError for an unknown override.
    """
    arguments = dataclasses.asdict(variant(name))
    del arguments["source"]  # where the row comes from
    known = arguments_of(backbone_class(name))
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(
            f"Unknown backbone option {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
        )
    return arguments | overrides


def create_backbone(
    name: str,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> StagedBackbone:
    """A published backbone by name.

    Args:
        name: see :func:`list_backbones`.
        weights: path, URL, registered name or state dict in any public layout, see
            :func:`focalnet_det.checkpoint.load_pretrained`, or None for random weights.
        overrides: any constructor argument of the variant's class, such as ``out_features``,
            ``in_channels``, ``focal_windows`` or ``drop_path_rate``.
    Returns: the module, in training mode.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for values
        that do not fit or weights that belong to another network.

    Example::

        net = create_backbone("focalnet_tiny_lrf", out_features=("stage2", "stage3", "stage4"))
        features = net(torch.rand(1, 3, 480, 640))  # {"stage2": (1, 192, 60, 80), ...}
    """
    net = backbone_class(name)(**backbone_arguments(name, **overrides))
    if weights is not None:
        from ..checkpoint import load_pretrained

        logger.info("%s", load_pretrained(net, weights))
    return net
