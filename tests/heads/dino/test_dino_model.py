"""The whole DINO: sizes, initial values, odd batches, classes, precision, any backbone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from focalnet_det.backbones.peers import resnet_backbone
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.dino import DINO, dino
from focalnet_det.heads.dino.dino_model import COCO_IDS
from focalnet_det.heads.set_prediction.levels import padding_masks
from tests.helpers.compare import relative_error
from tests.helpers.processes import in_two_processes

SMALL: dict[str, Any] = {
    "channels": 64,
    "queries": 7,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 32,
    "denoising_queries": 4,
}
STAGES = ("stage2", "stage3", "stage4")


class Maps(Backbone):
    """Features of some strides and channels, by one convolution each."""

    def __init__(self, strides: tuple[int, ...] = (8, 16, 32), width: int = 7) -> None:
        super().__init__()
        self.strides = strides
        self.convs = nn.ModuleList(nn.Conv2d(3, width + k, s, s) for k, s in enumerate(strides))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pads = [(-x.shape[-1] % s, -x.shape[-2] % s) for s in self.strides]
        return {
            f"s{s}": conv(nn.functional.pad(x, (0, right, 0, bottom)))
            for s, conv, (right, bottom) in zip(self.strides, self.convs, pads, strict=True)
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"s{s}": ShapeSpec(channels=conv.out_channels, stride=s)
            for s, conv in zip(self.strides, self.convs, strict=True)
        }


def small_model(**options: Any) -> DINO:
    return dino(backbone=Maps(), **{"num_classes": 5, **SMALL, **options})


def record(height: int, width: int, boxes: int = 2, **fields: Any) -> dict[str, Any]:
    objects = Instances((height, width))
    corners = torch.rand(boxes, 2) * torch.tensor([width / 2, height / 2])
    objects.gt_boxes = Boxes(torch.cat((corners, corners + 3 + 10 * torch.rand(boxes, 2)), 1))
    objects.gt_classes = torch.arange(boxes) % 5
    return {"image": 255 * torch.rand(3, height, width), "instances": objects, **fields}


@pytest.mark.parametrize(
    ("variant", "scales", "conventions", "head", "total"),
    [
        ("focalnet_tiny_lrf", 4, "detrex", 20_672_844, 48_552_924),
        ("focalnet_tiny_lrf", 4, "focalnet_dino", 19_915_710, 47_795_790),
        ("focalnet_large_fl3", 4, "detrex", 22_786_380, 228_352_428),
        ("focalnet_large_fl4", 5, "detrex", 23_132_620, 228_879_556),
        ("focalnet_large_fl4", 5, "focalnet_dino", 22_375_486, 228_122_422),
    ],
)
def test_parameters_are_as_many_as_published(
    variant: str, scales: int, conventions: str, head: int, total: int
) -> None:
    coco_ids = conventions == "focalnet_dino"
    stages = STAGES if scales == 4 else ("stage1", *STAGES)
    with torch.device("meta"):
        model = dino(
            backbone=focalnet_backbone(variant=variant, out_features=stages),
            num_classes=80,
            scales=scales,
            conventions=conventions,
            coco_ids=coco_ids,
        )
    counts = {name: p.numel() for name, p in model.named_parameters()}
    inside = sum(n for name, n in counts.items() if name.startswith("backbone."))
    assert sum(counts.values()) - inside == head
    assert sum(counts.values()) == total


def test_initial_values_are_the_published_distributions() -> None:
    model = dino(backbone=Maps(), num_classes=5)
    transformer = model.transformer
    xavier = (6 / (256 + 2048)) ** 0.5
    layers = (*transformer.encoder.layers, *transformer.decoder.layers)
    for layer in layers:
        assert 0.99 * xavier < layer.linear1.weight.abs().max() <= xavier
    assert transformer.tgt_embed.weight.abs().max() <= (6 / (256 + 900)) ** 0.5
    assert transformer.level_embed.std().item() == pytest.approx(1, rel=0.15)
    assert model.label_enc.weight.std().item() == pytest.approx(1, rel=0.1)
    for head in (*model.class_embed, transformer.enc_out_class_embed):
        assert torch.allclose(head.bias, torch.tensor(-math.log(99)))
    for head in (*model.bbox_embed, transformer.enc_out_bbox_embed):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
        assert head.layers[0].weight.any()


@pytest.mark.parametrize("backbone", ["resnet", "focal", "one feature"])
def test_any_backbone_and_every_parameter_learns(backbone: str) -> None:
    built = {
        "resnet": lambda: resnet_backbone(out_features=["res3", "res4", "res5"]),
        "focal": lambda: focalnet_backbone(variant="focal_nano"),
        "one feature": lambda: Maps(strides=(16,)),
    }[backbone]()
    scales = 5 if backbone == "focal" else 4
    model = dino(backbone=built, num_classes=5, scales=scales, **SMALL)
    losses = model([record(40, 70), record(64, 33)])
    # Two layers, the encoder, and two denoising sets.
    assert len(losses) == 15
    sum(losses.values()).backward()
    missing = [
        name
        for name, p in model.named_parameters()
        if p.grad is None and not name.startswith("backbone.")
    ]
    assert not missing


@pytest.mark.parametrize("conventions", ["focalnet_dino", "detrex"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (60, 1)])
def test_images_without_objects_and_with_many(counts: tuple[int, int], conventions: str) -> None:
    model = small_model(conventions=conventions)
    torch.manual_seed(0)
    losses = model([record(40, 50, boxes=counts[0]), record(64, 64, boxes=counts[1])])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    # Processes wait for the gradients of all parameters.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not any(counts):
        boxes = [loss for name, loss in losses.items() if "bbox" in name or "giou" in name]
        assert not any(boxes)
        assert not losses["loss_ce_dn"]
        assert losses["loss_ce"] > 0


def test_tiny_boxes_and_boxes_of_the_whole_image() -> None:
    model = small_model()
    sample = record(40, 50)
    sample["instances"].gt_boxes = Boxes(torch.tensor([[0, 0, 50, 40.0], [3, 3, 3, 3.0]]))
    losses = model([sample])
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_more_queries_than_tokens() -> None:
    model = small_model(queries=100, max_detections_per_image=1000)
    sum(model([record(32, 40)]).values()).backward()
    assert model.transformer.tgt_embed.weight.grad is not None
    tokens = 4 * 5 + 2 * 3 + 1 * 2 + 1 * 1
    assert not model.transformer.tgt_embed.weight.grad[tokens:].any()
    with torch.no_grad():
        [result] = model.eval()([{"image": torch.zeros(3, 32, 40)}])
    assert len(result["instances"]) == 5 * tokens


def test_a_record_without_objects_to_learn_is_named() -> None:
    with pytest.raises(ValueError, match=r"a\.jpg has no `instances`"):
        small_model()([{"image": torch.zeros(3, 32, 32), "file_name": "a.jpg"}])


def test_batch_padding_is_not_read() -> None:
    """Behind the neck: the same maps give the same, whatever lies in the padding."""
    model = small_model().eval()
    padding = padding_masks([(64, 64), (40, 48)], (64, 64), torch.device("cpu"))
    maps = {f"s{s}": torch.randn(2, 7 + k, 64 // s, 64 // s) for k, s in enumerate((8, 16, 32))}
    model.input_proj.forward = lambda features: features  # type: ignore[method-assign, assignment]
    projected = [torch.randn(2, 64, size, size) for size in (8, 4, 2, 1)]
    noisy = [x.clone() for x in projected]
    for x, size in zip(noisy, (8, 4, 2, 1), strict=True):
        outside = nn.functional.interpolate(padding[:, None].float(), size=(size, size))
        x += 5 * outside
    del maps
    with torch.no_grad():
        a, b = (model.predict(x, padding).layers[-1] for x in (projected, noisy))  # type: ignore[arg-type]
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.boxes, b.boxes)


def test_boxes_are_of_the_output_size_and_the_best_pairs() -> None:
    model = small_model(max_detections_per_image=6).eval()
    image = 255 * torch.rand(3, 40, 56)
    with torch.no_grad():
        [small] = model([{"image": image}])
        [large] = model([{"image": image, "height": 80, "width": 168}])
        features = model.backbone((image - model.pixel_mean)[None] / model.pixel_std)
        last = model.predict(features, torch.zeros(1, 40, 56, dtype=torch.bool)).layers[-1]
    assert small["instances"].image_size == (40, 56)
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(
        large["instances"].pred_boxes.tensor, small["instances"].pred_boxes.tensor * scale
    )
    pairs = sorted(
        ((p, q, k) for q, row in enumerate(last.logits[0].sigmoid().tolist())
         for k, p in enumerate(row)),
        reverse=True,
    )[:6]  # fmt: skip
    torch.testing.assert_close(small["instances"].scores, torch.tensor([p for p, _, _ in pairs]))
    assert small["instances"].pred_classes.tolist() == [k for _, _, k in pairs]
    cx, cy, w, h = last.boxes[0, pairs[0][1]].tolist()
    corners = [56 * (cx - w / 2), 40 * (cy - h / 2), 56 * (cx + w / 2), 40 * (cy + h / 2)]
    torch.testing.assert_close(small["instances"].pred_boxes.tensor[0], torch.tensor(corners))


def test_class_rows_that_are_ids_of_coco() -> None:
    assert (COCO_IDS[0], COCO_IDS[11], COCO_IDS[-1], len(COCO_IDS)) == (1, 13, 90, 80)
    model = small_model(num_classes=80, coco_ids=True, conventions="focalnet_dino")
    assert model.class_embed[0].out_features == 91
    assert model.label_enc.num_embeddings == 92
    sample = record(40, 40, boxes=1)
    sample["instances"].gt_classes = torch.tensor([11])  # a stop sign
    model.criterion.forward = lambda _, targets: {"ids": targets[0].labels}  # type: ignore[method-assign, assignment, misc]
    assert model([sample])["ids"].tolist() == [13]
    with torch.no_grad():
        model.class_embed[0].bias[13] += 10  # of the stop sign
        model.class_embed[0].bias[12] += 20  # of no class
        [result] = model.eval()([{"image": torch.zeros(3, 40, 40)}])
    assert result["instances"].pred_classes[:7].tolist() == [11] * 7
    with pytest.raises(ValueError, match="coco_ids is for COCO's 80 classes, num_classes is 5"):
        small_model(coco_ids=True)


def test_conventions_change_what_they_name() -> None:
    model = small_model(conventions="focalnet_dino")
    assert (model.position.temperature, model.position.offset, model.box_noise) == (20, 0, 0.4)
    assert (len(model.class_embed), len(model.bbox_embed)) == (1, 1)
    assert model.label_enc.num_embeddings == 6
    model.use_conventions("detrex")
    assert (model.position.temperature, model.position.offset) == (10_000, -0.5)
    assert (model.box_noise, model.position_temperature.item()) == (1, 10_000)
    assert (len(model.class_embed), len(model.bbox_embed)) == (2, 2)
    assert model.class_embed[0].weight is not model.class_embed[1].weight
    assert model.label_enc.num_embeddings == 5
    with pytest.raises(ValueError, match="Unknown conventions 'mmdet'"):
        small_model(conventions="mmdet")


def test_fewer_scales_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 scales reads one to 2 features, got 3: s8, s16, s32"):
        small_model(scales=2)


def test_half_precision_keeps_boxes_in_single() -> None:
    model = small_model().eval()
    image = {"image": 255 * torch.rand(3, 64, 64)}
    with torch.no_grad():
        [exact] = model([image])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            [half] = model([image])
    assert half["instances"].pred_boxes.tensor.dtype == torch.float32
    gap = (half["instances"].scores - exact["instances"].scores).abs().max()
    assert gap < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()([record(64, 64)])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def without_denoising(losses: dict[str, Tensor]) -> Tensor:
    """The sum of losses, in which those of denoising, which is drawn, count as 0."""
    return torch.stack([x * ("_dn" not in name) for name, x in losses.items()]).sum()


def train_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = small_model()
    batch = [record(32, 48, boxes=0), record(32, 48, boxes=3)]
    parallel = nn.parallel.DistributedDataParallel(model)
    without_denoising(parallel(batch[rank : rank + 1])).backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    torch.distributed.destroy_process_group()
    model.zero_grad()
    # The mean over processes, each over the mean number of objects, is the sum over their number.
    without_denoising(model(batch)).backward()
    for key, parameter in model.named_parameters():
        assert relative_error(together[key], parameter.grad) <= 1e-4, key


def test_a_process_without_objects_trains_with_another(tmp_path: Path) -> None:
    in_two_processes("tests.heads.dino.test_dino_model", "train_rank", tmp_path / "store")
