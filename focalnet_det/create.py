"""Create a backbone or a classifier by name, optionally with pretrained weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbones import StagedBackbone, build_backbone
from .backbones.classifier import Classifier, build_classifier

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


def create_classifier(
    name: str,
    num_classes: int = 1000,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> Classifier:
    """Create a published classifier by name, with the head of the official code.

    Args:
        name: variant, see :func:`~focalnet_det.list_backbones`.
        num_classes: number of logits: 1000 for ImageNet-1k, 21842 for ImageNet-22k.
        weights: path, URL, registered name or state dict in any public layout; a 22k file gives a
            classifier of 1,000 classes the head of ImageNet-1k. The head stays random if the file
            has none, or one for another number of classes. None for random weights.
        overrides: any constructor argument of the backbone, such as ``drop_path_rate``.
    Returns: the module, in training mode; its state dict is an official file.
    Raises: as :func:`create_backbone`.

    Example::

        net = create_classifier("focalnet_tiny_srf").eval()
        logits = net(torch.rand(1, 3, 224, 224))  # (1, 1000)
    """
    net = build_classifier(name, num_classes, **overrides)
    if weights is not None:
        from .checkpoint import load_headed

        logger.info("%s", load_headed(net, weights))
    return net
