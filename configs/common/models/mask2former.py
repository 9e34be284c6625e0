"""Mask2Former for semantic, instance and panoptic segmentation."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.mask2former import mask2former as build_mask2former

from .backbones import backbone_of

# Names of parameters without weight decay: norms and embeddings, as published.
NO_DECAY = (
    *("norm", "input_proj.0.1.", "input_proj.1.1.", "input_proj.2.1.", "query_feat", "query_embed"),
    *("predictor.level_embed", "relative_position_bias_table"),
)
ALL_TASKS = ("semantic", "instance", "panoptic")
# COCO panoptic in one numbering.
COCO_THINGS = tuple(range(80))


def mask2former(
    name,
    *,
    num_classes,
    tasks=("semantic",),
    things=None,
    queries=100,
    size=512,
    drop_path_rate=0.3,
    **backbone,
):
    """Mask2Former on a backbone by name, as published; further arguments go to the backbone.

    things: of a panoptic model, classes that are instances.
    size: side of the training images, pixels; smaller batches are padded to it.
    """
    return L(build_mask2former)(
        backbone=backbone_of(name, drop_path_rate=drop_path_rate, **backbone),
        num_classes=num_classes,
        tasks=list(tasks),
        things=None if things is None else list(things),
        queries=queries,
        channels=256,
        encoder_layers=6,
        decoder_layers=9,
        points=12_544,
        weights=[2.0, 5.0, 5.0],
        train_size=(size, size),
        object_threshold=0.8,
        overlap_threshold=0.8,
        instances_per_image=100,
        ignore_unlabeled=False,
        mask_padding=False,
    )


def nano_mask2former(*, size, queries=20, **options):
    """A small one for machines without a GPU; arguments as above."""
    model = mask2former("focalnet_nano", size=size, queries=queries, drop_path_rate=0.0, **options)
    model.channels, model.encoder_layers, model.decoder_layers = 64, 2, 3
    model.points = 1024
    return model
