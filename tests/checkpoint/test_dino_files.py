"""Whole files of DINO in its public layouts: there and back, inspection, wrong mixes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from focalnet_det.checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_initial_weights,
    read_state_dict,
)
from focalnet_det.checkpoint.dino_fit import conventions_of_file
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.dino import DINO, dino
from tests.helpers import stored_outputs
from tests.helpers.published import official

State = dict[str, Tensor]
SMALL: dict[str, Any] = {"channels": 64, "queries": 6, "encoder_layers": 1, "feedforward": 32}


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def small_model(*, scales: int = 4, num_classes: int = 5, **options: Any) -> DINO:
    stages = [f"stage{k}" for k in range(6 - scales, 5)]
    backbone = focalnet_backbone(variant="focalnet_nano", embed_dim=8, out_features=stages)
    options = {"decoder_layers": 2, **SMALL, **options}
    return dino(backbone=backbone, num_classes=num_classes, scales=scales, **options)


def public_file(layout: str) -> State:
    """All names of a public file by the stored lists, beside a small backbone."""
    numbers, _ = stored_outputs.stored("dino")
    if layout == "detrex":
        shapes, repeated = dict(numbers["detrex_keys"]), {}
        # Of each layer, for the decoder too.
        for name in shapes:
            if name.startswith(("class_embed", "bbox_embed")):
                repeated[f"transformer.decoder.{name}"] = name
    else:
        shapes = dict(numbers["s4"]["keys"])
        aliases = numbers["s4"]["aliases"]
        repeated = {other: name for name, others in aliases.items() for other in others}
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state |= {name: state[of].clone() for name, of in repeated.items()}
    prefix = {"detrex": "backbone.", "focalnet_dino": "backbone.0."}[layout]
    network = official("focalnet_nano")
    inside = {n: t for n, t in network.items() if not re.match(r"(norm|head)\.", n)}
    for i, width in ((1, 16), (2, 32), (3, 64)):
        inside |= {f"norm{i}.{part}": torch.rand(width) for part in ("weight", "bias")}
    return state | {f"{prefix}{name}": tensor for name, tensor in inside.items()}


@pytest.mark.parametrize("layout", ["focalnet_dino", "detrex"])
def test_whole_files_there_and_back(layout: str, tmp_path: Path) -> None:
    file = public_file(layout)
    torch.save({"model": file, "epoch": 11}, tmp_path / "theirs.pth")
    conversion = convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.pth", "detectron2")
    assert (conversion.layout, conversion.dropped) == (layout, {})
    ours = read_state_dict(tmp_path / "ours.pth")
    assert ours["position_temperature"] == {"focalnet_dino": 20, "detrex": 10_000}[layout]
    assert any(name.startswith("backbone.layers.0.") for name in ours)
    convert_checkpoint(tmp_path / "ours.pth", tmp_path / "back.safetensors", layout)
    assert_same(read_state_dict(tmp_path / "back.safetensors"), file)
    for path in ("theirs.pth", "ours.pth", "back.safetensors"):
        assert conventions_of_file(tmp_path / path) == layout
        found = inspect_checkpoint(tmp_path / path)
        assert (found.method, found.classes, found.conventions) == ("dino", 80, layout)
        assert (found.queries, found.feature_scales, found.family) == (100, 4, "focalnet")
        assert found.layout == ("detectron2" if path == "ours.pth" else layout)
    other = {"detrex": "focalnet_dino", "focalnet_dino": "detrex"}[layout]
    with pytest.raises(ValueError, match=f"make sense.* write it as {layout}"):
        convert_state_dict(ours, other)


def test_names_and_values_by_the_stored_table() -> None:
    """The names that both layouts have, by the stored list of them."""
    numbers, _ = stored_outputs.stored("dino")
    theirs = public_file("detrex")
    ours = convert_state_dict(theirs, "detectron2").tensors
    heads = re.compile(r"^(class_embed|bbox_embed|transformer\.enc_out)")
    for name, other in numbers["detrex_name_map"].items():
        if not heads.match(name):
            assert torch.equal(ours[name], theirs[other]), name
    assert torch.equal(ours["transformer.enc_out_class_embed.bias"], theirs["class_embed.6.bias"])
    assert torch.equal(ours["class_embed.3.weight"], theirs["class_embed.3.weight"])


def test_files_that_are_not_whole_are_refused() -> None:
    file = public_file("focalnet_dino")
    changed = dict(file) | {"class_embed.3.bias": file["class_embed.3.bias"] + 1}
    with pytest.raises(ValueError, match=r"class_embed\.\d\.bias .* differ, and are one tensor"):
        convert_state_dict(changed, "detectron2")
    with pytest.raises(ValueError, match=r"1 names .* such as transformer\.mystery"):
        convert_state_dict(file | {"transformer.mystery": torch.ones(1)}, "detectron2")
    missing = {n: t for n, t in file.items() if n != "transformer.enc_output.bias"}
    with pytest.raises(ValueError, match=r"transformer\.enc_output\.bias is missing"):
        convert_state_dict(missing, "detectron2")
    with pytest.raises(ValueError, match="Only a whole DINO saved by this package"):
        convert_state_dict(file, "detrex")


@pytest.mark.parametrize("conventions", ["focalnet_dino", "detrex"])
def test_models_take_over_the_conventions_of_a_file(conventions: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = small_model(conventions=conventions).eval()
    path = tmp_path / "public.pth"
    convert_checkpoint(source.state_dict(), path, conventions)
    model = small_model().eval()
    report = load_initial_weights(model, path, new_classes=False)
    assert (report.layout, report.missing, report.dropped) == (conventions, [], [])
    assert model.conventions == conventions
    assert_same(model.state_dict(), source.state_dict())
    image = [{"image": 255 * torch.rand(3, 40, 60)}]
    with torch.no_grad():
        [expected], [found] = source(image), model(image)
    assert torch.equal(found["instances"].scores, expected["instances"].scores)
    assert torch.equal(
        found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor
    )


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"scales": 5},
        {},
        [
            "this is a DINO of 5 scales, the config builds one of 4; use configs/COCO-Detection/",
            "dino_*_5scale_* or set model.scales=5",
        ],
    ),
    ({}, {"scales": 5}, ["this is a DINO of 4 scales, the config builds one of 5", "_4scale_*"]),
    (
        {"num_classes": 80, "coco_ids": True},
        {"num_classes": 80},
        [
            "its class layers have 91 rows, COCO's ids 0..90, those of the config 80, COCO's 80 ",
            "classes; set model.coco_ids=True (MODEL.DINO.COCO_IDS)",
        ],
    ),
    (
        {"num_classes": 80},
        {"num_classes": 80, "coco_ids": True},
        ["have 80 rows", "set model.coco_ids=False"],
    ),
    (
        {"conventions": "focalnet_dino"},
        {"conventions": "detrex"},
        [
            "with the conventions of FocalNet-DINO (positions of temperature 20), the config asks ",
            "for those of detrex (10000); set model.conventions=focalnet_dino",
        ],
    ),
    ({"conventions": "detrex"}, {"conventions": "focalnet_dino"}, ["model.conventions=detrex"]),
]


@pytest.mark.parametrize(("file", "config", "reasons"), REFUSED)
def test_wrong_mixes_are_refused(
    file: dict[str, Any], config: dict[str, Any], reasons: list[str]
) -> None:
    source, model = small_model(**file), small_model(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = source.state_dict()
    public = convert_state_dict(ours, source.conventions).tensors
    for state in (ours, public):
        for new_classes in (True, False):
            with pytest.raises(ValueError, match="does not fit, nothing was loaded") as caught:
                load_initial_weights(model, state, new_classes=new_classes)
            assert all(reason in str(caught.value) for reason in reasons), str(caught.value)
    assert_same(model.state_dict(), before)


def test_other_classes_begin_anew() -> None:
    source, model = small_model(conventions="focalnet_dino"), small_model(num_classes=3)
    report = load_initial_weights(model, source.state_dict())
    names = {name.partition(".")[0] for name in report.dropped}
    assert names == {"class_embed", "label_enc", "transformer"}
    assert set(report.rules.values()) == {"another number of classes"}
    assert torch.equal(model.transformer.level_embed, source.transformer.level_embed)
    with pytest.raises(ValueError, match="class_embed"):
        load_initial_weights(small_model(num_classes=3), source.state_dict(), new_classes=False)
