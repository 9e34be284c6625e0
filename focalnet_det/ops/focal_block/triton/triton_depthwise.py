"""Convolve NHWC maps depthwise on GPUs, with gradients and what surrounds them.

A thread computes a run of neighboring pixels for a few channels: what it reads, converted once,
is multiplied by every tap that reaches the run, and all offsets are constants of the program. The
rows of a tile meet in the cache. Triton has no tiles in shared memory that can be read at an
offset, so that two levels in one kernel would convolve their halo again for every tap; each level
is a kernel of its own instead. Sums are made in float32, and reductions in two stages without
atomics: a run repeats bit for bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import gelu, gelu_slope, per_pixel
from .triton_launch import ceil_divide, kernel
from .triton_prepared import taps as taps_of

# Programs of the weight gradient, about: parts of the pixels, times rows of taps and channels.
PROGRAMS = 2048
# Rows and neighboring pixels of a tile.
_TALL, _WIDE = 8, 16
# Neighbouring pixels that a thread computes: each value that it reads serves all of them.
_RUN = 8
# Channels of a program of the weight gradient.
_CHANNELS = 32


@triton.jit
def _place(
    tile, height, width, tiles_x, tiles_y,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Return row and first column of each run of pixels, and the pixels of images before."""
    runs: tl.constexpr = COLUMNS // PIXELS
    run = tl.arange(0, ROWS * runs)
    row = tile // tiles_x % tiles_y * ROWS + run // runs
    column = tile % tiles_x * COLUMNS + run % runs * PIXELS
    return row, column, (tile // (tiles_x * tiles_y)).to(tl.int64) * height * width


@triton.jit
def _within(there, column, width, SHIFT: tl.constexpr):
    """Mask runs of which the pixel ``SHIFT`` after the first lies in a row of ``there``."""
    if SHIFT == 0:
        return there
    if SHIFT < 0:
        return there & (column + SHIFT >= 0)
    return there & (column + SHIFT < width)


@triton.jit
def _correlate(
    x, taps, row, column, channels, height, width,
    C: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Return sums of an image for each of ``PIXELS`` pixels of all runs, (runs, channels)."""
    inside = (channels < C)[None, :]
    x += ((row - K // 2) * width + column - K // 2)[:, None] * STRIDE + channels[None, :]
    taps += channels[None, :]
    sums = ()
    for _ in tl.static_range(PIXELS):
        sums = sums + (tl.zeros((row.shape[0], channels.shape[0]), dtype=tl.float32),)
    for ky in range(K):
        source = row + (ky - K // 2)
        there = (column < width) & (source >= 0) & (source < height)
        tap = ()
        for kx in tl.static_range(K):
            tap = tap + (tl.load(taps + kx * C, mask=inside, other=0.0),)
        for i in tl.static_range(PIXELS + K - 1):
            mask = _within(there, column, width, i - K // 2)[:, None] & inside
            value = tl.load(x + i * STRIDE, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for p in tl.static_range(PIXELS):
                if i >= p and i - p < K:
                    updated = updated + (sums[p] + value * tap[i - p],)
                else:
                    updated = updated + (sums[p],)
            sums = updated
        x += width * STRIDE
        taps += K * C
    return sums


# Both fill the same tile: a thread holds eight channels of a run, or four at higher occupancy.
_TILES = [({"CHANNELS": 32}, 2), ({"CHANNELS": 32}, 4)]


@kernel(*_TILES, key=["C", "K", "KEEP", "FIRST"])
def level_kernel(
    x, taps, gates, before, valid, pre, post, total, partial,
    gate, scale, height, width, tiles_x, tiles_y,
    FIRST: tl.constexpr, KEEP: tl.constexpr, POST: tl.constexpr, MASKED: tl.constexpr,
    C: tl.constexpr, STRIDE: tl.constexpr, GATE_STRIDE: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute convolution, GELU, gated sum and the sums of a tile for the global mean."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    row, column, image = _place(tile, height, width, tiles_x, tiles_y, ROWS, COLUMNS, PIXELS)
    sums = _correlate(
        x + image * STRIDE, taps, row, column, channels, height, width, C, STRIDE, K, PIXELS
    )
    inside = (channels < C)[None, :]
    contribution = tl.zeros((row.shape[0], CHANNELS), dtype=tl.float32)
    for p in tl.static_range(PIXELS):
        there = (row < height) & (column + p < width)
        mask = there[:, None] & inside
        pixels = image + row * width + column + p
        place = pixels[:, None] * C + channels[None, :]
        value = gelu(sums[p])
        if KEEP:
            tl.store(pre + place, sums[p], mask=mask)
        if MASKED:
            value = value * tl.load(valid + pixels, mask=there, other=0.0).to(tl.float32)[:, None]
        if POST:
            tl.store(post + place, value, mask=mask)
        weight = tl.load(gates + pixels * GATE_STRIDE + gate, mask=there, other=0.0)
        gated = value * (weight.to(tl.float32) * scale)[:, None]
        if not FIRST:
            gated += tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + place, gated, mask=mask)
        contribution += tl.where(mask, value, 0.0)
    place = tile.to(tl.int64) * C + channels
    tl.store(partial + place, tl.sum(contribution, axis=0), mask=channels < C)


@kernel()
def mean_kernel(
    partial, area, mean, shared, size, tiles,
    C: tl.constexpr, MASKED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute means over the pixels from the sums of tiles, and their GELU; in a fixed order."""
    image = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < C
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for first in range(0, tiles, 32):
        rows = first + tl.arange(0, 32)
        place = (image * tiles + rows)[:, None] * C + channels[None, :]
        total += tl.sum(
            tl.load(partial + place, mask=(rows < tiles)[:, None] & inside[None, :], other=0.0), 0
        )
    if MASKED:
        size = tl.load(area + image)
    value = total / size
    tl.store(mean + image * C + channels, value, mask=inside)
    tl.store(shared + image * C + channels, gelu(value), mask=inside)


@kernel(*_TILES, key=["C", "K", "LAST"])
def level_backward_kernel(
    x, taps, gates, grad_total, valid, pre, out, gate, scale, height, width, tiles_x, tiles_y,
    LAST: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the gradient by a level before its GELU, from that by the next level before its GELU.

    ``taps`` are those of the next level turned around. ``LAST``: by the projected context, which
    has no GELU and no gate.
    """
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tile = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    row, column, image = _place(tile, height, width, tiles_x, tiles_y, ROWS, COLUMNS, PIXELS)
    sums = _correlate(x + image * C, taps, row, column, channels, height, width, C, C, K, PIXELS)
    inside = (channels < C)[None, :]
    for p in tl.static_range(PIXELS):
        there = (row < height) & (column + p < width)
        mask = there[:, None] & inside
        pixels = image + row * width + column + p
        place = pixels[:, None] * C + channels[None, :]
        value = sums[p]
        if not LAST:
            weight = tl.load(gates + pixels * STRIDE + gate, mask=there, other=0.0)
            outer = tl.load(grad_total + place, mask=mask, other=0.0).to(tl.float32)
            value += outer * (weight.to(tl.float32) * scale)[:, None]
        if MASKED:
            value = value * tl.load(valid + pixels, mask=there, other=0.0).to(tl.float32)[:, None]
        if not LAST:
            value = value * gelu_slope(tl.load(pre + place, mask=mask, other=0.0).to(tl.float32))
        tl.store(out + pixels[:, None] * OUT_STRIDE + channels[None, :], value, mask=mask)


@kernel()
def weight_kernel(
    x, gradient, partial, height, width, tiles_x, tiles_y, tiles, each,
    C: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, TAP_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum ``TAP_ROWS`` rows of taps over a part of the pixels: ``each`` tiles of all images."""
    part, first = tl.program_id(0), tl.program_id(1) * TAP_ROWS
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channels < C)[None, :]
    sums = ()
    for _ in tl.static_range(TAP_ROWS * K):
        sums = sums + (tl.zeros((ROWS * COLUMNS // PIXELS, CHANNELS), dtype=tl.float32),)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        row, column, image = _place(tile, height, width, tiles_x, tiles_y, ROWS, COLUMNS, PIXELS)
        pixels = (row * width + column)[:, None]
        place = gradient + image * C + pixels * C + channels[None, :]
        there = (column < width) & (row < height)
        outer = ()
        for p in tl.static_range(PIXELS):
            mask = _within(there, column, width, p)[:, None] & inside
            outer = outer + (tl.load(place + p * C, mask=mask, other=0.0).to(tl.float32),)
        for dy in tl.static_range(TAP_ROWS):
            shift = first + dy - K // 2
            source = row + shift
            there = (column < width) & (source >= 0) & (source < height) & (first + dy < K)
            place = x + image * STRIDE + (pixels + shift * width - K // 2) * STRIDE
            for i in tl.static_range(PIXELS + K - 1):
                mask = _within(there, column, width, i - K // 2)[:, None] & inside
                where = place + i * STRIDE + channels[None, :]
                value = tl.load(where, mask=mask, other=0.0).to(tl.float32)
                updated = ()
                for tap in tl.static_range(TAP_ROWS * K):
                    if (tap // K == dy) and (i >= tap % K and i - tap % K < PIXELS):
                        updated = updated + (sums[tap] + outer[i - tap % K] * value,)
                    else:
                        updated = updated + (sums[tap],)
                sums = updated
    for tap in tl.static_range(TAP_ROWS * K):
        if first + tap // K < K:
            place = ((part * K + first) * K + tap).to(tl.int64) * C + channels
            tl.store(partial + place, tl.sum(sums[tap], axis=0), mask=channels < C)


class Tiles(NamedTuple):
    """How tiles cover (N, H, W) pixels."""

    rows: int
    columns: int
    down: int
    across: int
    count: int

    @classmethod
    def cover(cls, n: int, h: int, w: int) -> "Tiles":
        """Return square tiles where wide ones would leave more of a short row empty."""
        narrow = ceil_divide(w, _RUN) % 2 == 1 and w <= 4 * _WIDE
        rows, columns = (2 * _TALL, _RUN) if narrow else (_TALL, _WIDE)
        down, across = ceil_divide(h, rows), ceil_divide(w, columns)
        return cls(rows, columns, down, across, n * down * across)

    def constants(self) -> dict[str, int]:
        """Return the compile-time constants of the kernels."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "PIXELS": _RUN}


def level(
    x: Tensor,
    taps: Tensor,
    gates: Tensor,
    gate: int,
    divisor: float,
    before: Tensor | None,
    valid: Tensor | None,
    pre: Tensor | None,
    post: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute one focal level of the context aggregation.

    Args:
        x: (N, H, W, C), the level before, after its GELU; channels contiguous, pixels evenly apart.
        taps: (k * k, C), float32, odd k.
        gates: (N, H, W, columns).
        gate: column of this level's gate.
        divisor: of the gates.
        before: (N, H, W, C), gated sum of the levels before, None for the first.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        pre: (N, H, W, C), where to write the level before its GELU, if anywhere.
        post: whether the level after its GELU is wanted.
    Returns: the gated sum; the level after its GELU or None; (N, tiles, C) sums of the latter.
    """
    n, h, w, c = x.shape
    tiles = Tiles.cover(n, h, w)
    total = x.new_empty(n, h, w, c)
    after = x.new_empty(n, h, w, c) if post else None
    partial = x.new_empty((n, tiles.across * tiles.down, c), dtype=torch.float32)
    level_kernel(
        lambda meta: (tiles.count * ceil_divide(c, meta["CHANNELS"]),),
        x, taps, gates, total if before is None else before, per_pixel(valid, x),
        total if pre is None else pre, total if after is None else after, total, partial,
        gate, 1 / divisor, h, w, tiles.across, tiles.down,
        FIRST=before is None, KEEP=pre is not None, POST=post, MASKED=valid is not None,
        C=c, STRIDE=x.stride(2), GATE_STRIDE=gates.stride(2), K=math.isqrt(len(taps)),
        **tiles.constants(),
    )  # fmt: skip
    return total, after, partial


def mean(
    partial: Tensor, area: Tensor | int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute global means from the sums of tiles.

    Args:
        partial: (N, tiles, C), sums.
        area: pixels of each image, (N,), or as many for all.
        dtype: of the GELU.
    Returns: (N, C), float32, and their GELU.
    """
    n, tiles, c = partial.shape
    means, shared = partial.new_empty(n, c), partial.new_empty((n, c), dtype=dtype)
    masked = isinstance(area, Tensor)
    mean_kernel(
        (n, ceil_divide(c, 64)),
        partial, area if masked else partial, means, shared, 1.0 if masked else float(area),
        tiles, C=c, MASKED=masked, CHANNELS=64,
    )  # fmt: skip
    return means, shared


def level_backward(
    grad_next: Tensor,
    kernel: Tensor,
    valid: Tensor | None,
    out: Tensor,
    inner: tuple[Tensor, int, float, Tensor, Tensor] | None = None,
) -> None:
    """Return the gradient by a level before its GELU, or by the projected context.

    Args:
        grad_next: (N, H, W, C), by the next level before its GELU.
        kernel: (C, 1, k, k), of the next level.
        valid: as in :func:`level`.
        out: (N, H, W, C), where to write; pixels may be further apart than C.
        inner: gates, column and divisor of this level's gate, gradient by the gated sum, and the
            level before its GELU; None for the projected context.
    """
    n, h, w, c = grad_next.shape
    tiles = Tiles.cover(n, h, w)
    gates, gate, divisor, grad_total, pre = inner or (grad_next, 0, 1.0, grad_next, grad_next)
    level_backward_kernel(
        lambda meta: (tiles.count * ceil_divide(c, meta["CHANNELS"]),),
        grad_next, taps_of(kernel, turned=True), gates, grad_total, per_pixel(valid, grad_next),
        pre, out, gate, 1 / divisor, h, w, tiles.across, tiles.down,
        LAST=inner is None, MASKED=valid is not None, C=c, STRIDE=gates.stride(2),
        OUT_STRIDE=out.stride(2), K=kernel.shape[-1], **tiles.constants(),
    )  # fmt: skip


def weight_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Return the gradient by a depthwise kernel.

    Args:
        x: (N, H, W, C), input of the convolution; pixels may be further apart than C.
        gradient: (N, H, W, C), by its output.
        size: k.
    Returns: (C, 1, k, k), float32.
    """
    n, h, w, c = gradient.shape
    tiles = Tiles.cover(n, h, w)
    # As many sums as registers hold; all programs of a row of taps read both maps again.
    tap_rows = 3 if size == 3 else 2 if size > 1 else 1
    groups, blocks = ceil_divide(size, tap_rows), ceil_divide(c, _CHANNELS)
    each = ceil_divide(tiles.count, max(1, PROGRAMS // (groups * blocks)))
    parts = ceil_divide(tiles.count, each)
    partial = x.new_empty((parts, size, size, c), dtype=torch.float32)
    weight_kernel(
        (parts, groups, blocks),
        x, gradient, partial, h, w, tiles.across, tiles.down, tiles.count, each,
        C=c, STRIDE=x.stride(2), K=size, TAP_ROWS=tap_rows, CHANNELS=_CHANNELS,
        **tiles.constants(),
    )  # fmt: skip
    return partial.sum(0).permute(2, 0, 1)[:, None]
