"""DINO: DETR with improved denoising anchor boxes, for object detection."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ...layers.checks import check_flag, check_integer, check_number
from ...layers.padded_batch import padded_batch
from ..mmdet.segmentor import pad_and_stack_maps
from ..set_prediction.box_matching import BoxPrediction, BoxTarget
from ..set_prediction.box_numbers import to_xyxy
from ..set_prediction.levels import EncodedLevels, padding_masks, resized_padding
from ..set_prediction.position_encoding import SinePositionEncoding
from .box_criterion import DINOCriterion, DINOPredictions
from .box_decoder import refine_boxes
from .denoising import (
    DenoisingQueries,
    blocked_attention,
    build_queries,
    draw_noise,
    plan_groups,
)
from .dino_conventions import AUTO, CONVENTIONS, DEFAULT
from .dino_transformer import DINOTransformer, Selection, box_layers, class_layer
from .level_neck import LevelNeck

Record = Mapping[str, Any]
# Ids of COCO's 80 classes, 1..90, in their order.
COCO_IDS = tuple(int(row["id"]) for row in COCO_CATEGORIES if row["isthing"])
# Rows of the class layers of models that count COCO's ids from 0.
COCO_ROWS = 91


@META_ARCH_REGISTRY.register()
class DINO(nn.Module):
    """Backbone, neck, transformer, heads and losses.

    Parameters have the names of FocalNet-DINO; heads that its layers share are there once.

    Source: arXiv:2203.03605; FocalNet/FocalNet-DINO:models/dino/dino.py.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    position_temperature: Tensor
    class_rows: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        input_proj: LevelNeck,
        transformer: DINOTransformer,
        criterion: DINOCriterion,
        num_classes: int,
        conventions: str = AUTO,
        coco_ids: bool = False,
        denoising_queries: int = 100,
        label_noise: float = 0.25,
        max_detections_per_image: int = 300,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        input_format: str = "RGB",
    ) -> None:
        """Build the model.

        Args:
            conventions: "focalnet_dino" or "detrex", see `DINOConventions`; they belong to a file
                of weights. "auto" is detrex until a file of whole models is loaded, and then what
                the file has.
            coco_ids: whether the rows of the class layers are COCO's ids 0..90, as in files of
                FocalNet-DINO, rather than the 80 classes, which labels and results always are.
            denoising_queries: about half of the denoising queries of an image.
            label_noise: probability with which a denoising query has a random class.
            max_detections_per_image: most boxes of an image.
            pixel_mean, pixel_std: 0..255, in the order of ``input_format``.
        Raises: ValueError for a value out of range.
        """
        super().__init__()
        check_integer("denoising_queries", denoising_queries, 1, 65_536)
        check_number("label_noise", label_noise, 0, 1)
        check_integer("max_detections_per_image", max_detections_per_image, 1, 1_000_000)
        if conventions not in (AUTO, *CONVENTIONS):
            raise ValueError(
                f"Unknown conventions {conventions!r}. Known: {AUTO}, {', '.join(CONVENTIONS)}."
            )
        self.backbone, self.input_proj, self.transformer = backbone, input_proj, transformer
        self.criterion, self.num_classes, self.input_format = criterion, num_classes, input_format
        self.denoising_queries, self.label_noise = denoising_queries, label_noise
        self.max_detections_per_image = max_detections_per_image
        self.coco_ids, self.is_auto = coco_ids, conventions == AUTO
        rows = class_row_count(num_classes, coco_ids)
        if transformer.enc_out_class_embed.out_features != rows:
            raise ValueError(f"The transformer must have {rows} classes.")
        self.channels = channels = transformer.tgt_embed.embedding_dim
        self.position = SinePositionEncoding(channels)
        layers = len(transformer.decoder.layers)
        self.class_embed = nn.ModuleList(class_layer(channels, rows) for _ in range(layers))
        self.bbox_embed = nn.ModuleList(box_layers(channels) for _ in range(layers))
        self.label_enc = nn.Embedding(rows, channels)
        # Weights make sense with it alone, and no shape tells it.
        self.register_buffer("position_temperature", torch.tensor(0.0))
        ids = torch.tensor(COCO_IDS if coco_ids else range(num_classes))
        self.register_buffer("class_rows", ids, persistent=False)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.use_conventions(DEFAULT if self.is_auto else conventions)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.DINO``."""
        own, backbone = cfg.MODEL.DINO, build_backbone(cfg)
        parts = build_parts(
            select_features(backbone, own.IN_FEATURES),
            num_classes=own.NUM_CLASSES,
            coco_ids=own.COCO_IDS,
            scales=own.SCALES,
            queries=own.QUERIES,
            channels=own.CHANNELS,
            encoder_layers=own.ENCODER_LAYERS,
            decoder_layers=own.DECODER_LAYERS,
            feedforward=own.FEEDFORWARD,
        )
        return {
            "backbone": backbone,
            **parts,
            "num_classes": own.NUM_CLASSES,
            "conventions": own.CONVENTIONS,
            "coco_ids": own.COCO_IDS,
            "denoising_queries": own.DENOISING_QUERIES,
            "label_noise": own.LABEL_NOISE,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def use_conventions(self, name: str) -> None:
        """Follow the conventions of a library: heads become shared, or each layer's own.

        Call it before an optimizer is built: parameters may be replaced.

        Raises: KeyError for unknown conventions.
        """
        self.conventions, row = name, CONVENTIONS[name]
        self.position.temperature, self.position.offset = row.temperature, row.offset
        self.position_temperature.fill_(row.temperature)
        self.box_noise = row.box_noise
        count = 1 if row.shared_heads else len(self.transformer.decoder.layers)
        for heads in (self.class_embed, self.bbox_embed):
            while len(heads) > count:
                heads.pop(-1)
            while len(heads) < count:
                heads.append(copy.deepcopy(heads[0]))
        rows = self.transformer.enc_out_class_embed.out_features + row.spare_labels
        if self.label_enc.num_embeddings != rows:
            weight = self.label_enc.weight
            self.label_enc = nn.Embedding(rows, self.channels, device=weight.device)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[Record]) -> Any:
        """Return losses in training, else results.

        Args:
            batched_inputs: "image", (3, H, W), 0..255; in training "instances" with "gt_boxes" and
                "gt_classes"; "height", "width" of the wanted output.
        Returns: the losses in training; otherwise "instances" for each image, boxes not clipped.
        """
        images = [(r["image"].to(self.device) - self.pixel_mean) / self.pixel_std
                  for r in batched_inputs]  # fmt: skip
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch = pad_and_stack_maps(images, (0, 0), max(self.backbone.size_divisibility, 1), 0.0)
        with padded_batch(sizes):
            features = self.backbone(batch)
        padding = padding_masks(sizes, (batch.shape[-2], batch.shape[-1]), self.device)
        if self.training:
            targets = [box_target(record, self.device) for record in batched_inputs]
            targets = [t._replace(labels=self.class_rows[t.labels]) for t in targets]
            predictions = self.predict(features, padding, self.draw_denoising(targets))
            losses: dict[str, Tensor] = self.criterion(predictions, targets)
            return losses
        last = self.predict(features, padding).layers[-1]
        logits = last.logits.float()[..., self.class_rows]
        results = []
        for i, (record, size) in enumerate(zip(batched_inputs, sizes, strict=True)):
            output = (int(record.get("height", size[0])), int(record.get("width", size[1])))
            found = detections(logits[i], last.boxes[i], output, self.max_detections_per_image)
            results.append({"instances": found})
        return results

    def draw_denoising(self, targets: Sequence[BoxTarget]) -> DenoisingQueries:
        """Draw denoising queries for the objects of a batch."""
        layout = plan_groups(targets, self.denoising_queries)
        rows = self.transformer.enc_out_class_embed.out_features
        noise = draw_noise(targets, layout.groups, num_classes=rows, label_noise=self.label_noise)
        return build_queries(targets, noise, layout, self.box_noise)

    def predict(
        self,
        features: Mapping[str, Tensor],
        padding: Tensor,
        denoising: DenoisingQueries | None = None,
    ) -> DINOPredictions:
        """Predict classes and boxes from the features of a backbone.

        Args:
            features: (N, C_i, H_i, W_i) by name.
            padding: bool (N, H, W) of the images, True in batch padding.
            denoising: queries to restore; None in evaluation.
        """
        memory = self.encode(features, padding)
        selection = self.transformer.select(memory)
        layers = self.decode(selection, memory, denoising)
        width = 0 if denoising is None else denoising.layout.width
        return DINOPredictions(
            layers=[BoxPrediction(*(x[:, width:] for x in layer)) for layer in layers],
            encoder=selection.prediction,
            denoising=[BoxPrediction(*(x[:, :width] for x in layer)) for layer in layers],
            layout=None if denoising is None else denoising.layout,
        )

    def encode(self, features: Mapping[str, Tensor], padding: Tensor) -> EncodedLevels:
        """Return the encoded tokens of all levels; arguments as in `predict`."""
        maps = self.input_proj(features)
        masks = [resized_padding(padding, x) for x in maps]
        positions = [
            self.position((x.shape[-2], x.shape[-1]), mask, x.device)
            for x, mask in zip(maps, masks, strict=True)
        ]
        return self.transformer.encode(maps, positions, masks)

    def decode(
        self, selection: Selection, memory: EncodedLevels, denoising: DenoisingQueries | None
    ) -> list[BoxPrediction]:
        """Return the predictions after each layer, of denoising queries first."""
        count = len(self.transformer.decoder.layers)
        class_heads, box_heads = self._heads(self.class_embed), self._heads(self.bbox_embed)
        extra = None
        if denoising is not None:
            content = self.label_enc(denoising.labels.clamp(min=0))
            content = content * (denoising.labels >= 0)[..., None]
            queries = selection.tokens.shape[1]
            blocked = blocked_attention(denoising.layout, queries, content.device)
            extra = (content, denoising.boxes, blocked)
        decoded = self.transformer.decode(selection, memory, box_heads, extra)
        return [
            BoxPrediction(
                class_heads[i](decoded.content[i]),
                refine_boxes(box_heads[i], decoded.content[i], decoded.references[i]),
            )
            for i in range(count)
        ]

    def _heads(self, heads: nn.ModuleList) -> list[nn.Module]:
        """Return the head of each decoder layer."""
        return [heads[i % len(heads)] for i in range(len(self.transformer.decoder.layers))]


def class_row_count(num_classes: int, coco_ids: bool) -> int:
    """Return the number of rows of class layers.

    Raises: ValueError if rows are COCO's ids and the classes are not COCO's 80.
    """
    check_integer("num_classes", num_classes, 1, 65_536)
    check_flag("coco_ids", coco_ids)
    if coco_ids and num_classes != len(COCO_IDS):
        raise ValueError(
            f"coco_ids is for COCO's {len(COCO_IDS)} classes, num_classes is {num_classes}: set "
            "coco_ids to False."
        )
    return COCO_ROWS if coco_ids else num_classes


def box_target(record: Record, device: torch.device) -> BoxTarget:
    """Return the objects of a record, boxes relative to its image.

    Raises: ValueError if it has no "instances".
    """
    name = str(record.get("file_name", "without a file name"))
    objects = record.get("instances")
    if objects is None:
        raise ValueError(f"Image {name} has no `instances` to train on.")
    height, width = objects.image_size
    boxes = objects.gt_boxes.tensor.to(device, torch.float32)
    boxes = boxes / boxes.new_tensor([width, height, width, height])
    return BoxTarget(objects.gt_classes.to(device), boxes, name)


def detections(logits: Tensor, boxes: Tensor, size: tuple[int, int], limit: int) -> Instances:
    """Return the pairs of query and class of highest probability as instances.

    Args:
        logits: (Q, K).
        boxes: (Q, 4), cxcywh, 0..1.
        size: (height, width) of the output, pixels.
        limit: most instances.
    """
    scores, pairs = logits.sigmoid().flatten().topk(min(limit, logits.numel()))
    queries = pairs.div(logits.shape[1], rounding_mode="floor")
    scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    found = Instances(size)
    found.pred_boxes = Boxes(to_xyxy(boxes[queries]) * scale)
    found.scores, found.pred_classes = scores, pairs % logits.shape[1]
    return found


def select_features(backbone: Backbone, names: Sequence[str]) -> dict[str, Any]:
    """Return the shapes of features of a backbone by name, of all without names."""
    shapes = backbone.output_shape()
    return {name: shapes[name] for name in names or shapes}


def build_parts(
    input_shape: Mapping[str, Any],
    *,
    num_classes: int,
    coco_ids: bool = False,
    scales: int = 4,
    queries: int = 900,
    channels: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    feedforward: int = 2048,
) -> dict[str, Any]:
    """Build neck, transformer and losses for the features of a backbone.

    Args:
        input_shape: of the features to use.
        scales: number of levels; those that the backbone lacks are made by convolutions.
        queries, channels, encoder_layers, decoder_layers, feedforward: of `DINOTransformer`.
    """
    check_integer("channels", channels, 64, 8192)
    check_integer("scales", scales, 1, 16)
    return {
        "input_proj": LevelNeck(input_shape, channels=channels, levels=scales),
        "transformer": DINOTransformer(
            num_classes=class_row_count(num_classes, coco_ids),
            channels=channels,
            queries=queries,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            levels=scales,
            feedforward=feedforward,
        ),
        "criterion": DINOCriterion(),
    }


def dino(
    *,
    backbone: Backbone,
    num_classes: int,
    in_features: Sequence[str] = (),
    coco_ids: bool = False,
    **options: Any,
) -> DINO:
    """Build DINO on the features of a backbone: channel counts are read from it.

    Args:
        in_features: names of the features to use; all without any.
        options: of `build_parts` and of `DINO`.
    Raises: TypeError for an unknown option, ValueError for a value out of range.
    """
    part_options = {name: options.pop(name) for name in PART_OPTIONS if name in options}
    shared: dict[str, Any] = {"num_classes": num_classes, "coco_ids": coco_ids}
    parts = build_parts(select_features(backbone, in_features), **shared, **part_options)
    return DINO(backbone=backbone, **parts, **shared, **options)


PART_OPTIONS = (
    "scales",
    "queries",
    "channels",
    "encoder_layers",
    "decoder_layers",
    "feedforward",
)
