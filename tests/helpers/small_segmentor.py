"""A UPerNet of a few channels."""

from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.mmdet.segmentor import MmsegSegmentor
from focalnet_det.heads.upernet import UPerNetHead


def small(**changes: object) -> MmsegSegmentor:
    backbone = focalnet_backbone("focalnet_tiny_srf", embed_dim=8, depths=(1, 1, 1, 1))
    head = UPerNetHead(
        input_shape=backbone.output_shape(), num_classes=3, channels=8, auxiliary_channels=4
    )
    parts: dict = {"backbone": backbone, "sem_seg_head": head}
    pixels = {"pixel_mean": [120.0] * 3, "pixel_std": [58.0] * 3}
    return MmsegSegmentor(**(parts | pixels | changes)).eval()
