"""Draw training samples as the model sees them: augmented, with masks, classes and keypoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances

from ..data.panoptic.panoptic_sets import THINGS
from .draw_instances import draw_objects
from .draw_semantic import class_labels, overlay, palette
from .label_layout import draw_labels
from .objects import Objects
from .sheet import Picture, Row, enlarged, gallery, nearest


def sample_rows(
    samples: Sequence[Mapping[str, Any]], metadata: Metadata, *, image_format: str
) -> list[Row]:
    """Arrange training samples in a gallery.

    Args:
        samples: of a training loader, see :class:`~focalnet_det.data.instances.mappers`: "image",
            uint8 (3, H, W), and "instances" or "sem_seg" or both.
        metadata: of the dataset.
        image_format: channel order of the images, "RGB" or "BGR".
    """
    left, rows = list(samples), []
    for widths in gallery([tuple(sample["image"].shape[-2:]) for sample in samples]):
        taken, left = left[: len(widths)], left[len(widths) :]
        panels = []
        for sample, width in zip(taken, widths, strict=True):
            image = sample["image"].permute(1, 2, 0).numpy()
            image = np.ascontiguousarray(image[..., ::-1] if image_format == "BGR" else image)
            panels.append((_title(sample), draw_sample(image, sample, metadata, width=width)))
        rows.append(Row(panels=panels))
    return rows


def draw_sample(
    image: Picture, sample: Mapping[str, Any], metadata: Metadata, *, width: int | None = None
) -> Picture:
    """Draw classes of pixels, then objects over them, on the image of a training sample.

    Args:
        image: uint8 RGB, (H, W, 3).
        sample: with "instances" (``gt_boxes``, ``gt_classes``, masks and keypoints if there are
            any) or "sem_seg", (H, W), or both.
        metadata: of the dataset.
        width: of the result, pixels; None enlarges small images only.
    Returns: uint8 RGB, (h, w, 3).
    """
    picture, regions = enlarged(image, width), []
    if "sem_seg" in sample:
        labels = nearest(sample["sem_seg"].numpy(), (picture.shape[0], picture.shape[1]))
        names = metadata.get("stuff_classes") or metadata.thing_classes
        colors = metadata.get("stuff_colors") or palette(len(names))
        picture = overlay(picture, labels, colors)
        regions = class_labels(labels, names, colors)
    if "instances" not in sample:
        return draw_labels(picture, regions)
    objects = training_objects(sample["instances"])
    # Things have names of their own.
    named = {THINGS, *(metadata.thing_classes[cls] for cls in objects.classes.tolist())}
    regions = [label for label in regions if label.text not in named]
    return draw_objects(picture, objects, metadata, width=picture.shape[1], regions=regions)


def training_objects(instances: Instances) -> Objects:
    """Return Detectron2 ``Instances`` of ground truth for drawing."""
    masks = instances.gt_masks.tensor.numpy() if instances.has("gt_masks") else None
    points = instances.gt_keypoints.tensor.numpy() if instances.has("gt_keypoints") else None
    return Objects(
        size=instances.image_size,
        boxes=instances.gt_boxes.tensor.double().numpy(),
        classes=instances.gt_classes.numpy(),
        masks=masks,
        keypoints=points,
    )


def _title(sample: Mapping[str, Any]) -> str:
    height, width = sample["image"].shape[-2:]
    parts = [f"{width} x {height}"]
    if "instances" in sample:
        count = len(sample["instances"])
        parts.insert(0, f"{count} object{'s' * (count != 1)}")
    # Last, because long titles are cut.
    return ", ".join([*parts, Path(sample["file_name"]).name])
