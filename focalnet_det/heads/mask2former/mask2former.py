"""Mask2Former: one model for semantic, instance and panoptic segmentation."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.checks import check_flag, check_integer, check_integers, check_number
from ...layers.padded_batch import padded_batch
from ..mmdet.segmentor import pad_and_stack_maps
from ..set_prediction.levels import padding_masks
from . import segmentation
from .mask_criterion import SetCriterion
from .mask_matcher import PUBLISHED_WEIGHTS, Weights
from .mask_targets import make_target
from .pixel_decoder import PixelDecoder
from .transformer_decoder import MaskedTransformerDecoder, Prediction

Record = Mapping[str, Any]
Size = tuple[int, int]
TASKS = ("semantic", "instance", "panoptic")


class Mask2FormerHead(nn.Module):
    """Pixel decoder and transformer decoder."""

    def __init__(self, pixel_decoder: PixelDecoder, predictor: MaskedTransformerDecoder) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def forward(
        self, features: Mapping[str, Tensor], padding: Tensor | None = None
    ) -> list[Prediction]:
        """Return the predictions of all layers; arguments as in `PixelDecoder`."""
        predictions: list[Prediction] = self.predictor(self.pixel_decoder(features, padding))
        return predictions


@META_ARCH_REGISTRY.register()
class Mask2Former(nn.Module):
    """Backbone, head, losses, and the three kinds of inference.

    Args:
        tasks: kinds of results: "semantic", "instance", "panoptic".
        things: classes that are instances, contiguous; None for all.
        pixel_mean, pixel_std: 0..255, in the order of ``input_format``.
        size_divisibility: of padded batches, pixels.
        train_size: smallest (height, width), pixels, that training batches are padded to.
        resize_masks_first: resize masks before they are combined, or combine them first, which
            differs in semantic results; None for what was published: first only where results
            are not semantic alone.
        object_threshold: smallest class probability of a panoptic segment, exclusive.
        overlap_threshold: smallest part of a panoptic segment that no other one covers.
        instances_per_image: most instances of an image.
        ignore_unlabeled: see `make_target`; off in the published models, for which pixels
            without a label are background of every mask.
        mask_padding: do not read batch padding behind the backbone; off in the published
            models. In evaluation, an image then has the same result in any batch, if the
            backbone ignores padding too (``valid_context``).
    Raises: ValueError if a task is unknown, none is asked for, or a value is out of range.
    Source: arXiv:2112.01527; facebookresearch/Mask2Former:mask2former/maskformer_model.py.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    # Read by test-time augmentation: semantic results are sums over queries, not logits.
    semantic_outputs_are_scores = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: Mask2FormerHead,
        criterion: SetCriterion,
        tasks: Sequence[str] = ("semantic",),
        things: Collection[int] | None = None,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
        size_divisibility: int = 32,
        train_size: tuple[int, int] | None = None,
        resize_masks_first: bool | None = None,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        instances_per_image: int = 100,
        ignore_unlabeled: bool = False,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        _check_tasks(tasks)
        check_integer("size_divisibility", size_divisibility, 1, 4096)
        check_integers("train_size", train_size or (), 0, 100_000)
        check_number("object_threshold", object_threshold, 0, 1)
        check_number("overlap_threshold", overlap_threshold, 0, 1)
        check_integer("instances_per_image", instances_per_image, 1, 1_000_000)
        check_flag("ignore_unlabeled", ignore_unlabeled)
        check_flag("mask_padding", mask_padding)
        self.backbone, self.sem_seg_head, self.criterion = backbone, sem_seg_head, criterion
        self.tasks = tuple(tasks)
        self.things = None if things is None else frozenset(int(k) for k in things)
        self.input_format = input_format
        self.size_divisibility = max(size_divisibility, backbone.size_divisibility)
        self.train_size = tuple(train_size or (0, 0))
        if resize_masks_first is None:
            resize_masks_first = self.tasks != ("semantic",)
        self.resize_masks_first = resize_masks_first
        self.object_threshold, self.overlap_threshold = object_threshold, overlap_threshold
        self.instances_per_image = instances_per_image
        self.ignore_unlabeled, self.mask_padding = ignore_unlabeled, mask_padding
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.MASK2FORMER``, and the numbers of classes from ``MODEL.SEM_SEG_HEAD``."""
        own, backbone = cfg.MODEL.MASK2FORMER, build_backbone(cfg)
        shapes = backbone.output_shape()
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
        ids = None if metadata is None else metadata.get("thing_dataset_id_to_contiguous_id")
        parts = build_parts(
            {name: shapes[name] for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES},
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            queries=own.QUERIES,
            channels=own.CHANNELS,
            encoder_layers=own.ENCODER_LAYERS,
            decoder_layers=own.DECODER_LAYERS,
            points=own.POINTS,
            weights=Weights(own.CLASS_WEIGHT, own.MASK_WEIGHT, own.DICE_WEIGHT),
            no_object_weight=own.NO_OBJECT_WEIGHT,
        )
        return {
            "backbone": backbone,
            **parts,
            "tasks": tuple(own.TASKS),
            "things": None if "panoptic" not in own.TASKS else sorted((ids or {}).values()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "train_size": own.TRAIN_SIZE or None,
            "object_threshold": own.OBJECT_THRESHOLD,
            "overlap_threshold": own.OVERLAP_THRESHOLD,
            "instances_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "ignore_unlabeled": own.IGNORE_UNLABELED,
            "mask_padding": own.MASK_PADDING,
        }

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Record]) -> Any:
        """Return losses in training, else results.

        Args:
            batched_inputs: "image", (3, H, W), 0..255; in training labels as `make_target` takes
                them; "height", "width" of the wanted output.
        Returns: the losses in training; otherwise for each image, by task, "sem_seg": scores
            (K, H, W); "panoptic_seg": (segments (H, W), their descriptions); "instances".
        """
        images = [(r["image"].to(self.device) - self.pixel_mean) / self.pixel_std
                  for r in batched_inputs]  # fmt: skip
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        least = self.train_size if self.training else (0, 0)
        batch = pad_and_stack_maps(images, least, self.size_divisibility, 0.0)
        padded = (batch.shape[-2], batch.shape[-1])
        with padded_batch(sizes):
            features = self.backbone(batch)
        if self.training:
            return self.losses(features, batched_inputs, sizes, padded)
        if self.mask_padding:
            alone = [self._predict_alone(features, i, size) for i, size in enumerate(sizes)]
        else:
            final = self.sem_seg_head(features)[-1]
            alone = [
                (Prediction(*(x[i : i + 1] for x in final)), padded) for i in range(len(sizes))
            ]
        results = []
        for record, size, (prediction, padded_size) in zip(
            batched_inputs, sizes, alone, strict=True
        ):
            output = (int(record.get("height", size[0])), int(record.get("width", size[1])))
            results.append(self.results(prediction, padded_size, size, output))
        return results

    def losses(
        self,
        features: Mapping[str, Tensor],
        records: Sequence[Record],
        sizes: Sequence[Size],
        padded: Size,
    ) -> dict[str, Tensor]:
        """Return the weighted losses of a batch.

        Args:
            features: of the backbone.
            sizes, padded: (height, width), pixels, of the images and of the batch.
        Raises: FloatingPointError that names the image if a matching cost is not finite.
        """
        targets = [
            make_target(
                record,
                things=self.things,
                ignore_unlabeled=self.ignore_unlabeled,
                device=self.device,
            )
            for record in records
        ]
        padding = padding_masks(sizes, padded, self.device) if self.mask_padding else None
        losses: dict[str, Tensor] = self.criterion(
            self.sem_seg_head(features, padding), targets, padded
        )
        return losses

    def _predict_alone(
        self, features: Mapping[str, Tensor], image: int, size: Size
    ) -> tuple[Prediction, Size]:
        """Return what a batch of this image alone would give, and that batch's size."""
        divisor = self.size_divisibility
        padded = (-(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor)
        shapes = self.backbone.output_shape()
        own = {}
        for name, x in features.items():
            rows, columns = (-(-side // shapes[name].stride) for side in padded)
            own[name] = x[image : image + 1, :, :rows, :columns]
        padding = padding_masks([size], padded, self.device)
        return self.sem_seg_head(own, padding)[-1], padded

    def results(
        self, prediction: Prediction, padded: Size, size: Size, output: Size
    ) -> dict[str, Any]:
        """Return the results of one image, by task.

        Args:
            prediction: of this image alone, N = 1.
            padded, size, output: (height, width), pixels, of the padded image, of the image in it,
                and of the result.
        """
        classes = prediction.class_logits[0]
        masks = prediction.mask_logits()[0].float()
        found: dict[str, Any] = {}
        if "semantic" in self.tasks:
            if self.resize_masks_first:
                resized = segmentation.resize_masks(masks, padded, size, output)
                found["sem_seg"] = segmentation.semantic_scores(classes, resized)
            else:
                whole = F.interpolate(masks[None], size=padded, mode="bilinear")[0]
                scores = segmentation.semantic_scores(classes, whole)
                found["sem_seg"] = segmentation.crop_and_resize(scores, size, output)
        if "panoptic" in self.tasks:
            queries, scores, labels = segmentation.panoptic_queries(classes, self.object_threshold)
            resized = segmentation.resize_masks(masks[queries], padded, size, output)
            things = range(classes.shape[-1] - 1) if self.things is None else self.things
            found["panoptic_seg"] = segmentation.panoptic_segments(
                scores, labels, resized, things, self.overlap_threshold
            )
        if "instance" in self.tasks:
            queries, labels, scores = segmentation.instance_candidates(
                classes, self.instances_per_image, self.things
            )
            resized = segmentation.resize_masks(masks[queries.unique()], padded, size, output)
            found["instances"] = segmentation.instances(queries, labels, scores, resized, output)
        return found


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"tasks must name one or more of {', '.join(TASKS)}; got {tasks}.")


def build_parts(
    input_shape: Mapping[str, Any],
    *,
    num_classes: int,
    queries: int = 100,
    channels: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 9,
    points: int = 12_544,
    weights: Weights | Sequence[float] = PUBLISHED_WEIGHTS,
    no_object_weight: float = 0.1,
) -> dict[str, Any]:
    """Build the head and the losses for the features of a backbone.

    Args:
        input_shape: of the features to use.
        channels: of both decoders and of the per-pixel embeddings; feed-forward networks have four
            and eight times as many.
        encoder_layers, decoder_layers: numbers of layers.
        points, weights, no_object_weight: of `SetCriterion`.
    """
    pixel_decoder = PixelDecoder(
        input_shape,
        channels=channels,
        mask_channels=channels,
        layers=encoder_layers,
        feedforward=4 * channels,
    )
    predictor = MaskedTransformerDecoder(
        num_classes=num_classes,
        channels=channels,
        mask_channels=channels,
        queries=queries,
        layers=decoder_layers,
        levels=len(input_shape) - 1,
        feedforward=8 * channels,
    )
    return {
        "sem_seg_head": Mask2FormerHead(pixel_decoder, predictor),
        "criterion": SetCriterion(
            num_classes=num_classes,
            weights=weights,
            no_object_weight=no_object_weight,
            points=points,
        ),
    }


def mask2former(
    *, backbone: Backbone, num_classes: int, in_features: Sequence[str] = (), **options: Any
) -> Mask2Former:
    """Build Mask2Former on the features of a backbone: channel counts are read from it.

    Args:
        in_features: names of the features to use; all without any.
        options: of `build_parts` and of `Mask2Former`.
    Raises: TypeError for an unknown option, ValueError for a value out of range.
    """
    shapes = backbone.output_shape()
    names = list(in_features or shapes)
    head = {name: options.pop(name) for name in HEAD_OPTIONS if name in options}
    parts = build_parts({name: shapes[name] for name in names}, num_classes=num_classes, **head)
    return Mask2Former(backbone=backbone, **parts, **options)


HEAD_OPTIONS = (
    "queries",
    "channels",
    "encoder_layers",
    "decoder_layers",
    "points",
    "weights",
    "no_object_weight",
)
