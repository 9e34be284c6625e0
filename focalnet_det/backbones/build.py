"""Build a backbone from the name of its variant."""

import dataclasses
import inspect
from typing import Any

from .focal_transformer import FocalTransformer, FocalTransformerV2
from .focalnet import FocalNet
from .stages import StagedBackbone
from .variants import FocalNetSpec, FocalTransformerSpec, FocalTransformerV2Spec, variant

# Which class a row of the table is for.
CLASSES: dict[type, type[StagedBackbone]] = {
    FocalNetSpec: FocalNet,
    FocalTransformerSpec: FocalTransformer,
    FocalTransformerV2Spec: FocalTransformerV2,
}


def arguments_of(network: type[StagedBackbone]) -> tuple[str, ...]:
    """Return the names of a class's constructor arguments."""
    return tuple(inspect.signature(network.__init__).parameters)[1:]


def backbone_class(name: str) -> type[StagedBackbone]:
    """Return the class of a variant.

    Raises: KeyError for an unknown variant.
    """
    return CLASSES[type(variant(name))]


def backbone_arguments(name: str, **overrides: Any) -> dict[str, Any]:
    """Return the constructor arguments of a variant, with overrides.

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


def build_backbone(name: str, **overrides: Any) -> StagedBackbone:
    """Build a variant with random weights.

    Args: as in :func:`focalnet_det.create_backbone`, which loads weights too.
    Returns: the module, in training mode.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for values
        that do not fit.
    """
    return backbone_class(name)(**backbone_arguments(name, **overrides))
