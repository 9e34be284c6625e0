"""The published cascade and RetinaNet, against slow loops and torchvision's GIoU."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor
from torchvision.ops import batched_nms, generalized_box_iou_loss

from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.heads.mmdet.cascade import MmdetCascadeROIHeads
from focalnet_det.heads.mmdet.conventions import MmdetBox2BoxTransform

CLASSES, SIZE = 3, (64, 80)
WEIGHTS = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))


def small_heads(**changes: object) -> MmdetCascadeROIHeads:
    """Three stages on one level of stride 4, with weights large enough to move boxes."""
    torch.manual_seed(3)
    shape = ShapeSpec(channels=8, height=7, width=7)
    options = {
        "num_classes": CLASSES,
        "batch_size_per_image": 32,
        "positive_fraction": 0.25,
        "box_in_features": ["p2"],
        "box_pooler": ROIPooler(7, (0.25,), 0, "ROIAlignV2"),
        "box_heads": [FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[16]) for _ in WEIGHTS],
        "box_predictors": [
            FastRCNNOutputLayers(
                ShapeSpec(channels=16),
                box2box_transform=MmdetBox2BoxTransform(w),
                num_classes=CLASSES,
                test_score_thresh=0.05,
                box_reg_loss_type="giou",
                loss_weight={"loss_box_reg": 10.0},
            )
            for w in WEIGHTS
        ],
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)],
        "mask_in_features": ["p2"],
        "mask_pooler": ROIPooler(14, (0.25,), 0, "ROIAlignV2"),
        "mask_heads": [
            MaskRCNNConvUpsampleHead(
                ShapeSpec(channels=8, height=14, width=14), num_classes=CLASSES, conv_dims=[8, 8]
            )
            for _ in WEIGHTS
        ],
    }
    heads = MmdetCascadeROIHeads(**(options | changes))
    for predictor in heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.5)
    for head in heads.mask_head:
        torch.nn.init.normal_(head.predictor.weight, std=0.5)
    return heads


def proposals(seed: int, count: int = 12) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 40
    sizes = torch.rand(count, 2, generator=generator) * 20 + 8
    boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
    return Instances(SIZE, proposal_boxes=boxes, objectness_logits=torch.zeros(count))


def decoded(box: list[float], delta: list[float], weights: tuple[int, ...]) -> list[float]:
    """One box moved by one delta; its log-sizes are far from their limits."""
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    w, h = x2 - x1, y2 - y1
    cx, cy = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
    w, h = w * 2.718281828459045**dw, h * 2.718281828459045**dh
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


@torch.no_grad()
def test_detections_equal_a_loop() -> None:
    """Logits are averaged, then one softmax; boxes follow the best foreground class."""
    heads = small_heads().eval()
    features = {"p2": torch.randn(1, 8, 16, 20)}
    start = proposals(1)
    (found,), losses = heads(None, features, [start])
    assert losses == {}
    height, width = SIZE
    boxes, total = start.proposal_boxes.tensor, torch.zeros(12, CLASSES + 1)
    for stage, weights in enumerate(WEIGHTS):
        pooled = heads.box_pooler([features["p2"]], [Boxes(boxes)])
        logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
        total += logits
        classes = [max(range(CLASSES), key=row.tolist().__getitem__) for row in logits]
        moved = [
            [decoded(boxes[i].tolist(), deltas[i, 4 * k : 4 * k + 4].tolist(), weights)
             for k in range(CLASSES)]
            for i in range(12)
        ]  # fmt: skip
        every = torch.tensor(moved)  # (12, classes, 4)
        every[..., 0::2].clamp_(0, width)
        every[..., 1::2].clamp_(0, height)
        boxes = torch.stack([every[i, k] for i, k in enumerate(classes)])
    scores = (total / 3).softmax(dim=1)[:, :CLASSES]
    rows, labels = (scores > 0.05).nonzero().unbind(1)
    keep = batched_nms(every[rows, labels], scores[rows, labels], labels, 0.5)
    assert len(found) == len(keep) > 5
    torch.testing.assert_close(found.scores, scores[rows, labels][keep])
    torch.testing.assert_close(
        found.pred_boxes.tensor, every[rows, labels][keep], atol=1e-3, rtol=0
    )
    assert found.pred_classes.tolist() == labels[keep].tolist()
    pooled = heads.mask_pooler([features["p2"]], [found.pred_boxes])
    masks = torch.zeros(len(found), 1, 28, 28)
    for head in heads.mask_head:
        logits = head.layers(pooled)
        for i, k in enumerate(found.pred_classes.tolist()):
            masks[i, 0] += 1 / (1 + torch.exp(-logits[i, k])) / 3
    torch.testing.assert_close(found.pred_masks, masks)


def truth() -> Instances:
    boxes = torch.tensor([[4.0, 4, 34, 30], [30, 20, 70, 60]])
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 4:30, 4:34] = masks[1, 20:60, 30:70] = True
    return Instances(
        SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks)
    )


def test_losses_are_giou_on_decoded_boxes_times_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = small_heads().train()
    seen: list[tuple[Tensor, list[Instances]]] = []
    run_stage = MmdetCascadeROIHeads._run_stage

    def recorded(self, maps, boxes, stage):  # type: ignore[no-untyped-def]
        predictions = run_stage(self, maps, boxes, stage)
        seen.append((predictions[1].detach(), boxes))
        return predictions

    monkeypatch.setattr(MmdetCascadeROIHeads, "_run_stage", recorded)
    with EventStorage():
        _, losses = heads(None, {"p2": torch.randn(1, 8, 16, 20)}, [proposals(2)], [truth()])
    assert set(losses) == {
        f"{name}_stage{k}" for name in ("loss_cls", "loss_box_reg", "loss_mask") for k in range(3)
    }
    for stage, (deltas, (boxes,)) in enumerate(seen):
        total = 0.0
        for i, k in enumerate(boxes.gt_classes.tolist()):
            if k < CLASSES:
                box = decoded(
                    boxes.proposal_boxes.tensor[i].tolist(),
                    deltas[i, 4 * k : 4 * k + 4].tolist(),
                    WEIGHTS[stage],
                )
                own = boxes.gt_boxes.tensor[i : i + 1]
                total += float(generalized_box_iou_loss(torch.tensor([box]), own).sum())
        expected = total / len(boxes) * 10 * (1, 0.5, 0.25)[stage]
        assert expected > 0.005
        assert losses[f"loss_box_reg_stage{stage}"].item() == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in heads.parameters())


def test_every_stage_gets_the_objects_themselves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own boxes join each stage's pool; moved ones are dropped."""
    heads = small_heads(batch_size_per_image=512, positive_fraction=0.9).train()
    pools: list[Instances] = []
    sample = MmdetCascadeROIHeads.label_and_sample_proposals

    def recorded(self, boxes, targets):  # type: ignore[no-untyped-def]
        pools.append(boxes[0])
        return sample(self, boxes, targets)

    monkeypatch.setattr(MmdetCascadeROIHeads, "label_and_sample_proposals", recorded)
    with EventStorage():
        heads(None, {"p2": torch.randn(1, 8, 16, 20)}, [proposals(2)], [truth()])
    assert [len(pool) for pool in pools] == [14] * 3
    for pool in pools:
        assert pool.is_ground_truth.tolist() == [False] * 12 + [True] * 2
        own = pool.proposal_boxes.tensor[12:]
        torch.testing.assert_close(own, truth().gt_boxes.tensor)


def test_image_without_objects() -> None:
    heads = small_heads().train()
    empty = Instances(
        SIZE,
        gt_boxes=Boxes(torch.zeros(0, 4)),
        gt_classes=torch.zeros(0, dtype=torch.long),
        gt_masks=BitMasks(torch.zeros(0, *SIZE, dtype=torch.bool)),
    )
    with EventStorage():
        _, losses = heads(None, {"p2": torch.randn(1, 8, 16, 20)}, [proposals(2)], [empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    for stage in range(3):
        assert losses[f"loss_box_reg_stage{stage}"] == 0
        assert losses[f"loss_cls_stage{stage}"] > 0


def test_one_of_each_per_stage() -> None:
    with pytest.raises(
        ValueError, match="3 stages need 3 mask heads and 3 stage weights, got 3 and"
    ):
        small_heads(stage_weights=(1.0, 0.5))


LEAF = "configs/COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py"
THIN = ["model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"]


def test_retinanet_divides_by_the_positives() -> None:
    model = read_experiment(load_config(LEAF, [*THIN, "model.num_classes=2"])).model()
    anchors = [Boxes(torch.tensor([[0.0, 0, 32, 32], [32, 32, 64, 64]]))]
    logits, deltas = [torch.zeros(2, 2, 2)], [torch.zeros(2, 2, 4)]
    # The second image has no positive, and counts as one.
    labels = [torch.tensor([1, 1]), torch.tensor([2, 2])]
    boxes = [torch.tensor([[0.0, 0, 32, 64], [32, 32, 64, 64]]), torch.zeros(2, 4)]
    with EventStorage():
        for _ in range(2):  # no moving average
            losses = model.losses(anchors, logits, labels, deltas, boxes)
    # Focal loss at probability 1/2: a quarter of log 2, weighed 1/4 for positives, 3/4 for others.
    focal = 0.25 * 0.6931472 * (2 * 0.25 + 6 * 0.75)
    assert losses["loss_cls"].item() == pytest.approx(focal / 3)
    assert losses["loss_box_reg"].item() == pytest.approx((0.5 + 0.6931472) / 3)


def test_rpn_leaves_crossing_anchors_out_before_matching() -> None:
    """The object's best anchor crosses the border: the next best one is then positive."""
    leaf = "configs/COCO-InstanceSegmentation/cascade_mask_rcnn_focalnet_tiny_lrf_fpn_3x.py"
    thin = [*THIN, "model.backbone.out_channels=8", "model.proposal_generator.head.in_channels=8"]
    config = load_config(leaf, thin)
    rpn = instantiate(config.model.proposal_generator)
    anchors = [Boxes(torch.tensor([[-1.0, 0, 20, 20], [0, 0, 24, 20], [30, 30, 50, 50]]))]
    image = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[0.0, 0, 20, 30]])))
    torch.manual_seed(0)
    (labels,), (boxes,) = rpn.label_and_sample_anchors(anchors, [image])
    assert labels.tolist() == [-1, 1, 0]
    assert boxes[1].tolist() == [0, 0, 20, 30]
    rpn.anchor_boundary_thresh = -1
    (labels,), _ = rpn.label_and_sample_anchors(anchors, [image])
    assert labels.tolist() == [1, -1, 0]
