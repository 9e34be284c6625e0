"""COCO 2017 panoptic, and its semantic labels alone."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import evaluation_resize, resize
from focalnet_det.data.loader import build_test_loader, build_train_loader

from .coco import coco_instances


def coco_panoptic(**changes):
    """As coco_instances, images without a thing included; panoptic quality in evaluation."""
    data = coco_instances(**changes)
    data["train"].datasets = "coco_2017_train_panoptic_separated"
    data["train"].filter_empty = False
    data["test"][0].dataset = "coco_2017_val_panoptic_separated"
    return data


def coco_stuff(batch_size=16, num_workers=4):
    """The 54 classes of panoptic FPN's semantic head: things as one, and the stuff."""
    return {
        "train": L(build_train_loader)(
            datasets="coco_2017_train_panoptic_stuffonly",
            augmentations=L(resize)(short_sides=(640, 672, 704, 736, 768, 800)),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=False,
        ),
        "test": [
            L(build_test_loader)(
                dataset="coco_2017_val_panoptic_stuffonly",
                augmentations=L(evaluation_resize)(),
                num_workers=num_workers,
            )
        ],
    }
