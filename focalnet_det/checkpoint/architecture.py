"""Infer from names and shapes which model of which library a state dict belongs to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .layouts.swin_resnet import find_peer_family, translate_peer
from .layouts.translate import translate
from .tensor_shapes import match_variant, visible_shapes

BACKGROUND, PLAIN, ANCHORS = "background", "plain", "anchors"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table of methods.

    Attributes:
        title: name for messages.
        signature: pattern of a name that the method has in the layout of some library.
        also: pattern of a second name that it must have, "" for none.
        classes: pattern of the weight of its classifier, "" if no weight shows the classes.
        counts: meaning of the classifier's rows: classes and background, classes, or classes of
            every anchor.
        recipes: glob of the recipes that build it, "" for none.
    """

    title: str
    signature: str
    also: str = ""
    classes: str = ""
    counts: str = PLAIN
    recipes: str = ""


_ROI_CLASSES = r"(bbox_head(\.0)?\.fc_cls|box_predictor(\.0)?\.cls_score)\.weight$"
_QUERY_CLASSES = r"(class_embed(\.0)?|cls_branches\.0|cls_embed|class_predictor)\.weight$"
_INSTANCES = "configs/COCO-InstanceSegmentation"

# The first match wins, so a method comes before those whose modules it also has.
METHODS: dict[str, Method] = {
    "xdecoder": Method(title="X-Decoder", signature=r"sem_seg_head\.predictor\.lang_encoder\."),
    "mask_dino": Method(
        title="Mask DINO", signature=r"sem_seg_head\.predictor\.(label_enc|enc_output)\."
    ),
    "mask2former": Method(
        title="Mask2Former",
        signature=r"\.(query_feat|queries_features|static_query)\.weight$",
        also=r"(pixel_decoder|pixel_level_module|sem_seg_head\.transformer)\.",
        classes=_QUERY_CLASSES,
        counts=BACKGROUND,
        recipes="configs/*/mask2former_*",
    ),
    "maskformer": Method(
        title="MaskFormer",
        signature=r"sem_seg_head\.predictor\.query_embed\.weight$",
        classes=_QUERY_CLASSES,
        counts=BACKGROUND,
    ),
    "sparse_rcnn": Method(
        title="Sparse R-CNN",
        signature=r"(^|\.)init_proposal_(bboxes|boxes|features)\.weight$",
        classes=r"(bbox_head\.0\.fc_cls|head_series\.0\.class_logits)\.weight$",
        recipes="configs/COCO-Detection/sparse_rcnn_*",
    ),
    "dino": Method(
        title="DINO",
        signature=r"(^|\.)(label_enc|label_embedding|tgt_embed)\.weight$",
        also=r"(^|\.)(transformer|decoder|encoder)\.",
        classes=_QUERY_CLASSES,
        recipes="configs/COCO-Detection/dino_*",
    ),
    "deformable_detr": Method(
        title="Deformable DETR",
        signature=r"(^|\.)(level_embed|level_embeds)$",
        also=r"(^|\.)(transformer|decoder|encoder)\.",
        classes=_QUERY_CLASSES,
    ),
    "detr": Method(
        title="DETR",
        signature=r"(^|\.)(query_embed|query_embedding|query_position_embeddings)\.weight$",
        classes=r"class_embed\.weight$",
        counts=BACKGROUND,
    ),
    "cascade_mask_rcnn": Method(
        title="Cascade Mask R-CNN",
        signature=r"roi_heads?\.(bbox_head|box_predictor)\.0\.(fc_cls|cls_score)\.weight$",
        also=r"roi_heads?\.mask_head\.",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
        recipes=f"{_INSTANCES}/cascade_mask_rcnn_*",
    ),
    "cascade_rcnn": Method(
        title="Cascade R-CNN",
        signature=r"roi_heads?\.(bbox_head|box_predictor)\.0\.(fc_cls|cls_score)\.weight$",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
    ),
    "keypoint_rcnn": Method(
        title="Keypoint R-CNN",
        signature=r"roi_heads?\.keypoint_(head|predictor)\.",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
        recipes="configs/COCO-Keypoints/keypoint_rcnn_*",
    ),
    "panoptic_fpn": Method(
        title="Panoptic FPN",
        signature=r"^(sem_seg_head\.predictor|semantic_head\.conv_logits)\.weight$",
        also=r"roi_heads?\.mask_head\.",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
        recipes="configs/COCO-PanopticSegmentation/panoptic_fpn_*",
    ),
    "mask_rcnn": Method(
        title="Mask R-CNN",
        signature=r"roi_heads?\.(mask_head\.(conv_logits|predictor)|mask_predictor\.mask_fcn_logits)\.",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
        recipes=f"{_INSTANCES}/mask_rcnn_*",
    ),
    "faster_rcnn": Method(
        title="Faster R-CNN",
        signature=r"roi_heads?\.(bbox_head\.fc_cls|box_predictor\.cls_score)\.weight$",
        classes=_ROI_CLASSES,
        counts=BACKGROUND,
        recipes="configs/COCO-Detection/faster_rcnn_*",
    ),
    "reppoints_v2": Method(
        title="RepPoints v2",
        signature=r"(reppoints_hem|shared_hem|hem_tl|reppoints_sem_out)",
        also=r"reppoints_cls_out\.",
        classes=r"reppoints_cls_out\.weight$",
        recipes="configs/COCO-Detection/reppoints_v2_*",
    ),
    "reppoints": Method(
        title="RepPoints",
        signature=r"reppoints_cls_out\.",
        classes=r"reppoints_cls_out\.weight$",
    ),
    "atss": Method(
        title="ATSS",
        signature=r"(^|\.)atss_(cls|reg|centerness)\.|^head\.scales\.",
        classes=r"(atss_cls|^head\.cls_score)\.weight$",
        recipes="configs/COCO-Detection/atss_*",
    ),
    "fcos": Method(
        title="FCOS",
        signature=r"^(head\.ctrness|bbox_head\.conv_centerness)\.",
        classes=r"head\.(cls_score|conv_cls)\.weight$",
        recipes="configs/COCO-Detection/fcos_*",
    ),
    "retinanet": Method(
        title="RetinaNet",
        signature=r"^(bbox_head\.retina_cls|head\.cls_score|head\.classification_head\.cls_logits)\.",
        classes=r"head\.(retina_cls|cls_score|classification_head\.cls_logits)\.weight$",
        counts=ANCHORS,
        recipes="configs/COCO-Detection/retinanet_*",
    ),
    "upernet": Method(
        title="UPerNet",
        signature=r"^(decode_head|sem_seg_head)\.psp_modules\.",
        classes=r"^(decode_head|sem_seg_head)\.conv_seg\.weight$",
        recipes="configs/ADE20K-SemanticSegmentation/upernet_*",
    ),
    "semantic_fpn": Method(
        title="Semantic FPN",
        signature=r"^(sem_seg_head\.p2\.0|decode_head\.scale_heads\.0)\.",
        classes=r"^(decode_head\.conv_seg|sem_seg_head\.predictor)\.weight$",
        recipes="configs/*-SemanticSegmentation/semantic_fpn_*",
    ),
    "mmseg": Method(
        title="segmentation model of mmseg",
        signature=r"^decode_head\.conv_seg\.",
        classes=r"^decode_head\.conv_seg\.weight$",
    ),
    "masked_images": Method(title="masked image model", signature=r"(^|\.)mask_token$"),
    "classifier": Method(
        title="classifier",
        signature=r"(^|\.)(head|fc|head\.fc|classifier|pred_w)(\.weight)?$",
        classes=r"(^|\.)(head|fc|head\.fc|classifier|pred_w)(\.weight)?$",
    ),
}
_FOCALNET = re.compile(r"focalnet_(\w+?)_(srf|lrf|fl3|fl4|iso|deeper)")
_FOCAL = re.compile(r"focal_(fast_)?(tiny|small|base|large)(_conv)?")
_SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L", "xlarge": "XL", "huge": "H"}
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}
# Blocks of two convolutions; those of three follow.
_BASIC_RESNETS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "ResNet-18",
    (3, 4, 6, 3): "ResNet-34",
}
_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "ResNet-50",
    (3, 4, 23, 3): "ResNet-101",
    (3, 8, 36, 3): "ResNet-152",
}


@dataclass(frozen=True)
class Architecture:
    """The model that a state dict belongs to.

    Attributes:
        method: key of ``METHODS``; None for a backbone alone or an unknown model.
        classes: number of classes without background; None if no tensor shows it.
        backbone: name for messages, such as "FocalNet-T LRF" or "ResNet-50"; None if unknown.
    """

    method: str | None
    classes: int | None
    backbone: str | None

    @property
    def is_detector(self) -> bool:
        """Tell whether it is a whole model with a head, for any task except classification."""
        return self.method not in (None, "classifier", "masked_images")

    def __str__(self) -> str:
        """Describe it, with an article: "a Cascade Mask R-CNN (80 classes, FocalNet-T LRF)"."""
        classes = None if self.classes is None else f"{self.classes} classes"
        if self.is_detector:
            title, details = METHODS[str(self.method)].title, [classes, self.backbone]
        else:
            kind = METHODS[self.method].title if self.method else "backbone"
            title, details = f"{self.backbone or ''} {kind}".strip(), [classes]
        known = ", ".join(detail for detail in details if detail)
        article = "an" if re.match(r"[AEIOU]|[FMSRX][-A-Z0-9]", title) else "a"
        return f"{article} {title}{f' ({known})' if known else ''}"


def find_method(names: Iterable[str]) -> str | None:
    """Return the method that names belong to, a key of ``METHODS``; None if no row fits."""
    names = list(names)
    for key, row in METHODS.items():
        if _has(row.signature, names) and (not row.also or _has(row.also, names)):
            return key
    return None


def _has(pattern: str, names: list[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def infer_architecture(tensors: Mapping[str, Tensor]) -> Architecture:
    """Infer the model that tensors belong to.

    Args:
        tensors: state dict in the names of any library, without containers.
    """
    method = find_method(tensors)
    classes = None if method is None else _count_classes(METHODS[method], tensors)
    return Architecture(method, classes, _name_backbone(tensors))


def _count_classes(row: Method, tensors: Mapping[str, Tensor]) -> int | None:
    name = next((n for n in tensors if row.classes and re.search(row.classes, n)), None)
    if name is None or tensors[name].ndim == 0:
        return None
    rows = tensors[name].shape[0]
    if row.counts == ANCHORS:
        # A box has four numbers per anchor.
        box = r"(retina_reg|bbox_pred|regression_head\.bbox_reg)\.weight$"
        boxes = next((t.shape[0] for n, t in tensors.items() if re.search(box, n)), 0)
        return 4 * rows // boxes if boxes >= 4 else None
    return rows - 1 if row.counts == BACKGROUND else rows


def _name_backbone(tensors: Mapping[str, Tensor]) -> str | None:
    family = find_peer_family(tensors)
    if family is not None:
        translation = translate_peer(tensors)
        backbone = {} if translation is None else translation.backbone
        return _name_swin(backbone) if family == "swin" else _name_resnet(backbone)
    try:
        shapes = visible_shapes(translate(tensors).backbone)
    except (ValueError, KeyError):
        return None
    match = match_variant(shapes)
    if match is not None:
        return name_variant(match[0])
    return "FocalNet" if "focal_levels" in shapes else "Focal Transformer"


def name_variant(variant: str) -> str:
    """Return the display name of a variant.

    "focalnet_tiny_lrf" is "FocalNet-T LRF", "focal_tiny_conv" is "Focal-T conv", and
    "focal_fast_tiny" is "Focal-T V2".
    """
    focal = _FOCAL.fullmatch(variant)
    if focal is not None:
        return f"Focal-{_SIZES[focal[2]]}{' V2' if focal[1] else ''}{' conv' if focal[3] else ''}"
    parts = _FOCALNET.fullmatch(variant)
    if parts is None:
        return variant
    return f"FocalNet-{_SIZES.get(parts[1], parts[1])} {parts[2].upper()}"


def _count(pattern: str, names: Iterable[str]) -> dict[int, int]:
    """Count the blocks of each stage; the pattern captures the indices of stage and block."""
    found = {(int(m[1]), int(m[2])) for m in (re.match(pattern, name) for name in names) if m}
    return {stage: sum(s == stage for s, _ in found) for stage in sorted({s for s, _ in found})}


def _name_swin(backbone: Mapping[str, Tensor]) -> str:
    stem = backbone.get("features.0.0.weight")
    depths = tuple(_count(r"features\.(\d+)\.(\d+)\.attn\.", backbone).values())
    return _SWINS.get((0 if stem is None else stem.shape[0], depths), "Swin")


def _name_resnet(backbone: Mapping[str, Tensor]) -> str:
    depths = tuple(_count(r"res(\d)\.(\d+)\.conv1\.", backbone).values())
    if any(".conv3." in name for name in backbone):
        return _RESNETS.get(depths, "ResNet")
    return _BASIC_RESNETS.get(depths, "ResNet")


def name_mismatch(tensors: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """Compare the architecture of a file with that of a model.

    Args:
        tensors: state dict of the file.
        model: state dict of the model that the config builds.
    Returns: None if both have the same method, or one has none; otherwise a phrase such as "this
        is a Cascade Mask R-CNN (80 classes, FocalNet-T LRF); the config builds a Mask R-CNN (80
        classes, FocalNet-T LRF); use configs/COCO-InstanceSegmentation/cascade_mask_rcnn_*".
    """
    file, built = infer_architecture(tensors), infer_architecture(model)
    if not (file.is_detector and built.is_detector) or file.method == built.method:
        return None
    recipes = METHODS[str(file.method)].recipes
    remedy = f"use {recipes}" if recipes else "no recipe of this package builds it"
    return f"this is {file}; the config builds {built}; {remedy}"
