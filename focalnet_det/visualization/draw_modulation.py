"""Draw gates, modulators, kernels and receptive fields over the image that they belong to."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from .modulation_maps import BlockMaps, Draws
from .sheet import Picture

# Inches; panels keep the aspect ratio of the image up to this height per width.
PANEL, TALLEST = 2.6, 1.6
OPACITY = 0.62
GLOBAL = "global"
SIGNED, POSITIVE = "coolwarm", "viridis"
# Ends of the signed color map.
POSITIVE_BAR, NEGATIVE = "#b40426", "#3b4cc0"
SHARE = "#2a788e"


def level_names(count: int) -> list[str]:
    """Return the names of L levels and the global context, L+1 in all."""
    return [*(f"level {k + 1}" for k in range(count - 1)), GLOBAL]


def draw_maps(
    image: Picture, maps: Sequence[BlockMaps], fields: Mapping[str, Tensor] | None = None
) -> Figure:
    """Draw a row for each block: gates by level, modulator magnitude, receptive field, kernels.

    Args:
        image: input of the network, uint8 RGB (H, W, 3); maps may extend beyond it at the right
            and bottom, where a stride does not divide its sides.
        maps: of the blocks to draw.
        fields: effective receptive field by stage, (H, W); None for none.
    """
    fields = fields or {}
    levels = max(len(block.gates) for block in maps)
    columns = levels + 1 + bool(fields) + 1
    figure, axes = _figure(image, len(maps), columns)
    for row, block in zip(axes, maps, strict=True):
        for axis in row:
            axis.set_axis_off()
        limit = max(float(block.gates.abs().max()), 1e-6)
        reach = [f", {len(kernel)} tokens" for kernel in block.spread] + [""]
        names = level_names(len(block.gates))
        for axis, gate, name, wide in zip(row, block.gates, names, reach, strict=False):
            title = f"gate of {name}{wide}"
            _overlay(axis, image, gate, block.stride, SIGNED, (-limit, limit))
            axis.set_title(f"{title}\nmean {float(gate.mean()):+.2f}", fontsize=8)
        axis = row[levels]
        _overlay(axis, image, block.modulator, block.stride, POSITIVE, None)
        axis.set_title(f"modulator, up to {float(block.modulator.max()):.1f}", fontsize=8)
        if block.stage in fields:
            field = fields[block.stage].cpu().numpy()
            # Gradients differ by orders of magnitude.
            shown = np.log10(np.maximum(field / field.max(), 1e-4))
            _overlay(row[levels + 1], image, shown, 1, "magma", None)
            row[levels + 1].set_title("receptive field (log)", fontsize=8)
        _draw_kernels(row[-1], block.spread)
        row[0].text(
            *(-0.04, 0.5, f"{block.stage}, block {block.block + 1}"),
            transform=row[0].transAxes, rotation=90, ha="right", va="center", fontsize=9,
        )  # fmt: skip
    return figure


def draw_box_draws(
    image: Picture,
    box: Sequence[float],
    draws: Sequence[Draws],
    evidence: Mapping[str, Tensor] | None = None,
    title: str = "",
) -> Figure:
    """Draw a row for each stage: the places that it draws on for a box, and the levels as bars.

    Args:
        image: input of the network, uint8 RGB (H, W, 3).
        box: xyxy, pixels of ``image``.
        draws: of the stages.
        evidence: by stage (L+1, H, W), how the gates support the score; None for none.
        title: of the figure.
    """
    figure, axes = _figure(image, len(draws), 2 + 2 * bool(evidence))
    sums_of_all = [maps.sum((1, 2)).abs().max() for maps in (evidence or {}).values()]
    # One scale for all stages, with room for the numbers.
    reach = 1.6 * max([float(value) for value in sums_of_all], default=0.0) or 1.0
    for row, stage in zip(axes, draws, strict=True):
        _overlay(row[0], image, stage.places, stage.stride, POSITIVE, None, fade=True)
        row[0].set_title(
            f"{stage.stage} draws on ({stage.inside:.0%} from inside the box)", fontsize=8
        )
        _bars(row[1], stage.levels.numpy() * 100, "share of the levels, %", "%.0f", SHARE)
        row[1].set_xlim(0, 115)
        _draw_box(row[0], box)
        if evidence is not None:
            _draw_evidence(row[2:], image, evidence[stage.stage], stage.stride, reach)
            _draw_box(row[2], box)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _draw_evidence(
    axes: Sequence[Axes], image: Picture, maps: Tensor, stride: int, reach: float
) -> None:
    """Draw evidence, (L+1, H, W), over the image, and its sums by level as bars up to ``reach``."""
    total = maps.sum(0)
    limit = max(float(total.abs().max()), 1e-12)
    _overlay(axes[0], image, total, stride, SIGNED, (-limit, limit), fade=True)
    axes[0].set_title("evidence: red for, blue against", fontsize=8)
    sums = maps.sum((1, 2)).numpy()
    _bars(axes[1], sums, f"evidence by level, sum {sums.sum():+.3f}", "%+.3f")
    axes[1].set_xlim(-reach, reach)


def _draw_box(axis: Axes, box: Sequence[float]) -> None:
    axis.set_axis_off()
    left, top, right, bottom = box
    for color, width in (("white", 2.4), ("black", 1.0)):
        axis.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=color,
                linewidth=width,
            )
        )


def figure_picture(figure: Figure) -> Picture:
    """Render a figure to uint8 RGB, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(image: Picture, rows: int, columns: int) -> tuple[Figure, NDArray[np.object_]]:
    aspect = min(image.shape[0] / image.shape[1], TALLEST)
    size = PANEL * columns + 0.3, (PANEL * aspect + 0.45) * rows + 0.3
    # Not pyplot's, which keeps figures and is not made for threads.
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def _overlay(
    axis: Axes,
    image: Picture,
    values: Tensor | NDArray[np.floating],
    stride: int,
    colors: str,
    limits: tuple[float, float] | None,
    *,
    fade: bool = False,
) -> None:
    """Draw a map, (H, W), of tokens with the given stride over an image.

    With ``fade``, the image shows through where values are near 0.
    """
    gray = image.mean(axis=2)
    height, width = gray.shape
    axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    extent = (0, values.shape[1] * stride, values.shape[0] * stride, 0)
    low, high = limits or (None, None)
    shown = np.asarray(values)
    largest = max(float(np.abs(shown).max()), 1e-30)
    alpha = np.clip(0.1 + np.abs(shown) / largest, 0, 0.8) if fade else OPACITY
    axis.imshow(shown, colors, vmin=low, vmax=high, alpha=alpha, extent=extent)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def _draw_kernels(axis: Axes, kernels: Sequence[Tensor]) -> None:
    """Draw the effective kernels of a block at one scale, finest first."""
    left = 0.0
    side = max((len(kernel) for kernel in kernels), default=1)
    for kernel in kernels:
        size = len(kernel)
        top = (side - size) / 2
        axis.imshow(kernel.numpy(), cmap="magma", extent=(left, left + size, top + size, top))
        left += size + 1
    axis.set_xlim(0, max(left - 1, 1))
    axis.set_ylim(side, 0)
    axis.set_title("kernels: " + ", ".join(f"{len(k)}x{len(k)}" for k in kernels), fontsize=8)


def _bars(
    axis: Axes, values: NDArray[np.floating], title: str, form: str, color: str = POSITIVE_BAR
) -> None:
    names = level_names(len(values))
    bars = axis.barh(names, values, color=[NEGATIVE if v < 0 else color for v in values])
    axis.bar_label(bars, fmt=form, padding=2, fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xticks([])
    axis.set_title(title, fontsize=8)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
