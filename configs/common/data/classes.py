"""Images with a class each, and images without labels."""

from detectron2.config import LazyCall as L

from focalnet_det.data.classification.class_augmentation import center_crop, class_augmentation
from focalnet_det.data.loader import build_test_loader, build_train_loader


def images(train, test, *, size, short_side, batch_size, num_workers, **augmentation):
    """Random crops of a size, pixels; evaluation on the center of the resized image."""
    return {
        "train": L(build_train_loader)(
            datasets=train,
            augmentations=L(class_augmentation)(size=size, **augmentation),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=False,
            filter_empty=False,
            aspect_ratio_grouping=False,
        ),
        "test": [
            L(build_test_loader)(
                dataset=test,
                augmentations=L(center_crop)(short_side=short_side, size=size),
                num_workers=num_workers,
            )
        ],
    }


def imagenet(batch_size=1024):
    """ImageNet-1k with the published augmentation, RandAugment among it."""
    return images(
        "imagenet_train",
        "imagenet_val",
        size=224,
        short_side=256,
        batch_size=batch_size,
        num_workers=8,
        scale=(0.08, 1.0),
        auto_augment="rand-m9-mstd0.5-inc1",
    )


def without_labels(train, test, *, size=192, batch_size=2048, num_workers=8):
    """Images for masked image modeling: SimMIM's large crops, and flips alone."""
    return images(
        train,
        test,
        size=size,
        short_side=size,
        batch_size=batch_size,
        num_workers=num_workers,
        scale=(0.67, 1.0),
        color_jitter=0.0,
        auto_augment="",
    )
