"""Mask R-CNN of mmdet's layout to ours and back; what its numbers mean, from mmdet's formulae."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.published import State, official

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import instantiate
from detectron2.structures import Boxes

from focalnet_det.checkpoint import convert_checkpoint, load_initial_weights, read_state_dict
from focalnet_det.checkpoint.layouts.detectors import find_public_method, to_detectron2, to_public
from focalnet_det.experiment import load_config
from tests.helpers.paths import ROOT

CONFIG = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py"
DEPTHS = (2, 2, 6, 2)


def mmdet_state() -> State:
    """The official Mask R-CNN's names and shapes, written by hand; 16 channels in the backbone."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    state = {
        f"backbone.{n}": t
        for n, t in official("focalnet_tiny_srf", width=16).items()
        if not n.startswith(("head.", "norm."))
    }
    for name in list(state):  # 3 and 5 were grown to 9 and 11
        if ".focal_layers." in name:
            size = 9 if ".focal_layers.0." in name else 11
            state[name] = random(state[name].shape[0], 1, size, size)
    for i in range(4):
        state |= {f"backbone.norm{i}.{p}": random(16 * 2**i) for p in ("weight", "bias")}
        shapes = {
            f"neck.lateral_convs.{i}.conv": (256, 16 * 2**i, 1, 1),
            f"neck.fpn_convs.{i}.conv": (256, 256, 3, 3),
            f"roi_head.mask_head.convs.{i}.conv": (256, 256, 3, 3),
        }
        state |= pairs(shapes, random)
    heads = {
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_cls": (3, 256, 1, 1),
        "rpn_head.rpn_reg": (12, 256, 1, 1),
        "roi_head.bbox_head.fc_cls": (81, 1024),
        "roi_head.bbox_head.fc_reg": (320, 1024),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * 49),
        "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
        "roi_head.mask_head.conv_logits": (80, 256, 1, 1),
    }
    state |= pairs(heads, random)
    # A transposed convolution: (in, out, 2, 2).
    state["roi_head.mask_head.upsample.weight"] = random(256, 256, 2, 2)
    state["roi_head.mask_head.upsample.bias"] = random(256)
    return state


def pairs(shapes: dict[str, tuple[int, ...]], random) -> State:  # type: ignore[no-untyped-def]
    weights = {f"{n}.weight": random(*shape) for n, shape in shapes.items()}
    return weights | {f"{n}.bias": random(shape[0]) for n, shape in shapes.items()}


@pytest.fixture(scope="module")
def theirs() -> State:
    return mmdet_state()


@pytest.fixture(scope="module")
def model(theirs: State, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Our recipe's model, loaded from mmdet's file, meta and optimizer and all."""
    path = tmp_path_factory.mktemp("mmdet") / "epoch_12.pth"
    meta = {"epoch": 12, "iter": 87960, "mmdet_version": "2.11.0", "CLASSES": ("person", "bicycle")}
    torch.save({"meta": meta, "state_dict": theirs, "optimizer": {"state": {}}}, path)
    cfg = load_config(str(CONFIG), ["model.backbone.bottom_up.embed_dim=16"])
    model = instantiate(cfg.model)
    # Evaluation demands every tensor, at its size.
    report = load_initial_weights(model, path, new_classes=False)
    assert report.layout == "mmdet"
    assert (report.missing, report.dropped, report.resized) == ([], [], [])
    assert len(report.loaded) == len(theirs)
    return model.eval()


def test_every_tensor_arrives(model: nn.Module, theirs: State) -> None:
    ours = model.state_dict()
    pixel = {n for n in ours if n.startswith("pixel_")}
    assert len(ours) - len(pixel) == len(theirs)
    for our_name, their_name in (
        ("backbone.bottom_up.norm2.bias", "backbone.norm2.bias"),
        ("backbone.fpn_lateral2.weight", "neck.lateral_convs.0.conv.weight"),
        ("backbone.fpn_output5.bias", "neck.fpn_convs.3.conv.bias"),
        ("proposal_generator.rpn_head.anchor_deltas.weight", "rpn_head.rpn_reg.weight"),
        ("roi_heads.box_head.fc1.weight", "roi_head.bbox_head.shared_fcs.0.weight"),
        ("roi_heads.box_predictor.bbox_pred.bias", "roi_head.bbox_head.fc_reg.bias"),
        ("roi_heads.mask_head.mask_fcn4.weight", "roi_head.mask_head.convs.3.conv.weight"),
        ("roi_heads.mask_head.deconv.weight", "roi_head.mask_head.upsample.weight"),
    ):
        assert torch.equal(ours[our_name], theirs[their_name])


def test_there_and_back(model: nn.Module, theirs: State, tmp_path: Path) -> None:
    assert find_public_method(theirs) == "mask_rcnn"
    back = to_public(to_detectron2(theirs)[0], "mask_rcnn")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[n], t) for n, t in theirs.items())
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.pth", "detectron2")
    convert_checkpoint(tmp_path / "ours.pth", tmp_path / "again.pth", "mmdet")
    raw = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(raw) == ["state_dict"]
    again = read_state_dict(tmp_path / "again.pth")
    assert all(torch.equal(again[n], t) for n, t in theirs.items())
    ours = to_public(model.state_dict(), "mask_rcnn")
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_a_row_too_many_is_refused(theirs: State) -> None:
    with pytest.raises(
        ValueError, match=r"neck\.fpn_convs\.4\.conv\.weight .*is unknown in models of"
    ):
        to_detectron2(theirs | {"neck.fpn_convs.4.conv.weight": torch.ones(1)})
    with pytest.raises(KeyError, match="Known: mask_rcnn"):
        to_public(theirs, "yolo")


# mmdet's formulae, computed anew.


@torch.no_grad()
def test_rpn_with_mmdets_formulae(model: nn.Module, theirs: State) -> None:
    """Half-open grid anchors, ratio-major; deltas of unit deviation, clipped at log(1000/16)."""
    feature = torch.randn(1, 256, 3, 5)
    conv = nn.functional.conv2d
    hidden = conv(
        feature, theirs["rpn_head.rpn_conv.weight"], theirs["rpn_head.rpn_conv.bias"], padding=1
    ).relu()
    deltas = conv(hidden, theirs["rpn_head.rpn_reg.weight"], theirs["rpn_head.rpn_reg.bias"])
    expected = []
    for y in range(3):
        for x in range(5):
            for a, ratio in enumerate((0.5, 1.0, 2.0)):  # height over width
                w, h = 64 / math.sqrt(ratio), 64 * math.sqrt(ratio)
                dx, dy, dw, dh = deltas[0, 4 * a : 4 * a + 4, y, x].tolist()
                limit = abs(math.log(16 / 1000))
                dw, dh = (max(-limit, min(limit, d)) for d in (dw, dh))
                cx, cy = 8 * x + w * dx, 8 * y + h * dy
                w, h = w * math.exp(dw), h * math.exp(dh)
                expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    rpn = model.proposal_generator
    anchors = rpn.anchor_generator([torch.zeros(1, 256, 2, 2), feature] + [feature[:, :, :1]] * 3)[
        1
    ]
    _, ours = rpn.rpn_head([feature])
    rows = ours[0].view(1, 3, 4, 3, 5).permute(0, 3, 4, 1, 2).reshape(-1, 4)
    boxes = rpn.box2box_transform.apply_deltas(rows, anchors.tensor)
    torch.testing.assert_close(boxes, torch.tensor(expected), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_box_head_with_mmdets_formulae(model: nn.Module, theirs: State) -> None:
    """RoI features flattened as (C, 7, 7); background last; deltas per class, std .1 and .2."""
    features = torch.randn(2, 256, 7, 7)
    head = "roi_head.bbox_head"
    x = features.flatten(1)
    for i in range(2):
        weight, bias = (theirs[f"{head}.shared_fcs.{i}.{p}"] for p in ("weight", "bias"))
        x = (x @ weight.T + bias).relu()
    logits = x @ theirs[f"{head}.fc_cls.weight"].T + theirs[f"{head}.fc_cls.bias"]
    deltas = x @ theirs[f"{head}.fc_reg.weight"].T + theirs[f"{head}.fc_reg.bias"]
    proposals = torch.tensor([[10.0, 20.0, 60.0, 50.0], [0.0, 0.0, 33.0, 99.0]])
    heads = model.roi_heads
    scores, ours = heads.box_predictor(heads.box_head(features))
    torch.testing.assert_close(scores, logits)
    decoded = heads.box_predictor.box2box_transform.apply_deltas(ours, proposals)
    for row, (x1, y1, x2, y2) in enumerate(proposals.tolist()):
        w, h = x2 - x1, y2 - y1
        for k in (0, 17, 79):
            dx, dy, dw, dh = deltas[row, 4 * k : 4 * k + 4].tolist()
            cx, cy = (x1 + x2) / 2 + 0.1 * dx * w, (y1 + y2) / 2 + 0.1 * dy * h
            w2, h2 = w * math.exp(0.2 * dw), h * math.exp(0.2 * dh)
            expected = torch.tensor([cx - w2 / 2, cy - h2 / 2, cx + w2 / 2, cy + h2 / 2])
            torch.testing.assert_close(decoded[row, 4 * k : 4 * k + 4], expected)


@torch.no_grad()
def test_roi_align_is_half_pixel_aligned(model: nn.Module) -> None:
    """On a linear ramp, mmdet's ``aligned=True`` reads the value at the bin centre less 0.5."""
    stride = 4
    ramp = torch.arange(64.0).expand(1, 256, 64, 64).contiguous()
    pooler = model.roi_heads.box_pooler
    features = [ramp, ramp[:, :, :32, :32], ramp[:, :, :16, :16], ramp[:, :, :8, :8]]
    box = [40.0, 60.0, 82.0, 95.0]
    pooled = pooler(features, [Boxes(torch.tensor([box]))])
    width = (box[2] - box[0]) / stride / 7
    expected = [box[0] / stride + (i + 0.5) * width - 0.5 for i in range(7)]
    torch.testing.assert_close(pooled[0, 0, 3], torch.tensor(expected), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_mask_head_with_mmdets_formulae(model: nn.Module, theirs: State) -> None:
    """Transposed convolution with ReLU; one 28x28 map per class."""
    features = torch.randn(1, 256, 14, 14)
    head = "roi_head.mask_head"
    x = features
    for i in range(4):
        weight, bias = (theirs[f"{head}.convs.{i}.conv.{p}"] for p in ("weight", "bias"))
        x = nn.functional.conv2d(x, weight, bias, padding=1).relu()
    weight, bias = theirs[f"{head}.upsample.weight"], theirs[f"{head}.upsample.bias"]
    # (in, out, 2, 2) at stride 2: each input pixel gives its own 2x2 block.
    x = torch.einsum("nchw,cokl->nohkwl", x, weight).reshape(1, 256, 28, 28)
    x = (x + bias[:, None, None]).relu()
    weight, bias = theirs[f"{head}.conv_logits.weight"], theirs[f"{head}.conv_logits.bias"]
    expected = nn.functional.conv2d(x, weight, bias)
    torch.testing.assert_close(model.roi_heads.mask_head.layers(features), expected)
