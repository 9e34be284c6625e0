"""Draw the textures of the generated dataset `shapes`: fills of shapes and stuff backgrounds.

Each texture is `f(rng, height, width, unit, palette) -> (height, width, 3)` float32, 0..1, where
`unit` is the image scale (1.0 for a short side of 192 pixels) and `palette` is three RGB colors.
Stuff classes differ only in texture, not in color.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[Any]
Texture = Callable[[Generator, int, int, float, Array], Array]


def random_palette(rng: Generator, saturation: tuple[float, float]) -> Array:
    """Sample three matching colors, (3, 3) RGB 0..1: a base, a variant and a contrast."""
    hue, sat = rng.uniform(), rng.uniform(*saturation)
    value = rng.uniform(0.35, 0.95)
    away = value - rng.uniform(0.2, 0.45) if value > 0.62 else value + rng.uniform(0.2, 0.45)
    other = hue + rng.choice((0.08, -0.08, 0.33, 0.5))
    hsv = (
        (hue, sat, value),
        (hue + rng.uniform(-0.04, 0.04), sat, np.clip(away, 0.1, 1.0)),
        (other, sat * rng.uniform(0.6, 1.0), rng.uniform(0.3, 1.0)),
    )
    colors = [colorsys.hsv_to_rgb(h % 1.0, s, float(v)) for h, s, v in hsv]
    return np.asarray(colors, dtype=np.float32)


def hue_palette(rng: Generator, hue: float) -> Array:
    """Sample three saturated colors of one hue (0..1, periodic), (3, 3) RGB 0..1."""
    sat, value = rng.uniform(0.65, 1.0), rng.uniform(0.45, 0.95)
    away = value - rng.uniform(0.2, 0.4) if value > 0.65 else value + rng.uniform(0.2, 0.4)
    hsv = ((sat, value), (sat, away), (0.5 * sat, min(1.0, away + 0.2)))
    colors = [colorsys.hsv_to_rgb(hue % 1.0, s, float(v)) for s, v in hsv]
    return np.asarray(colors, dtype=np.float32)


def mix(first: Array, second: Array, weight: Array) -> Array:
    """Blend two colors (3,) or images (H, W, 3) by weight (H, W), 0..1."""
    weight = np.clip(weight, 0.0, 1.0).astype(np.float32, copy=False)
    if first.ndim == second.ndim == 1:
        # Channel by channel: broadcasting over an inner axis of 3 is several times slower.
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        return cv2.merge([weight * np.float32(b - a) + np.float32(a) for a, b in pairs])
    blended = (second - first) * cv2.merge((weight, weight, weight))
    return (blended + first).astype(np.float32, copy=False)


def smooth_noise(rng: Generator, height: int, width: int, cell: float) -> Array:
    """Sample value noise with about zero mean and unit variance, features of `cell` px, (H, W)."""
    rows, cols = int(height / cell) + 4, int(width / cell) + 4
    coarse = rng.standard_normal((rows, cols), dtype=np.float32)
    full = cv2.resize(coarse, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    top, left = int(cell), int(cell)
    return np.ascontiguousarray(full[top : top + height, left : left + width], dtype=np.float32)


def _rotated(rng: Generator, height: int, width: int, angle: float) -> tuple[Array, Array]:
    """Return pixel coordinates rotated by `angle` radians, with a random phase."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 1000)
    v = y * np.cos(angle) - x * np.sin(angle) + rng.uniform(0, 1000)
    return u.astype(np.float32), v.astype(np.float32)


def _soft_square(phase: Array, sharpness: float) -> Array:
    """Compute a square wave with soft edges, 0..1, of period 2 pi."""
    return np.clip(0.5 + sharpness * np.sin(phase), 0.0, 1.0).astype(np.float32)


def stripes(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw straight stripes at a random angle."""
    u, _ = _rotated(rng, height, width, rng.uniform(0, np.pi))
    wave = 2 * np.pi * u / (unit * rng.uniform(5, 16))
    return mix(palette[0], palette[rng.integers(1, 3)], _soft_square(wave, 1.5))


def checkerboard(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw a checkerboard at a random angle."""
    u, v = _rotated(rng, height, width, rng.uniform(0, np.pi))
    rate = 2 * np.pi / (unit * rng.uniform(8, 20))
    board = (np.sin(u * rate) * np.sin(v * rate)).astype(np.float32)
    return mix(palette[0], palette[rng.integers(1, 3)], np.clip(0.5 + 3 * board, 0, 1))


def dots(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw a regular grid of dots."""
    u, v = _rotated(rng, height, width, rng.uniform(0, np.pi))
    rate = 2 * np.pi / (unit * rng.uniform(7, 14))
    bumps = np.cos(u * rate) + np.cos(v * rate) - rng.uniform(0.5, 0.9)
    return mix(palette[0], palette[rng.integers(1, 3)], np.clip(0.5 + 2 * bumps, 0, 1))


def speckle(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw blotches of two sizes."""
    coarse = smooth_noise(rng, height, width, unit * rng.uniform(5, 11))
    fine = smooth_noise(rng, height, width, max(1.5, 2 * unit))
    return mix(palette[0], palette[1], 0.5 + 0.45 * coarse + 0.12 * fine)


def gradient(rng: Generator, height: int, width: int, _unit: float, palette: Array) -> Array:
    """Draw a linear ramp between two colors."""
    u, _ = _rotated(rng, height, width, rng.uniform(0, 2 * np.pi))
    ramp = (u - u.min()) / max(float(np.ptp(u)), 1.0)
    return mix(palette[0], palette[rng.integers(1, 3)], ramp)


def plain(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw a single color with faint grain."""
    grain = smooth_noise(rng, height, width, max(1.5, 3 * unit))
    return mix(palette[0], palette[1], 0.08 + 0.06 * grain)


def sky(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw a smooth vertical ramp with soft clouds."""
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, axis=1)
    wide = smooth_noise(rng, height, width, unit * 44)
    cloud = wide + 0.45 * smooth_noise(rng, height, width, unit * 18)
    pale = (0.3 * palette[0] + 0.7).astype(np.float32)
    ramp = mix(palette[0], (0.6 * palette[0] + 0.4 * pale).astype(np.float32), y)
    return mix(ramp, np.broadcast_to(pale, ramp.shape), 0.55 * np.clip(cloud - 0.2, 0, 1.2))


def grass(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw short upright blades in a few shades."""
    dark, light = sorted(palette[:2], key=lambda color: float(color.sum()))
    patches = smooth_noise(rng, height, width, unit * 30)
    base = mix((0.8 * dark).astype(np.float32), light, 0.35 + 0.15 * patches)
    count = max(4, int(height * width / (unit * unit) / 110))
    length = unit * rng.uniform(5, 9)
    lean = rng.uniform(-0.35, 0.35)
    for shade in np.linspace(0.15, 1.05, 5):
        foot = rng.uniform((0, 0), (width, height + length), (count, 2))
        tilt = lean + rng.normal(0, 0.25, count)
        tip = foot + length * rng.uniform(0.6, 1.2, (count, 1)) * np.stack(
            (np.sin(tilt), -np.cos(tilt)), axis=1
        )
        blades = np.round(np.stack((foot, tip), axis=1) * 8).astype(np.int32)
        color = np.clip(0.8 * dark + (light - 0.8 * dark) * shade, 0, 1) * 255
        canvas = np.round(np.clip(base, 0, 1) * 255).astype(np.uint8)
        thickness = max(1, round(unit))
        cv2.polylines(canvas, list(blades), False, color.tolist(), thickness, cv2.LINE_AA, 3)
        base = canvas.astype(np.float32) / np.float32(255)
    return base


def brick(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw rows of bricks of individual shades, with mortar in between."""
    u, v = _rotated(rng, height, width, rng.normal(0, 0.08))
    tall = unit * rng.uniform(9, 15)
    wide = tall * rng.uniform(1.9, 2.5)
    row = np.floor(v / tall)
    along = u / wide + 0.5 * (row % 2)
    column = np.floor(along)
    shades = rng.uniform(0, 0.6, 4096).astype(np.float32)
    shade = shades[(row.astype(np.int64) * 61 + column.astype(np.int64) * 17) % 4096]
    edge = np.minimum(
        np.minimum(v - row * tall, (row + 1) * tall - v),
        np.minimum(along - column, column + 1 - along) * wide,
    )
    wall = mix(palette[0], palette[1], shade + 0.08 * smooth_noise(rng, height, width, 2 * unit))
    mean = float(palette[0].mean())
    mortar = palette[0] * 0.3 + (0.1 if mean > 0.5 else 0.62)
    return mix(wall, np.broadcast_to(mortar, wall.shape), 1.2 - (edge / unit - 0.3))


def water(rng: Generator, height: int, width: int, unit: float, palette: Array) -> Array:
    """Draw long wavy ripples with bright crests."""
    u, v = _rotated(rng, height, width, rng.normal(0, 0.2))
    period = unit * rng.uniform(8, 15)
    bend = smooth_noise(rng, height, width, unit * 24) + 0.5 * np.sin(u / (unit * 9))
    wave = np.sin(2 * np.pi * v / period + 1.5 * bend)
    broken = 0.5 + 0.5 * smooth_noise(rng, height, width, unit * 12)
    body = mix(palette[0], palette[1], 0.5 + 0.35 * wave)
    crest = np.clip(4 * (wave - 0.72), 0, 1) * np.clip(broken, 0, 1)
    return mix(body, np.ones_like(body), 0.55 * crest)


STUFF_TEXTURES: dict[str, Texture] = {"sky": sky, "grass": grass, "brick": brick, "water": water}
