"""COCO 2017 instances and keypoints."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import (
    evaluation_resize,
    large_scale_jitter,
    multiscale_or_crop,
    resize,
)
from focalnet_det.data.loader import build_test_loader, build_train_loader


def coco_instances(
    batch_size=16, num_workers=4, masks=True, train="coco_2017_train", test="coco_2017_val"
):
    """The published training augmentation; evaluation at 800/1333."""
    return {
        "train": L(build_train_loader)(
            datasets=train,
            augmentations=L(multiscale_or_crop)(),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=masks,
        ),
        "test": [
            L(build_test_loader)(
                dataset=test, augmentations=L(evaluation_resize)(), num_workers=num_workers
            )
        ],
    }


def coco_multiscale(short_sides, **options):
    """Resizing to one of the short sides, pixels, without crops."""
    data = coco_instances(**options)
    data["train"].augmentations = L(resize)(short_sides=short_sides)
    return data


def coco_lsj(size=1024, copy_paste=0.0, **options):
    """Large-scale jitter in squares, pixels; copy_paste: probability of pasted objects."""
    data = coco_instances(**options)
    data["train"].augmentations = L(large_scale_jitter)(size=size)
    data["train"].copy_paste = copy_paste
    data["train"].aspect_ratio_grouping = False
    return data


def coco_boxes(**options):
    """Boxes alone, images without any included, as published for DINO."""
    data = coco_instances(masks=False, **options)
    data["train"].filter_empty = False
    return data


def coco_boxes_high_resolution(**options):
    """Short sides of 480 to 1200, as published for DINO's best scores; evaluation at 1200/2000."""
    data = coco_boxes(**options)
    data["train"].augmentations.update(
        short_sides=(480, 560, 640, 720, 800, 900, 1000, 1100, 1200),
        max_long_side=2000,
        crop_short_sides=(400, 500, 600, 700, 800, 900),
        crop_range=(384, 900),
    )
    data["test"][0].augmentations.update(short_side=1200, max_long_side=2000)
    return data


def coco_keypoints(**options):
    """Persons with keypoints; crops would cut them apart, so that images are resized alone."""
    names = {"train": "keypoints_coco_2017_train", "test": "keypoints_coco_2017_val"}
    data = coco_instances(masks=False, **(names | options))
    data["train"].keypoints, data["train"].augmentations = True, L(resize)()
    return data
