"""Copy-paste and large-scale jitter: hand-worked examples, and through the training loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances

from focalnet_det.data.augmentation import large_scale_jitter
from focalnet_det.data.instances.copy_paste import CopyPaste, paste
from focalnet_det.data.loader import build_train_loader
from focalnet_det.data.registry import register_coco_json
from focalnet_det.data.shapes.generate import make_shapes


def example(size: tuple[int, int], value: int, boxes: list[tuple[int, ...]]) -> dict[str, Any]:
    """A picture of one value with rectangles, class = index."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    instances.gt_masks = BitMasks(masks)
    image = torch.full((3, *size), value, dtype=torch.uint8)
    return {"image": image, "instances": instances, "image_id": value}


def test_paste_by_hand() -> None:
    target = example((6, 8), 10, [(0, 0, 3, 3), (4, 1, 8, 5)])
    # Wider and lower than the target: the last object lies half outside of it.
    source = example((5, 20), 20, [(15, 0, 18, 3), (0, 0, 3, 4), (6, 2, 12, 5)])
    mixed = paste(target, source, torch.tensor([0, 1, 2]))
    # Object 0 of the target is covered whole, of object 1 a column and a row remain beside a hole.
    found = mixed["instances"]
    assert found.gt_classes.tolist() == [1, 1, 2]
    assert found.gt_boxes.tensor.tolist() == [[4, 1, 8, 5], [0, 0, 3, 4], [6, 2, 8, 5]]
    assert [int(m.sum()) for m in found.gt_masks.tensor] == [4 * 4 - 2 * 3, 12, 6]
    expected = np.full((6, 8), 10)
    expected[0:4, 0:3] = expected[2:5, 6:8] = 20
    assert (mixed["image"].numpy() == expected).all()
    assert (target["image"] == 10).all(), "the target is left as it was"
    assert len(target["instances"]) == 2
    assert mixed["image_id"] == 10


def test_nothing_to_paste_and_nothing_to_paste_onto() -> None:
    empty, other = example((6, 6), 1, []), example((6, 6), 2, [(1, 1, 4, 4)])
    always = CopyPaste(1.0)
    assert always(other, lambda: empty) is other
    mixed = always(empty, lambda: other)
    assert mixed["instances"].gt_boxes.tensor.tolist() == [[1, 1, 4, 4]]
    assert int((mixed["image"][0] == 2).sum()) == 9
    both = always(empty, lambda: empty)
    assert len(both["instances"]) == 0
    everything = paste(other, example((6, 6), 3, [(0, 0, 6, 6)]), torch.tensor([0]))
    assert everything["instances"].gt_boxes.tensor.tolist() == [[0, 0, 6, 6]]


def test_probability_and_subsets() -> None:
    target = example((4, 40), 1, [])
    source = example((4, 40), 2, [(4 * k, 0, 4 * k + 2, 2) for k in range(10)])
    np.random.seed(0)
    outcomes = [len(CopyPaste(0.5)(target, lambda: source)["instances"]) for _ in range(400)]
    pasted = [count for count in outcomes if count]
    # Standard deviations: 10 of the count, and 0.2 of the mean of 1..10.
    assert 160 < len(pasted) < 240
    assert set(pasted) == set(range(1, 11))
    assert 4.5 < np.mean(pasted) < 6.5


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="copy_paste must be a probability"):
        CopyPaste(2)
    with pytest.raises(ValueError, match="not semantic labels"):
        CopyPaste(1.0)({**example((4, 4), 1, []), "sem_seg": 0}, dict)
    with pytest.raises(ValueError, match="copy_paste requires masks=True"):
        build_train_loader(
            datasets="any", augmentations=[], batch_size=1, num_workers=0, masks=False, copy_paste=1
        )


def test_training_loader_pastes_and_repeats_itself(tmp_path: Path) -> None:
    root = make_shapes(tmp_path / "shapes", train=6, val=1, size=(64, 64), seed=1, workers=1)
    register_coco_json(
        "copy_paste_shapes", root / "annotations/instances_train.json", root / "images/train"
    )

    def first(copy_paste: float) -> list[dict[str, Any]]:
        loader = build_train_loader(
            datasets="copy_paste_shapes", augmentations=large_scale_jitter(size=96, scale=(0.5, 1)),
            batch_size=6, num_workers=0, copy_paste=copy_paste,
        )  # fmt: skip
        loader.seed = 4
        return next(iter(loader))

    plain, mixed, again = first(0.0), first(1.0), first(1.0)
    counts = [[len(e["instances"]) for e in batch] for batch in (plain, mixed)]
    assert sum(counts[1]) > sum(counts[0])
    for one, two in zip(mixed, again, strict=True):
        assert torch.equal(one["image"], two["image"])
        assert one["image"].shape == (3, 96, 96)
        masks = one["instances"].gt_masks
        assert torch.equal(masks.tensor, two["instances"].gt_masks.tensor)
        assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)
        tight = masks.get_bounding_boxes().tensor
        torch.testing.assert_close(one["instances"].gt_boxes.tensor, tight, atol=1.5, rtol=0)


def test_large_scale_jitter_sizes() -> None:
    np.random.seed(0)
    scales = []
    for _ in range(50):
        image = T.AugInput(np.full((30, 60, 3), 7, dtype=np.uint8))
        T.AugmentationList(large_scale_jitter(size=100))(image)
        assert image.image.shape == (100, 100, 3)
        scales.append(int((image.image[0, :, 0] == 7).sum()))
    # The long side takes 10 to 200 pixels, of which 100 fit.
    assert min(scales) < 30
    assert scales.count(100) > 15
