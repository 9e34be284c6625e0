"""BiFPN against a computation in single steps, and its sizes."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from torch import Tensor
from torch.nn import functional as F

from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.necks.bifpn import BiFPN


def plain_pass(state: dict[str, Tensor], maps: list[Tensor]) -> list[Tensor]:
    """One pass from the names of the parameters, level by level."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return F.group_norm(x, 32, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"])

    def mix(name: str, inputs: list[Tensor]) -> Tensor:
        weights = [max(w, 0.0) for w in state[f"{name}.weights"].flatten().tolist()]
        x = sum(w / (sum(weights) + 1e-4) * x for w, x in zip(weights, inputs, strict=True))
        assert isinstance(x, Tensor)
        return x * x.sigmoid()

    laterals = [
        conv(f"lateral_convs.{i}", x) if f"lateral_convs.{i}.conv.weight" in state else x
        for i, x in enumerate(maps)
    ]
    down = {4: laterals[4]}
    for i in (4, 3, 2, 1):
        height, width = laterals[i - 1].shape[-2:]
        rows = torch.arange(height) * down[i].shape[-2] // height
        columns = torch.arange(width) * down[i].shape[-1] // width
        up = down[i][:, :, rows][..., columns]
        mixed = mix(f"lateral_combine.{i - 1}", [laterals[i - 1], up])
        down[i - 1] = conv(f"lateral_combine_conv.{i - 1}", mixed)
    result = [down[0]]
    for i in range(4):
        inputs = [F.max_pool2d(result[i], 3, 2, 1), down[i + 1], laterals[i + 1]]
        mixed = mix(f"out_combine.{i}", inputs[: 2 if i == 3 else 3])
        result.append(conv(f"out_combine_conv.{i}", mixed))
    return result


def test_outputs_equal_single_steps() -> None:
    torch.manual_seed(0)
    # Channels 96, 192, 384, of which none, and those of the second pass all, are 64.
    neck = BiFPN(bottom_up=focalnet_backbone("focalnet_nano"), out_channels=64).eval()
    for name, parameter in neck.named_parameters():
        if name.endswith((".weights", ".gn.weight", ".gn.bias")):
            parameter.data = torch.randn_like(parameter) + 0.3
    image = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        found, features = neck(image), neck.bottom_up(image)
        maps = [features[name] for name in ("stage2", "stage3", "stage4")]
        maps.append(F.max_pool2d(maps[-1], 3, 2, 1))
        maps.append(F.max_pool2d(maps[-1], 3, 2, 1))
        for repeat in range(2):
            prefix = f"bi_fpn.{repeat}."
            state = {
                name.removeprefix(prefix): parameter
                for name, parameter in neck.named_parameters()
                if name.startswith(prefix)
            }
            maps = plain_pass(state, maps)
    assert list(found) == ["p3", "p4", "p5", "p6", "p7"]
    assert [tuple(m.shape[-2:]) for m in found.values()] == [
        (12, 20), (6, 10), (3, 5), (2, 3), (1, 2)
    ]  # fmt: skip
    for value, expected in zip(found.values(), maps, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_sizes_are_published() -> None:
    with torch.device("meta"):
        neck = BiFPN(bottom_up=focalnet_backbone("focalnet_tiny_srf"))
    own = {n: p for n, p in neck.named_parameters() if not n.startswith("bottom_up.")}
    assert sum(p.numel() for p in own.values()) == 10_185_254
    assert tuple(own["bi_fpn.1.out_combine.3.weights"].shape) == (1, 1, 1, 1, 2)
    assert own["bi_fpn.0.lateral_convs.4.conv.weight"].shape[1] == 768
    shapes = neck.output_shape()
    assert {name: s.stride for name, s in shapes.items()} == {f"p{k}": 2**k for k in range(3, 8)}
    assert neck.size_divisibility == 32
    frozen = [n for n, p in neck.named_parameters() if not p.requires_grad]
    assert frozen == ["bottom_up.norm0.weight", "bottom_up.norm0.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 48}, "out_channels must be divisible by 32, got 48"),
        ({"repeats": 0}, "repeats must be an integer between 1 and 100, got 0"),
        ({"in_features": ["stage2", "stage4"]}, "must be contiguous"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiFPN(bottom_up=focalnet_backbone("focalnet_nano"), **options)  # type: ignore[arg-type]
