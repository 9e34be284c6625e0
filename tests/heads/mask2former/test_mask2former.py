"""The whole model: sizes, targets, odd batches, padding, precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor, distributed, nn

from focalnet_det.backbones.peers import resnet_backbone
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.mask2former import (
    Mask2Former,
    mask2former,
    mask_criterion,
    mask_matcher,
)
from focalnet_det.heads.mask2former.mask2former import build_parts
from focalnet_det.heads.mask2former.mask_targets import make_target
from focalnet_det.heads.tta import TestTimeAugmentation
from tests.helpers.processes import in_two_processes

SMALL = {"channels": 32, "queries": 8, "encoder_layers": 1, "decoder_layers": 3, "points": 60}
CPU = torch.device("cpu")


def small_model(**options: Any) -> Mask2Former:
    backbone = focalnet_backbone(variant="focalnet_nano", valid_context=True)
    return mask2former(backbone=backbone, num_classes=5, **{**SMALL, **options})


def semantic_record(height: int, width: int, labels: Tensor | None = None) -> dict[str, Any]:
    labels = torch.randint(5, (height, width)) if labels is None else labels
    return {"image": 255 * torch.rand(3, height, width), "sem_seg": labels, "file_name": "a.jpg"}


def objects(count: int, height: int, width: int) -> Instances:
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[: height // 2, i : i + width // 3] = True
    return Instances(
        (height, width),
        gt_classes=torch.arange(count) % 2,
        gt_masks=BitMasks(masks),
        gt_boxes=Boxes(torch.zeros(count, 4)),
    )


def published_head(num_classes: int, queries: int, embed_dim: int) -> nn.Module:
    shapes = {
        f"stage{k + 1}": ShapeSpec(channels=embed_dim * 2**k, stride=4 * 2**k) for k in range(4)
    }
    head: nn.Module = build_parts(shapes, num_classes=num_classes, queries=queries)["sem_seg_head"]
    return head


@pytest.mark.parametrize(
    ("num_classes", "queries", "embed_dim", "head", "total", "variant"),
    [
        (150, 100, 96, 19_918_935, 47_799_207, "focalnet_tiny_lrf"),
        (150, 100, 192, 20_287_575, 226_034_511, "focalnet_large_fl4"),
        (133, 200, 192, 20_334_406, 226_081_342, "focalnet_large_fl4"),
    ],
)
def test_parameters_are_as_many_as_published(
    num_classes: int, queries: int, embed_dim: int, head: int, total: int, variant: str
) -> None:
    with torch.device("meta"):
        parts = published_head(num_classes, queries, embed_dim)
        backbone = focalnet_backbone(variant=variant)
    assert sum(p.numel() for p in parts.parameters()) == head
    assert sum(p.numel() for p in backbone.parameters()) + head == total


def test_initial_values_are_the_published_distributions() -> None:
    head = published_head(20, 100, 32)
    attention = head.pixel_decoder.transformer.encoder.layers[3].self_attn
    assert not attention.attention_weights.weight.any()
    assert not attention.sampling_offsets.weight.any()
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    # The third head looks down; the second one along the diagonal.
    torch.testing.assert_close(offsets[2, 0, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(offsets[1, 2, 1], torch.tensor([2.0, 2.0]))
    xavier = (6 / (256 + 1024)) ** 0.5
    for layer in head.pixel_decoder.transformer.encoder.layers:
        assert 0.99 * xavier < layer.linear1.weight.abs().max() <= xavier
    output = head.predictor.transformer_self_attention_layers[0].self_attn.out_proj
    assert 0.98 < output.weight.abs().max() / (6 / 512) ** 0.5 <= 1
    assert head.predictor.query_feat.weight.std().item() == pytest.approx(1, rel=0.05)
    assert head.pixel_decoder.transformer.level_embed.std().item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("backbone", ["resnet", "focal", "odd"])
def test_any_backbone_and_any_number_of_channels(backbone: str) -> None:
    class Odd(Backbone):
        """Three features of channels that nothing divides."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 7 + k, 8 * 2**k, 8 * 2**k) for k in range(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {f"s{k}": conv(x) for k, conv in enumerate(self.convs)}

        def output_shape(self) -> dict[str, ShapeSpec]:
            return {f"s{k}": ShapeSpec(channels=7 + k, stride=8 * 2**k) for k in range(3)}

    built = {
        "resnet": lambda: resnet_backbone(out_features=["res2", "res3", "res4", "res5"]),
        "focal": lambda: focalnet_backbone(variant="focal_nano"),
        "odd": Odd,
    }[backbone]()
    model = mask2former(backbone=built, num_classes=5, **SMALL)
    losses = model([semantic_record(40, 70)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for n, p in model.sem_seg_head.named_parameters())
    with torch.no_grad():
        [result] = model.eval()([{"image": torch.zeros(3, 33, 50), "height": 66, "width": 100}])
    assert result["sem_seg"].shape == (5, 66, 100)


def test_every_task_gives_its_result() -> None:
    model = small_model(tasks=["semantic", "instance", "panoptic"], things=[0, 1]).eval()
    with torch.no_grad():
        [result] = model([{"image": torch.zeros(3, 64, 64)}])
    assert set(result) == {"sem_seg", "panoptic_seg", "instances"}
    assert result["instances"].pred_masks.shape[1:] == (64, 64)
    assert set(result["instances"].pred_classes.tolist()) <= {0, 1}
    with pytest.raises(ValueError, match="tasks must name one or more"):
        small_model(tasks=["detection"])


def test_batches_without_any_object_train_all_parameters() -> None:
    model = small_model(tasks=["instance"])
    records = [
        {"image": torch.rand(3, 64, 64), "instances": objects(count, 64, 64)} for count in (0, 0)
    ]
    losses = model(records)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_an_image_all_of_whose_pixels_are_ignored_trains() -> None:
    for ignore in (False, True):
        model = small_model(ignore_unlabeled=ignore)
        nothing = semantic_record(64, 64, torch.full((64, 64), 255))
        losses = model([nothing, semantic_record(64, 64)])
        assert all(loss.isfinite() for loss in losses.values())


def test_targets_of_labels_objects_and_both() -> None:
    labels = torch.tensor([[0, 0, 3, 3], [255, 1, 1, 3]])
    record = {"sem_seg": labels, "file_name": "b.jpg"}
    target = make_target(record, things=None, ignore_unlabeled=True, device=CPU)
    assert target.labels.tolist() == [0, 1, 3]
    assert [m.sum().item() for m in target.masks] == [2, 2, 3]
    assert target.ignored is not None
    assert target.ignored.tolist() == [[False] * 4, [True, False, False, False]]
    # An object of class 0; a crowd of class 1 is labeled, but no instance.
    mask = torch.tensor([[[True, True, False, False], [False] * 4]])
    thing = Instances((2, 4), gt_classes=torch.tensor([0]), gt_masks=BitMasks(mask))
    both = {**record, "instances": thing}
    target = make_target(both, things=[0, 1], ignore_unlabeled=True, device=CPU)
    assert target.labels.tolist() == [0, 3]
    assert target.ignored is not None
    assert target.ignored.tolist() == [[False] * 4, [True, True, True, False]]
    plain = make_target(both, things=[0, 1], ignore_unlabeled=False, device=CPU)
    assert plain.ignored is None
    assert torch.equal(plain.masks, target.masks)
    with pytest.raises(ValueError, match=r"b\.jpg has no labels"):
        make_target({"file_name": "b.jpg"}, things=None, ignore_unlabeled=True, device=CPU)


def test_padding_is_not_read_if_it_is_masked() -> None:
    model = small_model(mask_padding=True, tasks=["semantic", "panoptic"]).eval()
    small, large = torch.rand(3, 50, 70) * 255, torch.rand(3, 130, 100) * 255
    with torch.no_grad():
        [alone] = model([{"image": small}])
        together, _ = model([{"image": small}, {"image": large}])
        model.mask_padding = False
        read, _ = model([{"image": small}, {"image": large}])
    torch.testing.assert_close(together["sem_seg"], alone["sem_seg"], rtol=1e-4, atol=1e-5)
    assert (read["sem_seg"] - alone["sem_seg"]).abs().max() > 1e-3


def test_masked_padding_does_not_enter_attention_in_training() -> None:
    model = small_model(mask_padding=True)
    head = model.sem_seg_head
    widths = [shape.channels for shape in model.backbone.output_shape().values()]
    shapes = {"stage1": (16, 16), "stage2": (8, 8), "stage3": (4, 4), "stage4": (2, 2)}
    features = {
        name: torch.randn(1, width, *size)
        for (name, size), width in zip(shapes.items(), widths, strict=True)
    }
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, :, 32:] = True
    pixels = head.pixel_decoder(features, padding)
    assert [p.float().mean().item() for p in pixels.padding] == [0.5] * 3
    levels = [x.clone() for x in pixels.levels]
    for level, mask in zip(levels, pixels.padding, strict=True):
        level.masked_fill_(mask[:, None], 1e3)
    first = head.predictor(pixels)
    second = head.predictor(pixels._replace(levels=levels))
    torch.testing.assert_close(first[-1].class_logits, second[-1].class_logits)


def test_half_precision_changes_results_by_rounding_alone() -> None:
    model = small_model().eval()
    record = {"image": 255 * torch.rand(3, 64, 96)}
    with torch.no_grad():
        [exact] = model([record])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            [rounded] = model([record])
    difference = (exact["sem_seg"] - rounded["sem_seg"]).abs()
    assert difference.mean() < 0.02 * exact["sem_seg"].abs().mean()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([semantic_record(64, 64)])
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    assert total.dtype == torch.float32
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_batch_of_two_is_twice_a_batch_of_one() -> None:
    model = small_model().eval()
    records = [{"image": 255 * torch.rand(3, 64, 64)} for _ in range(2)]
    with torch.no_grad():
        both = model(records)
        for record, result in zip(records, both, strict=True):
            [alone] = model([record])
            torch.testing.assert_close(alone["sem_seg"], result["sem_seg"], rtol=1e-4, atol=1e-5)


def test_views_are_averaged_as_scores() -> None:
    """Scores of a mask classifier are sums over queries: a softmax of them would be wrong."""
    torch.manual_seed(0)
    model = small_model().eval()
    image = 255 * torch.rand(3, 64, 96)
    views = [
        {"image": image, "transforms": T.TransformList([T.NoOpTransform()])},
        {"image": image.flip(-1), "transforms": T.TransformList([T.HFlipTransform(96)])},
    ]
    with torch.no_grad():
        plain, mirrored = (model([view])[0]["sem_seg"] for view in views)
        [merged] = TestTimeAugmentation(model)([{"views": views}])
    torch.testing.assert_close(merged["sem_seg"], (plain + mirrored.flip(-1)) / 2)


def records_of_ranks() -> list[dict[str, Any]]:
    """One image with three objects, and one with none."""
    generator = torch.Generator().manual_seed(3)
    images = [255 * torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    return [
        {"image": image, "instances": objects(count, 64, 64), "file_name": f"{count}.jpg"}
        for image, count in zip(images, (3, 0), strict=True)
    ]


def losses_at_a_grid(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return a model with gradients of its losses, at points that are the same in any batch."""
    side = (torch.arange(8) + 0.5) / 8
    grid = torch.cartesian_prod(side, side)[None]
    monkeypatch.setattr(
        mask_criterion, "choose_points", lambda logits, *_, **__: grid.expand(len(logits), -1, -1)
    )
    monkeypatch.setattr(mask_matcher.torch, "rand", lambda *_, **__: grid)
    torch.manual_seed(1)
    model = small_model(tasks=["instance"])
    sum(model(records).values()).backward()
    return model


def train_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            model = losses_at_a_grid([records_of_ranks()[rank]], monkeypatch)
        grads = {name: p.grad for name, p in model.named_parameters()}
        for grad in grads.values():
            distributed.all_reduce(grad)
        torch.save(grads, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_processes_one_without_objects_train_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_two_processes("tests.heads.mask2former.test_mask2former", "train_rank", tmp_path)
    whole = losses_at_a_grid(records_of_ranks(), monkeypatch)
    summed = torch.load(tmp_path / "1.pt")
    for name, parameter in whole.named_parameters():
        # Some gradients are zero but for rounding.
        torch.testing.assert_close(summed[name] / 2, parameter.grad, rtol=1e-3, atol=1e-5)
