"""Properties of every variant, with all of its flags, in few channels and blocks."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from shrunk import NAMES, relative_error, shrunk
from torch import Tensor, nn

from focalnet_det import create_backbone, list_backbones
from focalnet_det.backbones import (
    FOCAL_TRANSFORMERS,
    FOCALNETS,
    VARIANTS,
    FeatureShape,
    FocalTransformerSpec,
    StagedBackbone,
)

ALL = ("stage1", "stage2", "stage3", "stage4")
STRIDES = {"stage1": 4, "stage2": 8, "stage3": 16, "stage4": 32}

every_variant = pytest.mark.parametrize("name", NAMES)


def stages(name: str) -> tuple[str, ...]:
    """An isotropic network works at stride 16 alone."""
    return ("stage3",) if name.endswith("_iso") else ALL


def random_loss(features: dict[str, Tensor]) -> Tensor:
    """A sum in which every output value has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    return sum(
        (feature * torch.randn(feature.shape, generator=generator).to(feature)).sum()
        for feature in features.values()
    )


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert relative_error(actual[key], expected[key]) <= tolerance, key


# Shapes


@every_variant
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (97, 131), (230, 250)])
@torch.no_grad()
def test_any_size(name: str, height: int, width: int) -> None:
    net = shrunk(name)
    features = net(torch.randn(1, 3, height, width))
    assert tuple(features) == stages(name)
    for key, feature in features.items():
        channels = 8 * 2 ** stages(name).index(key)
        stride = STRIDES[key]
        assert net.output_shape()[key] == FeatureShape(channels=channels, stride=stride)
        expected = (1, channels, math.ceil(height / stride), math.ceil(width / stride))
        assert feature.shape == expected
        assert feature.isfinite().all()


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        ((97, 131), [(25, 33), (13, 17), (7, 9), (4, 5)]),
        ((230, 250), [(58, 63), (29, 32), (15, 16), (8, 8)]),
    ],
)
@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "focalnet_huge_fl4"])
@torch.no_grad()
def test_sizes_measured_on_the_official_detection_code(
    name: str, size: tuple[int, int], shapes: list[tuple[int, int]]
) -> None:
    features = shrunk(name)(torch.randn(1, 3, *size))
    assert [tuple(feature.shape[2:]) for feature in features.values()] == shapes


@every_variant
@torch.no_grad()
def test_batch_of_two_is_twice_a_batch_of_one(name: str) -> None:
    net = shrunk(name)
    x = torch.randn(2, 3, 33, 47)
    both = net(x)
    for i in range(2):
        assert_close({key: value[i : i + 1] for key, value in both.items()}, net(x[i : i + 1]))


# Gradients and memory


@every_variant
@pytest.mark.parametrize("in_channels", [3, 4])
def test_every_parameter_gets_a_gradient(name: str, in_channels: int) -> None:
    # Without drop path, which may leave out a block for the whole batch.
    net = shrunk(name, in_channels=in_channels, drop_path_rate=0).train()
    # The last map of a Focal Transformer must be wider than a window for neighbors to be read.
    size = (230, 250) if name in FOCAL_TRANSFORMERS else (70, 64)
    random_loss(net(torch.randn(2, in_channels, *size))).backward()
    without = [
        key
        for key, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without == []


@every_variant
def test_checkpointing_changes_nothing_but_memory(name: str) -> None:
    plain = shrunk(name, drop_path_rate=0.5).train()
    saving = shrunk(name, drop_path_rate=0.5, activation_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 40, 36)
    results, runs = [], []
    for net in (plain, saving):
        calls: list[str] = []
        for key, module in net.named_modules():
            if key.split(".")[-2:-1] == ["blocks"]:
                module.register_forward_pre_hook(lambda *_, key=key, calls=calls: calls.append(key))
        torch.manual_seed(3)
        features = net(x)
        random_loss(features).backward()
        results.append(features | {key: p.grad for key, p in net.named_parameters()})
        runs.append(calls)
    assert_close(results[1], results[0], 1e-6)
    assert len(set(runs[0])) == len(runs[0]), "plain blocks run once"
    assert sorted(runs[1]) == sorted(2 * runs[0]), "checkpointed blocks run again, each once"
    # Drop path did act, so that equality needs the same random numbers the second time.
    last = stages(name)[-1]
    assert relative_error(plain.eval()(x)[last], results[0][last]) > 1e-3


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


# Batch padding


@every_variant
@torch.no_grad()
def test_valid_context_makes_images_independent_of_their_batch(name: str) -> None:
    net = shrunk(name, valid_context=True)
    sizes = [(33, 47), (64, 80), (50, 20)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    batch = 100 * torch.randn(3, 3, 64, 80)  # garbage where there is no image
    for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        batch[i, :, :h, :w] = image[0]
    together = net(batch, sizes)
    for i, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        alone = net(image, [(h, w)])
        padded = net(batch[i : i + 1], [(h, w)])
        for key, expected in alone.items():
            rows, columns = expected.shape[2:]
            for actual in (padded[key], together[key][i : i + 1]):
                assert relative_error(actual[:, :, :rows, :columns], expected) <= 1e-5
                outside = actual.clone()
                outside[:, :, :rows, :columns] = 0
                assert not outside.any()


@every_variant
@torch.no_grad()
def test_valid_context_is_needed_for_that_and_changes_nothing_without_padding(name: str) -> None:
    plain, masked = shrunk(name), shrunk(name, valid_context=True)
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 50, 70)
    if isinstance(VARIANTS[name], FocalTransformerSpec):
        # Published windows read across the border of the map, and fill at its end.
        assert relative_error(masked(x, [(50, 70)] * 2)["stage1"], plain(x)["stage1"]) > 1e-3
    else:
        assert_close(masked(x, [(50, 70)] * 2), plain(x))
    last = stages(name)[-1]
    padded = plain(nn.functional.pad(x, (0, 26, 0, 14)))[last]
    expected = plain(x)[last]
    rows, columns = expected.shape[2:]
    assert relative_error(padded[:, :, :rows, :columns], expected) > 1e-3


@every_variant
def test_wrong_image_sizes_are_errors(name: str) -> None:
    x = torch.zeros(2, 3, 32, 48)
    with pytest.raises(ValueError, match="build it with valid_context=True"):
        shrunk(name)(x, [(32, 48), (32, 48)])
    net = shrunk(name, valid_context=True)
    with pytest.raises(ValueError, match="call it with image_sizes"):
        net(x)
    with pytest.raises(ValueError, match="1 entries for a batch of 2"):
        net(x, [(32, 48)])
    with pytest.raises(ValueError, match=r"\(32, 49\) does not fit"):
        net(x, [(32, 48), (32, 49)])


# Number types


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(name: str, dtype: torch.dtype) -> None:
    net = shrunk(name)
    x = torch.randn(2, 3, 49, 65)
    expected = net(x)
    with torch.autocast("cpu", dtype):
        features = net(x)
    # A few dozen rounding errors on the way, amplified by norms over a mere eight channels.
    tolerance = 32 * torch.finfo(dtype).eps
    errors = [relative_error(features[key].float(), expected[key]) for key in expected]
    assert 1e-5 < max(errors) <= tolerance


def test_autocast_on_every_cpu(every_cpu: str) -> None:
    net = shrunk("focalnet_tiny_lrf")
    x = torch.randn(2, 3, 49, 65)
    with torch.no_grad():
        expected = net(x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                features = net(x)
            for key, feature in features.items():
                error = relative_error(feature.float(), expected[key])
                assert 1e-5 < error <= 32 * torch.finfo(dtype).eps, (dtype, key)


@every_variant
def test_autocast_trains(name: str) -> None:
    net = shrunk(name, drop_path_rate=0.2, valid_context=True).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = net(torch.randn(2, 3, 49, 65), [(49, 65), (40, 30)])
    random_loss(features).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@every_variant
@torch.no_grad()
def test_double_precision(name: str) -> None:
    net = shrunk(name)
    x = torch.randn(2, 3, 49, 65)
    single, double = net(x), net.double()(x.double())
    assert {value.dtype for value in double.values()} == {torch.float64}
    assert_close({key: value.double() for key, value in single.items()}, double)


# Arguments


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1, 1)}, "one entry per stage, got 3, 4 and 4"),
        ({"focal_levels": (2, 2)}, "one entry per stage, got 4, 2 and 4"),
        ({"focal_windows": (3,) * 5}, "one entry per stage, got 4, 4 and 5"),
        ({"depths": (1, 0, 1, 1)}, "depths must be integers between 1 and"),
        ({"focal_levels": (2, 2, -1, 2)}, "focal_levels must be integers between 0 and"),
        ({"focal_windows": (3, 4, 3, 3)}, r"must be odd, got \(3, 4, 3, 3\)"),
        (
            {"focal_windows": (3, -1, 3, 3)},
            r"focal_windows must be integers between 1 and .*\(3, -1, 3, 3\)",
        ),
        ({"out_features": ("stage5",)}, "must be some of .* got"),
        ({"out_features": ("res2",)}, "must be some of"),
        ({"out_features": "stage1"}, "must be some of"),
        ({"out_features": ()}, "must be some of"),
        ({"frozen_stages": 5}, r"and 4, got 5"),
        ({"frozen_stages": -1}, r"and 4, got -1"),
        ({"frozen_stages": 3, "out_features": ("stage2",)}, r"and 2, got 3"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"patch_size": 6}, "power of two"),
        ({"patch_size": 2}, "power of two"),
    ],
)
def test_bad_arguments_are_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone("focalnet_nano", **overrides)


def test_unknown_variants_and_options_name_the_known_ones() -> None:
    with pytest.raises(KeyError, match="'focalnet_tinny'.*focalnet_tiny_srf"):
        create_backbone("focalnet_tinny")
    with pytest.raises(TypeError, match=r"focal_window\. Known: .*focal_windows"):
        create_backbone("focalnet_tiny_srf", focal_window=9)
    with pytest.raises(TypeError, match="source"):
        create_backbone("focalnet_tiny_srf", source="here")


def test_variants_can_be_listed_by_pattern() -> None:
    assert list_backbones("focalnet_tiny_*") == [
        "focalnet_tiny_deeper",
        "focalnet_tiny_iso",
        "focalnet_tiny_lrf",
        "focalnet_tiny_srf",
    ]
    assert list_backbones("nothing*") == []
    assert list_backbones() == NAMES


# Flags of FocalNet that no tensor shape reveals, as the official yaml files, builders and weights
# have them.
OVERLAPPING = {
    f"focalnet_{size}_{form}" for size in ("large", "xlarge", "huge") for form in ("fl3", "fl4")
}
POST_NORM = OVERLAPPING | {"focalnet_base_iso"}
HUGE = {"focalnet_huge_fl3", "focalnet_huge_fl4"}


@pytest.mark.parametrize("name", sorted(FOCALNETS))
def test_hidden_flags(name: str) -> None:
    row = FOCALNETS[name]
    assert row.conv_embed == (name in OVERLAPPING)
    assert row.post_norm == (name in POST_NORM)
    assert row.layer_scale == (1e-4 if name in POST_NORM else None)
    assert row.post_norm_in_modulation == (name in HUGE)
    assert row.normalize_modulator == (name == "focalnet_large_fl4")
    window = 5 if name in {"focalnet_large_fl3", "focalnet_xlarge_fl3"} else 3
    assert set(row.focal_windows) == {window}
    assert row.stem_padding == 2
    assert row.mlp_ratio == 4
