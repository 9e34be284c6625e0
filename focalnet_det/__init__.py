"""Multi-scale focal network backbones for detection and segmentation.

Importing the package is cheap: PyTorch is imported with the first backbone, Detectron2 with the
first module that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .moved import find_moved_modules

if TYPE_CHECKING:
    from .backbones import list_backbones
    from .create import create_backbone, create_classifier

__version__ = "0.1.0"

# Imported at first use.
LAZY_IMPORTS = {
    "create_backbone": ".create",
    "create_classifier": ".create",
    "list_backbones": ".backbones",
}

find_moved_modules()

__all__ = ["add_focalnet_config", "create_backbone", "create_classifier", "list_backbones"]


def __getattr__(name: str) -> Any:
    if name not in LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY_IMPORTS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def add_focalnet_config(cfg: Any) -> None:
    """Add the keys of this package, such as ``MODEL.FOCALNET``, to a Detectron2 config.

    Also registers the backbones ``build_focalnet_backbone``, ``build_focalnet_fpn_backbone`` and
    ``build_retinanet_focalnet_fpn_backbone``, and the same with ``focal_transformer``.

    Args:
        cfg: a yacs config of Detectron2.

    Raises: ImportError with instructions if Detectron2 is not installed.
    """
    from .compat import require_detectron2

    require_detectron2()
    from .experiment.yacs_keys import add_focalnet_config as add

    add(cfg)
