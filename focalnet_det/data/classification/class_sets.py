"""Register datasets of image labels by name, and list the classes of ImageNet."""

from functools import cache, partial
from pathlib import Path

from ..shapes.generate import default_root
from .archives import SUFFIXES
from .image_folders import register_classes_lazily, register_unlabeled_lazily

SPLITS = ("train", "val")


@cache
def imagenet22k_synsets() -> tuple[str, ...]:
    """Return the synsets of the 21,842 outputs of published 22k heads, such as "n01440764".

    The first 1,000 are those of ImageNet-1k in its usual order. Class 850 (n04399382, teddy bear)
    has no images in 22k: the published label map leaves its number out, and its output was never
    trained.

    Source: microsoft/FocalNet:labelmap_22k_reorder.txt (the order);
    huggingface/pytorch-image-models:timm/data/_info/imagenet22k_ms_synsets.txt (the file here,
    which has class 850 as well).
    """
    file = Path(__file__).with_name("imagenet22k_synsets.txt")
    return tuple(file.read_text(encoding="utf-8").split())


def imagenet1k_synsets() -> tuple[str, ...]:
    """Return the synsets of ImageNet-1k in the order of the outputs of published heads."""
    return imagenet22k_synsets()[:1000]


def find_split(root: Path, split: str) -> Path:
    """Return the folder or archive of a split, such as ``train``, ``train.tar`` or ``train.zip``.

    Raises: FileNotFoundError that names the folder if there is none of them.
    """
    candidates = [root / split, *(root / f"{split}{suffix}" for suffix in SUFFIXES)]
    return next((path for path in candidates if path.exists()), candidates[0])


def register_imagenet() -> None:
    """Register ``imagenet_train``, ``imagenet_val``, and the same as ``imagenet_unlabeled_*``."""
    root = default_root().with_name("imagenet")
    for split in SPLITS:
        source = partial(find_split, root, split)
        register_classes_lazily(f"imagenet_{split}", source, imagenet1k_synsets)
        register_unlabeled_lazily(f"imagenet_unlabeled_{split}", source)


def register_shapes_classes() -> None:
    """Register crops of the generated shapes, ``shapes_classes_*``, and ``shapes_unlabeled_*``."""
    root = default_root()
    for split in SPLITS:
        register_classes_lazily(
            f"shapes_classes_{split}", partial(find_split, root / "classes", split)
        )
        register_unlabeled_lazily(
            f"shapes_unlabeled_{split}", partial(find_split, root / "images", split)
        )
