"""Earlier names of modules keep working, and the table of them is true."""

import importlib
import sys

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.moved import MOVED_MODULES, current_name

# Packages stand where these modules stood.
NOW_PACKAGES = ("checkpoint.layouts", "data.panoptic", "data.semantic", "data.shapes")

PRESENT = "focalnet_det.data.shapes.generate.make_shapes"


@pytest.mark.parametrize("old", sorted(set(MOVED_MODULES) - set(NOW_PACKAGES)))
def test_earlier_names_import_the_module(old: str) -> None:
    sys.modules.pop(f"focalnet_det.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"focalnet_det.{MOVED_MODULES[old]}"):
        module = importlib.import_module(f"focalnet_det.{old}")
    assert module is importlib.import_module(f"focalnet_det.{MOVED_MODULES[old]}")


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("focalnet_det.data.shapes.make_shapes", PRESENT),
        (
            "focalnet_det.backbones.d2.focalnet_backbone",
            "focalnet_det.detectron2.backbone.focalnet_backbone",
        ),
        ("focalnet_det.engine.solver.adamw", "focalnet_det.experiment.solver.adamw"),
        (PRESENT, PRESENT),
        ("focalnet_det.heads.upernet.UPerNetHead", "focalnet_det.heads.upernet.UPerNetHead"),
        ("torch.nn.Conv2d", "torch.nn.Conv2d"),
        ("data.build", "data.build"),
    ],
)
def test_names_in_saved_configs(old: str, now: str) -> None:
    assert current_name(old) == now


def test_unknown_modules_stay_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"focalnet_det\.nothing"):
        importlib.import_module("focalnet_det.nothing")


def test_a_class_of_an_earlier_module() -> None:
    sys.modules.pop("focalnet_det.heads.mmdet_rcnn", None)
    with pytest.warns(DeprecationWarning, match="mmdet.rcnn"):
        from focalnet_det.heads.mmdet_rcnn import MmdetRCNN
    from focalnet_det.heads.mmdet.rcnn import MmdetRCNN as Present

    assert MmdetRCNN is Present
