"""Training and evaluation where there is nothing: in one image, in a batch, on one process."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.data import transforms as T
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import distributed, nn

from focalnet_det.compat import create_ddp_model
from focalnet_det.data.instances.mappers import InstanceMapper
from focalnet_det.heads.empty import accept_empty_images
from focalnet_det.layers.recast import recast
from tests.helpers.nano_recipes import (
    HEIGHT,
    IGNORE,
    KEYPOINTS,
    METHODS,
    STUFF,
    WIDTH,
    build,
    record,
)
from tests.helpers.processes import in_two_processes

Batch = list[dict[str, Any]]

# Mappers leave out masks and keypoints of images without objects; crops leave them empty.
NONE, NONE_LEFT = record(0, fields=False, label=IGNORE), record(0, seed=1, label=IGNORE)
BATCHES: dict[str, Batch] = {
    "none in two images": [NONE, record(2), NONE_LEFT],
    "none": [NONE, NONE_LEFT],
    "no visible keypoint": [record(2, visible=False), record(1, seed=1, visible=False)],
    "only ignored pixels": [record(2, label=IGNORE), record(1, seed=1, label=IGNORE)],
}
CASES = [
    (method, batch)
    for method in METHODS
    for batch in BATCHES
    if "keypoint" in method or "keypoint" not in batch
    if "panoptic" in method or "pixels" not in batch
]
# In the names of losses that only objects have.
ABOUT_OBJECTS = (
    "box_",
    "rpn_loc",
    "mask",
    "keypoint",
    "fcos_loc",
    "fcos_ctr",
    "centerness",
    "_offset",
)


def step(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the losses of a batch, after a backward pass, and what was logged."""
    model.zero_grad()
    with EventStorage() as storage, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        losses = model(batch)
    sum(losses.values()).backward()
    logged = {name: float(value) for name, (value, _) in storage.latest().items()}
    return {name: float(loss.detach()) for name, loss in losses.items()} | logged


def assert_all_gradients(model: nn.Module) -> None:
    """Parameters without one make DistributedDataParallel fail at the next step."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []
    assert [name for name, p in trained if not p.grad.isfinite().all()] == []  # type: ignore[union-attr]


@pytest.mark.parametrize(("method", "batch"), CASES)
def test_training(method: str, batch: str) -> None:
    model = build(method).train()
    values = step(model, BATCHES[batch])
    assert [name for name, value in values.items() if not value < float("inf")] == []
    assert_all_gradients(model)
    assert [n for n, b in model.named_buffers() if not b.isfinite().all()] == []
    about_objects = [
        n for n in values if n.startswith("loss") and any(p in n for p in ABOUT_OBJECTS)
    ]
    if batch == "none":
        assert [values[name] for name in about_objects] == [0.0] * len(about_objects)
    if batch in ("none", "only ignored pixels"):
        assert values.get("loss_sem_seg", 0.0) == 0.0
    if batch == "no visible keypoint":
        assert values.get("loss_keypoint", 0.0) == 0.0


@pytest.mark.parametrize(
    ("method", "objects"),
    [*((m, 0) for m in METHODS if "rcnn" in m or "panoptic" in m), ("cascade_mask_rcnn_mmdet", 2)],
)
def test_training_without_proposals(method: str, objects: int) -> None:
    """The heads then train on the objects themselves, if there are any."""
    model = build(method).train()
    model.proposal_generator.post_nms_topk = {True: 0, False: 0}
    values = step(model, [record(objects), record(objects, seed=1)])
    assert [name for name, value in values.items() if not value < float("inf")] == []
    assert_all_gradients(model)
    assert [n for n, b in model.named_buffers() if not b.isfinite().all()] == []


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_finds_nothing(method: str) -> None:
    model = build(method).eval()
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 2.0
    size = (2 * HEIGHT, 2 * WIDTH)
    with torch.no_grad():
        outputs = model([record(0), record(0, seed=1)])
        if hasattr(model, "proposal_generator"):
            model.proposal_generator.post_nms_topk = {True: 0, False: 0}
            outputs += model([record(0), record(0, seed=1)])
    for output in outputs:
        if "instances" in output:
            found = output["instances"]
            assert (len(found), found.image_size) == (0, size)
            assert found.pred_boxes.tensor.shape == (0, 4)
            assert found.has("pred_masks") == ("mask" in method or "panoptic" in method)
            if found.has("pred_masks"):
                assert found.pred_masks.shape == (0, *size)
            if "keypoint" in method:
                assert found.pred_keypoints.shape == (0, KEYPOINTS, 3)
        else:
            assert output["sem_seg"].shape == (STUFF, *size)
        if "panoptic_seg" in output:
            ids, segments = output["panoptic_seg"]
            assert not any(segment["isthing"] for segment in segments)
            assert set(ids.unique().tolist()) <= {0, *(segment["id"] for segment in segments)}


@pytest.mark.parametrize("method", ["fcos", "semantic_fpn", "panoptic_fpn_detectron2"])
def test_other_losses_stay(method: str) -> None:
    """Where there is something, the losses and gradients are those of Detectron2's classes."""
    ours = build(method).train()
    batch = [record(2), record(1, seed=1)]
    batch[0]["sem_seg"][:20] = IGNORE
    theirs = copy.deepcopy(ours)
    if method == "fcos":
        theirs = recast(theirs, FCOS)
    else:
        theirs.sem_seg_head = recast(theirs.sem_seg_head, SemSegFPNHead)
    values = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # of the boxes that are sampled
        values.append(step(model, batch))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Convolutions round by where their operands lie in memory.
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_detectron2s_own_models_are_prepared() -> None:
    """As yaml configs build them."""
    theirs = recast(build("fcos"), FCOS).train()
    ours = accept_empty_images(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert step(ours, BATCHES["none"])["loss_fcos_loc"] == 0
    segmentor = build("semantic_fpn").train()
    segmentor.sem_seg_head = recast(segmentor.sem_seg_head, SemSegFPNHead)
    # Else our class is to go.
    assert not step(segmentor, BATCHES["none"])["loss_sem_seg"] < float("inf")
    assert step(accept_empty_images(segmentor), BATCHES["none"])["loss_sem_seg"] == 0


def train_on_two_processes(rank: int, rendezvous: str) -> None:
    """Take two steps of each method; only process 0 has objects, and only in the second."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        for method in METHODS:
            torch.manual_seed(0)
            model = build(method).train()
            wrapped = create_ddp_model(model, broadcast_buffers=False)
            for objects in (0, 2):
                mine = objects if rank == 0 else 0
                label = IGNORE if mine == 0 else 1
                with EventStorage():
                    losses = wrapped([record(mine, seed=rank, label=label)] * 2)
                # DistributedDataParallel fails in the second forward pass if a parameter had no
                # gradient in the first.
                sum(losses.values()).backward()
                assert_all_gradients(model)
            sums = torch.stack([p.grad.sum() for p in model.parameters() if p.requires_grad])
            both = [torch.empty_like(sums) for _ in range(2)]
            distributed.all_gather(both, sums)
            assert torch.equal(*both), method
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    in_two_processes("tests.heads.test_empty", "train_on_two_processes", rendezvous)


class FixedCrop(T.Augmentation):
    """A crop that leaves out the left and the upper part."""

    def __init__(self, x0: int, y0: int, width: int, height: int) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: Any) -> T.Transform:
        return T.CropTransform(self.x0, self.y0, self.width, self.height, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "method", ["mask_rcnn_detectron2", "keypoint_rcnn_mmdet", "retinanet_mmdet"]
)
def test_records_of_the_mapper(method: str, tmp_path: Path) -> None:
    """An image without annotations, one with a crowd alone, and a crop without its object."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "image.png")
    annotation = {
        "bbox": [2.0, 2.0, 20.0, 20.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0,
        "segmentation": [[2.0, 2.0, 22.0, 2.0, 22.0, 22.0]], "iscrowd": 0,
        "keypoints": [10.0, 10.0, 2] * KEYPOINTS,
    }  # fmt: skip
    mapper = InstanceMapper(
        is_train=True,
        augmentations=[FixedCrop(48, 32, 48, 32)],
        image_format="RGB",
        masks="mask" in method,
        keypoints="keypoint" in method,
        keypoint_hflip_indices=range(KEYPOINTS),
    )
    batch = [
        mapper({"file_name": str(tmp_path / "image.png"), "height": HEIGHT, "width": WIDTH,
                "image_id": i, "annotations": annotations})
        for i, annotations in enumerate(([], [annotation | {"iscrowd": 1}], [annotation]))
    ]  # fmt: skip
    assert [len(example["instances"]) for example in batch] == [0, 0, 0]
    model = build(method).train()
    values = step(model, batch)
    assert [name for name, value in values.items() if not value < float("inf")] == []
    assert_all_gradients(model)
