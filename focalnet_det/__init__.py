"""Multi-scale focal network backbones for detection and segmentation.

Importing the package needs PyTorch alone; everything that touches Detectron2 is loaded on demand.
"""

from typing import Any

from .backbones import create_backbone, list_backbones

__version__ = "0.1.0"

__all__ = ["add_focalnet_config", "create_backbone", "list_backbones"]


def add_focalnet_config(cfg: Any) -> None:
    """Adds ``MODEL.FOCALNET`` and the solver keys of this package to a Detectron2 yacs config.

    Also registers the backbones ``build_focalnet_backbone``, ``build_focalnet_fpn_backbone`` and
    ``build_retinanet_focalnet_fpn_backbone``.

    Raises: ImportError with instructions if Detectron2 is not installed.
    """
    from .compat import require_detectron2

    require_detectron2()
    from .config import add_focalnet_config as add

    add(cfg)
