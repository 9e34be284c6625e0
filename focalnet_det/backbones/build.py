"""Build a backbone from the name of its variant."""

import dataclasses
import inspect
from typing import Any

from .focal_transformer import FocalTransformer, FocalTransformerV2
from .focalnet import FocalNet
from .stages import StagedBackbone
from .variants import FocalNetSpec, FocalTransformerSpec, FocalTransformerV2Spec, variant

# Class that a row of the table of variants configures.
BACKBONE_CLASSES: dict[type, type[StagedBackbone]] = {
    FocalNetSpec: FocalNet,
    FocalTransformerSpec: FocalTransformer,
    FocalTransformerV2Spec: FocalTransformerV2,
}


def constructor_arguments(network: type[StagedBackbone]) -> tuple[str, ...]:
    """Return the names of the constructor arguments of a backbone class."""
    return tuple(inspect.signature(network.__init__).parameters)[1:]


def backbone_class(name: str) -> type[StagedBackbone]:
    """Return the backbone class of a variant.

    Raises: KeyError for an unknown variant.
    """
    return BACKBONE_CLASSES[type(variant(name))]


def backbone_arguments(name: str, **overrides: Any) -> dict[str, Any]:
    """Return the constructor arguments of a variant, updated with overrides.

    Raises: KeyError for an unknown variant, TypeError for an unknown override.
    """
    arguments = dataclasses.asdict(variant(name))
    del arguments["source"]  # where the row comes from
    known = constructor_arguments(backbone_class(name))
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise TypeError(
            f"Unknown backbone option {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
        )
    return arguments | overrides


def build_backbone(name: str, **overrides: Any) -> StagedBackbone:
    """Build a variant with random weights; :func:`focalnet_det.create_backbone` also loads weights.

    Args:
        name: variant, see :func:`focalnet_det.list_backbones`.
        overrides: constructor arguments that replace those of the variant.
    Returns: the module, in training mode.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for invalid
        values.
    """
    return backbone_class(name)(**backbone_arguments(name, **overrides))
