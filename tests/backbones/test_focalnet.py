"""Properties of every variant, with all of its flags, in few channels and blocks."""

import math

import pytest
import torch
from torch import nn

from focalnet_det.backbones import (
    FOCAL_TRANSFORMERS,
    FOCALNETS,
    VARIANTS,
    FeatureShape,
    FocalTransformerSpec,
)
from tests.helpers.compare import relative_error
from tests.helpers.shrunk import shrunk
from tests.helpers.variant_properties import (
    STRIDES,
    assert_close,
    every_variant,
    random_loss,
    stages,
)

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
