"""Registered weights: found where they may lie, and told where to put them."""

import re
from pathlib import Path

import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.backbones import VARIANTS
from focalnet_det.checkpoint import WEIGHTS, list_weights, load_pretrained, write_state_dict, zoo
from tests.helpers import published
from tests.helpers.published import official

NAME = "focalnet_tiny_lrf.in1k"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty caches, and no network."""
    monkeypatch.setenv("FOCALNET_DET_WEIGHTS", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(url: str, *_: object, **__: object) -> None:
        raise zoo.urllib.error.URLError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    return {name: tmp_path / name for name in ("ours", "hub", "torch")}


def hub_file(hub: Path, repository: str) -> Path:
    folder = hub / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder / "model.safetensors"


def test_the_table() -> None:
    assert len(WEIGHTS) == 33
    for name in list_weights():
        row = WEIGHTS[name]
        assert row.variant in VARIANTS
        assert name.startswith(row.variant + ".")
        assert row.file.endswith(".pth")
        assert all(url.startswith("https://") and url.endswith(row.file) for url in row.urls)
        assert row.urls
        assert row.license == "MIT"
        assert re.fullmatch(r"([0-9a-f]{64})?", row.sha256)
    assert "82.3" in WEIGHTS[NAME].score
    # Source: README.md of microsoft/Focal-Transformer, the only public table of its links.
    focal = WEIGHTS["focal_small_conv.in1k"]
    assert focal.file == "focal-small-useconv-is224-ws7.pth"
    assert focal.score == "ImageNet-1k top-1 83.8"
    assert len({row.file for row in WEIGHTS.values()}) == len(WEIGHTS)


@pytest.mark.parametrize("place", ["ours", "torch", "timm", "huggingface"])
def test_every_place(place: str, folders: dict[str, Path]) -> None:
    state = official("focalnet_tiny_lrf")
    if place == "timm":
        path = hub_file(folders["hub"], "timm/focalnet_tiny_lrf.ms_in1k")
        write_state_dict(path, published.to_timm(state))
    elif place == "huggingface":
        path = hub_file(folders["hub"], "microsoft/focalnet-tiny-lrf")
        write_state_dict(path, published.to_huggingface(state))
    else:
        folder = folders["ours"] if place == "ours" else folders["torch"] / "hub/checkpoints"
        write_state_dict(folder / "focalnet_tiny_lrf.pth", state, "model")
    net = create_backbone("focalnet_tiny_lrf", embed_dim=8, weights=NAME)
    assert torch.equal(
        net.layers[2].blocks[5].mlp.fc2.weight, state["layers.2.blocks.5.mlp.fc2.weight"]
    )


def test_the_official_file_comes_first(folders: dict[str, Path]) -> None:
    write_state_dict(
        hub_file(folders["hub"], "timm/focalnet_tiny_lrf.ms_in1k"), {"a": torch.ones(1)}
    )
    path = folders["ours"] / "focalnet_tiny_lrf.pth"
    write_state_dict(path, official("focalnet_tiny_lrf"))
    assert zoo.resolve_weights(NAME) == path


def test_dead_links_say_what_to_do(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no link works") as caught:
        create_backbone("focalnet_tiny_lrf", weights=NAME)
    text = str(caught.value)
    assert "releases/download/v1.0.0/focalnet_tiny_lrf.pth" in text
    assert "huggingface.co/timm/focalnet_tiny_lrf.ms_in1k" in text
    assert str(folders["ours"] / "focalnet_tiny_lrf.pth") in text
    with pytest.raises(ValueError, match="No mirror is known"):
        zoo.resolve_weights("focalnet_base_iso.in1k")
    with pytest.raises(ValueError, match="Download it another way"):
        zoo.resolve_weights("https://example.com/a.pth")


def test_unknown_names_are_files_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"No such checkpoint: focalnet_tiny_lrf\.in2k"):
        create_backbone("focalnet_tiny_lrf", weights="focalnet_tiny_lrf.in2k")


def test_links_are_tried_in_their_order(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def serve(url: str, target: str) -> None:
        asked.append(url)
        if "github" in url:
            raise zoo.urllib.error.URLError("404")
        torch.save({"a": torch.ones(1)}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", serve)
    path = zoo.resolve_weights(NAME)
    assert path.is_relative_to(folders["ours"])
    assert path.name == "focalnet_tiny_lrf.pth"
    assert [re.sub("/.*", "", url.removeprefix("https://")) for url in asked] == [
        "github.com",
        "projects4jw.blob.core.windows.net",
    ]


def test_another_family_is_named_as_such() -> None:
    resnet = {f"layer{i}.conv.weight": torch.ones(8, 3, 7, 7) for i in range(4)}
    net = create_backbone("focalnet_nano", embed_dim=8)
    with pytest.raises(ValueError, match=r"layout is unknown; closest: .*: 4 of 4 names differ"):
        load_pretrained(net, resnet)


def test_a_share_too_small_is_refused() -> None:
    """Less than 95 % of the backbone is no pretrained backbone, unless asked for."""
    state = official("focalnet_nano")
    part = {n: t for n, t in state.items() if not n.startswith("layers.3")}
    net = create_backbone("focalnet_nano", embed_dim=8)
    with pytest.raises(ValueError, match=r"layers\.3\..* is not in the file \(and"):
        load_pretrained(net, part)
    with pytest.raises(ValueError, match=r"only \d\d\.\d % of the backbone is in the file"):
        load_pretrained(net, part, allow_missing=True)
    report = load_pretrained(net, part, allow_missing=True, min_loaded=0.1)
    total = {n: p.numel() for n, p in net.named_parameters() if not n.startswith("norm")}
    expected = sum(c for n, c in total.items() if n in part) / sum(total.values())
    assert report.share == pytest.approx(expected)
    assert "layers.3.blocks.0.norm1.weight" in report.missing
