"""What may stand in the place of a weight, and what is lost where kernels are cropped."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focalnet_det import create_backbone
from focalnet_det.checkpoint import convert_checkpoint, load_pretrained
from focalnet_det.checkpoint.fit import value_problem
from tests.helpers.paths import ROOT
from tests.helpers.published import LAYOUTS, official

NAME = "layers.1.blocks.0.mlp.fc1.weight"


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return change


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (spoiled(float("nan")), "has NaN or infinite values"),
    "inf": (spoiled(float("-inf")), "has NaN or infinite values"),
    "int": (lambda t: t.to(torch.int32), "is int32 in the file, where float32 is expected"),
    "bool": (lambda t: t > 0, "is bool in the file, where float32 is expected"),
    "complex": (lambda t: t.to(torch.complex64), "is complex64 in the file, where float32"),
    "fp8": (
        lambda t: t.to(torch.float8_e4m3fn),
        "is float8_e4m3fn, which has no meaning without its scales",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("layout", ["timm", "mmdet"])
def test_conversion_refuses_what_is_no_weight(kind: str, layout: str, tmp_path: Path) -> None:
    change, message = CHANGES[kind]
    state = official("focalnet_nano")
    state[NAME] = change(state[NAME])
    prefix = "backbone." if layout == "mmdet" else ""
    if layout == "mmdet":
        state = LAYOUTS["mmdet"](state)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    target = tmp_path / "b.safetensors"
    with pytest.raises(ValueError, match=f"Nothing was converted: {prefix}{NAME} {message}"):
        convert_checkpoint(tmp_path / "a.pth", target, "timm")
    assert not target.exists()
    net = create_backbone("focalnet_nano", embed_dim=8)
    with pytest.raises(ValueError, match=message):
        load_pretrained(net, tmp_path / "a.pth")


def test_the_first_is_named_and_the_others_counted(tmp_path: Path) -> None:
    state = {n: t.to(torch.complex64) for n, t in official("focalnet_nano").items()}
    torch.save(state, tmp_path / "a.pth")
    expected = rf"{next(iter(state))} is complex64 .* \(and {len(state) - 1} more\)\.$"
    with pytest.raises(ValueError, match=expected):
        convert_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth", "timm")


def test_what_may_stand_there() -> None:
    assert value_problem("a.bn.num_batches_tracked", torch.tensor(3)) is None
    assert value_problem("a.relative_position_index", torch.arange(4)) is None
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert value_problem("a.weight", torch.ones(2, dtype=dtype)) is None


def with_kernels(size: int, border: float) -> dict[str, Tensor]:
    """A file whose first kernels are larger by two, with this value around the old ones."""
    state = official("focalnet_nano")
    for name in [n for n in state if n.endswith("focal_layers.0.0.weight")]:
        old = state[name]
        margin = (size - old.shape[-1]) // 2
        state[name] = torch.nn.functional.pad(old, (margin,) * 4, value=border)
    return state


def test_cropped_kernels_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = create_backbone("focalnet_nano", embed_dim=8)
    with caplog.at_level(logging.WARNING, logger="focalnet_det"):
        report = load_pretrained(net, with_kernels(5, 0.1))
    expected = (
        "6 kernels are larger in the file and were cropped, which changes the features: "
        "first layers.0.blocks.0.modulation.focal_layers.0.0.weight, (8, 1, 5, 5) -> (8, 1, 3, 3). "
        "To keep them, set focal_windows to the values that tools/inspect_checkpoint.py prints for "
        "the file."
    )
    assert report.warnings == [expected]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [expected]
    assert f"Warning: {expected}" in str(report)


@pytest.mark.parametrize("border", [0.0, None])
def test_borders_of_zeros_and_padding_are_none(
    border: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    net = create_backbone(
        "focalnet_nano", embed_dim=8, focal_windows=(3 if border == 0 else 7,) * 4
    )
    file = official("focalnet_nano") if border is None else with_kernels(5, border)
    with caplog.at_level(logging.WARNING, logger="focalnet_det"):
        report = load_pretrained(net, file)
    assert report.resized
    assert report.warnings == []
    assert not caplog.records


def test_files_are_read_here_alone() -> None:
    """Every tool and the training read weights through the restricted reader."""
    own = ROOT / "focalnet_det/checkpoint"
    for path in (*ROOT.glob("focalnet_det/**/*.py"), *ROOT.glob("tools/*.py")):
        text = path.read_text()
        calls = text.split("torch.load(")[1:]
        assert all("weights_only=True" in call.partition("\n\n")[0] for call in calls), path
        assert "pickle.load" not in text, path
        if own not in path.parents:
            assert "from safetensors" not in text, path
