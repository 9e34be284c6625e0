"""Products of each layer are timed by every library, and the choice beside the fastest."""

from itertools import count

import pytest

from focalnet_det.benchmark import product_speed
from focalnet_det.ops.cpu import products
from tests.helpers.native_blocks import needs_compiler


def test_layers_of_the_networks() -> None:
    layers = product_speed.layers(512, 500)
    assert product_speed.Layer("stage 1, fc1", 128 * 125, 384, 96) in layers
    assert product_speed.Layer("stage 4, fc2", 16 * 16, 1024, 4096) in layers
    assert product_speed.Layer("box head, fc1", 512, 1024, 12544) in layers


@needs_compiler
def test_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(products.VARIABLE, "onednn")
    ticks = (float(i * i) for i in count())
    layer = product_speed.Layer("one", 5, 3, 4)
    forward, *rest = product_speed.time_products([layer], 2, clock=lambda: next(ticks))
    # Runs take 2 i + 1 of an ever slower clock: the first three are not counted.
    assert forward.seconds == {"tiles": 13.0, "onednn": 17.0, "mkl": 21.0}
    assert (forward.kind, forward.choice) == ("forward", "onednn")
    assert forward.loss == pytest.approx(17 / 13 - 1)
    assert [timing.kind for timing in rest] == ["input", "weight"]
