"""Build the detectors of recipes for benchmarks on synthetic images and objects."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..experiment import load_config
from .contenders import Contender

# Average of COCO.
OBJECTS_PER_IMAGE = 7


def detector(config: Path, device: torch.device, *, path: str | None = None) -> Contender:
    """Build the model of a recipe with reproducible random weights.

    Score thresholds are set to 0, because a random detector has low scores, and the heads should
    process as many boxes as in a trained one.

    Args:
        config: ``.py`` config of a Mask, Faster or Cascade R-CNN, RetinaNet or FCOS.
        device: for the model.
        path: value of ``FOCALNET_DET_OPS`` while it runs.
    Raises: ValueError if the config is not a ``.py`` file or not of a detector.
    """
    if config.suffix != ".py":
        raise ValueError(f"{config} is not a .py config, which --detector requires.")
    cfg = load_config(config, [f"train.device={device}"])
    torch.manual_seed(0)
    model: nn.Module = instantiate(cfg.model).to(device)
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

    name = config.stem if path is None else f"{config.stem}, {path}"
    return Contender(name, model, outputs, path=path)


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
