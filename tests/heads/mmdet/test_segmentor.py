"""Whole-image and sliding-window inference, and padded training batches."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.heads.mmdet.segmentor import MmsegSegmentor, window_starts
from tests.helpers.small_segmentor import small


class Identity(nn.Module):
    """A backbone that returns every second pixel, and a head that remembers what it was given."""

    size_divisibility = 0
    ignore_value = 255

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, targets: Tensor | None = None) -> object:
        self.calls.append((x, targets))
        return x, {"loss": x.sum()}


class EverySecond(Identity):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        self.calls.append((x, targets))
        return x[..., ::2, ::2]


def identity(**changes: object) -> MmsegSegmentor:
    parts: dict = {"backbone": EverySecond(), "sem_seg_head": Identity()}
    pixels = {"pixel_mean": [10.0, 20.0, 30.0], "pixel_std": [2.0, 4.0, 5.0]}
    return MmsegSegmentor(**(parts | pixels | changes)).eval()


def image(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_whole_image_is_resized_twice_and_not_padded() -> None:
    model = identity()
    pixels = image(37, 50)
    (result,) = model([{"image": pixels, "height": 91, "width": 64}])
    normalized = (pixels - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
        [2.0, 4, 5]
    ).view(3, 1, 1)
    assert model.backbone.calls[0][0].shape == (1, 3, 37, 50)
    first = F.interpolate(
        normalized[None, :, ::2, ::2], (37, 50), mode="bilinear", align_corners=False
    )
    second = F.interpolate(first, (91, 64), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(result["sem_seg"], second)
    once = F.interpolate(
        normalized[None, :, ::2, ::2], (91, 64), mode="bilinear", align_corners=False
    )[0]
    assert (once - second).abs().max() > 0.1


def test_a_backbone_that_needs_padding_gets_it() -> None:
    model = identity()
    model.backbone.size_divisibility = 32
    pixels = image(37, 50)
    (result,) = model([{"image": pixels}])
    # The mean of the pixels, zero, fills the padding.
    padded = torch.zeros(1, 3, 64, 64)
    for channel, (mean, deviation) in enumerate(((10, 2), (20, 4), (30, 5))):
        padded[0, channel, :37, :50] = (pixels[channel].float() - mean) / deviation
    torch.testing.assert_close(model.backbone.calls[0][0], padded)
    # Logits of the padded image are resized to its size, and cut off.
    logits = F.interpolate(padded[..., ::2, ::2], (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(result["sem_seg"], logits[0, :, :37, :50])


def test_sliding_equals_whole_image_on_one_window() -> None:
    model = small()
    record = {"image": image(64, 96), "height": 50, "width": 70}
    with torch.no_grad():
        (whole,) = model([record])
        for window in ((64, 96), (100, 200)):
            sliding = small(window=window)
            sliding.load_state_dict(model.state_dict())
            (result,) = sliding([record])
            torch.testing.assert_close(result["sem_seg"], whole["sem_seg"], rtol=0, atol=0)


def test_windows_are_averaged_where_they_overlap() -> None:
    class Numbered(Identity):
        """Logits that say which window it is: 1, 2, 3, ..."""

        def forward(self, x: Tensor, targets: Tensor | None = None) -> object:
            self.calls.append((x, targets))
            return torch.full_like(x[:, :1], float(len(self.calls))), {}

    head = Numbered()
    backbone = Identity()
    backbone.forward = lambda x: x  # type: ignore[method-assign]
    model = identity(backbone=backbone, sem_seg_head=head, window=(4, 6), window_stride=(3, 4))
    (result,) = model([{"image": image(6, 10)}])
    # Rows from 0 and 2, columns from 0 and 4.
    expected = torch.zeros(4, 6, 10)
    for number, (top, left) in enumerate([(0, 0), (0, 4), (2, 0), (2, 4)]):
        expected[number] = float("nan")
        expected[number, top : top + 4, left : left + 6] = number + 1
    torch.testing.assert_close(result["sem_seg"][0], expected.nanmean(dim=0))
    assert [tuple(x.shape[-2:]) for x, _ in head.calls] == [(4, 6)] * 4


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 3, [0]),
        (3, 4, 3, [0]),
        (5, 4, 4, [0, 1]),
    ],
)
def test_window_starts(length: int, window: int, stride: int, expected: list[int]) -> None:
    assert window_starts(length, window, stride) == expected


@pytest.mark.parametrize("stride", [(5, 4), (4, 0)])
def test_a_stride_that_leaves_gaps_is_an_error(stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="window_stride"):
        identity(window=(4, 4), window_stride=stride)


def test_training_batch_is_padded_with_ignored_pixels() -> None:
    model = identity(train_size=(8, 6)).train()
    images = [image(5, 9), image(4, 3)]
    labels = [torch.ones(5, 9, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long)]
    records = [{"image": i, "sem_seg": s} for i, s in zip(images, labels, strict=True)]
    losses = model(records)
    assert list(losses) == ["loss"]
    batch, targets = model.backbone.calls[0][0], model.sem_seg_head.calls[0][1]
    assert batch.shape == (2, 3, 8, 9)
    assert targets.shape == (2, 8, 9)
    assert (targets[0] == 1).sum() == 45
    assert (targets[1] == 0).sum() == 12
    assert (targets == 255).sum() == 2 * 72 - 45 - 12
    assert batch[1, :, 4:].abs().max() == 0
    assert batch[1, :, :, 3:].abs().max() == 0
    torch.testing.assert_close(batch[0, 1, :5], (images[0][1] - 20.0) / 4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = small()
    records = [{"image": image(64, 96)}, {"image": image(48, 40)}]
    with torch.no_grad():
        together = model(records)
        alone = [model([record])[0] for record in records]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a["sem_seg"], b["sem_seg"], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"train_size": (-1, 8)}, {"window": (0, 8)}])
def test_negative_sizes_are_errors(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        identity(**options)
