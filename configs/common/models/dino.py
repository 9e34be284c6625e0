"""DINO with four or five scales."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.dino import dino as build_dino

from .backbones import backbone_of

# Names of parameters without weight decay in detrex: those of norms. FocalNet-DINO decays all.
NO_DECAY = ("norm", "modulation.ln.", *(f"input_proj.{level}.1." for level in range(5)))


def dino(name, *, scales=4, num_classes=80, conventions="auto", drop_path_rate=0.1, **backbone):
    """DINO on a backbone by name, as published; further arguments go to the backbone.

    scales: 4 reads the stages of stride 8 to 32 and adds one level, 5 reads that of stride 4 too.
    conventions: "detrex" or "focalnet_dino"; "auto" is what the initial weights have if they are a
        whole DINO, else detrex. See focalnet_det.heads.dino.dino_conventions.
    """
    return L(build_dino)(
        backbone=backbone_of(
            name, first_stage=6 - scales, drop_path_rate=drop_path_rate, **backbone
        ),
        num_classes=num_classes,
        coco_ids=False,
        scales=scales,
        conventions=conventions,
        queries=900,
        channels=256,
        encoder_layers=6,
        decoder_layers=6,
        feedforward=2048,
        denoising_queries=100,
        label_noise=0.25,
        max_detections_per_image=300,
    )


def large_dino(name, *, drop_path_rate=0.3, **options):
    """DINO on a large backbone, whose activations are computed again in the backward pass."""
    return dino(name, drop_path_rate=drop_path_rate, activation_checkpointing=True, **options)


def nano_dino(**changes):
    """A small one for machines without a GPU; changes as in dino."""
    model = dino("focalnet_nano", **({"drop_path_rate": 0.0} | changes))
    model.queries, model.channels, model.feedforward = 50, 64, 256
    model.encoder_layers, model.decoder_layers, model.denoising_queries = 2, 3, 50
    model.max_detections_per_image = 100
    return model
