"""Gates, contributions, kernels and receptive fields equal numbers worked out by hand or loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from focalnet_det.backbones import FocalNet
from focalnet_det.backbones.focalnet import FocalModulation
from focalnet_det.backbones.stages import FeatureShape
from focalnet_det.visualization.modulation_maps import (
    BlockMaps,
    coverage,
    draws_of_box,
    effective_kernels,
    field_side,
    find_focalnet,
    modulation_maps,
    reaches,
    receptive_field,
    recorded_modulations,
)
from tests.helpers.shrunk import shrunk


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def by_hand(gate_weights: list[float], gate_biases: list[float]) -> FocalNet:
    """One block on one channel, without norms: tokens are means of 4x4 pixels.

    The context is the token itself. The first kernel sums 3x3 neighbors, the second one takes the
    token; the modulator is twice the aggregated context.
    """
    net = FocalNet(
        in_channels=1, embed_dim=1, depths=(1,), focal_levels=(2,), focal_windows=(3,),
        output_norm=False,
    ).eval()  # fmt: skip
    block: Any = net.layers[0].blocks[0]
    net.patch_embed.norm = block.norm1 = nn.Identity()
    with torch.no_grad():
        net.patch_embed.proj.weight.fill_(1 / 16)
        net.patch_embed.proj.bias.zero_()
        block.modulation.f.weight.copy_(torch.tensor([[0.0, 1.0, *gate_weights]]).T)
        block.modulation.f.bias.copy_(torch.tensor([1.0, 0.0, *gate_biases]))
        first, second = block.modulation.focal_layers.parameters()
        first.fill_(1)
        second.zero_()
        second[..., 2, 2] = 1
        block.modulation.h.weight.fill_(2)
        block.modulation.h.bias.zero_()
    return net


def pixels(tokens: Tensor) -> Tensor:
    return tokens.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]


def test_maps_of_a_two_level_block_by_hand() -> None:
    # A single 1 in the middle of 5x5 tokens. Gates: 2 x + 1, -x, 1/2.
    net = by_hand([2, -1, 0], [1, 0, 0.5])
    tokens = torch.zeros(5, 5)
    tokens[2, 2] = 1
    (maps,) = modulation_maps(net, lambda: net(pixels(tokens)))
    assert (maps.stage, maps.block, maps.stride) == ("stage1", 0, 4)
    expected = torch.stack([torch.ones(5, 5), torch.zeros(5, 5), torch.full((5, 5), 0.5)])
    expected[0, 2, 2], expected[1, 2, 2] = 3, -1
    torch.testing.assert_close(maps.gates, expected)

    # Level 1 is gelu(1) on 3x3 tokens, level 2 its gelu, the global context that of the mean.
    near = gelu(1)
    middle = gelu(near)
    everywhere = gelu(9 * middle / 25)
    assert [round(x, 4) for x in (near, middle, everywhere)] == [0.8413, 0.673, 0.1443]
    contributions = torch.zeros(3, 5, 5)
    contributions[0, 1:4, 1:4] = near
    contributions[0, 2, 2] = 3 * near
    contributions[1, 2, 2] = middle
    contributions[2] = everywhere / 2
    torch.testing.assert_close(maps.contributions, contributions, atol=1e-6, rtol=1e-5)
    modulator = torch.full((5, 5), everywhere)
    modulator[1:4, 1:4] += 2 * near
    modulator[2, 2] += 4 * near - 2 * middle
    torch.testing.assert_close(maps.modulator, modulator, atol=1e-6, rtol=1e-5)

    # Where it draws on for the middle token, 4 px wide.
    (draws,) = draws_of_box([maps], (8, 8, 12, 12))
    parts = torch.tensor([3 * near, middle, everywhere / 2])
    torch.testing.assert_close(draws.levels, parts / parts.sum())
    # Both levels see 3x3 tokens alike, level 2 through the first kernel.
    share = (parts[0] + parts[1]) / parts.sum() / 9
    places = torch.full((5, 5), float(parts[2] / parts.sum() / 25))
    places[1:4, 1:4] += share
    torch.testing.assert_close(draws.places, places)
    assert draws.inside == pytest.approx(float(places[2, 2]))


def test_recording_changes_nothing_and_is_what_the_network_computes() -> None:
    net: Any = shrunk("focalnet_tiny_lrf").eval()
    images = torch.rand(2, 3, 70, 90)
    net.layers[0].activation_checkpointing = True
    with torch.no_grad():
        before = net(images)
        seen: list[Tensor] = []
        handle = (
            net.layers[1]
            .blocks[0]
            .modulation.h.register_forward_hook(lambda _, __, out: seen.append(out))
        )
        maps = modulation_maps(net, lambda: net(images))
        handle.remove()
        after = net(images)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert net.layers[0].activation_checkpointing
    assert not any(module._forward_hooks for module in net.modules())
    names = [(block.stage, block.block) for block in maps]
    depths = [len(layer.blocks) for layer in net.layers]
    assert names == [(f"stage{i + 1}", k) for i, n in enumerate(depths) for k in range(n)]
    block = maps[names.index(("stage2", 0))]
    torch.testing.assert_close(block.modulator, seen[0][0].norm(dim=0), atol=1e-5, rtol=1e-4)
    assert block.gates.shape == (4, 9, 12)


def test_maps_respect_the_valid_area() -> None:
    net = shrunk("focalnet_tiny_srf", valid_context=True).eval()
    maps = modulation_maps(net, lambda: net(torch.rand(1, 3, 64, 96), [(64, 48)]))
    assert maps[0].contributions[..., 12:].abs().max() == 0
    assert maps[0].contributions[..., :12].min(dim=0).values.max() > 0


def test_effective_kernels_by_slow_loops() -> None:
    torch.manual_seed(0)
    module = FocalModulation(2, focal_level=2, focal_window=3)
    first, second = (weight.detach().abs().numpy() for weight in module.focal_layers.parameters())
    expected = np.zeros((7, 7))
    for channel in range(2):
        for y, x in np.ndindex(3, 3):
            for v, u in np.ndindex(5, 5):
                product = first[channel, 0, y, x] * second[channel, 0, v, u]
                expected[y + v, x + u] += product
    actual = effective_kernels(module)
    assert [len(kernel) for kernel in actual] == reaches(module) == [3, 7]
    np.testing.assert_allclose(actual[1], expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(actual[0], first.sum((0, 1)) / first.sum(), rtol=1e-5)


def test_draws_by_slow_loops_sum_to_one() -> None:
    torch.manual_seed(1)
    height, width, stride = 4, 6, 8
    module = FocalModulation(3, focal_level=2, focal_window=3)
    spread = effective_kernels(module)
    blocks = [
        BlockMaps(
            stage="stage2", block=k, stride=stride, gates=torch.zeros(3, height, width),
            contributions=torch.rand(3, height, width), modulator=torch.rand(height, width),
            spread=spread,
        )
        for k in range(2)
    ]  # fmt: skip
    box = (10.0, 4.0, 29.0, 30.0)
    covered = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        for v, u in np.ndindex(stride, stride):
            inside = box[0] <= x * stride + u < box[2] and box[1] <= y * stride + v < box[3]
            covered[y, x] += inside / stride**2
    np.testing.assert_allclose(coverage(box, stride, (height, width)), covered, rtol=1e-6)
    levels, places = np.zeros(3), np.zeros((height, width))
    for block in blocks:
        used = block.contributions.numpy() * covered
        used /= 2 * used.sum()
        levels += used.sum((1, 2))
        places += used[2].sum() / (height * width)
        for weights, kernel in zip(used, spread, strict=False):
            half = len(kernel) // 2
            for y, x in np.ndindex(height, width):
                reached = {
                    (y + v - half, x + u - half): float(kernel[v, u])
                    for v, u in np.ndindex(*kernel.shape)
                    if 0 <= y + v - half < height and 0 <= x + u - half < width
                }
                for place, part in reached.items():
                    places[place] += weights[y, x] * part / sum(reached.values())
    (draws,) = draws_of_box(blocks, box)
    np.testing.assert_allclose(draws.levels, levels, rtol=1e-5)
    np.testing.assert_allclose(draws.places, places, rtol=1e-5)
    assert levels.sum() == pytest.approx(1)
    assert places.sum() == pytest.approx(1)
    assert draws.inside == pytest.approx((places * covered).sum(), rel=1e-5)


def test_erasing_the_object_changes_what_is_drawn_on() -> None:
    torch.manual_seed(2)
    net = shrunk("focalnet_tiny_srf").eval()
    image = torch.zeros(1, 3, 64, 64)
    erased = image.clone()
    image[..., 20:40, 20:40] = torch.randn(1, 3, 20, 20)
    box = (20.0, 20.0, 40.0, 40.0)
    with_object, without = (
        draws_of_box(modulation_maps(net, lambda x=x: net(x)), box) for x in (image, erased)
    )
    for first, second in zip(with_object, without, strict=True):
        assert (first.levels - second.levels).abs().max() > 1e-3
        assert (first.places - second.places).abs().max() > 1e-4


def test_boxes_outside_of_the_image_are_refused() -> None:
    net = by_hand([0, 0, 0], [1, 1, 1])
    maps = modulation_maps(net, lambda: net(torch.rand(1, 1, 16, 16)))
    with pytest.raises(ValueError, match="draws on nothing"):
        draws_of_box(maps, (40, 40, 60, 60))


def test_other_backbones_are_named() -> None:
    with pytest.raises(ValueError, match="backbone is FocalTransformer, but focal modulation is"):
        find_focalnet(shrunk("focal_tiny"))
    detector = nn.Module()
    detector.backbone = nn.Module()
    detector.backbone.bottom_up = nn.Sequential()
    with pytest.raises(ValueError, match="The backbone is Sequential"):
        find_focalnet(detector)
    net = shrunk("focalnet_tiny_srf")
    with recorded_modulations(net) as records:
        assert records == []


class Patches(nn.Module):
    """A convolution of 4x4 patches in place of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 4, stride=4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"stage1": self.convolution(images)}

    def output_shape(self) -> dict[str, FeatureShape]:
        return {"stage1": FeatureShape(channels=2, stride=4)}


def test_receptive_field_of_a_convolution_is_its_kernel() -> None:
    net = Patches()
    field = receptive_field(net, torch.rand(1, 1, 12, 16), "stage1", (9.0, 5.0))
    weight = net.convolution.weight.detach().sum((0, 1)).abs()
    expected = torch.zeros(12, 16)
    expected[4:8, 8:12] = weight / weight.sum()
    torch.testing.assert_close(field, expected)
    with pytest.raises(ValueError, match="outside of the image of 16 x 12 px"):
        receptive_field(net, torch.rand(1, 1, 12, 16), "stage1", (16.0, 5.0))
    with pytest.raises(ValueError, match="returns stage1, not 'stage2'"):
        receptive_field(net, torch.rand(1, 1, 12, 16), "stage2", (1.0, 5.0))


def test_side_of_a_field() -> None:
    field = torch.zeros(9, 9)
    field[4, 4], field[4, 6], field[0, 4] = 0.5, 0.3, 0.2
    # Pixels have their middles at halves: 0, 2 and 4 px away.
    assert [field_side(field, (4.5, 4.5), share) for share in (0.4, 0.7, 0.95)] == [0, 4, 8]
