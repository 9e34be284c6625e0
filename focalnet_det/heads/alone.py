"""Necks and heads that see each image as if it were alone in its batch.

With ``valid_context``, a FocalNet's features of an image do not depend on batch padding. What
follows it would bring that back: the biases of a neck's convolutions fill the padding, and later
convolutions, norms over whole maps, RoIAlign and anchors outside the image read it. Here each of
these parts is given, in evaluation, the maps that the image would have alone, image by image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import FPN
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from torch import Tensor, nn

from ..backbones.d2 import ComputedFeatures
from ..backbones.stages import StagedBackbone
from ..compat import image_sizes_of
from ..ops.dispatch import traced

Extents = list[tuple[int, int]]


def see_images_alone(model: nn.Module) -> nn.Module:
    """Makes the evaluation of a Detectron2 model independent of batch padding.

    For models whose FocalNet has ``valid_context``; any other is left as it is. The classes of FPN,
    RPN head, dense heads, semantic FPN head and RoI poolers are replaced by subclasses; parameters
    and their names stay. Training and recorded graphs are not changed.

    Returns: the model.
    """
    if any(isinstance(m, StagedBackbone) and m.valid_context for m in model.modules()):
        for module in model.modules():
            for base, behaviour in BEHAVIOURS.items():
                if isinstance(module, base) and not isinstance(module, behaviour):
                    name = f"Alone{type(module).__name__}"
                    module.__class__ = type(name, (behaviour, type(module)), {})
    return model


class AloneFPN(FPN):
    """The features of each image from its own area, rounded up to the neck's divisor."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {name: map}, zero outside; each map notes the rows and columns filled."""
        sizes = image_sizes_of(x)
        if self.training or _recording() or sizes is None:
            return super().forward(x)
        features = self.bottom_up(x)
        whole, divisor = x.shape[-2:], max(self.size_divisibility, 1)
        sides = [[-(-int(side) // divisor) * divisor for side in size] for size in sizes]
        strides = {name: shape.stride for name, shape in self.bottom_up.output_shape().items()}
        images = []
        for i, side in enumerate(sides):
            own = {n: cropped(f, i, extent(side, strides[n])) for n, f in features.items()}
            images.append(super().forward(ComputedFeatures(own)))
        result = {}
        for name, shape in self.output_shape().items():
            maps = [image[name] for image in images]
            result[name] = joined(maps, extent(whole, shape.stride), 0.0)
            result[name].extents = [tuple(m.shape[-2:]) for m in maps]  # type: ignore[attr-defined]
        return result


class AloneDenseHead(nn.Module):
    """Of an RPN or a dense detector: without a score outside each image's own area."""

    def forward(self, features: list[Tensor]) -> Any:
        """Maps of all levels -> lists of maps, the first of which are logits."""
        extents = own_extents(self, features)
        if extents is None:
            return super().forward(features)
        images = [super(AloneDenseHead, self).forward(own) for own in each(features, extents)]
        sizes = [f.shape[-2:] for f in features]
        # Detectron2 drops what has no finite score or none above a threshold.
        return tuple(
            [
                joined([image[kind][level] for image in images], size, fill)
                for level, size in enumerate(sizes)
            ]
            for kind, fill in enumerate([-torch.inf] + [0.0] * (len(images[0]) - 1))
        )


class AlonePooler(nn.Module):
    """RoIAlign that ends where the image's own maps end."""

    def forward(self, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        """As in ``ROIPooler``."""
        extents = own_extents(self, x)
        if extents is None:
            return super().forward(x, box_lists)
        maps = each(x, extents)
        return torch.cat(
            [
                super(AlonePooler, self).forward(own, [boxes])
                for own, boxes in zip(maps, box_lists, strict=True)
            ]
        )


class AloneSemSegHead(nn.Module):
    """Semantic FPN's head on the image's own maps: its norms run over whole maps."""

    in_features: Sequence[str]

    def forward(self, features: dict[str, Tensor], targets: Any = None) -> Any:
        """As in ``SemSegFPNHead``; logits are zero outside."""
        names = list(self.in_features)
        maps = [features[name] for name in names]
        extents = own_extents(self, maps)
        if extents is None:
            return super().forward(features, targets)
        images = [
            super(AloneSemSegHead, self).forward(dict(zip(names, own, strict=True)))[0]
            for own in each(maps, extents)
        ]
        scale = images[0].shape[-1] // extents[0][0][1]
        size = [side * scale for side in maps[0].shape[-2:]]
        return joined(images, size, 0.0), {}


BEHAVIOURS: dict[type[nn.Module], type[nn.Module]] = {
    FPN: AloneFPN,
    StandardRPNHead: AloneDenseHead,
    RetinaNetHead: AloneDenseHead,
    ROIPooler: AlonePooler,
    SemSegFPNHead: AloneSemSegHead,
}


def _recording() -> bool:
    """Whether a graph is being recorded: of one image, as a rule."""
    return traced() or torch.compiler.is_compiling()


def extent(sides: Sequence[int], stride: int) -> tuple[int, int]:
    """Rows and columns of a map of that stride over (height, width), pixels."""
    return -(-int(sides[0]) // stride), -(-int(sides[1]) // stride)


def cropped(feature: Tensor, image: int, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (1, C, rows, columns) of one image."""
    return feature[image : image + 1, :, : size[0], : size[1]]


def own_extents(module: nn.Module, features: Sequence[Tensor]) -> list[Extents] | None:
    """Of each level, rows and columns of each image; None if there is nothing to set apart."""
    extents = [getattr(feature, "extents", None) for feature in features]
    if module.training or _recording() or any(level is None for level in extents):
        return None
    found: list[Extents] = [level for level in extents if level is not None]
    whole = all(
        size == tuple(feature.shape[-2:])
        for feature, level in zip(features, found, strict=True)
        for size in level
    )
    return None if whole and len(found[0]) == 1 else found


def each(features: Sequence[Tensor], extents: Sequence[Extents]) -> list[list[Tensor]]:
    """Of each image, its own maps of all levels."""
    return [
        [cropped(f, i, level[i]) for f, level in zip(features, extents, strict=True)]
        for i in range(len(extents[0]))
    ]


def joined(maps: Sequence[Tensor], size: Sequence[int], fill: float) -> Tensor:
    """Maps (1, C, h, w) of several images -> (N, C, H, W), filled at the right and the bottom."""
    result = maps[0].new_full((len(maps), maps[0].shape[1], int(size[0]), int(size[1])), fill)
    for i, own in enumerate(maps):
        result[i, :, : own.shape[-2], : own.shape[-1]] = own[0]
    return result
