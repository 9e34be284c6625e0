"""The list of features is described as timm describes its own."""

import pytest
import torch

from focalnet_det import create_backbone
from focalnet_det.adapters import FeatureListBackbone


def test_features_are_described_as_in_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is missing: make install-tests")
    theirs = timm.create_model("focalnet_tiny_srf", features_only=True)
    ours = FeatureListBackbone(create_backbone("focalnet_tiny_srf", output_norm=False)).eval()
    for idx in (None, 1, [0, 3]):
        assert ours.feature_info.channels(idx) == theirs.feature_info.channels(idx)
        assert ours.feature_info.reduction(idx) == theirs.feature_info.reduction(idx)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features, expected = ours(x), theirs.eval()(x)
    assert isinstance(features, list)
    assert [f.shape for f in features] == [f.shape for f in expected]
    assert len(ours.feature_info) == 4
    assert ours.feature_info.module_name(2) == "stage3"
