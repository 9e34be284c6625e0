"""Classifiers, and masked image modeling."""

from detectron2.config import LazyCall as L

from focalnet_det.heads.image_classifier import ImageClassifier
from focalnet_det.heads.masked_pretraining import MaskedPretraining

from .backbones import backbone_of


def classifier(
    name, *, num_classes=1000, label_smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25, **backbone
):
    """A classifier on a backbone by name, regularized as published; see ImageClassifier."""
    return L(ImageClassifier)(
        backbone=backbone_of(name, output_norm=False, **backbone),
        num_classes=num_classes,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        erasing=erasing,
    )


def plain_classifier(name, *, num_classes, **backbone):
    """A classifier that is trained on images as they are, for small data."""
    return classifier(name, num_classes=num_classes, mixup=0.0, cutmix=0.0, erasing=0.0, **backbone)


def masked_images(name, *, mask_unit=32, mask_ratio=0.6, **backbone):
    """Masked image modeling of a backbone by name, without stochastic depth; SimMIM's masks."""
    return L(MaskedPretraining)(
        backbone=backbone_of(name, output_norm=False, drop_path_rate=0.0, **backbone),
        mask_unit=mask_unit,
        mask_ratio=mask_ratio,
    )
