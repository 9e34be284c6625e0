"""Swin and ResNet: other libraries' files into the twins, held to those libraries' own features."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torchvision
from detectron2.modeling.backbone import BasicStem, ResNet

from focalnet_det import create_backbone
from focalnet_det.backbones.peers import SwinBackbone, resnet_backbone
from focalnet_det.checkpoint import (
    convert_state_dict,
    inspect_checkpoint,
    load_initial_weights,
    load_pretrained,
)
from focalnet_det.checkpoint.layouts.detectors import to_public
from focalnet_det.experiment import load_config, read_experiment
from tests.helpers.paths import CONFIGS

timm = pytest.importorskip("timm", reason="timm is a test dependency")
State = dict[str, Tensor]
SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
PREFIXES = ["", "backbone.", "backbone.bottom_up.", "module.", "module.backbone.", "encoder."]


@torch.no_grad()
def randomize(net: nn.Module) -> nn.Module:
    """Make every parameter and statistic matter, at a scale that 50 layers keep."""
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape) * tensor[0].numel() ** -0.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(torch.randn(tensor.shape) * 0.1)
        else:
            tensor.copy_(torch.rand(tensor.shape) * 0.4 + 0.8)
    return net.eval()


def image(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return randomize(torchvision.models.resnet50())


@torch.no_grad()
def resnet_stages(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    stages = []
    for k in range(1, 5):
        x = getattr(net, f"layer{k}")(x)
        stages.append(x)
    return stages


@torch.no_grad()
def check_resnet(net: nn.Module, expected: list[Tensor]) -> None:
    for feature, stage in zip(net.eval()(image()).values(), expected, strict=True):
        assert_near(feature, stage)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", PREFIXES[::2])
def test_torchvisions_resnet(prefix: str, resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    torch.save({"state_dict": prefixed(resnet.state_dict(), prefix)}, path)
    net = resnet_backbone()
    report = load_pretrained(net, path)
    assert (report.layout, report.share, report.missing) == ("torchvision", 1.0, [])
    assert set(report.rules.values()) == {
        "classifier",
        "counter of batch norms, which are frozen",
    }
    check_resnet(net, resnet_stages(resnet, image()))
    found = inspect_checkpoint(path)
    assert found.architecture == "a ResNet-50 classifier (1000 classes)"
    assert (found.family, found.classes) == ("resnet", 1000)


def test_timms_resnet(tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("resnet50", num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    net = resnet_backbone()
    load_pretrained(net, tmp_path / "timm.pth")
    with torch.no_grad():
        expected = theirs.forward_intermediates(image(), intermediates_only=True)[1:]
    check_resnet(net, expected)


def test_detectron2s_pickle_of_torchvisions_weights(resnet: nn.Module, tmp_path: Path) -> None:
    """By the renaming of Detectron2's own tool, tools/convert-torchvision-to-d2.py."""
    arrays = {}
    for name, tensor in resnet.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        k = name if "layer" in name else "stem." + name
        for t in range(1, 5):
            k = k.replace(f"layer{t}", f"res{t + 1}")
        for t in range(1, 4):
            k = k.replace(f"bn{t}", f"conv{t}.norm")
        k = k.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        if k.startswith("stem.fc"):
            continue
        arrays[k] = tensor.numpy()
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    with (tmp_path / "r50.pkl").open("wb") as file:
        pickle.dump(content, file)
    torch.save(
        {n: torch.from_numpy(a) for n, a in arrays.items()}, tmp_path / "r50_of_detectron2.pth"
    )
    for name in ("r50.pkl", "r50_of_detectron2.pth"):
        net = resnet_backbone()
        report = load_pretrained(net, tmp_path / name)
        assert (report.layout, report.share, report.notes) == ("detectron2", 1.0, [])
        check_resnet(net, resnet_stages(resnet, image()))


def caffe2_names(net: nn.Module) -> dict[str, np.ndarray]:
    """As in MSRA's R-50.pkl, from Detectron2's names; norms are scale and shift alone."""
    arrays = {}
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            continue
        parts = name.split(".")
        last = {"weight": "s", "bias": "b"}[parts[-1]]
        if parts[0] == "stem":
            key = f"res_conv1_bn_{last}" if "norm" in parts else "conv1_w"
        else:
            branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[parts[2]]
            key = f"{parts[0]}_{parts[1]}_branch{branch}_" + (
                f"bn_{last}" if "norm" in parts else "w"
            )
        arrays[key] = tensor.numpy()
    return arrays | {"fc1000_w": np.ones((1000, 2048), np.float32), "fc1000_b": np.ones(1000)}


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@torch.no_grad()
def test_msras_resnet(stride_in_1x1: bool, tmp_path: Path) -> None:
    """Its input is BGR less the mean, ours RGB less the mean over ImageNet's deviation."""
    stages = ResNet.make_default_stages(50, stride_in_1x1=stride_in_1x1, norm="FrozenBN")
    names = ["res2", "res3", "res4", "res5"]
    theirs = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=names)
    randomize(theirs)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_mean"):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1 - 1e-5)
    theirs.stem.conv1.weight /= 50
    path = tmp_path / "R-50.pth"
    arrays = {n: torch.from_numpy(a) for n, a in caffe2_names(theirs).items()}
    arrays = {n: t for n, t in arrays.items() if not n.startswith("fc1000")}
    torch.save({"model": arrays}, path)
    pixels = image() * torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    expected = list(theirs.eval()(pixels.flip(1)).values())
    net = resnet_backbone()
    if stride_in_1x1:
        stages = ResNet.make_default_stages(50, stride_in_1x1=True, norm="FrozenBN")
        net = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=names)
    report = load_pretrained(net, path)
    assert (report.layout, report.share) == ("caffe2", 1.0)
    assert any("strides in the 1x1" in note for note in report.notes) != stride_in_1x1
    check_resnet(net, expected)


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    return randomize(torchvision.models.swin_t())


@torch.no_grad()
def check_swin(net: SwinBackbone, expected: list[Tensor], x: Tensor | None = None) -> None:
    """Features before the output norms, which no classifier has."""
    stages = []
    x = net.eval().features[0](image() if x is None else x)
    for k in range(4):
        x = net.features[2 * k + 1](x)
        stages.append(x)
        if k < 3:
            x = net.features[2 * k + 2](x)
    for stage, feature in zip(stages, expected, strict=True):
        assert_near(stage, feature)


@torch.no_grad()
def torchvision_stages(net: nn.Module) -> list[Tensor]:
    x, stages = image(), []
    for number, layer in enumerate(net.features):
        x = layer(x)
        if number % 2:
            stages.append(x)
    return stages


@pytest.mark.parametrize("prefix", PREFIXES)
def test_torchvisions_swin(prefix: str) -> None:
    swin = randomize(
        torchvision.models.SwinTransformer([4, 4], window_size=[7, 7], num_classes=5, **SMALL)
    )
    net = SwinBackbone(**SMALL)
    report = load_pretrained(net, prefixed(swin.state_dict(), prefix))
    assert (report.layout, report.share) == ("torchvision", 1.0)
    assert report.missing == [f"norm{i}.{p}" for i in range(4) for p in ("weight", "bias")]
    assert report.dropped == [
        f"{prefix.removeprefix('module.')}{n}.{p}"
        for n in ("norm", "head")
        for p in ("weight", "bias")
    ]
    check_swin(net, torchvision_stages(swin))


@pytest.fixture(scope="module")
def timm_swin() -> tuple[State, list[Tensor]]:
    """A file of timm and its features."""
    # Windows of images under 224 are smaller in timm.
    theirs = randomize(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SMALL))
    with torch.no_grad():
        features = theirs.forward_intermediates(image(224, 224), intermediates_only=True)
    return theirs.state_dict(), [feature.permute(0, 2, 3, 1) for feature in features]


def official_names(state: State) -> State:
    """From timm's names to those of the official code: a stage ends with its downsampling."""
    result = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        result[".".join(parts).replace("head.fc", "head")] = tensor
    result["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    index = SwinBackbone(**SMALL).state_dict()["features.1.0.attn.relative_position_index"]
    result["layers.0.blocks.0.attn.relative_position_index"] = index.view(49, 49)
    return result


def mmdet_names(state: State) -> State:
    """From the official names to mmdet's, whose merging of patches is ``nn.Unfold``."""
    result = {}
    for name, tensor in official_names(state).items():
        if name.startswith(("head", "norm.")) or "mask" in name:
            continue
        name = name.replace("layers.", "stages.", 1).replace(
            "patch_embed.proj.", "patch_embed.projection."
        )
        name = name.replace(".attn.", ".attn.w_msa.")
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        if ".downsample." in name:
            # Where Unfold puts the value that stands at each place of the official merging.
            channels = tensor.shape[-1] // 4
            pixels = torch.arange(4.0 * channels).view(channels, 2, 2)
            official = torch.cat([pixels[:, h, w] for h, w in ((0, 0), (1, 0), (0, 1), (1, 1))])
            unfolded = nn.functional.unfold(pixels[None], 2)[0, :, 0]
            order = [official.tolist().index(value) for value in unfolded.tolist()]
            tensor = tensor[..., order]
        result[f"backbone.{name}"] = tensor
    return result


@pytest.mark.parametrize("layout", ["timm", "features_only", "official", "mmdet"])
def test_swins_of_other_names(
    layout: str, timm_swin: tuple[State, list[Tensor]], tmp_path: Path
) -> None:
    state, expected = timm_swin
    if layout == "features_only":
        state = {n.replace("layers.", "layers_", 1): t for n, t in state.items()}
    elif layout == "official":
        state = official_names(state)
    elif layout == "mmdet":
        state = mmdet_names(state)
    torch.save({"model": state}, tmp_path / "swin.pth")
    net = SwinBackbone(**SMALL)
    report = load_pretrained(net, tmp_path / "swin.pth")
    assert report.layout == layout.replace("features_only", "timm")
    assert report.share > 0.9
    assert all(name.startswith("norm") for name in report.missing)
    check_swin(net, expected, image(224, 224))
    assert inspect_checkpoint(tmp_path / "swin.pth").family == "swin"


@pytest.mark.parametrize("name", ["swin_tiny", "resnet50"])
def test_imagenet_weights_into_the_twins(
    name: str, swin: nn.Module, resnet: nn.Module, tmp_path: Path
) -> None:
    """As the header of the recipe has it: train.init_checkpoint=<ImageNet weights>."""
    leaf = CONFIGS / f"COCO-InstanceSegmentation/mask_rcnn_{name}_fpn_1x.py"
    model = read_experiment(load_config(str(leaf), [])).model()
    source = swin if name == "swin_tiny" else resnet
    torch.save(source.state_dict(), tmp_path / "imagenet.pth")
    report = load_initial_weights(model, tmp_path / "imagenet.pth")
    assert report.share == 1.0
    if name == "swin_tiny":
        check_swin(model.backbone.bottom_up, torchvision_stages(source))
    else:
        check_resnet(model.backbone.bottom_up, resnet_stages(source, image()))
    with pytest.raises(
        ValueError, match=r"no weights of this detector: it is a \S+ classifier \(1000"
    ):
        load_initial_weights(model, tmp_path / "imagenet.pth", new_classes=False)
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    whole = load_initial_weights(model, tmp_path / "whole.pth", new_classes=False)
    assert len(whole.loaded) == len(model.state_dict())


def test_mask_rcnn_of_mmdet_on_a_resnet(resnet: nn.Module, tmp_path: Path) -> None:
    """Its backbone has torchvision's names; its other parts are held in test_detectors.py."""
    leaf = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_resnet50_fpn_1x.py"
    model = read_experiment(load_config(str(leaf), [])).model()
    ours = {n: t for n, t in model.state_dict().items() if ".bottom_up." not in n}
    theirs = {n: t + 1 for n, t in to_public(ours, "mask_rcnn").items()}
    state = {n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")}
    torch.save({"state_dict": theirs | prefixed(state, "backbone.")}, tmp_path / "r50.pth")
    report = load_initial_weights(model, tmp_path / "r50.pth", new_classes=False)
    assert (report.layout, report.missing, report.share) == ("mmdet", [], 1.0)
    check_resnet(model.backbone.bottom_up, resnet_stages(resnet, image()))
    weight = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(model.state_dict()[weight], theirs["roi_head.bbox_head.fc_cls.weight"])
    with pytest.raises(ValueError, match=r"This is a Mask R-CNN \(80 classes, ResNet-50\), which"):
        convert_state_dict(model.state_dict(), "mmdet")


def test_other_networks_are_named(resnet: nn.Module, swin: nn.Module) -> None:
    focal = create_backbone("focalnet_tiny_srf", embed_dim=8)
    with pytest.raises(
        ValueError, match=r"The file is a ResNet-50 classifier \(1000 classes\), the"
    ):
        load_pretrained(focal, resnet.state_dict())
    with pytest.raises(
        ValueError, match=r"The file is a Swin-T classifier .*the network ResNet-50"
    ):
        load_pretrained(resnet_backbone(), swin.state_dict())
    with pytest.raises(ValueError, match="the network Swin-T"):
        load_pretrained(SwinBackbone(), focal.state_dict())
    deeper = torchvision.models.resnet101().state_dict()
    with pytest.raises(ValueError, match=r"is not in the network .*The file is a ResNet-101"):
        load_pretrained(resnet_backbone(), deeper)
    with pytest.raises(ValueError, match="This is a ResNet-50 classifier"):
        convert_state_dict(resnet.state_dict(), "timm")


def test_strictness(resnet: nn.Module, swin: nn.Module) -> None:
    state = resnet.state_dict()
    lacking = {n: t for n, t in state.items() if n != "layer3.2.bn2.running_var"}
    with pytest.raises(ValueError, match=r"res4\.2\.conv2\.norm\.running_var is not in the file"):
        load_pretrained(resnet_backbone(), lacking)
    with pytest.raises(ValueError, match=r"res4\.2\.conv9\.weight is not in the network"):
        load_pretrained(resnet_backbone(), state | {"layer3.2.conv9.weight": torch.ones(1)})
    index = "features.1.0.attn.relative_position_index"
    with pytest.raises(ValueError, match="is for another order of the tokens"):
        load_pretrained(
            SwinBackbone(), swin.state_dict() | {index: swin.state_dict()[index].flip(0)}
        )
