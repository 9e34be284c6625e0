"""valid_context in Detectron2: an image is found the same alone, in a batch, and padded more."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import copy

import torch
from detectron2.modeling import FPN, SemanticSegmentor, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import ImageList
from torch import Tensor, nn

from focalnet_det import create_backbone
from focalnet_det.analysis.feature_shifts import extra_padding, feature_shifts
from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.heads.batch_padding import ignore_batch_padding
from focalnet_det.layers.padded_batch import PaddedBatch, current_batch, padded_batch
from focalnet_det.layers.recast import recast
from tests.helpers.paths import CONFIGS

ROIS = ["model.proposal_generator.post_nms_topk=[40,40]"]
# GroupNorm in necks and heads, so that norms over whole maps are covered.
LEAVES = {
    "mask": ("COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py", ROIS),
    "cascade": ("Shapes-InstanceSegmentation/cascade_mask_rcnn_focalnet_nano_fpn_small.py", ROIS),
    "retinanet": ("Shapes-Detection/retinanet_focalnet_nano_fpn_small.py", []),
    "fcos": (
        "COCO-Detection/fcos_focalnet_tiny_srf_fpn_1x.py",
        ["model.test_score_thresh=0.001", "model.num_classes=3"],
    ),
    "atss": ("Shapes-Detection/atss_focalnet_nano_fpn_small.py", []),
    "reppoints_v2": ("Shapes-Detection/reppoints_v2_focalnet_nano_bifpn_small.py", []),
    "panoptic": (
        "Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py",
        [*ROIS, "model.combine_instances_score_thresh=0.1"],
    ),
    "semantic": ("Shapes-SemanticSegmentation/semantic_fpn_focalnet_nano_small.py", []),
}
LEAVES["focal"] = (
    "Shapes-InstanceSegmentation/mask_rcnn_focal_nano_fpn_small.py",
    [*ROIS, "+model.backbone.bottom_up.num_heads=[1,2,4,8]"],
)
THIN = ["+model.backbone.bottom_up.valid_context=true", "model.backbone.bottom_up.embed_dim=16"]
THIN += ["+model.backbone.bottom_up.depths=[1,1,1,1]"]


def grow(net: nn.Module) -> None:
    """Initial weights are small, so that contexts hardly matter: these do."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4


def model_of(kind: str, *, valid: bool = True) -> nn.Module:
    """Random weights, large enough in the last layers for detections with different scores."""
    leaf, options = LEAVES[kind]
    thin = THIN if valid else THIN[1:]
    model = read_experiment(load_config(CONFIGS / leaf, [*thin, *options])).model().eval()
    grow(getattr(model.backbone, "bottom_up", model.backbone))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_score.weight", "objectness_logits.weight", "bbox_pred.weight")):
            scale = 0.1 if "bbox" in name or "head.cls_score" in name else 1.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * scale * 0.3
        if name.endswith(("cls_out.weight", "score_out.weight")):
            # Of RepPoints v2, whose last convolutions follow others with small weights.
            parameter.data = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias") and parameter.dim() == 1:
            # What fills the padding of a neck.
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        if name == "head.reppoints_pts_init_out.bias":
            parameter.data[:4] += torch.tensor([-1.5, -1.5, 1.5, 1.5])
        if name in ("head.cls_score.bias", "head.reppoints_cls_out.bias"):
            parameter.data.fill_(-1.0)
    return model


def record(height: int, width: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator) * 255
    return {"image": image, "height": height, "width": width}


IMAGES = [record(70, 97, 1), record(128, 64, 2), record(33, 130, 3)]


@torch.no_grad()
def found(model: nn.Module, records: list[dict[str, Any]], padding: int = 0) -> list[Any]:
    if padding:
        with extra_padding(model, padding):
            return model(records)  # type: ignore[no-any-return]
    return model(records)  # type: ignore[no-any-return]


def tensors(output: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that a model says of an image."""
    result = {}
    if "instances" in output:
        fields = output["instances"].get_fields()
        result = {name: getattr(value, "tensor", value).float() for name, value in fields.items()}
        # By class and place: rounding decides the order of scores that are all but equal.
        place = result["pred_boxes"] @ torch.tensor([1.0, 1.7, 2.3, 3.1])
        order = torch.argsort(10_000 * result["pred_classes"] + place)
        result = {name: value[order] for name, value in result.items()}
    if "sem_seg" in output:
        result["sem_seg"] = output["sem_seg"]
    if "panoptic_seg" in output:
        result["panoptic"] = output["panoptic_seg"][0].float()
    return result


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    first, second = tensors(ours), tensors(theirs)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.shape == second[name].shape, name
        if name in ("pred_masks", "panoptic"):  # thresholded: a pixel or two may flip
            assert (value != second[name]).float().mean() < 1e-3
        else:
            torch.testing.assert_close(second[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", LEAVES)
def test_alone_in_a_batch_and_padded(kind: str) -> None:
    model = model_of(kind)
    alone = [found(model, [image])[0] for image in IMAGES]
    if "instances" in alone[0]:
        assert min(len(output["instances"]) for output in alone) >= 3
    together = found(model, IMAGES)
    for one, batched in zip(alone, together, strict=True):
        assert_same(one, batched)
    if kind == "semantic":  # mmsegmentation's inference: each image as it is, never padded
        return
    padded = found(model, IMAGES[:2], padding=200)
    for one, batched in zip(alone, padded, strict=False):
        assert_same(one, batched)


def test_without_it_padding_shows() -> None:
    model = model_of("retinanet", valid=False)
    alone = found(model, IMAGES[:1])[0]["instances"]
    padded = found(model, IMAGES[:1], padding=200)[0]["instances"]
    assert len(alone) != len(padded) or not torch.allclose(alone.scores, padded.scores, atol=1e-3)
    assert type(model.backbone).__name__ == "FPN"


def test_names_and_copies_stay() -> None:
    model = model_of("retinanet")
    plain = model_of("retinanet", valid=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    twice = copy.deepcopy(ignore_batch_padding(model))
    assert [type(m).__name__ for m in twice.modules()] == [
        type(m).__name__ for m in model.modules()
    ]
    assert_same(found(twice, IMAGES)[0], found(model, IMAGES)[0])


def test_detectron2_segmentor_and_yaml() -> None:
    """Meta-architectures that are not ours get the sizes too, from a yacs config."""
    cfg = load_config(
        CONFIGS / "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.yaml",
        ["MODEL.DEVICE=cpu", "MODEL.FOCALNET.EMBED_DIM=16", "MODEL.FOCALNET.DEPTHS=(1,1,1,1)",
         "MODEL.FOCALNET.VALID_CONTEXT=True", "MODEL.META_ARCHITECTURE=SemanticSegmentor",
         "MODEL.BACKBONE.NAME=build_focalnet_fpn_backbone",
         "MODEL.FPN.IN_FEATURES=('stage1','stage2','stage3','stage4')"],
    )  # fmt: skip
    model = ignore_batch_padding(build_model(cfg)).eval()
    assert type(model) is SemanticSegmentor
    alone = [found(model, [image])[0] for image in IMAGES]
    for batch in (found(model, IMAGES), found(model, IMAGES, padding=200)):
        for one, batched in zip(alone, batch, strict=True):
            assert_same(one, batched)


def test_training_gets_the_sizes() -> None:
    """The backbone refuses to run without them; and its features are zero in the padding."""
    model = model_of("semantic").train()
    seen: list[Tensor] = []
    model.backbone.bottom_up.register_forward_hook(lambda *hook: seen.append(hook[2]["stage1"]))
    labels = [torch.zeros(r["image"].shape[1:], dtype=torch.long) for r in IMAGES]
    losses = model([{**r, "sem_seg": x} for r, x in zip(IMAGES, labels, strict=True)])
    sum(losses.values()).backward()
    (feature,) = seen
    assert feature[0, :, 18:].abs().max() == 0
    assert feature[0, :, :18, :25].abs().max() > 0
    with pytest.raises(ValueError, match="call it with image_sizes"):
        model.backbone(torch.zeros(1, 3, 64, 64))


def test_nothing_of_detectron2_is_patched() -> None:
    """Batches carry nothing but pixels, stay scriptable, and sizes end with the forward pass."""
    assert ImageList.__init__.__module__ == "detectron2.structures.image_list"
    images = ImageList.from_tensors([torch.ones(3, 5, 7), torch.ones(3, 9, 4)], 4)
    assert vars(images.tensor) == {}
    model = model_of("retinanet")
    batches: list[PaddedBatch | None] = []
    maps: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda *_: batches.append(current_batch()))
    model.backbone.register_forward_hook(lambda *hook: maps.extend(hook[2].values()))
    found(model, IMAGES[:2])
    (batch,) = batches
    assert batch is not None
    assert batch.image_sizes == [(70, 97), (128, 64)]
    # Of padded images of 96 x 128 and 128 x 64 pixels, at stride 8.
    assert batch.extents[16, 16] == [(12, 16), (16, 8)]
    assert [vars(x) for x in maps] == [{}] * 5
    assert current_batch() is None

    def area(x: Tensor) -> Tensor:
        batch = ImageList.from_tensors([x], 4)
        return batch.tensor.sum() + batch.image_sizes[0][0]

    script: Callable[[Callable[[Tensor], Tensor]], Any] = torch.jit.script
    assert script(area)(torch.ones(3, 5, 7)) == 3 * 5 * 7 + 5


def test_sizes_end_where_a_forward_pass_fails() -> None:
    model = model_of("retinanet")

    def fail(*_: Any) -> None:
        raise RuntimeError("broken head")

    model.head.register_forward_pre_hook(fail)
    with padded_batch([(1, 2)]) as outer:
        with pytest.raises(RuntimeError, match="broken head"):
            found(model, IMAGES)
        assert current_batch() is outer
    assert current_batch() is None


def test_it_is_asked_for_by_a_function_too() -> None:
    model = model_of("retinanet", valid=False)
    twin = model_of("retinanet")
    twin.load_state_dict(model.state_dict())
    assert ignore_batch_padding(ignore_batch_padding(model)) is model
    assert model.backbone.bottom_up.valid_context
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    for one, batched in zip(found(twin, IMAGES), found(model, IMAGES), strict=True):
        assert_same(one, batched)


def test_what_cannot_ignore_padding_is_named() -> None:
    class MyHead(RetinaNetHead):
        pass

    model = model_of("retinanet", valid=False)
    model.head = recast(model.head, MyHead)
    with pytest.raises(ValueError, match="MyHead is not known to ignore batch padding"):
        ignore_batch_padding(model)
    assert not model.backbone.bottom_up.valid_context
    with pytest.raises(ValueError, match="This ReLU has no FocalNet"):
        ignore_batch_padding(nn.ReLU())


def test_the_earlier_name_warns() -> None:
    from focalnet_det.heads.alone import see_images_alone

    model = model_of("retinanet", valid=False)
    with pytest.warns(DeprecationWarning, match=r"see_images_alone is now .*ignore_batch_padding"):
        assert see_images_alone(model) is model
    assert type(model.backbone) is FPN  # no valid_context, so nothing to do


def test_traced_masks_follow_the_image() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("semantic").backbone.bottom_up

        def forward(self, x: Tensor) -> Tensor:
            images = ImageList.from_tensors([x], 32)
            return self.inner(images.tensor, images.image_sizes)["stage4"]  # type: ignore[no-any-return]

    net = Net().eval()
    images = [r["image"] / 100 for r in IMAGES]
    traced = torch.jit.trace(net, images[0])
    for image in images:
        torch.testing.assert_close(traced(image), net(image), atol=1e-4, rtol=1e-4)


def test_reported_shifts() -> None:
    torch.manual_seed(0)
    net = create_backbone("focalnet_nano", embed_dim=16, depths=(1, 1, 1, 1))
    grow(net)
    shifts = feature_shifts(net, torch.randn(3, 64, 96), [0, 32, 200])
    assert [s.feature for s in shifts[::3]] == ["stage1", "stage2", "stage3", "stage4"]
    for shift in shifts:
        assert shift.valid < 1e-5
        assert shift.plain < 1e-6 if shift.pixels == 0 else shift.plain > 1e-3
    assert not net.valid_context
