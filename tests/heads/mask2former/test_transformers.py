"""Mask2Former against that of transformers with the same numbers, which is read as a file."""

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

transformers = pytest.importorskip("transformers")

from focalnet_det.checkpoint.layouts.mask2former_names import (  # noqa: E402
    find_layout,
    inspect_mask2former,
    original_names,
    translate_mask2former,
)
from focalnet_det.heads.mask2former.mask2former import Mask2FormerHead, build_parts  # noqa: E402
from focalnet_det.heads.mask2former.transformer_decoder import Prediction  # noqa: E402

NUM_CLASSES = 7


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        num_labels=NUM_CLASSES,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=256,
        dim_feedforward=512,
        encoder_layers=2,
        decoder_layers=5,
        num_queries=11,
        backbone_config={
            "model_type": "swin",
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh numbers would leave norms and offsets untested.
            scale = 0.5 if "queries" in name or "level_embed" in name else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Mask2FormerHead:
    shapes = {f"stage{k + 1}": ShapeSpec(channels=16 * 2**k, stride=4 * 2**k) for k in range(4)}
    parts = build_parts(
        shapes,
        num_classes=NUM_CLASSES,
        queries=11,
        channels=64,
        encoder_layers=2,
        decoder_layers=4,
    )
    head: Mask2FormerHead = parts["sem_seg_head"]
    state = translate_mask2former(theirs.state_dict())
    assert torch.equal(state.pop("criterion.empty_weight"), parts["criterion"].empty_weight)
    head.load_state_dict({k.removeprefix("sem_seg_head."): v for k, v in state.items()})
    return head


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 96, 128)


@pytest.fixture(scope="module")
def their_output(theirs: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return theirs(images, output_auxiliary_logits=True)


@pytest.fixture(scope="module")
def predictions(theirs: Any, ours: Mask2FormerHead, images: Tensor) -> list[Prediction]:
    with torch.no_grad():
        features = theirs.model.pixel_level_module.encoder(images).feature_maps
        found: list[Prediction] = ours({f"stage{k + 1}": x for k, x in enumerate(features)})
    return found


def test_predictions_of_all_layers_are_theirs(
    predictions: list[Prediction], their_output: Any
) -> None:
    final = {
        "class_queries_logits": their_output.class_queries_logits,
        "masks_queries_logits": their_output.masks_queries_logits,
    }
    layers = [*their_output.auxiliary_logits, final]
    assert len(layers) == len(predictions) == 5
    for expected, actual in zip(layers, predictions, strict=True):
        torch.testing.assert_close(
            actual.class_logits, expected["class_queries_logits"], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            actual.mask_logits(), expected["masks_queries_logits"], rtol=1e-4, atol=1e-3
        )


def test_old_files_of_the_original_are_read(ours: Mask2FormerHead) -> None:
    state = {f"sem_seg_head.{name}": value for name, value in ours.state_dict().items()}
    old = original_names(state, old=True)
    assert "sem_seg_head.predictor.static_query.weight" in old
    assert "sem_seg_head.mask_features.weight" in old
    assert not any("pixel_decoder" in name or "query_feat" in name for name in old)
    assert [find_layout(x) for x in (state, old)] == ["original", "old original"]
    for file in (old, original_names(state)):
        again = translate_mask2former(file)
        assert again.keys() == state.keys()
        assert all(again[name] is value for name, value in state.items())


def test_weights_tell_what_they_are_of(theirs: Any) -> None:
    found = inspect_mask2former(theirs.state_dict())
    assert (found.layout, found.num_classes, found.queries) == ("transformers", NUM_CLASSES, 11)
    assert (found.encoder_layers, found.decoder_layers) == (2, 4)
    assert found.backbone == "Swin Transformer"


def test_other_files_are_refused(theirs: Any) -> None:
    with pytest.raises(ValueError, match="not the weights of a Mask2Former"):
        translate_mask2former({"backbone.conv.weight": torch.zeros(1)})
    state = dict(theirs.state_dict())
    state["model.transformer_module.decoder.extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 names .* such as .*decoder\.extra\.weight"):
        translate_mask2former(state)
