"""UPerNet of mmseg's layout to ours and back; its numbers mean there what they mean here."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.published import State, official
from tests.helpers.upernet_reference import upernet_logits

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import instantiate

from focalnet_det.checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_initial_weights,
    read_state_dict,
)
from focalnet_det.checkpoint.layouts.detectors import (
    find_detectron2_method,
    find_public_method,
    to_public,
)
from focalnet_det.experiment import load_config
from tests.helpers.paths import ROOT

CONFIG = ROOT / "configs/ADE20K-SemanticSegmentation/upernet_focalnet_tiny_srf_160k.py"
WIDTH, CHANNELS = 8, 16
PARTS = ("weight", "bias")
SMALL = (
    f"model.backbone.embed_dim={WIDTH}",
    f"model.channels={CHANNELS}",
    "model.auxiliary_channels=8",
)


def mmseg_state() -> State:
    """The official UPerNet's names, written by hand; thin."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state = {
        f"backbone.{n}": t - 0.5
        for n, t in official("focalnet_tiny_srf", width=WIDTH).items()
        if not n.startswith(("head.", "norm."))
    }
    for name in list(state):  # 3 and 5 were grown to 9 and 11
        if ".focal_layers." in name:
            size = 9 if ".focal_layers.0." in name else 11
            state[name] = random(state[name].shape[0], 1, size, size)
    for i in range(4):
        state |= {f"backbone.norm{i}.{p}": random(WIDTH * 2**i) for p in PARTS}
    convs = {f"decode_head.psp_modules.{p}.1": (CHANNELS, 8 * WIDTH, 1) for p in range(4)}
    for i in range(3):
        convs[f"decode_head.lateral_convs.{i}"] = (CHANNELS, WIDTH * 2**i, 1)
        convs[f"decode_head.fpn_convs.{i}"] = (CHANNELS, CHANNELS, 3)
    convs["decode_head.bottleneck"] = (CHANNELS, 8 * WIDTH + 4 * CHANNELS, 3)
    convs["decode_head.fpn_bottleneck"] = (CHANNELS, 4 * CHANNELS, 3)
    convs["auxiliary_head.convs.0"] = (8, 4 * WIDTH, 3)
    for name, (out, into, size) in convs.items():
        state |= {
            f"{name}.conv.weight": random(out, into, size, size),
            f"{name}.bn.weight": 1 + random(out),
            f"{name}.bn.bias": random(out),
            f"{name}.bn.running_mean": random(out),
            f"{name}.bn.running_var": 1 + random(out).abs(),
            f"{name}.bn.num_batches_tracked": torch.tensor(160_000),
        }
    for head, channels in (("decode_head", CHANNELS), ("auxiliary_head", 8)):
        state[f"{head}.conv_seg.weight"] = random(150, channels, 1, 1)
        state[f"{head}.conv_seg.bias"] = random(150)
    return state


@pytest.fixture(scope="module")
def theirs() -> State:
    return mmseg_state()


@pytest.fixture(scope="module")
def model(theirs: State, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Our recipe's model, loaded from mmseg's file."""
    path = tmp_path_factory.mktemp("mmseg") / "iter_160000.pth"
    meta = {"iter": 160_000, "mmseg_version": "0.11.0", "PALETTE": [[120, 120, 120]]}
    torch.save({"meta": meta, "state_dict": theirs, "optimizer": {"state": {}}}, path)
    model = instantiate(load_config(str(CONFIG), list(SMALL)).model)
    report = load_initial_weights(model, path, new_classes=False)
    assert report.layout == "mmseg"
    assert (report.missing, report.dropped, report.resized) == ([], [], [])
    assert len(report.loaded) == len(theirs)
    assert report.share == 1
    return model.eval()


@torch.no_grad()
def test_logits_equal_a_recomputation_from_mmsegs_names(model: nn.Module, theirs: State) -> None:
    features = model.backbone(torch.randn(1, 3, 90, 75))
    ours, _ = model.sem_seg_head(features)
    head = {n.removeprefix("decode_head."): t for n, t in theirs.items()}
    expected = upernet_logits(head, list(features.values()))
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    # The auxiliary head: convolution, norm with the stored statistics, ReLU, classifier.
    part = {n.removeprefix("auxiliary_head."): t for n, t in theirs.items()}
    x = nn.functional.conv2d(features["stage3"], part["convs.0.conv.weight"], padding=1)
    mean, var = part["convs.0.bn.running_mean"], part["convs.0.bn.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    x = x * part["convs.0.bn.weight"][:, None, None] + part["convs.0.bn.bias"][:, None, None]
    expected = nn.functional.conv2d(x.relu(), part["conv_seg.weight"], part["conv_seg.bias"])
    auxiliary = model.sem_seg_head.auxiliary_head(features["stage3"])
    torch.testing.assert_close(auxiliary, expected, rtol=1e-4, atol=1e-5)


def test_there_and_back(model: nn.Module, theirs: State, tmp_path: Path) -> None:
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    first = convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.pth", "detectron2")
    assert first.layout == "mmseg"
    assert not first.dropped
    assert read_state_dict(tmp_path / "ours.pth").keys() == model.state_dict().keys()
    convert_checkpoint(tmp_path / "ours.pth", tmp_path / "again.pth", "mmseg")
    again = read_state_dict(tmp_path / "again.pth")
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[n], t) for n, t in theirs.items())
    from_model = to_public(model.state_dict(), "upernet")
    assert all(torch.equal(from_model[n], t) for n, t in theirs.items())


def test_inspection_names_the_method(model: nn.Module, theirs: State) -> None:
    assert (find_public_method(theirs), find_detectron2_method(theirs)) == ("upernet", None)
    found = inspect_checkpoint(theirs)
    assert (found.layout, found.method) == ("mmseg", "upernet")
    assert found.output_norms == ["norm0", "norm1", "norm2", "norm3"]
    own = inspect_checkpoint(model.state_dict())
    assert (own.layout, own.method, own.shapes) == ("detectron2", "upernet", found.shapes)


def test_other_classes_start_anew_and_other_models_take_the_backbone(
    theirs: State, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": theirs}, path)
    cfg = load_config(str(CONFIG), [*SMALL, "model.num_classes=11"])
    model = instantiate(cfg.model)
    report = load_initial_weights(model, path)
    anew = {f"sem_seg_head.{h}conv_seg.{p}" for h in ("", "auxiliary_head.") for p in PARTS}
    assert set(report.missing) == anew
    with pytest.raises(ValueError, match=r"conv_seg.* is \(150"):
        load_initial_weights(model, path, new_classes=False)
    # Of another detector, whose names share the prefix, the backbone alone.
    detector = {n: t for n, t in theirs.items() if n.startswith("backbone.")}
    torch.save({"state_dict": detector | {"rpn_head.rpn_cls.bias": torch.ones(3)}}, path)
    report = load_initial_weights(model, path)
    assert report.layout == "mmdet"
    assert report.dropped == ["rpn_head.rpn_cls.bias"]
    assert torch.equal(model.backbone.norm3.bias, theirs["backbone.norm3.bias"])


def test_what_has_no_table_is_refused(theirs: State) -> None:
    ours = convert_state_dict(theirs, "detectron2").tensors
    with pytest.raises(ValueError, match=r"can be written as mmdet; this file is upernet"):
        convert_state_dict(ours, "mmdet")
    with pytest.raises(ValueError, match="this file is not such a model"):
        convert_state_dict({n: t for n, t in theirs.items() if "backbone" in n}, "mmseg")
    with pytest.raises(ValueError, match=r"decode_head\.mystery\.weight is unknown in models of"):
        convert_state_dict(theirs | {"decode_head.mystery.weight": torch.ones(1)}, "detectron2")
