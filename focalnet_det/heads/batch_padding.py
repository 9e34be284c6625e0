"""Make the predictions for an image independent of batch padding.

With ``valid_context``, the features of our backbones do not depend on batch padding. Necks and
heads would reintroduce the dependence: the biases of a neck's convolutions fill the padding, and
later convolutions, norms over whole maps, RoIAlign and anchors outside the image read it. In
evaluation, the classes below process each image on the maps that it would have in a batch of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.layers.wrappers import shapes_to_tensor
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from torch import Tensor, nn

from ..detectron2.backbone import ComputedFeatures
from ..layers.padded_batch import Extents, begin_batch, current_batch, end_batch
from ..layers.recast import replace_modules
from ..necks.bifpn import BiFPN
from ..ops.focal_block.policy import is_tracing
from .atss.atss_head import ATSSHead
from .empty import FiniteSemSegFPNHead
from .poolers import FastROIPooler
from .reppoints_v2.reppoints_head import RepPointsV2Head


def ignore_batch_padding(model: nn.Module) -> nn.Module:
    """Make the evaluation of a Detectron2 model independent of batch padding.

    Sets ``valid_context`` of its FocalNet or Focal Transformer, and replaces FPN, RPN head, dense
    heads, semantic FPN head and RoI poolers by the subclasses in ``PADDING_INVARIANT``; parameters
    and their names do not change. In training only the backbone ignores the padding, and recorded
    graphs contain the original modules.

    Args:
        model: a meta-architecture, called with a list of records with "image", (C, H, W). It is
            modified in place.
    Returns: the model.
    Raises: ValueError if the model has no such backbone, or has a subclass of one of these modules
        that is not in ``PADDING_INVARIANT``.
    """
    backbones = _focal_backbones(model)
    if not backbones:
        raise ValueError(
            f"This {type(model).__name__} has no FocalNet or Focal Transformer: other backbones "
            "cannot ignore batch padding."
        )
    for module in model.modules():
        known = type(module) in PADDING_INVARIANT or type(module) in PADDING_INVARIANT.values()
        if isinstance(module, tuple(PADDING_INVARIANT)) and not known:
            raise ValueError(
                f"{type(module).__name__} is not known to ignore batch padding: add a subclass "
                "that does to focalnet_det.heads.batch_padding.PADDING_INVARIANT."
            )
    for backbone in backbones:
        backbone.valid_context = True
    replace_modules(model, PADDING_INVARIANT)
    if _begin_batch not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin_batch)
        model.register_forward_hook(_end_batch, always_call=True)
    return model


def has_valid_context(model: nn.Module) -> bool:
    """Tell whether a backbone of the model was built with ``valid_context=True``."""
    return any(backbone.valid_context for backbone in _focal_backbones(model))


def _focal_backbones(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "valid_context")]


def _begin_batch(_: nn.Module, arguments: tuple[Sequence[Mapping[str, Any]]]) -> None:
    """Provide the image sizes of the records that a meta-architecture is called with."""
    shapes = [record["image"].shape[-2:] for record in arguments[0]]
    # In a traced graph numbers would be constants.
    begin_batch([shapes_to_tensor(s) if is_tracing() else (int(s[0]), int(s[1])) for s in shapes])


def _end_batch(*_: Any) -> None:
    end_batch()


class _PerImageNeck(Backbone):
    """Base class of necks that process the area of each image, rounded up to their divisor."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of a padded batch, zero outside each image.

        Args:
            x: (N, 3, H, W); the image sizes are those of the current batch.
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
            areas = {n: crop_image(f, i, map_size(side, strides[n])) for n, f in features.items()}
            images.append(super().forward(ComputedFeatures(areas)))
        result = {}
        for name, shape in self.output_shape().items():
            maps = [image[name] for image in images]
            size = map_size(x.shape[-2:], shape.stride)
            result[name] = pad_and_stack(maps, size, 0.0)
            batch.extents[size] = [(m.shape[-2], m.shape[-1]) for m in maps]
        return result


class PaddingInvariantFPN(_PerImageNeck, FPN):
    """Detectron2's FPN, image by image."""


class PaddingInvariantBiFPN(_PerImageNeck, BiFPN):
    """BiFPN, image by image."""


class _PerImageDenseHead(nn.Module):
    """Base class of heads on feature maps that predict nothing outside the area of each image."""

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Predict for all levels.

        Args:
            features: (N, C, H, W) of each level.
        Returns: lists of maps, one map (N, C', H, W) per level; the first list holds the logits,
            which are -inf outside each image.
        """
        extents = image_extents(self, features)
        if extents is None:
            return super().forward(features)
        images = [
            super(_PerImageDenseHead, self).forward(areas)
            for areas in split_images(features, extents)
        ]
        sizes = [f.shape[-2:] for f in features]
        # Detectron2 drops candidates whose scores are not finite or below a threshold.
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


class PaddingInvariantATSSHead(_PerImageDenseHead, ATSSHead):
    """ATSS's head, image by image."""


class PaddingInvariantRepPointsV2Head(_PerImageDenseHead, RepPointsV2Head):
    """RepPoints v2's head, image by image."""


class _PerImageROIPooler(nn.Module):
    """Base class of poolers that apply RoIAlign to the area of each image."""

    def forward(self, x: list[Tensor], box_lists: list[Any]) -> Tensor:
        """Pool the features of R boxes, (R, C, S, S); arguments as in ``ROIPooler``."""
        extents = image_extents(self, x)
        if extents is None:
            return super().forward(x, box_lists)
        maps = split_images(x, extents)
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
    """Detectron2's semantic FPN head, image by image, because its norms run over whole maps."""

    def forward(self, features: dict[str, Tensor], targets: Any = None) -> Any:
        """Predict logits (N, K, H, W), zero outside each image; arguments as in the base class."""
        names = list(self.in_features)
        maps = [features[name] for name in names]
        extents = image_extents(self, maps)
        if extents is None:
            return super().forward(features, targets)
        images = [
            super(PaddingInvariantSemSegFPNHead, self).forward(
                dict(zip(names, areas, strict=True))
            )[0]
            for areas in split_images(maps, extents)
        ]
        scale = images[0].shape[-1] // extents[0][0][1]
        size = [side * scale for side in maps[0].shape[-2:]]
        return pad_and_stack(images, size, 0.0), {}


# Class of Detectron2 -> its replacement.
PADDING_INVARIANT: dict[type[nn.Module], type[nn.Module]] = {
    FPN: PaddingInvariantFPN,
    BiFPN: PaddingInvariantBiFPN,
    StandardRPNHead: PaddingInvariantRPNHead,
    RetinaNetHead: PaddingInvariantRetinaNetHead,
    FCOSHead: PaddingInvariantFCOSHead,
    ATSSHead: PaddingInvariantATSSHead,
    RepPointsV2Head: PaddingInvariantRepPointsV2Head,
    ROIPooler: PaddingInvariantROIPooler,
    FastROIPooler: PaddingInvariantFastROIPooler,
    SemSegFPNHead: PaddingInvariantSemSegFPNHead,
    FiniteSemSegFPNHead: PaddingInvariantSemSegFPNHead,
}


def _is_recording_graph() -> bool:
    """Tell whether a graph is being recorded; graphs are usually recorded with one image."""
    return is_tracing() or torch.compiler.is_compiling()


def map_size(sides: Sequence[int], stride: int) -> tuple[int, int]:
    """Return (rows, columns) of a feature map of an image of (height, width), pixels."""
    return -(-int(sides[0]) // stride), -(-int(sides[1]) // stride)


def crop_image(feature: Tensor, image: int, size: tuple[int, int]) -> Tensor:
    """Crop a batch to the area of one image, (N, C, H, W) -> (1, C, rows, columns)."""
    return feature[image : image + 1, :, : size[0], : size[1]]


def image_extents(module: nn.Module, features: Sequence[Tensor]) -> list[Extents] | None:
    """Return the areas of the images in feature maps, level by level.

    Args:
        module: the module that processes the maps.
        features: (N, C, H, W) of each level.
    Returns: (rows, columns) of each image for each level. None if the maps are to be processed as a
        batch: in training, in recorded graphs, for a single image without padding, and for maps
        that a `PaddingInvariantFPN` did not compute.
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


def split_images(features: Sequence[Tensor], extents: Sequence[Extents]) -> list[list[Tensor]]:
    """Split batched maps into a list per image, with one map (1, C, rows, columns) per level."""
    return [
        [crop_image(f, i, level[i]) for f, level in zip(features, extents, strict=True)]
        for i in range(len(extents[0]))
    ]


def pad_and_stack(maps: Sequence[Tensor], size: Sequence[int], fill: float) -> Tensor:
    """Stack maps (1, C, h, w) of N images to (N, C, H, W), padded at the right and bottom.

    Args:
        maps: one map per image.
        size: (H, W) of the result.
        fill: value of the padding.
    """
    result = maps[0].new_full((len(maps), maps[0].shape[1], int(size[0]), int(size[1])), fill)
    for i, area in enumerate(maps):
        result[i, :, : area.shape[-2], : area.shape[-1]] = area[0]
    return result
