"""Semantic segmentation: ADE20K at the published sizes, anything at small ones."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import evaluation_resize
from focalnet_det.data.loader import build_test_loader, build_train_loader
from focalnet_det.data.semantic.semantic_crops import semantic_crops


def semantic(
    train,
    test,
    *,
    crop,
    short_side,
    long_side,
    ratios=(0.5, 2.0),
    photometric=True,
    batch_size=16,
    num_workers=4,
):
    """Augment with random size, crop, flip and color; evaluate at one size. Sizes are in pixels."""
    return {
        "train": L(build_train_loader)(
            datasets=train,
            augmentations=L(semantic_crops)(
                crop=crop,
                short_side=short_side,
                long_side=long_side,
                ratios=ratios,
                photometric=photometric,
            ),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=False,
            aspect_ratio_grouping=False,
        ),
        "test": [
            L(build_test_loader)(
                dataset=test,
                augmentations=L(evaluation_resize)(short_side=short_side, max_long_side=long_side),
                num_workers=num_workers,
            )
        ],
    }


def ade20k(crop=512):
    """The published recipe: images are fitted into 4 x 1 crops, times 0.5 to 2 in training."""
    return semantic(
        "ade20k_sem_seg_train",
        "ade20k_sem_seg_val",
        crop=crop,
        short_side=crop,
        long_side=4 * crop,
    )
