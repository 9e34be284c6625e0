"""Instances at small sizes, for machines without a GPU."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import evaluation_resize, resize_and_crop
from focalnet_det.data.loader import build_test_loader, build_train_loader


def small_instances(
    train,
    test,
    *,
    short_sides,
    crop,
    test_size,
    batch_size,
    num_workers=2,
    vertical_flip=False,
    masks=True,
):
    """Resize to one of some short sides, crop a square; evaluate at one size, pixels."""
    return {
        "train": L(build_train_loader)(
            datasets=train,
            augmentations=L(resize_and_crop)(
                short_sides=short_sides, crop=crop, vertical_flip=vertical_flip
            ),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=masks,
        ),
        "test": [
            L(build_test_loader)(
                dataset=test,
                augmentations=L(evaluation_resize)(
                    short_side=test_size, max_long_side=2 * test_size
                ),
                num_workers=num_workers,
            )
        ],
    }
