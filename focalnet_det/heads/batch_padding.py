"""Necks and heads that make the detections of an image independent of batch padding.

With ``valid_context``, our backbones' features of an image do not depend on batch padding. What
follows them would bring that back: the biases of a neck's convolutions fill the padding, and later
convolutions, norms over whole maps, RoIAlign and anchors outside the image read it. Here each of
these parts is given, in evaluation, the maps that a batch of this one image would have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers.wrappers import shapes_to_tensor
from detectron2.modeling import FPN
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from torch import Tensor, nn

from ..detectron2.backbone import ComputedFeatures
from ..layers.padded_batch import Extents, begin_batch, current_batch, end_batch
from ..layers.recast import replace_modules
from ..ops.dispatch import is_tracing
from .empty import FiniteSemSegFPNHead
from .poolers import FastROIPooler


def ignore_batch_padding(model: nn.Module) -> nn.Module:
    """Make the evaluation of a Detectron2 model independent of batch padding.

    Its FocalNet or Focal Transformer gets ``valid_context``. FPN, RPN head, dense heads, semantic
    FPN head and RoI poolers are replaced by the subclasses in ``PADDING_INVARIANT``; parameters and
    their names stay. In training only the backbone ignores the padding, and a graph that is
    recorded holds the original parts.

    Args:
        model: a meta-architecture, called with a list of records with "image", (C, H, W).
    Returns: the model.
    Raises: ValueError if there is neither of them in it, or a subclass of one of these parts that
        has no entry in ``PADDING_INVARIANT``.
    """
    backbones = _focal_backbones(model)
    if not backbones:
        raise ValueError(
            f"This {type(model).__name__} has no FocalNet or Focal Transformer: no other backbone "
            "can ignore padding."
        )
    for module in model.modules():
        known = type(module) in PADDING_INVARIANT or type(module) in PADDING_INVARIANT.values()
        if isinstance(module, tuple(PADDING_INVARIANT)) and not known:
            raise ValueError(
                f"{type(module).__name__} is not known to ignore batch padding: add a subclass of "
                "it that does to focalnet_det.heads.batch_padding.PADDING_INVARIANT."
            )
    for backbone in backbones:
        backbone.valid_context = True
    replace_modules(model, PADDING_INVARIANT)
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)
    return model


def has_valid_context(model: nn.Module) -> bool:
    """Return whether a config has asked for features that are independent of batch padding."""
    return any(backbone.valid_context for backbone in _focal_backbones(model))


def _focal_backbones(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "valid_context")]


def _begin(_: nn.Module, arguments: tuple[Sequence[Mapping[str, Any]]]) -> None:
    """Give the image sizes of the records that a meta-architecture is called with."""
    shapes = [record["image"].shape[-2:] for record in arguments[0]]
    # A traced graph must not fix the sizes.
    begin_batch([shapes_to_tensor(s) if is_tracing() else (int(s[0]), int(s[1])) for s in shapes])


def _end(*_: Any) -> None:
    end_batch()


class PaddingInvariantFPN(FPN):
    """FPN that computes each image from its own area, rounded up to the neck's divisor."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of a padded batch, zero outside each image.

        Args:
            x: (N, 3, H, W); the sizes of its images are those of the current batch.
        Returns: {name: (N, C, ceil(H / stride), ceil(W / stride))}.
        """
        batch = current_batch()
        if self.training or _is_recording_graph() or batch is None:
            return super().forward(x)
        features = self.bottom_up(x)
        divisor = max(self.size_divisibility, 1)
        sides = [[-(-int(side) // divisor) * divisor for side in s] for s in batch.image_sizes]
        strides = {name: shape.stride for name, shape in self.bottom_up.output_shape().items()}
        images = []
        for i, side in enumerate(sides):
            areas = {n: crop(f, i, extent(side, strides[n])) for n, f in features.items()}
            images.append(super().forward(ComputedFeatures(areas)))
        result = {}
        for name, shape in self.output_shape().items():
            maps = [image[name] for image in images]
            size = extent(x.shape[-2:], shape.stride)
            result[name] = pad_and_stack(maps, size, 0.0)
            batch.extents[size] = [(m.shape[-2], m.shape[-1]) for m in maps]
        return result


class _PerImageDenseHead(nn.Module):
    """An RPN's or a dense detector's head that gives no score outside each image's area."""

    def forward(self, features: list[Tensor]) -> Any:
        """Return lists of maps of all levels, the first of which are logits."""
        extents = extents_of(self, features)
        if extents is None:
            return super().forward(features)
        images = [
            super(_PerImageDenseHead, self).forward(areas) for areas in split(features, extents)
        ]
        sizes = [f.shape[-2:] for f in features]
        # Detectron2 drops what has no finite score or none above a threshold.
        return tuple(
            [
                pad_and_stack([image[kind][level] for image in images], size, fill)
                for level, size in enumerate(sizes)
            ]
            for kind, fill in enumerate([-torch.inf] + [0.0] * (len(images[0]) - 1))
        )


class PaddingInvariantRPNHead(_PerImageDenseHead, StandardRPNHead):
    """Detectron2's RPN head, image by image."""


class PaddingInvariantRetinaNetHead(_PerImageDenseHead, RetinaNetHead):
    """Detectron2's RetinaNet head, image by image."""


class PaddingInvariantFCOSHead(_PerImageDenseHead, FCOSHead):
    """Detectron2's FCOS head, image by image."""


class _PerImageROIPooler(nn.Module):
    """RoIAlign on maps that end where each image's area ends."""

    def forward(self, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        """Return the features of all boxes, (R, C, S, S); arguments as in ``ROIPooler``."""
        extents = extents_of(self, x)
        if extents is None:
            return super().forward(x, box_lists)
        maps = split(x, extents)
        return torch.cat(
            [
                super(_PerImageROIPooler, self).forward(areas, [boxes])
                for areas, boxes in zip(maps, box_lists, strict=True)
            ]
        )


class PaddingInvariantROIPooler(_PerImageROIPooler, ROIPooler):
    """Detectron2's RoI pooler, image by image."""


class PaddingInvariantFastROIPooler(_PerImageROIPooler, FastROIPooler):
    """The fast RoI pooler, image by image."""


class PaddingInvariantSemSegFPNHead(FiniteSemSegFPNHead):
    """Semantic FPN's head, image by image: its norms run over whole maps."""

    def forward(self, features: dict[str, Tensor], targets: Any = None) -> Any:
        """Return logits, zero outside each image; arguments as in ``SemSegFPNHead``."""
        names = list(self.in_features)
        maps = [features[name] for name in names]
        extents = extents_of(self, maps)
        if extents is None:
            return super().forward(features, targets)
        images = [
            super(PaddingInvariantSemSegFPNHead, self).forward(
                dict(zip(names, areas, strict=True))
            )[0]
            for areas in split(maps, extents)
        ]
        scale = images[0].shape[-1] // extents[0][0][1]
        size = [side * scale for side in maps[0].shape[-2:]]
        return pad_and_stack(images, size, 0.0), {}


# A part of Detectron2, and what replaces it.
PADDING_INVARIANT: dict[type[nn.Module], type[nn.Module]] = {
    FPN: PaddingInvariantFPN,
    StandardRPNHead: PaddingInvariantRPNHead,
    RetinaNetHead: PaddingInvariantRetinaNetHead,
    FCOSHead: PaddingInvariantFCOSHead,
    ROIPooler: PaddingInvariantROIPooler,
    FastROIPooler: PaddingInvariantFastROIPooler,
    SemSegFPNHead: PaddingInvariantSemSegFPNHead,
    FiniteSemSegFPNHead: PaddingInvariantSemSegFPNHead,
}


def _is_recording_graph() -> bool:
    """Return whether a graph is being recorded, which as a rule is of one image."""
    return is_tracing() or torch.compiler.is_compiling()


def extent(sides: Sequence[int], stride: int) -> tuple[int, int]:
    """Return rows and columns of a map of that stride over (height, width), pixels."""
    return -(-int(sides[0]) // stride), -(-int(sides[1]) // stride)


def crop(feature: Tensor, image: int, size: tuple[int, int]) -> Tensor:
    """Return the area of one image, (N, C, H, W) -> (1, C, rows, columns)."""
    return feature[image : image + 1, :, : size[0], : size[1]]


def extents_of(module: nn.Module, features: Sequence[Tensor]) -> list[Extents] | None:
    """Return what each image covers of the maps, level by level.

    None in training, in graphs, and where the maps are not of a `PaddingInvariantFPN` or are those
    of one image without padding.
    """
    batch = current_batch()
    if module.training or batch is None or _is_recording_graph():
        return None
    sizes = [(f.shape[-2], f.shape[-1]) for f in features]
    if not all(size in batch.extents for size in sizes):
        return None
    extents = [batch.extents[size] for size in sizes]
    whole = all(set(level) == {size} for size, level in zip(sizes, extents, strict=True))
    return None if whole and len(extents[0]) == 1 else extents


def split(features: Sequence[Tensor], extents: Sequence[Extents]) -> list[list[Tensor]]:
    """Return the maps of each image, of all levels."""
    return [
        [crop(f, i, level[i]) for f, level in zip(features, extents, strict=True)]
        for i in range(len(extents[0]))
    ]


def pad_and_stack(maps: Sequence[Tensor], size: Sequence[int], fill: float) -> Tensor:
    """Return maps (1, C, h, w) of several images as (N, C, H, W), filled right and below."""
    result = maps[0].new_full((len(maps), maps[0].shape[1], int(size[0]), int(size[1])), fill)
    for i, area in enumerate(maps):
        result[i, :, : area.shape[-2], : area.shape[-1]] = area[0]
    return result
