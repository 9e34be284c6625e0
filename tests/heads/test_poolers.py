"""RoIAlign in C++ against torchvision's."""

import copy

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from focalnet_det.heads.poolers import FastROIPooler, use_fast_roi_align
from focalnet_det.ops.cpu import library as native
from focalnet_det.ops.focal_block import policy

pytestmark = pytest.mark.skipif(
    isinstance(native.library(), native.BuildError),
    reason=f"no native kernels: {native.library()}",
)

SCALES = (1 / 4, 1 / 8, 1 / 16)


def pair(
    size: int, scales: tuple[float, ...], ratio: int, kind: str
) -> tuple[ROIPooler, nn.Module]:
    stock = ROIPooler(size, scales, ratio, kind, canonical_box_size=56)
    return stock, use_fast_roi_align(copy.deepcopy(stock))


def maps_of(
    channels: int,
    scales: tuple[float, ...],
    *,
    images: int = 2,
    height: int = 100,
    width: int = 140,
) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(images, channels, int(height * s), int(width * s)).requires_grad_()
        for s in scales
    ]


def boxes_of(count: int, *, height: int = 100, width: int = 140) -> Boxes:
    """Of every size, some without an area, some that reach beyond the image."""
    torch.manual_seed(1)
    corners = torch.rand(count, 2) * torch.tensor([width, height]) * 1.2 - 10
    sides = torch.rand(count, 2) ** 2 * 150
    sides[::7] = 0
    return Boxes(torch.cat([corners, corners + sides], dim=1))


def results(pooler: nn.Module, maps: list[Tensor], boxes: list[Boxes]) -> list[Tensor]:
    maps = [x.detach().requires_grad_() for x in maps]
    out = pooler(maps, boxes)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    # A map of whose level there is no box has a gradient of zeros, or none.
    gradients = torch.autograd.grad((out * weights).sum(), maps, allow_unused=True)
    return [
        out,
        *(torch.zeros_like(x) if g is None else g for x, g in zip(maps, gradients, strict=True)),
    ]


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize(
    ("size", "ratio", "channels"), [(7, 0, 64), (7, 2, 5), (10, 1, 40), (14, 3, 1), (1, 0, 33)]
)
@pytest.mark.parametrize("scales", [SCALES, (1 / 8,)])
def test_as_torchvision(
    size: int, ratio: int, channels: int, kind: str, scales: tuple[float, ...]
) -> None:
    stock, fast = pair(size, scales, ratio, kind)
    maps, boxes = maps_of(channels, scales), [boxes_of(60), boxes_of(13)]
    for expected, actual in zip(
        results(stock, maps, boxes), results(fast, maps, boxes), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert type(fast) is FastROIPooler


def test_hand_worked() -> None:
    """On a map that is x + 10 y, a bin is that at its centre (pixel centres lie at halves)."""
    fast = use_fast_roi_align(ROIPooler(2, (1.0,), 2, "ROIAlignV2"))
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    out = fast([(x + 10 * y)[None, None]], [Boxes(torch.tensor([[1.0, 2.0, 5.0, 6.0]]))])
    torch.testing.assert_close(out[0, 0], torch.tensor([[26.5, 28.5], [46.5, 48.5]]))


def test_memory_orders_no_boxes_and_threads() -> None:
    stock, fast = pair(7, SCALES, 2, "ROIAlignV2")
    maps, boxes = maps_of(32, SCALES), [boxes_of(20), boxes_of(0)]
    first = results(fast, maps, boxes)
    last = results(
        fast, [x.detach().contiguous(memory_format=torch.channels_last) for x in maps], boxes
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    more = results(fast, maps, boxes)
    torch.set_num_threads(threads)
    for a, b, c in zip(first, last, more, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    empty = [boxes_of(0), boxes_of(0)]
    assert fast(maps, empty).shape == stock(maps, empty).shape == (0, 32, 7, 7)
    for gradient in results(fast, maps, empty)[1:]:
        assert not gradient.any()
    with torch.no_grad():
        assert not fast(maps, boxes).requires_grad


def test_leaves_the_rest_to_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fast = pair(7, SCALES, 2, "ROIAlignV2")
    maps, boxes = maps_of(8, SCALES), [boxes_of(9), boxes_of(4)]
    assert policy.supports_native(maps)
    double = [x.double() for x in maps]
    assert not policy.supports_native(double)
    assert torch.equal(fast(double, boxes), stock(double, boxes))
    monkeypatch.setenv(policy.VARIABLE, "reference")
    assert torch.equal(fast(maps, boxes), stock(maps, boxes))

    class Other(ROIPooler):
        pass

    assert type(use_fast_roi_align(Other(7, SCALES, 2, "ROIAlignV2"))) is Other
