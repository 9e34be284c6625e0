"""Every variant in every public layout: recognised, loaded, converted there and back, bit-exact."""

import re

import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.backbones import FOCALNETS
from focalnet_det.checkpoint import convert_state_dict, inspect_checkpoint, load_pretrained
from focalnet_det.checkpoint.layouts.tables import WRITABLE
from tests.helpers import published
from tests.helpers.published import LAYOUTS, NAMES, State, official

CLASSIFIERS = ("official", "timm", "huggingface", "mmpretrain")


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_tell_layout_and_variant(name: str, layout: str) -> None:
    """At the true sizes, without numbers."""
    found = inspect_checkpoint(LAYOUTS[layout](official(name, width=None, device="meta")))
    assert (found.layout, found.variant, found.overrides) == (layout, name, {})
    row = FOCALNETS[name]
    assert found.shapes["focal_levels"] == row.focal_levels
    assert found.shapes["focal_windows"] == row.focal_windows
    assert found.shapes["conv_embed"] == row.conv_embed
    assert found.classes == (10 if layout in CLASSIFIERS else None)
    assert found.candidates == []
    stages = len(row.depths)
    assert len(found.output_norms) == (0 if layout in CLASSIFIERS else stages)
    # Four levels without a norm in the modulation: the published copies disagree about these.
    asks = any("normalize_modulator" in note for note in found.ambiguous_settings)
    assert asks == (name in ("focalnet_large_fl4", "focalnet_xlarge_fl4"))
    assert any("stem_padding=2" in note for note in found.ambiguous_settings) == row.conv_embed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_loads(name: str, layout: str) -> None:
    state = official(name)
    net = create_backbone(name, embed_dim=8)
    report = load_pretrained(net, LAYOUTS[layout](state))
    assert report.layout == layout
    assert report.share == 1.0
    assert report.resized == []
    loaded = net.state_dict()
    backbone = {n: t for n, t in state.items() if not re.match(r"(norm|head)\.", n)}
    for key, tensor in backbone.items():
        assert torch.equal(loaded[key], tensor), key
    norms = set(loaded) - set(backbone)
    assert set(report.missing) == (norms if layout in CLASSIFIERS else set())
    assert len(report.dropped) == (4 if layout in CLASSIFIERS else len(LAYOUTS[layout]({})))
    assert report.rules.keys() == set(report.dropped)


@pytest.mark.parametrize("to", WRITABLE)
@pytest.mark.parametrize("layout", CLASSIFIERS)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, layout: str, to: str) -> None:
    state = official(name)
    source = LAYOUTS[layout](state)
    there = convert_state_dict(source, to)
    assert there.layout == layout
    assert there.dropped == {}
    if to in CLASSIFIERS:
        assert_same(there.tensors, LAYOUTS[to](state))
    back = convert_state_dict(there.tensors, layout if layout in WRITABLE else "official")
    assert_same(back.tensors, source if layout in WRITABLE else state)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(CLASSIFIERS)))
@pytest.mark.parametrize("name", NAMES)
def test_a_detector_gives_its_backbone(name: str, layout: str) -> None:
    source = LAYOUTS[layout](official(name))
    there = convert_state_dict(source, "official")
    outside = LAYOUTS[layout]({})
    assert there.dropped == dict.fromkeys(outside, "outside the backbone")
    back = convert_state_dict(there.tensors, "detectron2").tensors
    expected = published.LAYOUTS["detectron2"](official(name))
    for key in published.LAYOUTS["detectron2"]({}):
        del expected[key]
    assert_same(back, expected)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "visual.", "module.model."])
def test_wrappers(wrapper: str) -> None:
    state = official("focalnet_nano")
    found = inspect_checkpoint({"state_dict": {wrapper + n: t for n, t in state.items()}})
    assert found.layout == "official"
    assert found.classes == 10


@pytest.mark.parametrize("container", ["model", "state_dict", "teacher", "module"])
def test_containers(container: str) -> None:
    net = create_backbone("focalnet_nano", embed_dim=8)
    state = official("focalnet_nano")
    assert load_pretrained(net, {container: state, "epoch": 7}).share == 1.0
    assert inspect_checkpoint({container: state, "epoch": 7}).progress == {"epoch": 7}


def test_timm_features_only() -> None:
    state = published.to_timm(official("focalnet_nano"))
    flat = {n.replace("layers.", "layers_", 1): t for n, t in state.items() if "head" not in n}
    del flat["norm.weight"], flat["norm.bias"]
    net = create_backbone("focalnet_nano", embed_dim=8)
    assert load_pretrained(net, flat).layout == "timm"
    assert torch.equal(net.patch_embed.proj.bias, state["stem.proj.bias"])


def test_huggingface_without_a_head_and_with_its_converters_slip() -> None:
    """FocalNetBackbone has no head, FocalNetModel no prefix, converted huge models official ln."""
    state = published.to_huggingface(official("focalnet_huge_fl3"))
    state = {n.replace("modulation.layernorm", "modulation.ln"): t for n, t in state.items()}
    del state["classifier.weight"], state["classifier.bias"]
    bare = {n.removeprefix("focalnet."): t for n, t in state.items()}
    bare["embeddings.mask_token"] = torch.zeros(1, 1, 8)
    for variant in (state, bare):
        net = create_backbone("focalnet_huge_fl3", embed_dim=8)
        report = load_pretrained(net, variant)
        assert (report.layout, report.share) == ("huggingface", 1.0)
    assert report.rules["embeddings.mask_token"] == "token of masked image modeling"


def test_enlarged_windows_are_an_override() -> None:
    net = create_backbone("focalnet_tiny_srf", focal_windows=(11, 9, 9, 7))
    found = inspect_checkpoint(net.state_dict())
    assert found.variant == "focalnet_tiny_srf"
    assert found.overrides == {"focal_windows": (11, 9, 9, 7)}
    assert found.parameters == sum(p.numel() for p in net.parameters())


def test_detr_scales() -> None:
    state = LAYOUTS["focalnet_dino"](official("focalnet_large_fl4"))
    state["transformer.level_embed"] = torch.zeros(5, 256)
    assert inspect_checkpoint(state).feature_scales == 5


def test_unknown_networks_get_their_nearest_relatives() -> None:
    found = inspect_checkpoint(
        create_backbone("focalnet_tiny_srf", depths=(2, 2, 7, 2)).state_dict()
    )
    assert found.variant is None
    expected = "focalnet_tiny_srf, but depths is (2, 2, 7, 2) instead of (2, 2, 6, 2)"
    assert found.candidates[0] == expected
    resnet = inspect_checkpoint(
        {"conv1.weight": torch.ones(64, 3, 7, 7), "norm.weight": torch.ones(8)}
    )
    assert (resnet.layout, resnet.family) == (None, "unknown")
    assert "official classification: 1 of 2 names differ, first conv1.weight" in resnet.candidates


def test_two_names_of_one_parameter_are_refused() -> None:
    state = published.to_timm(official("focalnet_huge_fl3"))
    state["layers.0.blocks.0.norm1.weight"] = torch.ones(8)
    with pytest.raises(ValueError, match=r"norm1.* are both layers\.0\.blocks\.0\.norm1\.weight"):
        load_pretrained(create_backbone("focalnet_huge_fl3", embed_dim=8), state)
