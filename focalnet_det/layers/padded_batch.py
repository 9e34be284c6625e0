"""The sizes of the images in a padded batch, for as long as a forward pass runs.

Meta-architectures of Detectron2 hand their backbone one padded tensor and nothing else. What has
to tell images from padding, in the backbone and behind it, asks for the batch here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

# Rows and columns of a feature map that each image of a batch covers.
Extents = Sequence[tuple[int, int]]


@dataclass(eq=False)
class PaddedBatch:
    """The images of a batch that is padded at the right and the bottom.

    Attributes:
        image_sizes: (height, width) of each image without its padding, pixels; tensors in a graph
            that ``torch.jit.trace`` records.
        extents: what each image covers of the feature maps of a (height, width), written by the
            neck that made them. Maps of one size have one stride, or are single cells.
        outer: the batch that is current again afterwards.
    """

    image_sizes: Sequence[Any]
    extents: dict[tuple[int, int], Extents] = field(default_factory=dict)
    outer: "PaddedBatch | None" = None


_current: ContextVar[PaddedBatch | None] = ContextVar("padded_batch", default=None)


def current_batch() -> PaddedBatch | None:
    """Return the batch of the running forward pass; None if nobody has given its sizes."""
    return _current.get()


def begin_batch(image_sizes: Sequence[Any]) -> PaddedBatch:
    """Make a batch of images of these (height, width), pixels, current; `end_batch` ends it."""
    batch = PaddedBatch(image_sizes, outer=_current.get())
    _current.set(batch)
    return batch


def end_batch() -> None:
    """Make the batch current that was so before the last `begin_batch`."""
    batch = _current.get()
    _current.set(None if batch is None else batch.outer)


@contextmanager
def padded_batch(image_sizes: Sequence[Any]) -> Iterator[PaddedBatch]:
    """Give the image sizes of the batches that are computed within it.

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
