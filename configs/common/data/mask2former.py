"""Mask2Former's training images: crops on ADE20K, large-scale jitter on COCO."""

from detectron2.config import LazyCall as L

from focalnet_det.data.augmentation import evaluation_resize, large_scale_jitter
from focalnet_det.data.loader import build_test_loader, build_train_loader
from focalnet_det.data.semantic.semantic_crops import shortest_edge_crops


def crops(
    train,
    test,
    *,
    crop=512,
    ratios=(0.5, 2.0),
    photometric=True,
    masks=False,
    batch_size=16,
    num_workers=4,
):
    """Short side of 0.5 to 2 times the crop, colors, flip; evaluation at the crop's size.

    masks: whether instances are learned; images without any are kept.
    """
    return {
        "train": L(build_train_loader)(
            datasets=train,
            augmentations=L(shortest_edge_crops)(
                crop=crop, max_long_side=4 * crop, ratios=ratios, photometric=photometric
            ),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=masks,
            filter_empty=False,
            aspect_ratio_grouping=False,
        ),
        "test": [
            L(build_test_loader)(
                dataset=test,
                augmentations=L(evaluation_resize)(short_side=crop, max_long_side=4 * crop),
                num_workers=num_workers,
            )
        ],
    }


def ade20k(task="sem_seg", crop=512):
    """ADE20K for a task: "sem_seg", "instance" or "panoptic"."""
    suffix = "_unified" if task == "panoptic" else ""
    names = [f"ade20k_{task}_{split}{suffix}" for split in ("train", "val")]
    return crops(*names, crop=crop, masks=task != "sem_seg")


def coco_jitter(task, size=1024, batch_size=16, num_workers=4):
    """COCO for "instance" or "panoptic": 0.1 to 2 times a square; evaluation at 800/1333."""
    suffix = "_panoptic" if task == "panoptic" else ""
    return {
        "train": L(build_train_loader)(
            datasets=f"coco_2017_train{suffix}",
            augmentations=L(large_scale_jitter)(size=size, pad=False),
            batch_size=batch_size,
            num_workers=num_workers,
            masks=True,
            filter_empty=task == "instance",
            aspect_ratio_grouping=False,
        ),
        "test": [
            L(build_test_loader)(
                dataset=f"coco_2017_val{suffix}",
                augmentations=L(evaluation_resize)(short_side=800, max_long_side=1333),
                num_workers=num_workers,
            )
        ],
    }
