"""Which model a file is, by its names in the libraries that write it, and what is said of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from focalnet_det.checkpoint import inspect_checkpoint
from focalnet_det.checkpoint.architecture import (
    METHODS,
    Architecture,
    find_method,
    infer_architecture,
    name_mismatch,
    name_variant,
)
from tests.helpers.paths import ROOT
from tests.helpers.published import LAYOUTS, official

Shapes = dict[str, tuple[int, ...]]
# A few telling names and shapes of each method, by the library that writes them.
MODELS: list[tuple[str, int | None, str, Shapes]] = [
    (
        "cascade_mask_rcnn",
        80,
        "mmdet",
        {
            "roi_head.bbox_head.0.fc_cls.weight": (81, 8),
            "roi_head.bbox_head.1.fc_cls.weight": (81, 8),
            "roi_head.mask_head.0.conv_logits.weight": (80, 8, 1, 1),
        },
    ),
    (
        "cascade_mask_rcnn",
        3,
        "detectron2",
        {
            "roi_heads.box_predictor.0.cls_score.weight": (4, 8),
            "roi_heads.mask_head.predictor.weight": (3, 8, 1, 1),
        },
    ),
    ("cascade_rcnn", 80, "mmdet", {"roi_head.bbox_head.0.fc_cls.weight": (81, 8)}),
    (
        "mask_rcnn",
        80,
        "mmdet",
        {
            "neck.fpn_convs.0.conv.weight": (8, 8, 3, 3),
            "roi_head.bbox_head.fc_cls.weight": (81, 8),
            "roi_head.mask_head.conv_logits.weight": (80, 8, 1, 1),
        },
    ),
    (
        "mask_rcnn",
        90,
        "torchvision",
        {
            "roi_heads.box_predictor.cls_score.weight": (91, 8),
            "roi_heads.mask_predictor.mask_fcn_logits.weight": (91, 8, 1, 1),
        },
    ),
    ("faster_rcnn", 2, "detectron2", {"roi_heads.box_predictor.cls_score.weight": (3, 8)}),
    (
        "keypoint_rcnn",
        1,
        "detectron2",
        {
            "roi_heads.box_predictor.cls_score.weight": (2, 8),
            "roi_heads.keypoint_head.score_lowres.weight": (8, 17, 4, 4),
        },
    ),
    (
        "panoptic_fpn",
        80,
        "detectron2",
        {
            "roi_heads.box_predictor.cls_score.weight": (81, 8),
            "roi_heads.mask_head.predictor.weight": (80, 8, 1, 1),
            "sem_seg_head.p2.0.weight": (8, 8, 3, 3),
            "sem_seg_head.predictor.weight": (54, 8, 1, 1),
        },
    ),
    (
        "retinanet",
        80,
        "mmdet",
        {
            "bbox_head.retina_cls.weight": (720, 8, 3, 3),
            "bbox_head.retina_reg.weight": (36, 8, 3, 3),
        },
    ),
    (
        "retinanet",
        5,
        "detectron2",
        {"head.cls_score.weight": (45, 8, 3, 3), "head.bbox_pred.weight": (36, 8, 3, 3)},
    ),
    (
        "fcos",
        80,
        "detectron2",
        {"head.cls_score.weight": (80, 8, 3, 3), "head.ctrness.weight": (1, 8, 3, 3)},
    ),
    (
        "fcos",
        80,
        "mmdet",
        {
            "bbox_head.conv_cls.weight": (80, 8, 3, 3),
            "bbox_head.conv_centerness.weight": (1, 8, 3, 3),
        },
    ),
    (
        "atss",
        80,
        "mmdet",
        {
            "bbox_head.atss_cls.weight": (80, 8, 3, 3),
            "bbox_head.atss_centerness.weight": (1, 8, 3, 3),
        },
    ),
    (
        "atss",
        80,
        "detectron2",
        {
            "head.cls_score.weight": (80, 8, 3, 3),
            "head.ctrness.weight": (1, 8, 3, 3),
            "head.scales.0.scale": (),
        },
    ),
    (
        "reppoints_v2",
        80,
        "mmdet",
        {
            "bbox_head.reppoints_cls_out.weight": (80, 8, 1, 1),
            "bbox_head.reppoints_hem_tl_score_out.weight": (1, 8, 1, 1),
        },
    ),
    (
        "upernet",
        150,
        "mmseg",
        {
            "decode_head.psp_modules.0.1.conv.weight": (8, 8, 1, 1),
            "decode_head.conv_seg.weight": (150, 8, 1, 1),
        },
    ),
    (
        "semantic_fpn",
        150,
        "mmseg",
        {
            "decode_head.scale_heads.0.0.conv.weight": (8, 8, 3, 3),
            "decode_head.conv_seg.weight": (150, 8, 1, 1),
        },
    ),
    ("mmseg", 19, "mmseg", {"decode_head.conv_seg.weight": (19, 8, 1, 1)}),
    (
        "mask2former",
        80,
        "its own code",
        {
            "sem_seg_head.predictor.query_feat.weight": (100, 8),
            "sem_seg_head.predictor.class_embed.weight": (81, 8),
            "sem_seg_head.pixel_decoder.transformer.level_embed": (3, 8),
        },
    ),
    (
        "mask2former",
        133,
        "mmdet",
        {
            "panoptic_head.query_feat.weight": (100, 8),
            "panoptic_head.cls_embed.weight": (134, 8),
            "panoptic_head.pixel_decoder.level_encoding.weight": (3, 8),
        },
    ),
    (
        "xdecoder",
        None,
        "its own code",
        {
            "sem_seg_head.predictor.query_feat.weight": (100, 8),
            "sem_seg_head.predictor.lang_encoder.logit_scale": (),
            "sem_seg_head.pixel_decoder.mask_features.weight": (8, 8, 1, 1),
        },
    ),
    (
        "dino",
        91,
        "its own code",
        {
            "transformer.level_embed": (4, 8),
            "label_enc.weight": (92, 8),
            "class_embed.0.weight": (91, 8),
        },
    ),
    (
        "dino",
        80,
        "mmdet",
        {
            "bbox_head.cls_branches.0.weight": (80, 8),
            "dn_query_generator.label_embedding.weight": (80, 8),
            "level_embed": (4, 8),
            "encoder.layers.0.norms.0.weight": (8,),
        },
    ),
    (
        "deformable_detr",
        91,
        "its own code",
        {"transformer.level_embed": (4, 8), "class_embed.0.weight": (91, 8)},
    ),
    (
        "detr",
        91,
        "its own code",
        {"query_embed.weight": (100, 8), "class_embed.weight": (92, 8)},
    ),
    (
        "sparse_rcnn",
        80,
        "mmdet",
        {
            "rpn_head.init_proposal_bboxes.weight": (100, 4),
            "rpn_head.init_proposal_features.weight": (100, 8),
            "roi_head.bbox_head.0.fc_cls.weight": (80, 8),
        },
    ),
    (
        "sparse_rcnn",
        80,
        "its own code",
        {"init_proposal_boxes.weight": (100, 4), "head.head_series.0.class_logits.weight": (80, 8)},
    ),
]


def state(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("method", "classes", "library", "shapes"), MODELS, ids=[f"{m}-{w}" for m, _, w, _ in MODELS]
)
def test_methods_and_class_counts(
    method: str, classes: int | None, library: str, shapes: Shapes
) -> None:
    found = infer_architecture(state(shapes))
    assert (found.method, found.classes, found.backbone) == (method, classes, None), library
    assert found.is_detector


def test_backbones_alone_and_unknown_models() -> None:
    assert find_method(["layer1.0.conv1.weight", "bn1.weight"]) is None
    assert str(infer_architecture({"a": torch.ones(1)})) == "a backbone"
    tiny = official("focalnet_tiny_lrf")
    assert (
        str(infer_architecture(tiny))
        == f"a FocalNet classifier ({len(tiny['head.weight'])} classes)"
    )


def full_width() -> dict[str, Tensor]:
    """The shapes of FocalNet-T LRF in a Cascade Mask R-CNN of mmdet's; nothing is allocated."""
    from focalnet_det import create_backbone

    with torch.device("meta"):
        net = create_backbone("focalnet_tiny_lrf")
    tensors = {f"backbone.{n}": t for n, t in net.state_dict().items()}
    return tensors | state(MODELS[0][3])


def test_the_sentence() -> None:
    file = full_width()
    assert str(infer_architecture(file)) == "a Cascade Mask R-CNN (80 classes, FocalNet-T LRF)"
    model = state(MODELS[3][3])
    assert name_mismatch(file, model) == (
        "this is a Cascade Mask R-CNN (80 classes, FocalNet-T LRF); the config builds a Mask R-CNN "
        "(80 classes); use configs/COCO-InstanceSegmentation/cascade_mask_rcnn_*"
    )
    assert name_mismatch(model, model) is None
    # A classifier may start any model.
    assert name_mismatch(official("focalnet_nano"), model) is None
    assert str(Architecture("atss", 80, None)) == "an ATSS (80 classes)"
    assert str(Architecture("fcos", None, "Swin-T")) == "an FCOS (Swin-T)"


MISFITS = [row for row in MODELS if row[0] != "mask_rcnn"]


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_a_file_of_another_method_is_named(number: int, tmp_path: Path) -> None:
    """Into a Mask R-CNN of Detectron2, by the loading of train.init_checkpoint."""
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from detectron2.config import instantiate

    from focalnet_det.checkpoint import load_initial_weights
    from focalnet_det.experiment import load_config

    method, classes, _, shapes = MISFITS[number]
    leaf = ROOT / "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"
    model = instantiate(load_config(str(leaf), ["model.backbone.bottom_up.embed_dim=8"]).model)
    file = LAYOUTS["mmdet"](official("focalnet_nano")) | state(shapes)
    torch.save({"state_dict": file}, tmp_path / "epoch_12.pth")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    title = METHODS[method].title
    counted = "" if classes is None else f"{classes} classes, "
    recipes = METHODS[method].recipes
    remedy = f"use {recipes}" if recipes else "no recipe of this package builds it"
    for new_classes in (True, False):
        with pytest.raises(ValueError, match="nothing was loaded") as caught:
            load_initial_weights(model, tmp_path / "epoch_12.pth", new_classes=new_classes)
        text = str(caught.value)
        assert "epoch_12.pth does not fit, nothing was loaded: this is a" in text
        assert (
            f" {title} ({counted}FocalNet); the config builds a Mask R-CNN (6 classes, FocalNet)"
            in text
        )
        assert remedy in text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert inspect_checkpoint(tmp_path / "epoch_12.pth").method == method


def test_recipes_exist() -> None:
    for row in METHODS.values():
        if row.recipes:
            assert list(ROOT.glob(row.recipes)), row.recipes


def test_names_of_variants() -> None:
    assert name_variant("focalnet_xlarge_fl4") == "FocalNet-XL FL4"
    assert name_variant("focalnet_base_deeper") == "FocalNet-B DEEPER"
    assert name_variant("focalnet_nano") == "focalnet_nano"
    assert name_variant("focal_small") == "Focal-S"
    assert name_variant("focal_tiny_conv") == "Focal-T conv"
    assert name_variant("focal_fast_base") == "Focal-B V2"
