"""Denoising queries, their mask and their objects, against loops."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from focalnet_det.heads.dino.denoising import (
    Layout,
    Noise,
    blocked_attention,
    build_queries,
    denoising_matches,
    draw_noise,
    plan_groups,
)
from focalnet_det.heads.set_prediction.box_matching import BoxTarget

CPU = torch.device("cpu")


def targets(*counts: int) -> list[BoxTarget]:
    generator = torch.Generator().manual_seed(3)
    return [
        BoxTarget(
            torch.randint(7, (count,), generator=generator),
            box_convert(torch.rand(count, 4, generator=generator) * 0.5 + 0.2, "cxcywh", "xyxy"),
        )
        for count in counts
    ]


@pytest.mark.parametrize(
    ("counts", "queries", "groups"),
    [((3, 5), 100, 20), ((0, 1), 100, 100), ((150, 2), 100, 1), ((0, 0), 100, 1), ((7,), 100, 14)],
)
def test_number_of_groups(counts: tuple[int, ...], queries: int, groups: int) -> None:
    layout = plan_groups(targets(*counts), queries)
    assert layout == Layout(groups, max(counts))
    assert layout.width == 2 * groups * max(counts)


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_queries_from_given_noise(scale: float) -> None:
    objects, layout = targets(2, 0, 3), Layout(groups=2, most=3)
    torch.manual_seed(0)
    noise = Noise(torch.randint(7, (4, 5)), 4 * torch.rand(4, 5, 4) - 2)
    found = build_queries(objects, noise, layout, scale)
    assert found.labels.shape == (3, 12)
    seen = set()
    flat = [(i, j) for i, target in enumerate(objects) for j in range(len(target.labels))]
    for copy in range(4):  # positives and negatives of the first group, then of the second
        for t, (i, j) in enumerate(flat):
            place = 3 * copy + j
            seen.add((i, place))
            assert found.labels[i, place] == noise.labels[copy, t]
            corners = objects[i].boxes[j].tolist()
            w, h = corners[2] - corners[0], corners[3] - corners[1]
            moved = [
                min(max(corner + scale * half * shift, 0.0), 1.0)
                for corner, half, shift in zip(
                    corners, [w / 2, h / 2] * 2, noise.shifts[copy, t].tolist(), strict=True
                )
            ]
            box = box_convert(torch.tensor(moved), "xyxy", "cxcywh")
            # Negative sides, where corners have passed each other, count as none.
            box = box.clamp(0, 1)
            expected = (box.clamp(min=1e-3) / (1 - box).clamp(min=1e-3)).log()
            torch.testing.assert_close(found.boxes[i, place], expected, rtol=1e-4, atol=1e-3)
    empty = [(i, p) for i in range(3) for p in range(12) if (i, p) not in seen]
    assert all(found.labels[i, p] == -1 and not found.boxes[i, p].any() for i, p in empty)


def test_drawn_noise() -> None:
    objects = targets(40, 60)
    torch.manual_seed(0)
    noise = draw_noise(objects, 50, num_classes=7, label_noise=0.25)
    assert noise.labels.shape == (100, 100)
    true = torch.cat([target.labels for target in objects])
    # A replaced label is the true one by a chance of 1 in 7.
    changed = (noise.labels != true).float().mean().item()
    assert changed == pytest.approx(0.25 * 6 / 7, abs=0.015)
    positives, negatives = noise.shifts[0::2].abs(), noise.shifts[1::2].abs()
    assert positives.max() < 1 <= negatives.min()
    assert negatives.max() < 2
    assert positives.mean().item() == pytest.approx(0.5, abs=0.01)
    assert negatives.mean().item() == pytest.approx(1.5, abs=0.01)
    assert (noise.shifts > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("layout", [Layout(3, 2), Layout(1, 4), Layout(1, 0)])
def test_blocked_attention(layout: Layout) -> None:
    queries = 5
    found = blocked_attention(layout, queries, CPU)

    def group(place: int) -> int | None:
        return place // (2 * layout.most) if place < layout.width else None

    total = layout.width + queries
    expected = torch.zeros(total, total, dtype=torch.bool)
    for reader in range(total):
        for read in range(total):
            denoising = group(read) is not None
            expected[reader, read] = denoising and group(reader) != group(read)
    assert torch.equal(found, expected)


def test_objects_of_positive_queries() -> None:
    found = denoising_matches(targets(2, 0, 3), Layout(groups=2, most=3), CPU)
    pairs: list[tuple[Tensor, Tensor]] = found
    assert [[q.tolist(), o.tolist()] for q, o in pairs] == [
        [[0, 1, 6, 7], [0, 1, 0, 1]],
        [[], []],
        [[0, 1, 2, 6, 7, 8], [0, 1, 2, 0, 1, 2]],
    ]
