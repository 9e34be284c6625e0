"""Build the detectors of recipes for benchmarks on synthetic images and objects."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..experiment import load_config
from ..heads.mask2former import Mask2Former
from .contenders import Contender

# Average of COCO.
OBJECTS_PER_IMAGE = 7


def detector(config: Path, device: torch.device, *, path: str | None = None) -> Contender:
    """Build the model of a recipe with reproducible random weights.

    Score thresholds are set to 0, because a random detector has low scores, and the heads should
    process as many boxes as in a trained one.

    Args:
        config: ``.py`` config of a Mask, Faster or Cascade R-CNN, RetinaNet or FCOS; or of
            Mask2Former, whose inference is measured up to class and mask logits.
        device: for the model.
        path: value of ``FOCALNET_DET_OPS`` while it runs.
    Raises: ValueError if the config is not a ``.py`` file or not of a detector.
    """
    if config.suffix != ".py":
        raise ValueError(f"{config} is not a .py config, which --detector requires.")
    cfg = load_config(config, [f"train.device={device}"])
    torch.manual_seed(0)
    model: nn.Module = instantiate(cfg.model).to(device)
    name = config.stem if path is None else f"{config.stem}, {path}"
    if isinstance(model, Mask2Former):
        return Contender(name, model, partial(_mask2former_logits, model), path=path)
    thresholds = [m for m in model.modules() if hasattr(m, "test_score_thresh")]
    if not thresholds:
        raise ValueError(f"The model of {config} is not a detector with boxes.")
    for module in thresholds:
        module.test_score_thresh = 0.0  # type: ignore[assignment]

    def outputs(images: Tensor) -> list[Tensor]:
        inputs = [_sample(image, seed) for seed, image in enumerate(images)]
        if model.training:
            with EventStorage():
                return list(model(inputs).values())
        return [output["instances"].scores for output in model(inputs)]

    return Contender(name, model, outputs, path=path)


def transformers_mask2former(num_classes: int, device: torch.device) -> Contender:
    """Build Hugging Face's Mask2Former with its own Swin-T, as published for ADE20K.

    Raises: ImportError without transformers.
    """
    import transformers

    library: Any = transformers
    # Its decoder counts the prediction before the first layer: 10 for 9 layers.
    config = library.Mask2FormerConfig(
        num_labels=num_classes,
        encoder_layers=6,
        decoder_layers=10,
        backbone_config=library.SwinConfig(
            embed_dim=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
    )
    model = library.Mask2FormerForUniversalSegmentation(config).to(device)

    def logits(images: Tensor) -> list[Tensor]:
        output = model(images)
        return [output.class_queries_logits, output.masks_queries_logits]

    return Contender("transformers Mask2Former, Swin-T", model, logits)


def _mask2former_logits(model: Mask2Former, images: Tensor) -> list[Tensor]:
    """Return the last layer's class logits (N, Q, K + 1) and mask logits (N, Q, H/4, W/4)."""
    if model.training:
        raise ValueError("Only the inference of Mask2Former is measured. Remove --training.")
    final = model.sem_seg_head(model.backbone(images))[-1]
    return [final.class_logits, final.mask_logits()]


def _sample(image: Tensor, seed: int) -> dict[str, Any]:
    """Create a sample in Detectron2's format, with rectangles as objects."""
    height, width = image.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(OBJECTS_PER_IMAGE, 2, generator=generator) * 0.7
    sides = torch.rand(OBJECTS_PER_IMAGE, 2, generator=generator) * 0.25 + 0.05
    boxes = torch.cat([corners, corners + sides], 1) * torch.tensor([width, height] * 2)
    masks = torch.zeros(OBJECTS_PER_IMAGE, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    objects = Instances((height, width))
    objects.gt_boxes = Boxes(boxes)
    objects.gt_classes = torch.zeros(OBJECTS_PER_IMAGE, dtype=torch.int64)
    objects.gt_masks = BitMasks(masks)
    pixels = (image * 50 + 120).clamp(0, 255)
    return {"image": pixels, "instances": objects, "height": height, "width": width}
