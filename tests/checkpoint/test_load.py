"""Strict loading: what fits is loaded, what does not fit loads nothing, and no file runs code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focalnet_det import create_backbone
from focalnet_det.backbones import FocalNet
from focalnet_det.checkpoint import load_initial_weights, load_pretrained, read_state_dict
from tests.helpers.paths import CONFIGS

State = dict[str, Tensor]


def backbone(**overrides: Any) -> FocalNet:
    return create_backbone("focalnet_nano", embed_dim=8, **overrides)


def classification_file(**overrides: Any) -> dict[str, State]:
    """The official layout: no output norms, a final norm and a head, under "model"."""
    state = {
        name: torch.randn(tensor.shape) * 0.1
        for name, tensor in backbone(output_norm=False, **overrides).state_dict().items()
    }
    state |= {"norm.weight": torch.rand(64), "norm.bias": torch.rand(64)}
    state |= {"head.weight": torch.rand(1000, 64), "head.bias": torch.rand(1000)}
    return {"model": state}


def snapshot(net: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_refused(net: nn.Module, load: Callable[[], Any], message: str) -> None:
    """`load` raises ValueError, and the network is what it was before."""
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        load()
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_classification_file_into_a_detection_backbone() -> None:
    net, file = backbone(), classification_file()
    fresh = snapshot(net)
    report = load_pretrained(net, file)

    norms = [f"norm{i}.{part}" for i in range(4) for part in ("weight", "bias")]
    names = {
        "patch_embed.proj.weight",
        "layers.0.blocks.0.modulation.f.weight",
        "layers.2.blocks.2.modulation.focal_layers.1.0.weight",
        "layers.2.downsample.norm.bias",
    }
    assert names <= set(report.loaded)
    assert set(report.loaded) == set(net.state_dict()) - set(norms)
    assert report.resized == []
    assert sorted(report.dropped) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert sorted(report.missing) == sorted(norms)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in norms else file["model"][name]), name

    text = str(report)
    assert f"Loaded {len(report.loaded)} tensors, resized 0, dropped 4; 8 are new." in text
    assert "head.weight" in text
    assert "norm0.weight" in text


def test_larger_kernels_leave_the_features_unchanged() -> None:
    file = classification_file()
    plain, detector = backbone(), backbone(focal_windows=(9, 9, 9, 9))
    load_pretrained(plain, file)
    report = load_pretrained(detector, file)
    # Six blocks with two levels each: 3 -> 9 and 5 -> 11.
    assert len(report.resized) == 12
    kernel = detector.layers[0].blocks[0].modulation.focal_layers[1][0].weight
    assert kernel.shape == (8, 1, 11, 11)
    assert not set(report.resized) & set(report.loaded)

    x = torch.randn(2, 3, 70, 101, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = plain.double().eval()(x), detector.double().eval()(x)
    for name, feature in expected.items():
        assert (actual[name] - feature).abs().max() <= 1e-6, name
        assert feature.std() > 0.1


def test_smaller_kernels_take_the_centre() -> None:
    file = classification_file(focal_windows=(5, 5, 5, 5))
    net = backbone()
    load_pretrained(net, file)
    name = "layers.1.blocks.0.modulation.focal_layers.0.0.weight"
    assert torch.equal(net.state_dict()[name], file["model"][name][:, :, 1:4, 1:4])


@pytest.mark.parametrize(
    "prefix", ["module.", "backbone.", "backbone.bottom_up.", "module.backbone."]
)
def test_prefixes_of_wrappers_and_detectors(prefix: str) -> None:
    source = backbone().state_dict()
    file = {prefix + name: torch.randn(tensor.shape) for name, tensor in source.items()}
    if "backbone." in prefix:
        file[prefix.partition("backbone.")[0] + "roi_heads.box_head.fc1.weight"] = torch.ones(3)
    net = backbone()
    report = load_pretrained(net, {"state_dict": file})
    assert sorted(report.loaded) == sorted(source)
    assert report.missing == []
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, file[prefix + name])


def test_weights_argument_of_create_backbone(tmp_path: Path) -> None:
    file = classification_file()
    torch.save(file, tmp_path / "official.pth")
    net = backbone(weights=tmp_path / "official.pth")
    name = "layers.3.blocks.0.mlp.fc2.weight"
    assert torch.equal(net.state_dict()[name], file["model"][name])


def test_safetensors(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    file = classification_file()["model"]
    library.save_file(file, tmp_path / "weights.safetensors")
    net = backbone()
    assert len(load_pretrained(net, tmp_path / "weights.safetensors").dropped) == 4
    assert torch.equal(net.state_dict()["patch_embed.proj.bias"], file["patch_embed.proj.bias"])
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(ValueError, match=r"Could not read .*broken\.safetensors"):
        read_state_dict(tmp_path / "broken.safetensors")


def drop(state: State, name: str) -> State:
    del state[name]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: drop(s, "layers.1.blocks.0.norm1.weight"),
            r"layers\.1\.blocks\.0\.norm1\.weight is not in the file\.$",
        ),
        (
            lambda s: s | {"layers.0.extra": torch.ones(1)},
            r"layers\.0\.extra is not in the network",
        ),
        (
            lambda s: s | {"patch_embed.proj.bias": torch.ones(9)},
            r"patch_embed\.proj\.bias is \(9,\) in the file, \(8,\) in the network",
        ),
        (
            lambda s: (
                s | {"layers.0.blocks.0.modulation.focal_layers.0.0.weight": torch.ones(9, 1, 3, 3)}
            ),
            r"\(9, 1, 3, 3\) in the file",
        ),
        (
            lambda s: (
                s | {"layers.0.blocks.0.modulation.focal_layers.0.0.weight": torch.ones(8, 1, 4, 4)}
            ),
            "Only square kernels of odd size",
        ),
        (lambda _: {"conv1.weight": torch.ones(64, 3, 7, 7)}, "conv1.weight is not in the network"),
    ],
    ids=["missing", "extra", "shape", "channels", "even kernel", "another network"],
)
def test_what_does_not_fit_loads_nothing(change: Callable[[State], State], message: str) -> None:
    net, state = backbone(), change(classification_file()["model"])
    assert_refused(net, lambda: load_pretrained(net, {"model": state}), message)


def test_another_variant_loads_nothing() -> None:
    net = backbone()
    deeper = classification_file(depths=(1, 1, 4, 1))
    # The fourth block of stage 3 has 16 tensors; the message names the first and counts the rest.
    assert_refused(
        net,
        lambda: load_pretrained(net, deeper),
        r"nothing was loaded: layers\.2\.blocks\.3\.\S+ is not in the network \(and 15 more\)",
    )
    more_levels = classification_file(focal_levels=(3, 3, 3, 3))
    assert_refused(net, lambda: load_pretrained(net, more_levels), "nothing was loaded")


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3}, [torch.ones(2)], torch.ones(2)]
)
def test_no_state_dict(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.pth"
    torch.save(content, path)
    net = backbone()
    assert_refused(net, lambda: load_pretrained(net, path), "contains no state dict")
    if isinstance(content, dict):
        assert_refused(net, lambda: load_pretrained(net, content), "contains no state dict")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No such checkpoint: .*absent\.pth"):
        read_state_dict(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="No such checkpoint"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_file(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    torch.save(classification_file(), path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(b"<html>404: not found</html>" if damage == "text" else b"")
    net = backbone()
    assert_refused(net, lambda: load_pretrained(net, path), r"Could not read .*damaged\.pth")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    path, marker = tmp_path / "malicious.pth", tmp_path / "marker"
    torch.save({"model": classification_file()["model"], "args": Malicious(marker)}, path)
    torch.load(path, weights_only=False)["args"].close()
    assert marker.exists(), "the attack itself must work, or this test shows nothing"
    marker.unlink()

    net = backbone()
    message = r"malicious\.pth: it asks for \S*open, which no weights need: do not trust this file"
    assert_refused(net, lambda: load_pretrained(net, path), message)
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"malicious\.pth"):
        load_initial_weights(net, path)
    assert not marker.exists()


# Whole detectors.

CLASS_LAYERS = {
    f"roi_heads.{layer}.{part}"
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    for part in ("weight", "bias")
}


def detector(num_classes: int) -> nn.Module:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from detectron2.config import instantiate

    from focalnet_det.experiment import load_config

    cfg = load_config(
        CONFIGS / "Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py",
        [
            f"model.roi_heads.num_classes={num_classes}",
            "model.roi_heads.box_predictor.cls_agnostic_bbox_reg=false",
            "model.backbone.bottom_up.embed_dim=8",
        ],
    )
    return instantiate(cfg.model)


@pytest.fixture(scope="module")
def six_classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A detector of six classes and the file that training saves of it."""
    torch.manual_seed(1)
    model = detector(6)
    path = tmp_path_factory.mktemp("detector") / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 699}, path)
    return model, path


@pytest.mark.parametrize("new_classes", [True, False])
def test_detector_with_the_same_classes(
    new_classes: bool, six_classes: tuple[nn.Module, Path]
) -> None:
    source, path = six_classes
    model = detector(6)
    report = load_initial_weights(model, path, new_classes=new_classes)
    assert report.dropped == report.missing == report.resized == []
    expected = source.state_dict()
    assert sorted(report.loaded) == sorted(expected)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_new_class_count_starts_only_the_class_layers_anew(
    six_classes: tuple[nn.Module, Path],
) -> None:
    source, path = six_classes
    model = detector(3)
    fresh = snapshot(model)
    report = load_initial_weights(model, path)
    assert set(report.dropped) == set(report.missing) == CLASS_LAYERS
    expected = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if name in CLASS_LAYERS else expected)[name]), name


def test_evaluation_refuses_new_classes(six_classes: tuple[nn.Module, Path]) -> None:
    model = detector(3)
    assert_refused(
        model,
        lambda: load_initial_weights(model, six_classes[1], new_classes=False),
        r"\(7, 256\) in the file, \(4, 256\) in the model .* The file is a Mask R-CNN "
        r"\(6 classes, FocalNet\); "
        r"the config builds a Mask R-CNN \(3 classes, FocalNet\)\.$",
    )


@pytest.mark.parametrize("new_classes", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: drop(s, "backbone.fpn_lateral2.weight"),
            "fpn_lateral2.weight is not in the file",
        ),
        (lambda s: s | {"teacher.weight": torch.ones(1)}, "teacher.weight is not in the model"),
        (lambda s: s | {"backbone.bottom_up.norm0.bias": torch.ones(5)}, r"\(5,\) in the file"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_detector_files_are_strict(
    change: Callable[[State], State],
    message: str,
    new_classes: bool,
    six_classes: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    model = detector(6)
    path = tmp_path / "changed.pth"
    torch.save(change(dict(six_classes[0].state_dict())), path)
    assert_refused(
        model, lambda: load_initial_weights(model, path, new_classes=new_classes), message
    )


def test_backbone_file_into_a_detector(tmp_path: Path) -> None:
    file = classification_file()
    path = tmp_path / "imagenet.pth"
    torch.save(file, path)
    model = detector(6)
    fresh = snapshot(model)
    report = load_initial_weights(model, path)
    assert len(report.loaded) == len(file["model"]) - 4
    for name, tensor in model.state_dict().items():
        short = name.removeprefix("backbone.bottom_up.")
        assert torch.equal(tensor, file["model"].get(short, fresh[name])), name
    assert_refused(
        model,
        lambda: load_initial_weights(model, path, new_classes=False),
        "no weights of this detector",
    )
