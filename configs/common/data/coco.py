"""COCO 2017 instances."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import evaluation_resize, multiscale_or_crop
from focalnet_det.data.build import build_test_loader, build_train_loader


def coco_instances(batch_size=16, num_workers=4):
    """The published training augmentation; evaluation at 800/1333."""
    return {
        "train": L(build_train_loader)(
            datasets="coco_2017_train",
            augmentations=L(multiscale_or_crop)(),
            batch_size=batch_size,
            num_workers=num_workers,
        ),
        "test": [
            L(build_test_loader)(
                dataset="coco_2017_val",
                augmentations=L(evaluation_resize)(),
                num_workers=num_workers,
            )
        ],
    }
