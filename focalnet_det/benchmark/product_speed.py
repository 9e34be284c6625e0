"""Time the float32 products of FocalNet and of a box head with each library, on a CPU."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..ops.cpu import products

KINDS = ("forward", "input", "weight")


class Layer(NamedTuple):
    """A linear layer.

    Attributes:
        name: what it is.
        rows: pixels or boxes that it is applied to.
        outputs, inputs: sides of its weight.
    """

    name: str
    rows: int
    outputs: int
    inputs: int


class ProductTiming(NamedTuple):
    """Time of a product.

    Attributes:
        layer: whose product it is.
        kind: ``forward``, ``input`` or ``weight``, see :class:`..ops.cpu.products.Shape`.
        seconds: by engine, the least of the repeats.
        choice: engine that runs.
    """

    layer: Layer
    kind: str
    seconds: dict[str, float]
    choice: str

    @property
    def loss(self) -> float:
        """Time of the choice divided by that of the fastest engine, minus one."""
        return self.seconds[self.choice] / min(self.seconds.values()) - 1


def layers(height: int, width: int) -> list[Layer]:
    """Return the linear layers of FocalNet-T, S (96 channels) and B (128), and of a box head.

    Args:
        height, width: of the image, pixels.
    """
    result = []
    for channels in (96, 128):
        for stage in range(4):
            rows = -(-height // 2 ** (stage + 2)) * -(-width // 2 ** (stage + 2))
            c = channels * 2**stage
            for name, outputs, inputs in (
                ("query, context, h, proj", c, c),
                ("fc1", 4 * c, c),
                ("fc2", c, 4 * c),
            ):
                result.append(Layer(f"stage {stage + 1}, {name}", rows, outputs, inputs))
    boxes = 512
    return [
        *result,
        Layer("box head, fc1", boxes, 1024, 256 * 7 * 7),
        Layer("box head, fc2", boxes, 1024, 1024),
        Layer("box head, deltas", boxes, 320, 1024),
    ]


def time_products(
    layers: Sequence[Layer], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[ProductTiming]:
    """Time the three products of each layer with every engine, interleaved.

    Args:
        layers: see :class:`Layer`.
        repeats: timed runs of each, after an untimed one.
        clock: returns seconds.
    """
    result = []
    for layer in layers:
        _, rows, outputs, inputs = layer
        for kind in KINDS:
            a, b = products.Shape(kind, rows, outputs, inputs).operands()
            out = torch.empty(a.shape[0], b.shape[1])
            times: dict[str, list[float]] = {engine: [] for engine in products.ENGINES}
            for _ in range(repeats + 1):
                for engine, seconds in times.items():
                    start = clock()
                    products.RUN[engine](a, b, out, False)
                    seconds.append(clock() - start)
            least = {engine: min(seconds[1:]) for engine, seconds in times.items()}
            choice = products.choose_engine(kind, rows, outputs, inputs)
            result.append(ProductTiming(layer, kind, least, choice))
    return result
