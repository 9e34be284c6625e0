"""Sparse R-CNN as a meta-architecture: proposals, empty images, detections, options."""

from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.prepare import prepare_model
from focalnet_det.heads.sparse_rcnn import DynamicConv, DynamicStage, SparseRCNN, sparse_rcnn
from focalnet_det.heads.sparse_rcnn.dynamic_stage import initial_boxes
from focalnet_det.necks.fpn import build_fpn

SMALL = {
    "num_classes": 3, "proposals": 7, "stages": 2, "dynamic_channels": 4, "feedforward": 16,
    "heads": 2, "max_detections_per_image": 5,
}  # fmt: skip


def small_model(backbone: dict[str, Any] | None = None, **options: Any) -> SparseRCNN:
    torch.manual_seed(0)
    network = focalnet_backbone(
        "focalnet_nano", embed_dim=8, depths=(1, 1, 1, 1), **(backbone or {})
    )
    return sparse_rcnn(backbone=build_fpn(network, out_channels=16), **(SMALL | options))


def record(height: int, width: int, objects: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(objects, 2, generator=generator) * 20
    truth = Instances(
        (height, width),
        gt_boxes=Boxes(torch.cat((corner, corner + 15), dim=1)),
        gt_classes=torch.arange(objects) % 3,
    )
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "instances": truth, "file_name": f"{seed}.jpg"}


@pytest.mark.parametrize("objects", [(2, 1), (3, 0), (0, 0)])
def test_every_parameter_gets_a_gradient(objects: tuple[int, int]) -> None:
    model = small_model()
    batch = [record(64, 96, objects[0], 1), record(48, 64, objects[1], 2)]
    losses = model(batch)
    assert set(losses) == {f"loss_{n}_stage{k}" for n in ("cls", "box", "giou") for k in (0, 1)}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if not sum(objects):
        assert float(losses["loss_box_stage1"]) == 0
        assert float(losses["loss_cls_stage1"]) > 0


def test_dynamic_conv_equals_a_loop() -> None:
    torch.manual_seed(1)
    conv = DynamicConv(6, dynamic_channels=4, resolution=3)
    proposals, rois = torch.randn(5, 6), torch.randn(5, 6, 3, 3)
    found = conv(proposals, rois)
    for proposal, roi, row in zip(proposals, rois, found, strict=True):
        generated = conv.dynamic_layer(proposal)
        first, second = generated[:24].view(6, 4), generated[24:].view(4, 6)
        cells = []
        for y in range(3):
            for x in range(3):
                hidden = F.relu(F.layer_norm(roi[:, y, x] @ first, (4,), *pair(conv.norm1)))
                cells.append(F.relu(F.layer_norm(hidden @ second, (6,), *pair(conv.norm2))))
        flat = torch.cat(cells) @ conv.out_layer.weight.T + conv.out_layer.bias
        expected = F.relu(F.layer_norm(flat, (6,), *pair(conv.norm3)))
        torch.testing.assert_close(row, expected)


def pair(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias  # type: ignore[return-value]


def test_self_attention_is_that_of_pytorch() -> None:
    torch.manual_seed(2)
    stage = DynamicStage(3, 16, dynamic_channels=4, resolution=2, heads=2, feedforward=8)
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    reference.load_state_dict(stage.self_attn.state_dict())
    x = torch.randn(2, 5, 16)
    expected, _ = reference(x, x, x)
    torch.testing.assert_close(stage.self_attn(x, x, x), expected)


def test_detections_are_the_most_probable_pairs() -> None:
    model = small_model(max_detections_per_image=3).eval()
    logits = torch.full((7, 3), -9.0)
    logits[4, 2], logits[0, 1], logits[4, 0] = 3.0, 2.0, 1.0
    boxes = torch.arange(28.0).view(7, 4)
    found = model.detections(logits, boxes, (40, 50))
    assert found.pred_classes.tolist() == [2, 1, 0]
    assert torch.equal(found.pred_boxes.tensor, boxes[[4, 0, 4]])
    assert found.scores.tolist() == pytest.approx([0.95257, 0.88080, 0.73106], abs=1e-4)


@torch.no_grad()
def test_boxes_are_in_the_original_image() -> None:
    model = small_model().eval()
    image = record(64, 96, 0)
    (plain,), (scaled,) = model([image]), model([image | {"height": 128, "width": 288}])
    factors = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(
        scaled["instances"].pred_boxes.tensor, plain["instances"].pred_boxes.tensor * factors
    )
    assert scaled["instances"].image_size == (128, 288)
    assert len(plain["instances"]) == 5


@torch.no_grad()
def test_batch_padding_is_ignored_where_asked() -> None:
    model = prepare_model(small_model({"valid_context": True})).eval()
    images = [record(64, 96, 0, 1), record(40, 60, 0, 2)]
    together = model(images)
    for image, result in zip(images, together, strict=True):
        (alone,) = model([image])
        torch.testing.assert_close(
            result["instances"].pred_boxes.tensor, alone["instances"].pred_boxes.tensor,
            rtol=1e-4, atol=1e-3,
        )  # fmt: skip


def test_initial_boxes() -> None:
    assert initial_boxes(2, "image").tolist() == [[0.5, 0.5, 1.0, 1.0]] * 2
    grid = initial_boxes(4, "grid")
    assert grid.tolist() == [
        [0.25, 0.25, 0.75, 0.75], [0.75, 0.25, 0.75, 0.75],
        [0.25, 0.75, 0.75, 0.75], [0.75, 0.75, 0.75, 0.75],
    ]  # fmt: skip
    model = small_model(proposals=1)
    sizes = torch.tensor([[96.0, 64.0, 96.0, 64.0]])
    assert model.proposal_boxes(sizes).tolist() == [[[0.0, 0.0, 96.0, 64.0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_box": "random"}, "Unknown initial_boxes 'random'. Known: grid, image."),
        ({"heads": 3}, "16 channels cannot be split over 3 heads"),
        ({"in_features": ("p2", "p9")}, "reads levels p2, p9, the backbone gives p2, p3"),
        ({"stages": 0}, "stages must be an integer between 1 and 100, got 0"),
        ({"proposals": 0}, "proposals must be an integer between 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_images_without_records_of_objects_are_named() -> None:
    model = small_model()
    nan = record(64, 96, 1, 7)
    nan["image"][:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"matching cost of image 7.jpg"):
        model([nan])
