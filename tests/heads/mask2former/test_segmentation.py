"""The three kinds of inference against loops over pixels, and cases worked by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from focalnet_det.heads.mask2former import segmentation

THINGS = range(3)


def smooth_masks(count: int, size: tuple[int, int]) -> Tensor:
    return F.interpolate(3 * torch.randn(1, count, 4, 5), size, mode="bicubic")[0]


def panoptic_loop(
    class_logits: Tensor, masks: Tensor, threshold: float, overlap: float
) -> tuple[list[list[int]], list[tuple[int, int, bool]]]:
    """Map of segment numbers, and (number, class, is thing), pixel by pixel."""
    nothing = class_logits.shape[1] - 1
    used = []
    for query, row in enumerate(class_logits.softmax(-1).tolist()):
        label = max(range(nothing + 1), key=lambda k: row[k])
        if label != nothing and row[label] > threshold:
            used.append((query, label, row[label]))
    height, width = masks.shape[1:]
    probability = [[[1 / (1 + math.exp(-v)) for v in row] for row in m] for m in masks.tolist()]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    owner = {
        (y, x): max(range(len(used)), key=lambda i: used[i][2] * probability[used[i][0]][y][x])
        for y, x in pixels
        if used
    }
    result = [[0] * width for _ in range(height)]
    rows: list[tuple[int, int, bool]] = []
    for i, (query, label, _) in enumerate(used):
        won = [p for p in pixels if owner[p] == i]
        own = [p for p in pixels if probability[query][p[0]][p[1]] >= 0.5]
        kept = [p for p in won if p in set(own)]
        if not won or not own or not kept or len(won) / len(own) < overlap:
            continue
        number = next((n for n, k, thing in rows if k == label and not thing), 0)
        if label in THINGS or not number:
            number = len(rows) + 1
            rows.append((number, label, label in THINGS))
        for y, x in kept:
            result[y][x] = number
    return result, rows


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_segments_are_those_of_a_loop(seed: int) -> None:
    torch.manual_seed(seed)
    class_logits, masks = 3 * torch.randn(14, 6), smooth_masks(14, (17, 23))
    threshold, overlap = 0.4, 0.3
    queries, scores, labels = segmentation.panoptic_queries(class_logits, threshold)
    segments, rows = segmentation.panoptic_segments(scores, labels, masks[queries], THINGS, overlap)
    expected, wanted = panoptic_loop(class_logits, masks, threshold, overlap)
    assert segments.tolist() == expected
    assert [(r["id"], r["category_id"], r["isthing"]) for r in rows] == wanted
    assert len(wanted) >= 3


def test_parts_of_stuff_join_and_things_stay_apart() -> None:
    masks = torch.full((4, 2, 8), -9.0)
    for i in range(4):
        masks[i, :, 2 * i : 2 * i + 2] = 9.0
    labels = torch.tensor([4, 0, 4, 0])
    segments, rows = segmentation.panoptic_segments(torch.ones(4), labels, masks, THINGS, 0.8)
    assert segments[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]
    assert [r["category_id"] for r in rows] == [4, 0, 0]


def test_an_image_in_which_nothing_is_found() -> None:
    class_logits = torch.tensor([[0.0, 9.0]] * 5)
    queries, scores, labels = segmentation.panoptic_queries(class_logits, 0.8)
    masks = segmentation.resize_masks(torch.zeros(5, 4, 4)[queries], (16, 16), (15, 14), (30, 28))
    segments, rows = segmentation.panoptic_segments(scores, labels, masks, THINGS, 0.8)
    assert segments.shape == (30, 28)
    assert not segments.any()
    assert rows == []


def test_instances_are_the_most_probable_pairs() -> None:
    class_logits, masks = torch.randn(6, 5), smooth_masks(6, (7, 9))
    queries, labels, scores = segmentation.instance_candidates(class_logits, 8, None)
    wanted = masks[queries.unique()]
    found = segmentation.instances(queries, labels, scores, wanted, (7, 9))
    probability = class_logits.softmax(-1)
    pairs = [(float(probability[q, k]), q, k) for q in range(6) for k in range(4)]
    expected = set()
    for score, query, label in sorted(pairs, reverse=True)[:8]:
        inside = [v for v in masks[query].flatten().tolist() if v > 0]
        mean = sum(1 / (1 + math.exp(-v)) for v in inside) / (len(inside) + 1e-6)
        expected.add((round(score * mean, 5), label, len(inside)))
    actual = {
        (round(float(s), 5), int(k), int(m.sum()))
        for s, k, m in zip(found.scores, found.pred_classes, found.pred_masks, strict=True)
    }
    assert actual == expected
    assert found.image_size == (7, 9)
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor.tolist(), strict=True):
        y, x = mask.nonzero(as_tuple=True)
        empty = not len(x)
        expected_box = [0] * 4 if empty else [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert box == [int(v) for v in expected_box]


def test_stuff_is_no_instance() -> None:
    class_logits = torch.tensor([[1.0, 5.0, 0.0, 0.0], [4.0, 1.0, 0.0, 0.0]])
    queries, labels, scores = segmentation.instance_candidates(class_logits, 4, [0, 2])
    assert set(labels.tolist()) <= {0, 2}
    assert len(queries) == len(scores) < 4


def test_semantic_scores_are_sums_over_queries() -> None:
    class_logits, masks = torch.randn(4, 3), smooth_masks(4, (3, 2))
    scores = segmentation.semantic_scores(class_logits, masks)
    expected = sum(
        class_logits[q].softmax(-1)[:-1, None, None] * masks[q].sigmoid() for q in range(4)
    )
    torch.testing.assert_close(scores, expected)


def test_masks_are_resized_cropped_and_resized() -> None:
    masks = smooth_masks(2, (8, 8))
    resized = segmentation.resize_masks(masks, (32, 32), (20, 31), (10, 40))
    whole = F.interpolate(masks[None], (32, 32), mode="bilinear", align_corners=False)
    expected = F.interpolate(whole[:, :, :20, :31], (10, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, expected[0])
