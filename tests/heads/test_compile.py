"""``torch.compile`` of detectors, on images in which nothing is found."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from focalnet_det.heads.poolers import use_fast_roi_align
from focalnet_det.ops.cpu import library as native

pytestmark = pytest.mark.skipif(
    isinstance(native.library(), native.BuildError), reason="inductor needs a C++ compiler too"
)


MAPS = [torch.rand(1, 8, 16, 16), torch.rand(1, 8, 8, 8)]


def test_pooler_of_no_boxes() -> None:
    """Inductor folds the count of no boxes into a constant, and stops at Detectron2's use of it."""
    pooler = use_fast_roi_align(ROIPooler(7, (1 / 4, 1 / 8), 2, "ROIAlignV2"))
    with torch.no_grad():
        out = torch.compile(pooler)(MAPS, [Boxes(torch.zeros(0, 4))])
    assert out.shape == (0, 8, 7, 7)


def test_gradients_of_no_boxes() -> None:
    pooler = use_fast_roi_align(ROIPooler(7, (1 / 4, 1 / 8), 2, "ROIAlignV2"))
    maps = [x.clone().requires_grad_() for x in MAPS]
    out = torch.compile(pooler, backend="eager")(maps, [Boxes(torch.zeros(0, 4))])
    assert out.shape == (0, 8, 7, 7)
    for gradient in torch.autograd.grad(out.sum(), maps):
        assert not gradient.any()
