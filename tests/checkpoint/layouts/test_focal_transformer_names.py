"""Checkpoints of Focal Transformers: loading, inspection, conversion, sets of closest tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from focalnet_det import create_backbone
from focalnet_det.backbones import FOCAL_TRANSFORMERS, FocalTransformerSpec
from focalnet_det.checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    inspect_checkpoint,
    load_initial_weights,
    load_pretrained,
)
from focalnet_det.checkpoint.architecture import infer_architecture
from focalnet_det.ops import nearest
from focalnet_det.ops.window_attention import WindowGrid

NAMES = sorted(FOCAL_TRANSFORMERS)
State = dict[str, Tensor]


def official(name: str, side: int = 224, *, device: str = "cpu", classes: int = 10) -> State:
    """A classifier's file for one size of image, names and shapes by hand; values random."""
    row = FOCAL_TRANSFORMERS[name]
    generator = None if device == "meta" else torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    first = isinstance(row, FocalTransformerSpec)
    kernel = 7 if row.conv_embed else 4
    state = {"patch_embed.proj.weight": rand(row.embed_dim, 3, kernel, kernel)}
    state |= {f"patch_embed.{n}": rand(row.embed_dim) for n in ("proj.bias", "norm.weight")}
    state["patch_embed.norm.bias"] = rand(row.embed_dim)
    for i, depth in enumerate(row.depths):
        c, h, cells = row.embed_dim * 2**i, row.num_heads[i], side // (4 * 2**i)
        windows = (cells // 7) ** 2
        for j in range(depth):
            b = f"layers.{i}.blocks.{j}."
            shapes: dict[str, tuple[int, ...]] = {
                "pool_layers.0.weight": (1, 49), "pool_layers.0.bias": (1,),
                "norm1.weight": (c,), "norm1.bias": (c,),
                "attn.qkv.weight": (3 * c, c), "attn.qkv.bias": (3 * c,),
                "attn.proj.weight": (c, c), "attn.proj.bias": (c,),
                "norm2.weight": (c,), "norm2.bias": (c,),
                "mlp.fc1.weight": (4 * c, c), "mlp.fc1.bias": (4 * c,),
                "mlp.fc2.weight": (c, 4 * c), "mlp.fc2.bias": (c,),
            }  # fmt: skip
            if first:
                f = (7, 5, 3, 1)[i]
                shapes["attn.relative_position_bias_table"] = (169, h)
                shapes["attn.relative_position_bias_table_to_windows.0"] = (h, (6 + f) ** 2)
                shapes["attn.relative_position_index"] = (49, 49)
                shapes["attn.relative_position_index_0"] = (49, f * f)
                if cells > 7:
                    table = "attn.relative_position_bias_table_to_neighbors"
                    shapes[table] = (1, h, 49, 132)
                    shapes["attn.valid_ind_rolled"] = (132,)
            else:
                shapes["attn.window_coords"] = (7, 7, 2)
                for k, keys in enumerate((min(128, cells**2), min(128, windows))):
                    level = f"attn.coord2rpb_all.{k}"
                    shapes |= {f"{level}.0.weight": (32, 2), f"{level}.0.bias": (32,)}
                    shapes |= {f"{level}.2.weight": (h, 32), f"{level}.2.bias": (h,)}
                    shapes[f"attn.topk_cloest_coords_{k}"] = (windows, 49, keys, 2)
            state |= {b + part: rand(*shape) for part, shape in shapes.items()}
            if not first:
                for k, numbers in enumerate(nearest.nearest_sets(WindowGrid(cells, cells, 7), 128)):
                    state[f"{b}attn.topk_cloest_indice_{k}"] = numbers.to(device)
        if i < 3:
            down, kernel = f"layers.{i}.downsample.", 3 if row.conv_embed else 2
            state[down + "proj.weight"] = rand(2 * c, c, kernel, kernel)
            state |= {down + n: rand(2 * c) for n in ("proj.bias", "norm.weight", "norm.bias")}
    last = 8 * row.embed_dim
    state |= {"norm.weight": rand(last), "norm.bias": rand(last)}
    return state | {"head.weight": rand(classes, last), "head.bias": rand(classes)}


def neighbors(stage: int, blocks: int) -> list[str]:
    table = "attn.relative_position_bias_table_to_neighbors"
    return [f"layers.{stage}.blocks.{j}.{table}" for j in range(blocks)]


@pytest.mark.parametrize("name", NAMES)
def test_official_files_fit_and_are_recognised(name: str) -> None:
    state = official(name, device="meta", classes=1000)
    inspection = inspect_checkpoint(state)
    assert (inspection.family, inspection.layout) == ("focal_transformer", "official")
    assert (inspection.variant, inspection.overrides) == (name, {})
    assert (inspection.classes, inspection.candidates) == (1000, [])
    net = create_backbone(name) if name == "focal_nano" else None
    if net is None:
        with torch.device("meta"):
            net = create_backbone(name)
    own = {n: t for n, t in net.state_dict().items() if not n.startswith("norm")}
    # Every parameter is in the file, but for the neighbors of the last stage.
    version = isinstance(FOCAL_TRANSFORMERS[name], FocalTransformerSpec)
    absent = neighbors(3, FOCAL_TRANSFORMERS[name].depths[3]) if version else []
    assert sorted(set(own) - set(state)) == absent
    assert all(state[n].shape == t.shape for n, t in own.items() if n in state)


def test_loading_reports_new_tables_and_dropped_indices() -> None:
    state = official("focal_nano")
    net = create_backbone("focal_nano")
    table = net.get_parameter(neighbors(3, 1)[0]).detach().clone()
    report = load_pretrained(net, state)
    assert [n for n in report.missing if not n.startswith("norm")] == neighbors(3, 1)
    assert torch.equal(net.get_parameter(neighbors(3, 1)[0]), table), "it keeps its random values"
    assert float(table.std()) == pytest.approx(0.02, rel=0.2)
    assert any("stage 4" in note for note in report.notes)
    dropped = [
        n for n, rule in report.rules.items() if rule == "index that is computed for each size"
    ]
    assert len(dropped) == 6 * 2 + 5
    for name, value in net.named_parameters():
        assert name in report.missing or torch.equal(value, state[name]), name


def test_files_of_larger_images_have_all_tables() -> None:
    report = load_pretrained(create_backbone("focal_nano"), official("focal_nano", 448))
    assert not any("neighbors" in name for name in report.missing)


@pytest.mark.parametrize("damage", ["one table", "an early stage", "another weight"])
def test_other_missing_names_are_errors(damage: str) -> None:
    state = official("focal_nano", 448)
    names = {
        "one table": neighbors(2, 3)[1:2],
        "an early stage": neighbors(1, 1),
        "another weight": ["layers.1.blocks.0.attn.relative_position_bias_table"],
    }[damage]
    for name in names:
        del state[name]
    net = create_backbone("focal_nano")
    before = net.patch_embed.proj.weight.detach().clone()
    with pytest.raises(ValueError, match=f"{names[0]} is not in the file"):
        load_pretrained(net, state)
    assert torch.equal(net.patch_embed.proj.weight, before), "nothing was loaded"


def test_a_file_of_another_network_is_named() -> None:
    with pytest.raises(ValueError, match="The file is focal_nano.*of another family"):
        load_pretrained(create_backbone("focalnet_nano"), official("focal_nano"))
    net = create_backbone("focal_nano", depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 8))
    expected = r"The file is focal_nano.*depths \(1, 1, 3, 1\) in the file"
    with pytest.raises(ValueError, match=expected):
        load_pretrained(net, official("focal_nano"))


def small_fast(name: str = "focal_fast_tiny") -> torch.nn.Module:
    return create_backbone(name, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def with_sets(net: torch.nn.Module, cells: int, top_k: int = 128) -> State:
    """A file of the network with sets for maps of (cells, cells) in the first stage."""
    state = dict(net.state_dict())
    for i in range(4):
        side = cells // 2**i
        for k, numbers in enumerate(nearest.nearest_sets(WindowGrid(side, side, 7), top_k)):
            state[f"layers.{i}.blocks.0.attn.topk_cloest_indice_{k}"] = numbers
    return state


def test_sets_of_a_file_are_used_saved_and_replaced() -> None:
    net = small_fast()
    report = load_pretrained(net, with_sets(small_fast(), 56))
    assert any("7x7" in note and "56x56" in note for note in report.notes)
    assert "layers.0.blocks.0.attn.topk_cloest_indice_0" in report.loaded
    again = small_fast()
    load_pretrained(again, net.state_dict())
    assert again.layers[0].blocks[0].attn._stored.size == WindowGrid(56, 56, 7)
    report = load_pretrained(again, with_sets(small_fast(), 112))
    assert again.layers[0].blocks[0].attn._stored.size == WindowGrid(112, 112, 7)
    # Other weights without sets were trained with those of no particular size.
    load_pretrained(again, small_fast().state_dict())
    assert again.layers[0].blocks[0].attn._stored is None
    assert inspect_checkpoint(net.state_dict()).family == "focal_transformer"


def test_sets_that_fit_no_map_are_reported_and_left_out() -> None:
    net = small_fast()
    state = with_sets(small_fast(), 56)
    name = "layers.0.blocks.0.attn.topk_cloest_indice_0"
    state[name] = state[name].flip(0)
    report = load_pretrained(net, state)
    assert name not in report.loaded
    assert "computed instead" in report.rules[name]
    assert net.layers[0].blocks[0].attn._stored is None
    assert net.layers[1].blocks[0].attn._stored is not None
    # Sets of another length belong to a network with another top_k.
    report = load_pretrained(net, with_sets(small_fast(), 56, top_k=64))
    assert "computed instead" in report.rules[name]


def detector(net: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({"backbone": net, "head": torch.nn.Linear(2, 2)})


def test_sets_in_detectors() -> None:
    """Files of whole detectors hold them, or do not, under longer names."""
    net = small_fast()
    load_pretrained(net, with_sets(small_fast(), 56))
    again = small_fast()
    state = detector(net).state_dict()
    name = "backbone.layers.1.blocks.0.attn.topk_cloest_indice_0"
    state[name] = state[name].flip(0)
    report = load_initial_weights(detector(again), state)
    assert "head.weight" in report.loaded
    assert "computed instead" in report.rules[name]
    assert name not in report.loaded
    assert again.layers[0].blocks[0].attn._stored.size == WindowGrid(56, 56, 7)
    assert again.layers[1].blocks[0].attn._stored is None
    report = load_initial_weights(detector(again), detector(small_fast()).state_dict())
    assert again.layers[0].blocks[0].attn._stored is None
    assert all("topk_cloest_indice" in name for name in report.missing)


def test_sets_are_whole_numbers() -> None:
    state = with_sets(small_fast(), 56)
    name = "layers.0.blocks.0.attn.topk_cloest_indice_0"
    state[name] = state[name].float()
    message = f"{name} is float32 in the file, where int64 is expected"
    with pytest.raises(ValueError, match=message):
        load_pretrained(small_fast(), state)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state, "detectron2")


def test_architectures_are_named() -> None:
    file = official("focal_tiny", device="meta", classes=1000)
    assert str(infer_architecture(file)) == "a Focal-T classifier (1000 classes)"
    other = create_backbone("focal_nano", depths=(1, 1, 4, 1)).state_dict()
    assert str(infer_architecture(other)) == "a Focal Transformer backbone"


def test_sets_have_no_place_in_version_1() -> None:
    state = official("focal_nano")
    state["layers.0.blocks.0.attn.topk_cloest_indice_0"] = torch.zeros(64, 128, dtype=torch.int64)
    with pytest.raises(ValueError, match="topk_cloest_indice_0 is not in the network"):
        load_pretrained(create_backbone("focal_nano"), state)


@pytest.mark.parametrize("name", ["focal_nano", "focal_fast_tiny"])
def test_conversion_to_detectron2_and_back(name: str, tmp_path: Path) -> None:
    state = official(name, device="meta") if name != "focal_nano" else official(name)
    converted = convert_state_dict(state, "detectron2")
    assert all(n.startswith("backbone.bottom_up.") for n in converted.tensors if "head" not in n)
    back = convert_state_dict(converted.tensors, "official")
    indices = set(converted.dropped)
    assert {n for n in indices if "index" not in n and "coords" not in n} <= {
        n for n in state if "valid_ind_rolled" in n
    }
    assert set(back.tensors) == set(state) - indices
    if name == "focal_nano":
        assert all(torch.equal(t, state[n]) for n, t in back.tensors.items())
        convert_checkpoint(state, tmp_path / "model.safetensors", "detectron2")
        report = load_pretrained(create_backbone(name), tmp_path / "model.safetensors")
        assert [n for n in report.missing if not n.startswith("norm")] == neighbors(3, 1)


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_other_libraries_have_no_focal_transformer(layout: str) -> None:
    with pytest.raises(ValueError, match="no Focal Transformers"):
        convert_state_dict(official("focal_nano", device="meta"), layout)


def test_unknown_shapes_name_the_nearest_variant() -> None:
    net = create_backbone("focal_nano", depths=(1, 1, 4, 1))
    inspection = inspect_checkpoint(net.state_dict())
    assert inspection.variant is None
    assert inspection.candidates[0].startswith("focal_nano, but depths is (1, 1, 4, 1)")
    enlarged = create_backbone("focal_nano", focal_windows=(9, 5, 3, 1), in_channels=4)
    inspection = inspect_checkpoint(enlarged.state_dict())
    assert inspection.variant == "focal_nano"
    assert inspection.overrides == {"focal_windows": (9, 5, 3, 1), "in_channels": 4}
