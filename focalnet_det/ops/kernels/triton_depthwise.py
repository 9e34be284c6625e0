"""Depthwise convolution of NHWC maps and its gradients on GPUs, with what surrounds them.

One program computes a few rows of ``WIDTH`` pixels and ``CHANNELS`` channels: an input tile, once
read, is multiplied by the taps of every output row that it reaches. Triton has no tiles in shared
memory that can be read at an offset, so that two levels in one kernel would convolve their halo
again for every tap; each level is a kernel of its own instead. Sums are made in float32, and
reductions in two stages without atomics: a run repeats bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import candidates, gelu, gelu_slope, per_pixel

# Up to this size the loops over taps are unrolled, and rows outside of a kernel cost nothing.
UNROLLED = 3
# Parts into which the pixels are divided for the weight gradient, before they are added up.
PARTS = 128


@triton.jit
def _correlate(
    x, taps, first, columns, channels, height, width, stride, c,
    K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """One (WIDTH, CHANNELS) sum for each of ``ROWS`` output rows of an image; zeros outside."""
    inside = (channels < c)[None, :]
    corner = (first - K // 2) * width + columns - K // 2
    x += corner[:, None] * stride + channels[None, :]
    taps += channels[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((WIDTH, CHANNELS), dtype=tl.float32),)
    if UNROLL:
        for i in tl.static_range(ROWS + K - 1):
            there = (first + (i - K // 2) >= 0) & (first + (i - K // 2) < height)
            for kx in tl.static_range(K):
                column = columns + (kx - K // 2)
                mask = (there & (column >= 0) & (column < width))[:, None] & inside
                place = (i * width + kx) * stride
                values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
                updated = ()
                for r in tl.static_range(ROWS):
                    if i >= r and i - r < K:
                        tap = tl.load(taps + ((i - r) * K + kx) * c, mask=inside, other=0.0)
                        updated = updated + (sums[r] + values * tap.to(tl.float32),)
                    else:
                        updated = updated + (sums[r],)
                sums = updated
    else:
        for i in range(ROWS + K - 1):
            there = (first + i - K // 2 >= 0) & (first + i - K // 2 < height)
            for kx in range(K):
                column = columns + (kx - K // 2)
                mask = (there & (column >= 0) & (column < width))[:, None] & inside
                place = (i * width + kx) * stride
                values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
                updated = ()
                for r in tl.static_range(ROWS):
                    reached = inside & (i >= r) & (i - r < K)
                    tap = tl.load(taps + ((i - r) * K + kx) * c, mask=reached, other=0.0)
                    updated = updated + (sums[r] + values * tap.to(tl.float32),)
                sums = updated
    return sums


_TILES = [
    ({"CHANNELS": 32}, 2),
    ({"CHANNELS": 32}, 1),
    ({"CHANNELS": 64}, 4),
    ({"CHANNELS": 64}, 2),
]


@triton.autotune(candidates(*_TILES), key=["c", "K", "WIDTH", "KEEP"])
@triton.jit(do_not_specialize=["gate"])
def level_kernel(
    x, taps, gates, before, valid, pre, post, total, partial,
    stride, gate_stride, gate, divisor, height, width, c, tiles_x, tiles_y,
    FIRST: tl.constexpr, KEEP: tl.constexpr, POST: tl.constexpr, MASKED: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolution, GELU, gated sum and the sums of a tile for the global mean."""
    blocks = tl.cdiv(c, CHANNELS)
    tile = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    columns = tile % tiles_x * WIDTH + tl.arange(0, WIDTH)
    first = tile // tiles_x % tiles_y * ROWS
    image = (tile // (tiles_x * tiles_y)).to(tl.int64) * height * width
    sums = _correlate(
        x + image * stride, taps, first, columns, channels, height, width, stride, c,
        K, ROWS, WIDTH, CHANNELS, UNROLL,
    )  # fmt: skip
    inside = (channels < c)[None, :]
    contribution = tl.zeros((CHANNELS,), dtype=tl.float32)
    for r in tl.static_range(ROWS):
        there = (columns < width) & (first + r < height)
        mask = there[:, None] & inside
        pixels = image + (first + r) * width + columns
        place = pixels[:, None] * c + channels[None, :]
        value = gelu(sums[r])
        if KEEP:
            tl.store(pre + place, sums[r], mask=mask)
        if MASKED:
            value = value * tl.load(valid + pixels, mask=there, other=0.0).to(tl.float32)[:, None]
        if POST:
            tl.store(post + place, value, mask=mask)
        place_gate = pixels * gate_stride + gate
        weight = tl.load(gates + place_gate, mask=there, other=0.0).to(tl.float32)
        gated = value * (weight / divisor)[:, None]
        if not FIRST:
            gated += tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + place, gated, mask=mask)
        contribution += tl.sum(tl.where(mask, value, 0.0), axis=0)
    tl.store(partial + tile.to(tl.int64) * c + channels, contribution, mask=channels < c)


@triton.jit
def mean_kernel(
    partial, area, mean, shared, size, tiles, c, MASKED: tl.constexpr, CHANNELS: tl.constexpr
):
    """Means over the pixels from the sums of tiles, and their GELU; in a fixed order."""
    image = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < c
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    for first in range(0, tiles, 32):
        rows = first + tl.arange(0, 32)
        place = (image * tiles + rows)[:, None] * c + channels[None, :]
        total += tl.sum(
            tl.load(partial + place, mask=(rows < tiles)[:, None] & inside[None, :], other=0.0), 0
        )
    if MASKED:
        size = tl.load(area + image)
    value = total / size
    tl.store(mean + image * c + channels, value, mask=inside)
    tl.store(shared + image * c + channels, gelu(value), mask=inside)


@triton.autotune(candidates(*_TILES), key=["c", "K", "WIDTH", "LAST"])
@triton.jit(do_not_specialize=["gate"])
def level_backward_kernel(
    x, taps, gates, by_total, valid, pre, out,
    stride, gate, divisor, out_stride, height, width, c, tiles_x, tiles_y,
    LAST: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, UNROLL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient by a level before its GELU, from that by the next level before its GELU.

    ``taps`` are those of the next level turned around. ``LAST``: by the projected context, which
    has no GELU and no gate.
    """
    blocks = tl.cdiv(c, CHANNELS)
    tile = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    columns = tile % tiles_x * WIDTH + tl.arange(0, WIDTH)
    first = tile // tiles_x % tiles_y * ROWS
    image = (tile // (tiles_x * tiles_y)).to(tl.int64) * height * width
    sums = _correlate(
        x + image * c, taps, first, columns, channels, height, width, c, c,
        K, ROWS, WIDTH, CHANNELS, UNROLL,
    )  # fmt: skip
    inside = (channels < c)[None, :]
    for r in tl.static_range(ROWS):
        there = (columns < width) & (first + r < height)
        mask = there[:, None] & inside
        pixels = image + (first + r) * width + columns
        value = sums[r]
        place = pixels[:, None] * c + channels[None, :]
        if not LAST:
            weight = tl.load(gates + pixels * stride + gate, mask=there, other=0.0).to(tl.float32)
            outer = tl.load(by_total + place, mask=mask, other=0.0).to(tl.float32)
            value += outer * (weight / divisor)[:, None]
        if MASKED:
            value = value * tl.load(valid + pixels, mask=there, other=0.0).to(tl.float32)[:, None]
        if not LAST:
            value = value * gelu_slope(tl.load(pre + place, mask=mask, other=0.0).to(tl.float32))
        tl.store(out + pixels[:, None] * out_stride + channels[None, :], value, mask=mask)


_STRIPS = [({"CHANNELS": 32}, 2), ({"CHANNELS": 32}, 4), ({"CHANNELS": 64}, 4)]


@triton.autotune(candidates(*_STRIPS), key=["c", "K", "WIDTH"])
@triton.jit
def weight_kernel(
    x, gradient, partial, stride, images, height, width, c, rows,
    K: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One row of taps for a part of the pixels: ``rows`` rows, counted over all images."""
    part, ky = tl.program_id(0), tl.program_id(1)
    channels = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((WIDTH, CHANNELS), dtype=tl.float32),)
    inside = (channels < c)[None, :]
    for step in range(tl.minimum(rows, images * height - part * rows)):
        index = part * rows + step
        row = index % height + ky - K // 2
        there = (row >= 0) & (row < height)
        pixels = index.to(tl.int64) * width
        across = pixels + (ky - K // 2) * width - K // 2
        for start in range(0, width, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            place = (pixels + columns)[:, None] * c + channels[None, :]
            mask = (columns < width)[:, None] & inside
            outer = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
            place = (across + columns)[:, None] * stride + channels[None, :]
            updated = ()
            for kx in tl.static_range(K):
                column = columns + (kx - K // 2)
                mask = (there & (column >= 0) & (column < width))[:, None] & inside
                values = tl.load(x + place + kx * stride, mask=mask, other=0.0).to(tl.float32)
                updated = updated + (sums[kx] + outer * values,)
            sums = updated
    for kx in tl.static_range(K):
        place = ((part * K + ky) * K + kx).to(tl.int64) * c + channels
        tl.store(partial + place, tl.sum(sums[kx], axis=0), mask=channels < c)


def taps(kernel: Tensor, *, turned: bool = False) -> Tensor:
    """(C, 1, k, k) -> (k * k, C), turned around for the gradient by the input."""
    if turned:
        kernel = kernel.flip(2, 3)
    return kernel.flatten(1).t().contiguous()


def _tile(kernel: Tensor, width: int) -> dict[str, int]:
    size = kernel.shape[-1]
    unroll = size <= UNROLLED
    # A row outside of the kernel is multiplied by zero where loops are not unrolled.
    rows = 4 if unroll or size >= 9 else 2
    return {"K": size, "ROWS": rows, "WIDTH": 8 if width <= 8 else 16, "UNROLL": unroll}


def level(
    x: Tensor,
    kernel: Tensor,
    gates: Tensor,
    gate: int,
    divisor: float,
    before: Tensor | None,
    valid: Tensor | None,
    pre: Tensor | None,
    post: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One focal level of the context aggregation.

    Args:
        x: (N, H, W, C), the level before, after its GELU; channels contiguous, pixels evenly apart.
        kernel: (C, 1, k, k), odd k.
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
    tile = _tile(kernel, w)
    across, down = triton.cdiv(w, tile["WIDTH"]), triton.cdiv(h, tile["ROWS"])
    total = x.new_empty(n, h, w, c)
    after = x.new_empty(n, h, w, c) if post else None
    partial = x.new_empty((n, across * down, c), dtype=torch.float32)
    level_kernel[lambda meta: (n * across * down * triton.cdiv(c, meta["CHANNELS"]),)](
        x, taps(kernel), gates, total if before is None else before, per_pixel(valid, x),
        total if pre is None else pre, total if after is None else after, total, partial,
        x.stride(2), gates.stride(2), gate, divisor, h, w, c, across, down,
        FIRST=before is None, KEEP=pre is not None, POST=post, MASKED=valid is not None, **tile,
    )  # fmt: skip
    return total, after, partial


def mean(partial: Tensor, area: Tensor | int) -> tuple[Tensor, Tensor]:
    """(N, tiles, C) sums -> (N, C) means over ``area`` pixels (N,), or as many each; their GELU."""
    n, tiles, c = partial.shape
    means, shared = partial.new_empty(n, c), partial.new_empty(n, c)
    masked = isinstance(area, Tensor)
    mean_kernel[(n, triton.cdiv(c, 64))](
        partial, area if masked else partial, means, shared, 1.0 if masked else float(area),
        tiles, c, MASKED=masked, CHANNELS=64,
    )  # fmt: skip
    return means, shared


def level_backward(
    by_next: Tensor,
    kernel: Tensor,
    valid: Tensor | None,
    out: Tensor,
    inner: tuple[Tensor, int, float, Tensor, Tensor] | None = None,
) -> None:
    """Gradient by a level before its GELU, or by the projected context.

    Args:
        by_next: (N, H, W, C), by the next level before its GELU.
        kernel: (C, 1, k, k), of the next level.
        valid: as in :func:`level`.
        out: (N, H, W, C), where to write; pixels may be further apart than C.
        inner: gates, column and divisor of this level's gate, gradient by the gated sum, and the
            level before its GELU; None for the projected context.
    """
    n, h, w, c = by_next.shape
    tile = _tile(kernel, w)
    across, down = triton.cdiv(w, tile["WIDTH"]), triton.cdiv(h, tile["ROWS"])
    gates, gate, divisor, by_total, pre = inner or (by_next, 0, 1.0, by_next, by_next)
    level_backward_kernel[lambda meta: (n * across * down * triton.cdiv(c, meta["CHANNELS"]),)](
        by_next, taps(kernel, turned=True), gates, by_total, per_pixel(valid, by_next), pre, out,
        gates.stride(2), gate, divisor, out.stride(2), h, w, c, across, down,
        LAST=inner is None, MASKED=valid is not None, **tile,
    )  # fmt: skip


def weight_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """Gradient by a depthwise kernel.

    Args:
        x: (N, H, W, C), input of the convolution; pixels may be further apart than C.
        gradient: (N, H, W, C), by its output.
        size: k.
    Returns: (C, 1, k, k), float32.
    """
    n, h, w, c = gradient.shape
    rows = triton.cdiv(n * h, PARTS)
    parts = triton.cdiv(n * h, rows)
    partial = x.new_empty((parts, size, size, c), dtype=torch.float32)
    weight_kernel[lambda meta: (parts, size, triton.cdiv(c, meta["CHANNELS"]))](
        x, gradient, partial, x.stride(2), n, h, w, c, rows,
        K=size, WIDTH=8 if w <= 8 else 16,
    )  # fmt: skip
    return partial.sum(0).permute(2, 0, 1)[:, None]
