"""What mmdet does differently, against slow loops and hand-worked numbers."""

import math
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor

from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.heads.empty import EmptyImageROIHeads
from focalnet_det.heads.mmdet.conventions import (
    MmdetBox2BoxTransform,
    MmdetMatcher,
    MmdetROIHeads,
    MmdetRPN,
)
from focalnet_det.heads.mmdet.rcnn import MmdetRCNN, rescale_to_original

YAML = "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"
NANO = ["MODEL.FOCALNET.VARIANT=focalnet_nano", "MODEL.FOCALNET.FOCAL_WINDOWS=None"]


def slow_assignment(iou: torch.Tensor) -> tuple[list[int], list[int]]:
    """Object and label of every anchor, one anchor and one object at a time."""
    objects, anchors = iou.shape
    matches, labels = [], []
    for a in range(anchors):
        column = iou[:, a].tolist()
        best = max(column)
        matches.append(column.index(best))
        labels.append(1 if best >= 0.7 else 0 if best < 0.3 else -1)
    for g in range(objects):
        row = iou[g].tolist()
        if max(row) >= 0.3:
            for a in range(anchors):
                if row[a] == max(row):
                    matches[a], labels[a] = g, 1
    return matches, labels


@pytest.mark.parametrize("seed", range(20))
def test_assignment_equals_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Sixteenths, so that there are ties within and between objects.
    iou = (torch.rand(5, 30, generator=generator) * 16).round() / 16
    iou[seed % 5] *= 0.25  # an object that no anchor overlaps enough
    matches, labels = MmdetMatcher()(iou)
    assert (matches.tolist(), labels.tolist()) == slow_assignment(iou)


def test_assignment_where_detectron2_differs() -> None:
    # Anchor 0 is the best of both objects: mmdet gives it to the last of them, Detectron2 to the
    # one that it overlaps most. Object 2 is hardly overlapped: Detectron2 gives it an anchor.
    iou = torch.tensor([[0.6, 0.1, 0.0], [0.5, 0.2, 0.0], [0.0, 0.0, 0.1]])
    matches, labels = MmdetMatcher()(iou)
    assert (matches.tolist(), labels.tolist()) == ([1, 1, 2], [1, 0, 0])
    theirs = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(iou)
    assert (theirs[0].tolist(), theirs[1].tolist()) == ([0, 1, 2], [1, 0, 1])


def test_assignment_without_objects() -> None:
    matches, labels = MmdetMatcher()(torch.zeros(0, 4))
    assert (matches.tolist(), labels.tolist()) == ([0] * 4, [0] * 4)


def test_decoding_limits_both_directions() -> None:
    boxes = torch.tensor([[0.0, 0.0, 100.0, 200.0]])
    deltas = torch.tensor([[1.0, -1.0, -50.0, 50.0, 0.5, 0.5, 0.1, -0.1]])
    found = MmdetBox2BoxTransform((10, 10, 5, 5)).apply_deltas(deltas, boxes)
    # exp(-4.13517) = 16 / 1000 and its inverse; the centre moves by a tenth of the side.
    width, height = 100 * 16 / 1000, 200 * 1000 / 16
    first = [60 - width / 2, 80 - height / 2, 60 + width / 2, 80 + height / 2]
    torch.testing.assert_close(found[0, :4], torch.tensor(first), rtol=1e-4, atol=1e-3)
    usual = Box2BoxTransform((10, 10, 5, 5)).apply_deltas(deltas, boxes)
    torch.testing.assert_close(found[0, 4:], usual[0, 4:])
    assert usual[0, 2] - usual[0, 0] < 0.01


def test_decoding_leaves_its_input_alone() -> None:
    deltas = torch.full((3, 4), -100.0)
    MmdetBox2BoxTransform((1, 1, 1, 1)).apply_deltas(deltas, torch.rand(3, 4))
    assert (deltas == -100).all()


def test_rpn_averages_over_what_was_sampled() -> None:
    """Few anchors: mmdet divides by their number, Detectron2 by the 256 that it asked for."""
    rpn = read_experiment(load_config(YAML, NANO)).model().proposal_generator
    assert type(rpn) is MmdetRPN
    anchors = [Boxes(torch.tensor([[0.0, 0, 32, 32], [32, 32, 64, 64], [8, 8, 40, 40]]))]
    logits, deltas = [torch.tensor([[1.0, -2.0, 0.5]])], [torch.zeros(1, 3, 4)]
    labels = [torch.tensor([1, 0, -1], dtype=torch.int8)]
    truth = [torch.tensor([[0.0, 0, 32, 64]] * 3)]
    with EventStorage():
        losses = rpn.losses(anchors, logits, labels, deltas, truth)
    objectness = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(-2.0))) / 2
    assert losses["loss_rpn_cls"].item() == pytest.approx(objectness)
    # The only positive is half as high as its object: dy = 0.5, dh = log 2.
    assert losses["loss_rpn_loc"].item() == pytest.approx((0.5 + math.log(2)) / 2)


def test_one_key_switches() -> None:
    official = read_experiment(load_config(YAML, NANO)).model()
    assert type(official.roi_heads) is MmdetROIHeads
    transform = official.roi_heads.box_predictor.box2box_transform
    assert type(transform) is MmdetBox2BoxTransform
    assert type(official) is MmdetRCNN
    usual = read_experiment(load_config(YAML, [*NANO, "MODEL.CONVENTIONS=detectron2"])).model()
    assert type(usual).__name__ == "GeneralizedRCNN"
    assert type(usual.proposal_generator).__name__ == "RPN"
    assert type(usual.roi_heads) is EmptyImageROIHeads
    names = [{n: p.shape for n, p in m.named_parameters()} for m in (official, usual)]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match=r"MODEL\.CONVENTIONS 'mmseg'. Known: detectron2, mmdet"):
        read_experiment(load_config(YAML, [*NANO, "MODEL.CONVENTIONS=mmseg"])).model()


def test_iou_is_what_the_matcher_gets() -> None:
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]]))
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 20], [20, 20, 30, 30]]))
    _, labels = MmdetMatcher()(pairwise_iou(boxes, anchors))
    assert labels.tolist() == [1, -1, 0]


def found(boxes: Tensor, **fields: Any) -> Instances:
    return Instances((100, 200), pred_boxes=Boxes(boxes), **fields)


def test_boxes_go_back_unclipped_and_empty_ones_stay() -> None:
    """x by 50/200, y by 40/100; Detectron2 drops the second box, which has no width."""
    boxes = torch.tensor([[8.0, 10, 200.002, 60], [80, 10, 80, 60]])
    ours = rescale_to_original(found(boxes, scores=torch.tensor([0.9, 0.8])), 40, 50)
    assert ours.image_size == (40, 50)
    expected = torch.tensor([[2.0, 4, 50.0005, 24], [20, 4, 20, 24]])
    torch.testing.assert_close(ours.pred_boxes.tensor, expected, rtol=0, atol=1e-6)
    assert ours.scores.tolist() == pytest.approx([0.9, 0.8])
    assert len(detector_postprocess(found(boxes.clone()), 40, 50)) == 1


def test_masks_and_keypoints_are_those_of_detectron2() -> None:
    boxes = torch.tensor([[8.0, 10, 160, 60], [20, 30, 80, 90]])
    fields = {"pred_masks": torch.rand(2, 1, 28, 28), "pred_keypoints": torch.rand(2, 17, 3) * 90}
    ours = rescale_to_original(found(boxes.clone(), **fields), 40, 50)
    copies = {n: t.clone() for n, t in fields.items()}
    theirs = detector_postprocess(found(boxes.clone(), **copies), 40, 50)
    assert ours.pred_masks.any()
    assert torch.equal(ours.pred_masks, theirs.pred_masks)
    torch.testing.assert_close(ours.pred_keypoints, theirs.pred_keypoints)


def test_the_model_postprocesses_its_detections() -> None:
    model = read_experiment(load_config(YAML, NANO)).model().eval()
    record = {"image": torch.rand(3, 64, 96) * 255, "height": 128, "width": 96}
    with torch.no_grad():
        raw = model.inference([record], do_postprocess=False)[0]
        final = model([record])[0]["instances"]
    assert len(final) == len(raw)
    expected = raw.pred_boxes.tensor * torch.tensor([1.0, 2.0, 1.0, 2.0])
    torch.testing.assert_close(final.pred_boxes.tensor, expected)
