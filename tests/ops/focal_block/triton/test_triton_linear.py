"""Linear layers in Triton with what follows them."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.focal_block.weights import Affine
from tests.helpers.compare import relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.helpers.triton_blocks import DEVICE, TOLERANCE, block

pytestmark = [pytest.mark.usefixtures("triton_path")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)  # `make gpu-test` runs them too


@pytest.mark.parametrize(("depth", "columns"), [(20, 33), (96, 136)])
def test_linear_layers_with_what_follows(
    depth: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and channels that no tile divides, in two images, and fused as well as separate."""
    from focalnet_det.ops.focal_block.triton import triton_linear

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(torch.float16)

    shape = (2, 7, 11)
    layer = Affine(draw(columns, depth) / depth**0.5, draw(columns))
    x, before, gamma = draw(*shape, depth), draw(*shape, columns), draw(columns)
    wide, shared = draw(*shape, columns + 3), draw(2, columns)
    plain = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    context = wide.double()[..., columns + 1, None] / 3 * shared.double()[:, None, None]
    expected = {
        "gelu": F.gelu(plain),
        "add": before.double() + plain,
        "scaled": before.double() + gamma.double() * plain,
        "modulate": wide.double()[..., :columns] * (plain + context),
    }
    for fused in (True, False):
        pick = lambda x, key, ours, other, fused=fused: (ours if fused else other)()  # noqa: E731
        monkeypatch.setattr(triton_linear, "fastest", pick)
        actual = {
            "gelu": triton_linear.gelu_of(x, layer),
            "add": triton_linear.add(before, x, layer, None),
            "scaled": triton_linear.add(before, x, layer, gamma),
            "modulate": triton_linear.modulate(x, layer, wide, shared, columns + 1, 3.0),
        }
        for name, value in expected.items():
            assert relative_error(actual[name], value) < TOLERANCE[torch.float16], (name, fused)


@pytest.mark.parametrize("flags", [{}, {"layer_scale": 0.5}, {"post_norm": True}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_sums_keep_the_type_of_the_map_in_inference(
    flags: dict, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small branches added to a large map, with autocast: 16 bits would swallow them."""
    from focalnet_det.ops.focal_block.triton import triton_block, triton_linear

    def pick(
        _: Tensor, __: object, ours: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> Tensor:
        return (ours if fused else other)()

    monkeypatch.setattr(triton_block, "fastest", pick)
    monkeypatch.setattr(triton_linear, "fastest", pick)
    module = block(20, 2, 3, **flags)
    with torch.no_grad():
        for layer in (module.norm1, module.norm2, module.mlp.fc2, module.modulation.proj):
            layer.weight.mul_(2e-3)
            layer.bias.mul_(2e-3)
    x = 1 + torch.rand(2, 3, 5, 20, device=DEVICE)
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    with torch.no_grad(), torch.autocast(DEVICE, kind):
        actual = module(x)
    assert actual.dtype == torch.float32
    with torch.no_grad(), policy.force_backend("reference"):
        expected = module(x)
    # The branches themselves are in 16 bits.
    assert relative_error(actual - x, expected - x) < 2e-2
