"""Explain a detected box: the focal levels and the places that the backbone draws on for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from ..backbones.focalnet import FocalNet
from ..visualization.draw_modulation import draw_box_draws, level_names
from ..visualization.modulation_maps import (
    BlockMaps,
    Draws,
    Recorded,
    block_maps,
    draws_of_box,
    find_focalnet,
    receptive_field,
    recorded_modulations,
)
from ..visualization.sheet import Picture
from .predictor import ImageLike, Predictor, to_picture

# IoU from which a detection of the explained call is the box that was asked for.
SAME_BOX = 0.9
# Scores are kept this far from 0 and 1, where log-odds are infinite in float32.
EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a model found a box.

    Attributes:
        box: xyxy, pixels of the image.
        name, score: of the detection; "" and None if the box is not one of the model's.
        draws: for each stage, which levels and places its modulations draw on for the tokens of the
            box: shares that sum to 1 over the levels, and to 1 over the places.
        evidence: by stage (L+1, H, W), gate times the derivative of the detection's log-odds with
            respect to it, summed over the blocks. All numbers of a stage sum to the derivative of
            the log-odds with respect to a common factor on the gates of the stage: what its context
            does for the detection, to first order. It is 0 for a score of 1 in float32, and None if
            the box is not a detection.
        image: input of the network, uint8 RGB (h, w, 3); ``places`` belong to it.
        scale: pixels of the input per pixel of the image, horizontal and vertical.
    """

    box: tuple[float, float, float, float]
    name: str
    score: float | None
    draws: Sequence[Draws]
    evidence: Mapping[str, Tensor] | None
    image: Picture
    scale: tuple[float, float]

    @property
    def title(self) -> str:
        """Return name and score, or the corners of the box."""
        if self.score is None:
            return "box " + ", ".join(f"{x:.0f}" for x in self.box)
        return f"{self.name} {self.score:.0%}"

    def table(self) -> str:
        """Return the numbers as text: a row for each level of each stage."""
        rows: list[list[Any]] = []
        for stage in self.draws:
            names = level_names(len(stage.levels))
            for index, (name, share) in enumerate(zip(names, stage.levels.tolist(), strict=True)):
                first = [stage.stage, f"{stage.inside:.0%}"] if index == 0 else ["", ""]
                rows.append([first[0], name, f"{share:.1%}", first[1]])
                if self.evidence is not None:
                    rows[-1].append(f"{float(self.evidence[stage.stage][index].sum()):+.3f}")
        header = ["stage", "level", "share", "inside the box"]
        header += [] if self.evidence is None else ["evidence"]
        return tabulate(rows, header, stralign="right", disable_numparse=True)

    def figure(self) -> Figure:
        """Draw places and levels of each stage, see :func:`draw_box_draws`."""
        box = np.array(self.box) * np.array([*self.scale, *self.scale])
        return draw_box_draws(self.image, box.tolist(), self.draws, self.evidence, self.title)


def why_box(
    predictor: Predictor,
    image: ImageLike,
    box: Sequence[float],
    class_name: str | None = None,
) -> Explanation:
    """Explain a box: which focal levels and places the backbone draws on for it.

    Example::

        prediction = predictor("image.jpg")
        explanation = why_box(predictor, "image.jpg", prediction.instances.pred_boxes.tensor[0])
        print(explanation.table())

    Args:
        predictor: with a FocalNet backbone.
        image: as for the predictor.
        box: xyxy, pixels of the image; one of the model's detections, or any other, which has no
            evidence.
        class_name: of the detection, if several share a box.
    Raises: ValueError if the backbone is not a FocalNet or the box lies outside of the image.
    """
    backbone = find_focalnet(predictor.model)
    sample = plain_sample(predictor, image)
    left, top, right, bottom = (float(x) for x in box)
    corners = left, top, right, bottom
    with torch.enable_grad(), recorded_modulations(backbone) as records:
        output = predictor.model([sample])[0]
    height, width = sample["image"].shape[-2:]
    scale = width / sample["width"], height / sample["height"]
    inside = [x * s for x, s in zip(corners, (*scale, *scale), strict=True)]
    instances = output.get("instances", ())
    index = _detection(predictor, instances, corners, class_name) if len(instances) else None
    name, score, evidence = "", None, None
    if index is not None:
        name = predictor.metadata.thing_classes[instances.pred_classes[index]]
        score = float(instances.scores[index].detach())
        evidence = _evidence(instances.scores[index], records)
    return Explanation(
        box=corners,
        name=name,
        score=score,
        draws=draws_of_box(_maps(backbone, records), inside),
        evidence=evidence,
        image=shown_image(predictor, sample),
        scale=scale,
    )


def _maps(backbone: FocalNet, records: Sequence[Recorded]) -> list[BlockMaps]:
    return [block_maps(record, backbone.shapes[record.stage].stride) for record in records]


def plain_sample(predictor: Predictor, image: ImageLike) -> dict[str, Any]:
    """Return the model's input for an image; of test-time augmentation the first view."""
    sample = predictor.prepare(to_picture(image))
    return sample["views"][0] if "views" in sample else sample


def shown_image(predictor: Predictor, sample: Mapping[str, Any]) -> Picture:
    """Return the image of a model's input as uint8 RGB, (h, w, 3)."""
    array = sample["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(array[..., ::-1] if predictor.image_format == "BGR" else array)


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """What the modulations of a network compute for an image.

    Attributes:
        image: input of the network, uint8 RGB (h, w, 3).
        maps: of every block.
        fields: effective receptive field of ``point`` by output of the backbone, (h, w).
        point: x and y, pixels of ``image``.
    """

    image: Picture
    maps: Sequence[BlockMaps]
    fields: Mapping[str, Tensor]
    point: tuple[float, float]


def modulation_of_image(
    predictor: Predictor, image: ImageLike, point: tuple[float, float] | None = None
) -> ImageMaps:
    """Compute the maps of every block for an image, and the receptive field of a point.

    Args:
        predictor: with a FocalNet backbone.
        image: as for the predictor.
        point: x and y, pixels of the image; None for its middle.
    Raises: ValueError if the backbone is not a FocalNet or the point lies outside of the image.
    """
    backbone = find_focalnet(predictor.model)
    sample = plain_sample(predictor, image)
    inputs: list[Tensor] = []
    handle = backbone.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.no_grad(), recorded_modulations(backbone) as records:
            predictor.model([sample])
    finally:
        handle.remove()
    maps = _maps(backbone, records)
    height, width = sample["image"].shape[-2:]
    x, y = point or (sample["width"] / 2, sample["height"] / 2)
    at = x * width / sample["width"], y * height / sample["height"]
    fields = {
        name: receptive_field(backbone, inputs[0], name, at)[:height, :width]
        for name in backbone.output_shape()
    }
    return ImageMaps(image=shown_image(predictor, sample), maps=maps, fields=fields, point=at)


def _detection(
    predictor: Predictor, instances: Instances, box: Sequence[float], class_name: str | None
) -> int | None:
    """Return the index of the detection with a box, None if it is not among them."""
    wanted = Boxes(torch.tensor([box], dtype=torch.float32))
    overlaps = pairwise_iou(wanted, Boxes(instances.pred_boxes.tensor.detach().cpu().float()))[0]
    if class_name is not None:
        names = predictor.metadata.thing_classes
        other = [names[cls] != class_name for cls in instances.pred_classes.tolist()]
        overlaps[torch.tensor(other)] = 0
    best = int(overlaps.argmax())
    return best if overlaps[best] >= SAME_BOX else None


def _evidence(score: Tensor, records: Sequence[Recorded]) -> dict[str, Tensor]:
    """Return gate times the derivative of the log-odds by stage, (L+1, H, W).

    Raises: ValueError if the score does not depend on the modulations.
    """
    if not score.requires_grad:
        raise ValueError(
            "The scores of this model carry no gradient, so that a detection cannot be explained."
        )
    rows = [record.projected for record in records]
    gradients = torch.autograd.grad(torch.logit(score, EPSILON), rows, allow_unused=True)
    result: dict[str, Tensor] = {}
    for record, gradient in zip(records, gradients, strict=True):
        part = torch.zeros_like(record.gates()) if gradient is None else record.gates(gradient)
        part = (record.gates() * part).detach().float().cpu()
        result[record.stage] = result.get(record.stage, 0) + part
    return result
