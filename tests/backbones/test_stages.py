"""Stages of every variant: drop path, freezing, and which features are given."""

import copy

import numpy as np
import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.backbones import (
    VARIANTS,
    StagedBackbone,
)
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import NAMES, shrunk
from tests.helpers.variant_properties import every_variant, random_loss, stages

# Drop path


@every_variant
def test_drop_path_rates_are_the_published_ones(name: str) -> None:
    row = VARIANTS[name]
    with torch.device("meta"):
        net = create_backbone(name)
    rates = [block.drop_path.rate for layer in net.layers for block in layer.blocks]
    expected = np.linspace(0, row.drop_path_rate, sum(row.depths))
    np.testing.assert_allclose(rates, expected, atol=1e-12)
    # Classification rates, configs of microsoft/FocalNet and microsoft/Focal-Transformer.
    size = name.removeprefix("focal_fast_").split("_")[-1 if "fast" in name else 1]
    published = {"tiny": 0.2, "small": 0.3, "base": 0.5, "nano": 0.0}.get(size, 0.5)
    assert row.drop_path_rate == (0.2 if name.endswith("_iso") else published)


@every_variant
def test_rates_do_not_depend_on_which_stages_are_built(name: str) -> None:
    first = stages(name)[0]
    net = shrunk(name, out_features=(first,), drop_path_rate=0.3)
    rates = [block.drop_path.rate for layer in net.layers for block in layer.blocks]
    blocks = 2 if name.endswith("_iso") else 5
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, blocks)[: len(rates)], atol=1e-12)


@every_variant
@torch.no_grad()
def test_drop_path_acts_on_samples_in_training_only(name: str) -> None:
    net = shrunk(name, drop_path_rate=0.5)
    x = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    last = stages(name)[-1]
    evaluated, trained = net(x)[last], net.train()(x)[last]
    assert relative_error(evaluated[1:], evaluated[:-1]) < 1e-5
    kinds = {round(float(sample.double().norm()), 4) for sample in trained}
    assert len(kinds) > 1, "every sample of the batch was treated alike"
    first_block = net.layers[0].blocks[0]
    assert first_block.drop_path.rate == 0


# Frozen stages


def frozen_by_name(net: StagedBackbone) -> set[str]:
    return {key for key, parameter in net.named_parameters() if not parameter.requires_grad}


@every_variant
@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3, 4])
def test_frozen_stages(name: str, frozen: int | None) -> None:
    if frozen is not None and frozen > len(stages(name)):
        with pytest.raises(
            ValueError,
            match=r"frozen_stages must be None or an integer between 0 \(the stem\) and 1,",
        ):
            shrunk(name, frozen_stages=frozen)
        return
    net = shrunk(name, frozen_stages=frozen, drop_rate=0.5, drop_path_rate=0.9)
    prefixes: tuple[str, ...] = ()
    if frozen is not None:
        prefixes = ("patch_embed.", *(f"layers.{i}." for i in range(frozen)))
    keys = [key for key, _ in net.named_parameters()]
    assert frozen_by_name(net) == {key for key in keys if key.startswith(prefixes)}
    assert not any(key.startswith("norm") for key in frozen_by_name(net))

    assert net.train() is net
    assert net.training
    for key, module in net.named_modules():
        if key and "." in key:
            assert module.training != (key + ".").startswith(prefixes), key
    assert net.pos_drop.training == (frozen is None)
    assert net.eval() is net
    assert not any(module.training for module in net.modules())


@every_variant
def test_frozen_stages_are_deterministic_in_training_and_keep_their_weights(name: str) -> None:
    count = len(stages(name))
    net = shrunk(name, frozen_stages=count, drop_rate=0.5, drop_path_rate=0.9)
    x = torch.randn(4, 3, 32, 32)
    expected = net(x)
    features = net.train()(x)
    assert all(torch.equal(features[key], expected[key]) for key in expected)
    before = copy.deepcopy(net.state_dict())
    random_loss(features).backward()
    torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1).step()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("norm"), key


@pytest.mark.parametrize("name", [name for name in NAMES if len(stages(name)) == 4])
def test_stages_after_the_frozen_ones_still_drop(name: str) -> None:
    net = shrunk(name, frozen_stages=2, drop_path_rate=0.9)
    x = torch.randn(8, 3, 64, 64)
    expected, features = net(x), net.train()(x)
    assert torch.equal(features["stage1"], expected["stage1"])
    assert torch.equal(features["stage2"], expected["stage2"])
    assert relative_error(features["stage4"], expected["stage4"]) > 1e-3


# Which features


@every_variant
@torch.no_grad()
def test_some_features_equal_those_of_the_whole_network(name: str) -> None:
    names = stages(name)
    full = shrunk(name)
    x = torch.randn(1, 3, 50, 70)
    expected = full(x)
    for wanted in [(key,) for key in names] + [names[1:3], (names[0], names[-1])]:
        if not wanted:
            continue
        part = shrunk(name, out_features=wanted)
        missing, unexpected = part.load_state_dict(full.state_dict(), strict=False)
        assert missing == []
        last = max(names.index(key) for key in wanted)
        for key in unexpected:
            unbuilt = key.startswith(tuple(f"layers.{i}." for i in range(last + 1, len(names))))
            own_norm = key.startswith("norm") and names[int(key[4])] not in wanted
            assert unbuilt or own_norm or key.startswith(f"layers.{last}.downsample."), key
        assert len(part.layers) == last + 1
        assert part.layers[last].downsample is None
        features = part(x)
        assert set(part.output_shape()) == set(features) == set(wanted)
        for key in wanted:
            assert torch.equal(features[key], expected[key])


@every_variant
@torch.no_grad()
def test_output_norms_normalise_the_raw_features(name: str) -> None:
    normed, raw = shrunk(name), shrunk(name, output_norm=False)
    missing, unexpected = raw.load_state_dict(normed.state_dict(), strict=False)
    assert missing == []
    assert {key[:4] for key in unexpected} == {"norm"}
    x = torch.randn(1, 3, 64, 64)
    weights = normed.state_dict()
    for i, (actual, feature) in enumerate(zip(normed(x).values(), raw(x).values(), strict=True)):
        mean, variance = feature.mean(1, keepdim=True), feature.var(1, keepdim=True, correction=0)
        weight, bias = (weights[f"norm{i}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        expected = (feature - mean) / (variance + 1e-5).sqrt() * weight + bias
        assert relative_error(actual, expected) <= 1e-5
