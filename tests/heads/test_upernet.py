"""UPerNet against its parameter counts, and against a re-computation from its description."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.upernet_reference import upernet_logits

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from focalnet_det import add_focalnet_config
from focalnet_det.detectron2.backbone import focalnet_backbone
from focalnet_det.heads.mmdet.segmentor import MmsegSegmentor
from focalnet_det.heads.pixel_loss import PixelCrossEntropy
from focalnet_det.heads.upernet import UPerNetHead

SHAPES = {
    "stage1": ShapeSpec(channels=6, stride=4),
    "stage2": ShapeSpec(channels=10, stride=8),
    "stage3": ShapeSpec(channels=14, stride=16),
    "stage4": ShapeSpec(channels=18, stride=32),
}
# Odd sizes: every upsampling is a different one.
SIZES = {"stage1": (27, 21), "stage2": (14, 11), "stage3": (7, 6), "stage4": (4, 3)}


def features(batch: int = 2) -> dict[str, Tensor]:
    return {
        name: torch.randn(batch, shape.channels, *SIZES[name]) for name, shape in SHAPES.items()
    }


def small_head(**changes: object) -> UPerNetHead:
    fields: dict = {"input_shape": SHAPES, "num_classes": 5, "channels": 8, "auxiliary_channels": 4}
    return UPerNetHead(**(fields | changes))


def randomize_norms(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)


# Parameters in millions with 150 classes. Sources: the official layout; see configs.
ROWS = {
    "focalnet_tiny_srf": "60.823",
    "focalnet_tiny_lrf": "61.573",
    "focalnet_small_srf": "83.061",
    "focalnet_small_lrf": "84.595",
    "focalnet_base_srf": "123.681",
    "focalnet_base_lrf": "125.726",
}


@pytest.mark.parametrize("variant", ROWS)
def test_published_parameters(variant: str) -> None:
    with torch.device("meta"):
        backbone = focalnet_backbone(variant, focal_windows=(9, 9, 9, 9))
        head = UPerNetHead(input_shape=backbone.output_shape(), num_classes=150)
    count = sum(p.numel() for part in (backbone, head) for p in part.parameters())
    assert f"{count / 1e6:.3f}" == ROWS[variant]


def test_names_are_the_public_ones_and_norms_are_decayed() -> None:
    names = {name for name, _ in small_head().named_parameters()}
    expected = {"conv_seg.weight", "conv_seg.bias"}
    expected |= {"auxiliary_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"}
    modules = [f"psp_modules.{p}.1" for p in range(4)]
    modules += ["bottleneck", "fpn_bottleneck", "auxiliary_head.convs.0"]
    modules += [f"{kind}.{i}" for kind in ("lateral_convs", "fpn_convs") for i in range(3)]
    for module in modules:
        expected |= {f"{module}.conv.weight", f"{module}.bn.weight", f"{module}.bn.bias"}
    assert names == expected
    assert not any("norm" in name for name in names)


def test_forward_equals_a_recomputation() -> None:
    head = small_head().eval()
    randomize_norms(head)
    inputs = features()
    with torch.no_grad():
        logits, losses = head(inputs)
    assert losses == {}
    expected = upernet_logits(head.state_dict(), list(inputs.values()))
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_feature_order_is_that_of_strides() -> None:
    torch.manual_seed(1)
    a = small_head().eval()
    torch.manual_seed(1)
    b = small_head(input_shape=dict(reversed(SHAPES.items()))).eval()
    inputs = features()
    torch.testing.assert_close(a(inputs)[0], b(inputs)[0], rtol=0, atol=0)


def test_losses_in_training_and_every_parameter_learns() -> None:
    head = small_head(dropout=0.0, auxiliary_weight=0.4)
    inputs = features()
    targets = torch.randint(0, 5, (2, 60, 50))
    targets[0, :30] = 255
    result, losses = head(inputs, targets)
    assert result is None
    assert set(losses) == {"loss_sem_seg", "loss_auxiliary"}
    # Near the start the classes are nearly equally probable; 5/4 pixels of 4 count.
    share = float((targets != 255).float().mean())
    ln5 = 1.6094379
    assert losses["loss_sem_seg"].item() == pytest.approx(share * ln5, rel=0.05)
    assert losses["loss_auxiliary"].item() == pytest.approx(0.4 * share * ln5, rel=0.05)
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith(".bn.bias"), name


def test_without_auxiliary_head_and_with_group_norm_on_one_image() -> None:
    head = small_head(auxiliary_weight=0.0, norm="GN", channels=64, auxiliary_channels=32)
    _, losses = head(features(batch=1), torch.zeros(1, 40, 40, dtype=torch.long))
    assert list(losses) == ["loss_sem_seg"]
    with pytest.raises(ValueError, match=r'batch size of at least 2.*norm="GN"'):
        small_head()(features(batch=1), torch.zeros(1, 40, 40, dtype=torch.long))


def test_one_feature_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs at least two features"):
        small_head(input_shape={"stage4": SHAPES["stage4"]})


def test_class_weights_must_fit_the_classes() -> None:
    small_head(loss=PixelCrossEntropy(class_weights=[1] * 5))
    with pytest.raises(ValueError, match="2 class weights for 5 classes"):
        small_head(loss=PixelCrossEntropy(class_weights=[1, 2]))


def test_yacs_builds_the_same_model() -> None:
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "MmsegSegmentor", "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_focalnet_backbone"
    cfg.MODEL.FOCALNET.merge_from_other_cfg(cfg.MODEL.FOCALNET)
    cfg.MODEL.FOCALNET.EMBED_DIM, cfg.MODEL.FOCALNET.DEPTHS = 8, (1, 1, 1, 1)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.NORM, head.CONVS_DIM, head.NUM_CLASSES = "UPerNetHead", "SyncBN", 16, 7
    head.IN_FEATURES = ["stage1", "stage2", "stage3", "stage4"]
    cfg.MODEL.SEGMENTOR.WINDOW, cfg.MODEL.SEGMENTOR.WINDOW_STRIDE = (64, 96), (32, 48)
    own = cfg.MODEL.UPERNET
    own.CLASS_WEIGHTS, own.OHEM_THRESHOLD = (1, 2, 3, 4, 5, 6, 7), 0.7
    model = build_model(cfg)
    assert (model.window, model.window_stride, model.train_size) == ((64, 96), (32, 48), (0, 0))
    loss = model.sem_seg_head.loss
    assert loss.class_weights.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert loss.ohem_threshold == 0.7
    assert isinstance(model, MmsegSegmentor)
    backbone = focalnet_backbone("focalnet_tiny_srf", embed_dim=8, depths=(1, 1, 1, 1))
    own = UPerNetHead(input_shape=backbone.output_shape(), num_classes=7, channels=16)
    shapes = {name: p.shape for name, p in own.state_dict().items()}
    assert {n: p.shape for n, p in model.sem_seg_head.state_dict().items()} == shapes
    assert isinstance(own.loss, PixelCrossEntropy)
    assert model.sem_seg_head.loss.average == own.loss.average == "all"


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_one_image_where_batch_norms_are_frozen(norm: str) -> None:
    """One image has one pixel in the coarsest level: no variance, unless it is given."""
    torch.manual_seed(0)
    head = small_head(norm=norm, dropout=0.0)
    randomize_norms(head)
    one, labels = features(1), torch.randint(0, 5, (1, 108, 84))
    with pytest.raises(ValueError, match="cannot train on one image at a time"):
        head(one, labels)
    for module in head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    _, losses = head(one, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    # What it computes is what two equal images give.
    two = {name: feature.repeat(2, 1, 1, 1) for name, feature in one.items()}
    _, expected = head(two, labels.repeat(2, 1, 1))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    # Larger grids have more than one pixel.
    assert small_head(norm=norm, pool_scales=(2, 3)).decode(one).shape == (1, 5, 27, 21)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer between 1 and .* got 0"),
        ({"channels": -8}, "channels must be an integer between 1 and .* got -8"),
        ({"pool_scales": (1, 0)}, r"pool_scales must be integers between 1 and .* got \(1, 0\)"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"auxiliary_channels": 0}, "auxiliary_channels must be an integer between 1 and"),
        (
            {"auxiliary_weight": -0.4},
            r"auxiliary_weight must be a number between 0 and .* got -0\.4",
        ),
        ({"loss_weight": float("nan")}, "loss_weight must be a number between 0 and .* got nan"),
    ],
)
def test_bad_values_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_head(**changes)
