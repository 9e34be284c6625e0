"""RepPoints v2's head and inference against slow computations."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, nms

from focalnet_det.heads.reppoints_v2 import reppoints_head
from focalnet_det.heads.reppoints_v2.corner_pool import CornerPool, running_maximum
from focalnet_det.heads.reppoints_v2.reppoints_head import Predictions, RepPointsV2Head
from tests.helpers import reppoints_loops as loops
from tests.helpers.nano_recipes import CLASSES, build, record
from tests.helpers.shared_gradients import assert_two_processes_equal_one

SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]


def slow_maximum(x: Tensor, direction: str) -> Tensor:
    """Of every cell: the maximum over it and what lies in that direction."""
    result = torch.empty_like(x)
    for y in range(x.shape[2]):
        for c in range(x.shape[3]):
            rest = {"below": x[:, :, y:, c], "above": x[:, :, : y + 1, c],
                    "right": x[:, :, y, c:], "left": x[:, :, y, : c + 1]}[direction]  # fmt: skip
            result[:, :, y, c] = rest.amax(dim=2)
    return result


@pytest.mark.parametrize("top_left", [True, False])
def test_corner_pool_equals_a_loop(top_left: bool) -> None:
    torch.manual_seed(2)
    pool = CornerPool(64, 32, top_left=top_left)
    x = torch.randn(2, 64, 5, 7)
    ways = ("below", "right") if top_left else ("above", "left")
    for dim, way in zip((2, 3), ways, strict=True):
        assert torch.equal(running_maximum(x, dim, from_end=top_left), slow_maximum(x, way))
    columns, rows = slow_maximum(pool.p1_conv1(x), ways[0]), slow_maximum(pool.p2_conv1(x), ways[1])
    summed = pool.p_gn1(pool.p_conv1(columns + rows)) + pool.gn1(pool.conv1(x))
    expected = F.relu(pool.conv2.gn(pool.conv2.conv(F.relu(summed))))
    torch.testing.assert_close(pool(x), expected)


def test_sizes_are_published() -> None:
    with torch.device("meta"):
        head = RepPointsV2Head(num_classes=80)
    assert sum(p.numel() for p in head.parameters()) == 7_210_442
    assert list(head.state_dict()) == [name for name, _ in head.named_parameters()]


def test_head_equals_single_steps() -> None:
    torch.manual_seed(3)
    head: Any = RepPointsV2Head(num_classes=CLASSES, channels=64, convs=2)
    for name, parameter in head.named_parameters():
        if "_out." in name or "_conv." in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    x = torch.randn(1, 64, 6, 5)
    found = Predictions(*(maps[0] for maps in head([x])))
    classes = points = x
    for conv in head.cls_convs:
        classes = F.relu(conv.gn(conv.conv(classes)))
    for conv in head.reg_convs:
        points = F.relu(conv.gn(conv.conv(points)))
    shared = F.relu(head.shared_convs[0].gn(head.shared_convs[0].conv(points)))
    embedding = head.reppoints_sem_embedding(shared)
    torch.testing.assert_close(found.semantic, head.reppoints_sem_out(shared))
    corners = [head.hem_tl(shared + embedding), head.hem_br(shared + embedding)]
    maps = [
        head.reppoints_hem_tl_score_out(corners[0]),
        head.reppoints_hem_br_score_out(corners[1]),
    ]
    maps += [head.reppoints_hem_tl_offset_out(corners[0])]
    maps += [head.reppoints_hem_br_offset_out(corners[1])]
    torch.testing.assert_close(torch.cat(maps, 1), torch.cat(found[3:5], 1))
    initial = head.reppoints_pts_init_out(F.relu(head.reppoints_pts_init_conv(points + embedding)))
    torch.testing.assert_close(found.initial, initial)
    # The kernel reads at the points: nine positions, y before x, of which -1, -1 is the first.
    grid = torch.tensor([[y, x] for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)]).reshape(1, 18, 1, 1)
    outputs = []
    for features, part in ((classes, "cls"), (points, "pts_refine")):
        inputs = torch.cat([features + embedding, *maps], dim=1)
        weight = getattr(head, f"reppoints_{part}_conv").weight
        sampled = deform_conv2d(inputs, initial - grid, weight, padding=1)
        outputs.append(getattr(head, f"reppoints_{part}_out")(F.relu(sampled)))
    torch.testing.assert_close(found.logits, outputs[0])
    torch.testing.assert_close(found.refined, outputs[1] + initial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_on_the_cpu(dtype: torch.dtype) -> None:
    model = build("reppoints_v2").train()
    batch = [record(2), record(0, seed=1)]
    expected = model(batch)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.1, abs=1e-3), name


def test_points_get_a_tenth_of_the_gradient_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    head: Any = RepPointsV2Head(num_classes=2, channels=64, convs=1)
    head.reppoints_pts_init_out.weight.data *= 100
    x = torch.randn(1, 64, 6, 5)
    seen: list[Tensor] = []

    def recorded(features: Tensor, points: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(points)
        return deform_conv2d(features, points, *arguments, **options)

    monkeypatch.setattr(reppoints_head, "deform_conv2d", recorded)
    found = head([x])
    seen[0].retain_grad()
    found.initial[0].retain_grad()
    found.logits[0].sum().backward()
    assert found.initial[0].grad.abs().max() > 0
    torch.testing.assert_close(found.initial[0].grad, 0.1 * seen[0].grad)


def random_maps() -> Predictions:
    generator = torch.Generator().manual_seed(6)

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(1, channels, *size, generator=generator) for size in SIZES]

    found = Predictions(maps(CLASSES), maps(18), maps(18), maps(2), maps(4), maps(CLASSES))
    for level in found.refined:
        level[:, :2] -= 1.5
        level[:, 2:4] += 1.5
    return found


def slow_snap(x: float, y: float, maps: Predictions, finer: int, corner: int) -> list[float]:
    """The likeliest of the 2 x 2 cells from the one that the point lies in."""
    stride, (rows, columns) = loops.STRIDES[finer], SIZES[finer]
    scores = maps.corner_scores[finer][0, corner].tolist()
    offsets = maps.corner_offsets[finer][0, 2 * corner : 2 * corner + 2].tolist()
    column, row = min(int(x / stride), columns - 2), min(int(y / stride), rows - 2)
    _, r, c = max((scores[r][c], r, c) for r in (row, row + 1) for c in (column, column + 1))
    return [(c + offsets[0][r][c]) * stride, (r + offsets[1][r][c]) * stride]


def test_inference_equals_a_loop() -> None:
    model: Any = build("reppoints_v2").eval()
    model.test_topk_candidates, model.max_detections_per_image = 20, 15
    model.test_score_thresh = 0.3
    maps = random_maps()
    height, width = 61, 90

    def clipped(x: float, y: float) -> list[float]:
        return [min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))]

    rows: list[tuple[list[float], list[float]]] = []
    for level, (h, w) in enumerate(SIZES):
        own = []
        for c, (_, x, y) in enumerate(cell for cell in loops.cells(SIZES) if cell[0] == level):
            s = loops.STRIDES[level]
            y0, x0, y1, x1 = maps.refined[level][0, :4].flatten(1)[:, c].tolist()
            box = clipped(x + s * x0, y + s * y0) + clipped(x + s * x1, y + s * y1)
            if level > 0:
                finer = {1: 0, 2: 0, 3: 1, 4: 1}[level]
                box = clipped(*slow_snap(*box[:2], maps, finer, 0)) + clipped(
                    *slow_snap(*box[2:], maps, finer, 1)
                )
            scores = [loops.sigmoid(z) for z in maps.logits[level][0].flatten(1)[:, c].tolist()]
            own.append((box, scores))
        assert len(own) == h * w
        rows += sorted(own, key=lambda r: -max(r[1]))[:20]
    kept = []
    for k in range(CLASSES):
        mine = [(box, scores[k], k) for box, scores in rows if scores[k] > 0.3]
        chosen = nms(torch.tensor([m[0] for m in mine]), torch.tensor([m[1] for m in mine]), 0.6)
        kept += [mine[int(i)] for i in chosen]
    expected = sorted(kept, key=lambda r: -r[1])[:15]
    images: Any = type("Images", (), {"image_sizes": [(height, width)]})
    (found,) = model.forward_inference(images, [], maps)
    assert found.image_size == (height, width)
    assert found.scores.tolist() == pytest.approx([r[1] for r in expected], rel=1e-5)
    assert found.pred_classes.tolist() == [r[2] for r in expected]
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([r[0] for r in expected]), rtol=1e-4, atol=1e-3
    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One process has objects, the other none."""
    assert_two_processes_equal_one("reppoints_v2", tmp_path)
