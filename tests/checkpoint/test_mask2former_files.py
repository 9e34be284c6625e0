"""Whole files of Mask2Former in its public layouts: there and back, loading, inspection."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from focalnet_det.checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_initial_weights,
    read_state_dict,
)
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.mask2former import Mask2Former, mask2former

State = dict[str, Tensor]


def small_model(*, num_classes: int = 19, queries: int = 6, **options: Any) -> Mask2Former:
    return mask2former(
        backbone=focalnet_backbone(variant="focalnet_nano", embed_dim=8),
        num_classes=num_classes,
        queries=queries,
        channels=32,
        encoder_layers=2,
        decoder_layers=2,
        **options,
    )


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    torch.manual_seed(0)
    return small_model()


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def old_names(state: State) -> State:
    """Those of the first release: no prefix of the pixel decoder, another name of the content."""
    return {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace(
            "predictor.query_feat", "predictor.static_query"
        ): tensor
        for name, tensor in state.items()
    }


LAYOUTS = ("mask2former", "mask2former_old", "mask2former_transformers")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_files_there_and_back(layout: str, model: Mask2Former, tmp_path: Path) -> None:
    state = model.state_dict()
    conversion = convert_checkpoint(state, tmp_path / "theirs.pth", layout)
    theirs = read_state_dict(tmp_path / "theirs.pth")
    if layout == "mask2former":
        # Its names are ours.
        assert_same(theirs, state)
    if layout == "mask2former_old":
        assert_same(theirs, old_names(state))
    assert conversion.layout == "detectron2"
    back = convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", "detectron2")
    assert back.layout == layout
    expected = state
    if layout == "mask2former_transformers":
        expected = {n: t for n, t in state.items() if not n.startswith("backbone.")}
        assert "model.transformer_module.decoder.layers.1.self_attn.k_proj.weight" in theirs
    assert_same(read_state_dict(tmp_path / "ours.safetensors"), expected)
    found = inspect_checkpoint(tmp_path / "theirs.pth")
    assert (found.method, found.layout, found.queries, found.classes) == (
        *("mask2former", layout, 6, 19),
    )
    assert found.tasks == ["semantic", "panoptic"]
    assert "Mask2Former (19 classes" in found.architecture


def test_names_of_transformers_are_those_of_its_code(model: Mask2Former) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig(
        num_labels=19,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=128,
        dim_feedforward=256,
        encoder_layers=2,
        # One more than there are, as everywhere in it.
        decoder_layers=3,
        num_queries=6,
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    )
    with torch.device("meta"):
        theirs = transformers.Mask2FormerForUniversalSegmentation(config).state_dict()
    written = convert_state_dict(model.state_dict(), "mask2former_transformers").tensors
    encoder = "model.pixel_level_module.encoder."
    expected = {n: tuple(t.shape) for n, t in theirs.items() if not n.startswith(encoder)}
    assert {n: tuple(t.shape) for n, t in written.items()} == expected


@pytest.mark.parametrize("layout", ["mask2former", "mask2former_old"])
def test_files_load_as_whole_models(layout: str, model: Mask2Former) -> None:
    theirs = convert_state_dict(model.state_dict(), layout).tensors
    other = small_model()
    report = load_initial_weights(other, {"model": theirs}, new_classes=False)
    assert (report.layout, report.missing, report.dropped) == (layout, [], [])
    assert_same(other.state_dict(), model.state_dict())


def test_other_classes_begin_anew_and_other_queries_are_refused(model: Mask2Former) -> None:
    other = small_model(num_classes=4)
    report = load_initial_weights(other, model.state_dict())
    assert set(report.dropped) == {
        "criterion.empty_weight",
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.class_embed.bias",
    }
    query_feat = other.sem_seg_head.predictor.query_feat.weight
    assert torch.equal(query_feat, model.sem_seg_head.predictor.query_feat.weight)
    reason = re.escape("query_feat.weight is (6, 32) in the file, (9, 32) in the model")
    with pytest.raises(ValueError, match=reason):
        load_initial_weights(small_model(queries=9), model.state_dict())


def test_a_focalnet_of_transformers_is_read(model: Mask2Former) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.FocalNetConfig(
        embed_dim=8,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1],
        focal_levels=[2] * 4,
        focal_windows=[3] * 4,
    )
    backbone = transformers.FocalNetBackbone(config).state_dict()
    theirs = dict(convert_state_dict(model.state_dict(), "mask2former_transformers").tensors)
    theirs |= {f"model.pixel_level_module.encoder.{n}": t for n, t in backbone.items()}
    found = convert_state_dict(theirs, "detectron2").tensors
    name = "encoder.stages.1.layers.0.modulation.projection_in.weight"
    (full,) = (n for n in backbone if n.endswith(name))
    assert torch.equal(found["backbone.layers.1.blocks.0.modulation.f.weight"], backbone[full])


def test_only_a_mask2former_is_written() -> None:
    with pytest.raises(ValueError, match="Only a whole Mask2Former saved by this package"):
        convert_state_dict({"backbone.conv.weight": torch.ones(2)}, "mask2former")
