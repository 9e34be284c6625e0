"""Recipes of Focal Transformer: published sizes and scores, and that they run."""

import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from focalnet_det.experiment import load_config, read_experiment
from tests.helpers.configs import LEAVES, build_without_memory, read
from tests.helpers.paths import CONFIGS

# Millions of parameters; box AP and mask AP, or mIoU at one and at several scales.
# Source: README.md of microsoft/Focal-Transformer.
PUBLISHED = {
    "mask_rcnn_focal_tiny_fpn_1x": (49, (44.8, 41.0)),
    "mask_rcnn_focal_tiny_fpn_3x": (49, (47.2, 42.7)),
    "mask_rcnn_focal_small_fpn_1x": (71, (47.4, 42.8)),
    "mask_rcnn_focal_small_fpn_3x": (71, (48.8, 43.8)),
    "mask_rcnn_focal_base_fpn_1x": (110, (47.8, 43.2)),
    "mask_rcnn_focal_base_fpn_3x": (110, (49.0, 43.7)),
    "retinanet_focal_tiny_fpn_1x": (39, (43.7,)),
    "retinanet_focal_tiny_fpn_3x": (39, (45.5,)),
    "retinanet_focal_small_fpn_1x": (62, (45.6,)),
    "retinanet_focal_small_fpn_3x": (62, (47.3,)),
    "retinanet_focal_base_fpn_1x": (101, (46.3,)),
    "retinanet_focal_base_fpn_3x": (101, (46.9,)),
    "cascade_mask_rcnn_focal_tiny_fpn_3x": (87, (51.5,)),
    "atss_focal_tiny_fpn_3x": (37, (49.5,)),
    "reppoints_v2_focal_tiny_bifpn_3x": (45, (51.2,)),
    "upernet_focal_tiny_160k": (62, (45.8, 47.0)),
    "upernet_focal_small_160k": (85, (48.0, 50.0)),
    "upernet_focal_base_160k": (126, (49.0, 50.5)),
    "upernet_focal_large_160k_640": (240, (54.0, 55.4)),
}
# Ours, where published totals are others.
UPERNET = {
    "upernet_focal_tiny_160k": "60.844",
    "upernet_focal_small_160k": "83.106",
    "upernet_focal_base_160k": "123.741",
    "upernet_focal_large_160k_640": "237.451",
}
# Sparse R-CNN's has its own test.
PATHS = {
    path.stem: path
    for path in LEAVES
    if re.search("_focal_", path.stem) and not path.stem.startswith("sparse_rcnn")
}
NANO = {"mask_rcnn_focal_nano_fpn_small", "upernet_focal_nano_small"}
DROP_PATH = {
    ("tiny", "1x"): 0.1, ("small", "1x"): 0.2, ("base", "1x"): 0.3,
    ("tiny", "3x"): 0.3, ("small", "3x"): 0.5, ("base", "3x"): 0.5,
}  # fmt: skip


def bottom_up(model: nn.Module) -> nn.Module:
    return getattr(model.backbone, "bottom_up", model.backbone)


def test_leaves_are_complete() -> None:
    assert set(PATHS) == set(PUBLISHED) | NANO


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_scores_are_published(name: str) -> None:
    millions, scores = PUBLISHED[name]
    model = build_without_memory(read(PATHS[name]).model)
    total = sum(p.numel() for p in model.parameters()) / 1e6
    if name in UPERNET:
        # Unlike all other totals, and those of FocalNet and Swin with this head, the published
        # ones are 1 to 3 % larger than the published networks make them.
        assert f"{total:.3f}" == UPERNET[name]
        assert total < millions < 1.025 * total
    elif name.startswith("reppoints"):
        assert f"{total:.2f}" == "45.82"
        assert int(total) == millions, "the published total is cut off, not rounded"
    else:
        assert round(total) == millions
    header = PATHS[name].read_text().split('"""')[1]
    assert [float(s) for s in re.findall(r"\d\d\.\d", header)] == list(scores)
    assert "recipe ours" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_that_of_focalnet(name: str) -> None:
    """But for drop path, where the two networks differ in kernels, and what is not decayed."""
    size, schedule = re.search(r"focal_(\w+?)_(?:(?:bi)?fpn_)?(\w+)$", name).groups()  # type: ignore[union-attr]
    experiment = read(PATHS[name])
    model = build_without_memory(experiment.model)
    blocks = [b for layer in bottom_up(model).layers for b in layer.blocks]
    rate = 0.2 if name.startswith("reppoints") else DROP_PATH.get((size, schedule), 0.3)
    assert blocks[-1].drop_path.rate == pytest.approx(rate)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in experiment.optimizer(model).param_groups:
        for parameter in group["params"]:
            exempt = re.search("norm|relative_position_bias_table", names[id(parameter)])
            assert (group["weight_decay"] == 0) == bool(exempt), names[id(parameter)]
    peers = {"160k_640": "focalnet_large_fl3_160k_640", "160k": "focalnet_tiny_srf_160k"}
    twin = name.split("_focal_")[0] + "_" + peers.get(schedule, f"focalnet_tiny_srf_fpn_{schedule}")
    if name.startswith(("cascade", "atss", "reppoints")):
        twin = name.replace("focal_tiny", "focalnet_tiny_lrf")
    if name.startswith("retinanet"):
        twin = "retinanet_focalnet_tiny_srf_fpn_1x"
    path = next(p for p in LEAVES if p.stem == twin)
    own, other = (load_config(p, []) for p in (PATHS[name], path))
    for config in (own, other):
        bottom = config.model.backbone
        (bottom.pop("bottom_up") if "bottom_up" in bottom else config.model.pop("backbone"))
        config.optimizer.pop("no_decay_names")
        if name.startswith("retinanet"):
            config.schedule.update(epochs=0, milestones=[])
    assert OmegaConf.to_container(own) == OmegaConf.to_container(other)


def example(semantic: bool) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
    example: dict[str, object] = {"image": image, "height": 64, "width": 96}
    if semantic:
        return example | {"sem_seg": torch.randint(0, 3, (64, 96), generator=generator)}
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[0, 8:50, 10:60] = True
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 8.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(masks)
    return example | {"instances": instances}


SHRUNK = ("embed_dim=8", "depths=[1,1,1,1]", "num_heads=[1,2,4,8]")


@pytest.mark.parametrize(
    "name", sorted(NANO | {n for n in PUBLISHED if "tiny" in n and n.endswith(("3x", "160k"))})
)
def test_recipe_trains_and_evaluates_at_reduced_size(name: str) -> None:
    """One optimizer step, in which every parameter gets a gradient, and one evaluation."""
    torch.manual_seed(0)
    semantic = name.startswith("upernet")
    place = "model.backbone" if semantic else "model.backbone.bottom_up"
    changes = [f"{place}.{change}" for change in SHRUNK]
    if semantic:
        changes += ["model.train_size=[64,96]", "model.channels=16"]
    elif "rcnn" in name:
        changes += ["model.roi_heads.batch_size_per_image=16"]
        changes += ["model.proposal_generator.post_nms_topk=[30,30]"]
    experiment = read_experiment(load_config(PATHS[name], changes))
    model = experiment.model()
    optimizer = experiment.optimizer(model)
    model.train()
    with EventStorage():
        losses = model([example(semantic), example(semantic)])
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    optimizer.step()
    model.eval()
    with torch.no_grad():
        (result,) = model([{k: example(semantic)[k] for k in ("image", "height", "width")}])
    if semantic:
        assert result["sem_seg"].shape[1:] == (64, 96)
        assert result["sem_seg"].isfinite().all()
    else:
        assert result["instances"].image_size == (64, 96)


def test_configs_are_where_others_are() -> None:
    for path in PATHS.values():
        assert path.parent.parent == Path(CONFIGS)
