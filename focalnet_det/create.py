"""Create a backbone by name, optionally with pretrained weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbones import StagedBackbone, build_backbone

logger = logging.getLogger("focalnet_det")


def create_backbone(
    name: str,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> StagedBackbone:
    """Create a published backbone by name.

    Args:
        name: variant, see :func:`~focalnet_det.list_backbones`.
        weights: path, URL, registered name or state dict in any public layout, see
            :func:`~focalnet_det.checkpoint.load_pretrained`; None for random weights.
        overrides: any constructor argument of the variant's class, such as ``out_features``,
            ``in_channels``, ``focal_windows`` or ``drop_path_rate``.
    Returns: the module, in training mode.
    Raises: KeyError for an unknown variant, TypeError for an unknown option, ValueError for invalid
        values or weights of another network, FileNotFoundError for a missing file.

    Example::

        net = create_backbone("focalnet_tiny_lrf", out_features=("stage2", "stage3", "stage4"))
        features = net(torch.rand(1, 3, 480, 640))  # {"stage2": (1, 192, 60, 80), ...}
    """
    net = build_backbone(name, **overrides)
    if weights is not None:
        # Imported here: reading checkpoints needs libraries that a backbone does not.
        from .checkpoint import load_pretrained

        logger.info("%s", load_pretrained(net, weights))
    return net
