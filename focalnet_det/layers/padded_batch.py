"""Provide the image sizes of a padded batch for the duration of a forward pass.

Meta-architectures of Detectron2 pass a single padded tensor to their backbone. Modules that must
tell images from padding, in the backbone and after it, get the image sizes here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# (rows, columns) of a feature map that each image of a batch covers.
Extents = Sequence[tuple[int, int]]


@dataclass(eq=False)
class PaddedBatch:
    """A batch of images that is padded at the right and the bottom.

    Attributes:
        image_sizes: (height, width) of each image without its padding, pixels; tensors while
            ``torch.jit.trace`` records a graph.
        extents: for feature maps of a given (height, width), the area of each image. The neck that
            computes the maps writes it. Maps of equal size have equal strides, or a single cell.
        outer: the batch that becomes current again when this one ends.
    """

    image_sizes: Sequence[Any]
    extents: dict[tuple[int, int], Extents] = field(default_factory=dict)
    outer: "PaddedBatch | None" = None


_current: ContextVar[PaddedBatch | None] = ContextVar("padded_batch", default=None)


def current_batch() -> PaddedBatch | None:
    """Return the batch of the running forward pass; None if its sizes are unknown."""
    return _current.get()


def begin_batch(image_sizes: Sequence[Any]) -> PaddedBatch:
    """Make a batch current until `end_batch`.

    Args:
        image_sizes: (height, width) of each image without its padding, pixels.
    """
    batch = PaddedBatch(image_sizes, outer=_current.get())
    _current.set(batch)
    return batch


def end_batch() -> None:
    """Restore the batch that was current before the last `begin_batch`."""
    batch = _current.get()
    _current.set(None if batch is None else batch.outer)


@contextmanager
def padded_batch(image_sizes: Sequence[Any]) -> Iterator[PaddedBatch]:
    """Provide the image sizes of the batch that is computed within the block.

    Args:
        image_sizes: (height, width) of each image without its padding, pixels.

    Example::

        images = model.preprocess_image(records)
        with padded_batch(images.image_sizes):
            features = model.backbone(images.tensor)
    """
    batch = begin_batch(image_sizes)
    try:
        yield batch
    finally:
        end_batch()
